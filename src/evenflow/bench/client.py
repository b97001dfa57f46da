"""One streamed request to an OpenAI-compatible server, timed. Needs httpx (extra `bench`), no torch, no tokenizer."""

import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evenflow.bench.metrics import RequestRecord
from evenflow.bench.workload import BenchRequest

if TYPE_CHECKING:
    import httpx

ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
REQUEST_TIMEOUT_S = 3 * 3600.0  # as vLLM v0.1.4's client
CONNECT_TIMEOUT_S = 60.0
MAX_ERROR_CHARS = 300


def check_httpx() -> None:
    """Raises ValueError that says how to get httpx where it is not installed."""
    try:
        import httpx  # noqa: F401
    except ImportError:
        raise ValueError("this benchmark needs httpx: pip install 'evenflow[bench]'") from None


@dataclass(slots=True)
class Client:
    """A server and how to ask it. http: an httpx.AsyncClient with the server's base URL.

    body: added to every request, such as temperature. clock: seconds, for tests.
    """

    http: "httpx.AsyncClient"
    model: str
    backend: str = "openai"
    body: dict[str, Any] = field(default_factory=dict)
    ignore_eos: bool = True
    clock: Callable[[], float] = time.perf_counter

    async def send(self, request: BenchRequest, origin_s: float = 0.0) -> RequestRecord:
        """Never raises for what a server or network does: the record's `error` tells."""
        import httpx

        record = RequestRecord(num_prompt_tokens=request.num_prompt_tokens)
        start_s = self.clock()
        record.start_s = start_s - origin_s
        try:
            async with self.http.stream("POST", ENDPOINTS[self.backend], json=self._body(request)) as response:
                if response.status_code != 200:
                    record.error = f"HTTP {response.status_code}: {_message(await response.aread())}"
                else:
                    await self._read(response.aiter_bytes(), record, start_s)
        except httpx.HTTPError as error:
            record.error = f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]
        return record

    def _body(self, request: BenchRequest) -> dict[str, Any]:
        fixed: dict[str, Any] = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.backend == "openai-chat":
            fixed["messages"] = [{"role": "user", "content": request.prompt}]
            fixed["max_completion_tokens"] = request.num_output_tokens
        else:
            fixed["prompt"] = request.prompt
            fixed["max_tokens"] = request.num_output_tokens
        if self.ignore_eos:
            fixed["ignore_eos"] = True
        return fixed | self.body

    async def _read(self, chunks: AsyncIterator[bytes], record: RequestRecord, start_s: float) -> None:
        last_s, num_chunks, is_done, has_usage = start_s, 0, False, False
        async for payload in events(chunks):
            if is_done or payload == b"[DONE]":
                is_done = True  # read to the end all the same: a body cut short costs its connection
                continue
            event = _decode(payload)
            if event is None or "error" in event:
                record.error = f"the stream failed: {_message(payload)}"
                return
            if event.get("choices"):
                now_s = self.clock()
                if num_chunks:
                    record.itls_s.append(now_s - last_s)
                else:
                    record.ttft_s = now_s - start_s
                last_s = now_s
                num_chunks += 1
            if usage := event.get("usage"):
                has_usage = True
                record.num_output_tokens = usage.get("completion_tokens") or 0
                record.num_prompt_tokens = usage.get("prompt_tokens") or record.num_prompt_tokens
        record.latency_s = last_s - start_s
        if not has_usage:
            record.num_output_tokens = num_chunks  # a server without usage: a chunk is the nearest thing to a token
        if not num_chunks:
            record.error = "the stream ended without a single chunk"
        elif not is_done:
            record.error = "the stream broke off before [DONE]"


async def events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events, however the bytes are cut."""
    buffer = b""
    async for chunk in chunks:
        buffer += chunk
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
    if buffer.startswith(b"data:"):
        yield buffer[5:].strip()


def _decode(payload: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(payload)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def _message(data: bytes) -> str:
    """The message of an OpenAI error object, or the beginning of whatever came."""
    event = _decode(data) or {}
    error = event.get("error", event)
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or data.decode(errors="replace"))[:MAX_ERROR_CHARS]


async def served_model(http: "httpx.AsyncClient", wanted: str | None) -> str:
    """The model to ask for: `wanted`, or the first that the server lists.

    Raises ValueError when no server answers, the answer is no list of models, or the wanted one is not in it.
    """
    import httpx

    url = str(http.base_url).rstrip("/")
    try:
        response = await http.get("/v1/models")
    except httpx.HTTPError as error:
        raise ValueError(
            f"no server answers at {url} ({type(error).__name__}: {error}); start one with `evenflow serve`, "
            "or pass --base-url"
        ) from None
    if response.status_code in (401, 403):
        raise ValueError(f"{url} wants a key (HTTP {response.status_code}); pass --api-key")
    listed = (_decode(response.content) or {}).get("data") if response.status_code == 200 else None
    names = [entry["id"] for entry in listed or [] if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
    if not names:
        raise ValueError(
            f"{url}/v1/models lists no model (HTTP {response.status_code}); is this an OpenAI-compatible server?"
        )
    if wanted is not None and wanted not in names:
        raise ValueError(f"--model {wanted!r} is not served at {url}; it has {', '.join(names)}")
    return wanted or names[0]


def make_http(base_url: str, api_key: str | None = None) -> "httpx.AsyncClient":
    """A client without limits on connections. Raises ValueError for a URL that is none."""
    check_httpx()
    import httpx

    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"--base-url {base_url!r} must start with http:// or https://")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.AsyncClient(
        base_url=base_url.rstrip("/").removesuffix("/v1"),
        headers=headers,
        timeout=httpx.Timeout(REQUEST_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=False,
    )
