"""A server that speaks the API as the page reads it, with answers made by hand and the policy that the page must live
under. No engine: what it says is set by the test, and what it was asked is kept for the test to look at."""

import json
import mimetypes
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WEB = Path(__file__).parents[2] / "src" / "evenflow" / "server" / "web"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
Token = dict[str, Any]
Chunk = dict[str, Any]


def token(data: str | bytes, logprob: float = -0.1, top: list[tuple[str, float]] | None = None) -> Token:
    """One entry of a chat's logprobs. data: bytes where the token is a part of a character."""
    raw = data.encode() if isinstance(data, str) else data
    text = data if isinstance(data, str) else raw.decode(errors="replace")
    best = top if top is not None else [(text, logprob)]
    return {
        "token": text,
        "logprob": logprob,
        "bytes": list(raw),
        "top_logprobs": [{"token": name, "logprob": value, "bytes": list(name.encode())} for name, value in best],
    }


def chat_chunk(text: str, tokens: list[Token], finish_reason: str | None = None) -> Chunk:
    logprobs = {"content": tokens} if tokens else None
    return {
        "choices": [{"index": 0, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": finish_reason}],
        "usage": None,
    }


def usage_chunk(num_prompt: int, num_output: int) -> Chunk:
    return {"choices": [], "usage": {"prompt_tokens": num_prompt, "completion_tokens": num_output}}


def chat_answer(*pieces: str) -> list[Chunk]:
    """Each piece one token and one chunk, then the usage."""
    last = len(pieces) - 1
    chunks = [
        chat_chunk(piece, [token(piece)], "stop" if index == last else None) for index, piece in enumerate(pieces)
    ]
    return [*chunks, usage_chunk(12, len(pieces))]


def text_chunk(text: str, tokens: list[tuple[str, float]], finish_reason: str | None = None) -> Chunk:
    logprobs = {
        "tokens": [name for name, _ in tokens],
        "token_logprobs": [value for _, value in tokens],
        "top_logprobs": [{name: value, " other": -3.0} for name, value in tokens],
        "text_offset": [0] * len(tokens),
    }
    return {"choices": [{"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}]}


def live_state(**changes: Any) -> dict[str, Any]:
    return {
        "model": "demo",
        "version": "0.1.0",
        "state": "ready",
        "uptime_s": 3723.4,
        "num_running": 3,
        "num_waiting": 1,
        "prompt_tokens_per_s": 45.0,
        "output_tokens_per_s": 1234.4,
        "kv": {
            "num_blocks": 64,
            "block_size": 16,
            "num_used": 12,
            "num_cached": 8,
            "blocks_per_cell": 1,
            "map": "3" * 4 + "2" * 8 + "1" * 8 + "0" * 44,
        },
        "ttft_ms": {"p50": 12.0, "p90": 40.5, "p99": None},
        "itl_ms": {"p50": 3.21, "p90": 4.0, "p99": 12345.0},
        "prefix": {"queries": 1000, "hits": 400},
        "num_preemptions": 2,
        "num_requests": {"completed": 10, "aborted": 1, "failed": 0},
        **changes,
    }


class Script:
    """What the stub answers, and what it was asked. A test changes it while the page runs."""

    def __init__(self) -> None:
        self.model: dict[str, Any] = {"id": "demo", "max_model_len": 1024}
        self.chunks: list[Chunk] = chat_answer("Once", " upon", " a", " time.")
        self.status, self.error = 200, {}  # type: int, dict[str, Any]
        self.breaks_off = False  # the stream ends without [DONE]
        self.live: Callable[[], dict[str, Any]] = live_state
        self.is_live_up = True
        self.is_held = False  # the stream waits after its chunks until the client leaves
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.num_live_polls = 0
        self.disconnected = threading.Event()
        self.stopped = threading.Event()

    def refuse(self, status: int, message: str, param: str | None = None) -> None:
        self.status = status
        self.error = {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": None}}

    def frames(self) -> Iterator[bytes]:
        for chunk in self.chunks:
            yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
        while self.is_held and not self.stopped.wait(0.02):
            yield b": held\n\n"  # a comment, which a client skips; writing it is how a lost client is found
        if not self.breaks_off:
            yield b"data: [DONE]\n\n"


class Handler(BaseHTTPRequestHandler):
    script: Script

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/v1/models":
            self._json(200, {"object": "list", "data": [self.script.model]})
        elif path == "/live":
            self.script.num_live_polls += 1
            if self.script.is_live_up:
                self._json(200, self.script.live())
            else:
                self.close_connection = True  # as a server that died
        else:
            self._file("index.html" if path == "/" else path.removeprefix("/web/"))

    def do_POST(self) -> None:
        script = self.script
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        script.bodies.append((self.path, body))
        if script.status != 200:
            self._json(script.status, script.error)
            return
        self._head(200, "text/event-stream")
        self.end_headers()
        self.close_connection = True
        try:
            for frame in script.frames():
                self.wfile.write(frame)
                self.wfile.flush()
        except OSError:
            script.disconnected.set()

    def _file(self, name: str) -> None:
        file = WEB / name
        if "/" in name or not file.is_file():
            self._json(404, {"error": {"message": f"there is no {self.path}"}})
            return
        self._send(200, f"{mimetypes.guess_type(name)[0]}; charset=utf-8", file.read_bytes())

    def _json(self, status: int, value: object) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _send(self, status: int, content_type: str, data: bytes) -> None:
        self._head(status, content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _head(self, status: int, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")

    def log_message(self, format: str, *args: object) -> None:
        """A test needs no access log."""


class Stub:
    """The server on a free port of 127.0.0.1, from `with` to its end. Each test sets a fresh `script`."""

    def __enter__(self) -> "Stub":
        self.script = Script()
        self._handler = type("ScriptedHandler", (Handler,), {"script": self.script})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def restart(self) -> Script:
        self.script.stopped.set()
        self.script = self._handler.script = Script()  # type: ignore[attr-defined]
        return self.script

    def __exit__(self, *exc: object) -> None:
        self.script.stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
