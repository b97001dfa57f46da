"""Two servers to measure: one in virtual time, whose latencies are exact, and one on a socket, for the command line."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its clock jumps to the next timer when nothing is ready: hours pass at once, and exactly."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0

    def time(self) -> float:
        return self._now_s

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self._now_s = max(self._now_s, min(handle.when() for handle in self._scheduled))
        super()._run_once()


def run_virtually(make: Callable[[VirtualLoop], Any]) -> Any:
    """The result of the coroutine that `make` makes of a virtual loop."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(make(loop))
    finally:
        loop.close()


class Stream(httpx.AsyncByteStream):
    """(seconds before it, bytes) of every piece."""

    def __init__(self, pieces: list[tuple[float, bytes]], at_end: Callable[[], None] = lambda: None) -> None:
        self._pieces, self._at_end = pieces, at_end

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for wait_s, data in self._pieces:
            await asyncio.sleep(wait_s)
            yield data
        self._at_end()


def data(event: dict[str, Any] | str) -> bytes:
    text = event if isinstance(event, str) else json.dumps(event)
    return f"data: {text}\n\n".encode()


def token_events(num_tokens: int, num_prompt_tokens: int = 10) -> list[bytes]:
    """What a server sends for a completion: a chunk a token, usage, the end."""
    chunks = [data({"choices": [{"index": 0, "text": "x"}]}) for _ in range(num_tokens)]
    usage = {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_tokens}
    return [*chunks, data({"choices": [], "usage": usage}), data("[DONE]")]


class OpenAIServer:
    """`answer(body) -> (status, bytes)` for posts; lists `models`. Keeps what it was asked in `bodies`, `headers`."""

    def __init__(self) -> None:
        self.models = ["m"]
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answer: Callable[[dict[str, Any]], tuple[int, bytes]] = self.complete
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.headers.append({name.lower(): value for name, value in self.headers.items()})
                self._send(200, json.dumps({"data": [{"id": name} for name in owner.models]}).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                owner.bodies.append({"path": self.path, **body})
                self._send(*owner.answer(body))

            def _send(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})

    @staticmethod
    def complete(body: dict[str, Any]) -> tuple[int, bytes]:
        asked = body.get("max_tokens") or body.get("max_completion_tokens")
        prompt = body.get("prompt") or body["messages"][0]["content"]
        return 200, b"".join(token_events(asked, len(prompt if isinstance(prompt, list) else prompt.split())))

    def __enter__(self) -> "OpenAIServer":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()
