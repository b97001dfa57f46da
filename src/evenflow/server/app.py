"""The routes: which path answers what. Owns no state but the front's, and does nothing that an endpoint can do."""

import mimetypes
import time
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from evenflow import __version__
from evenflow.server.body import read_json_body
from evenflow.server.chat import ChatCall
from evenflow.server.completions import CompletionCall
from evenflow.server.errors import ApiError
from evenflow.server.front import Front, State, bad_request
from evenflow.server.protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from evenflow.server.responses import ResponsesCall, ResponsesRequest
from evenflow.server.streaming import EventStream, encode_json, unless_disconnected
from evenflow.server.tokenization import detokenize, tokenize, tokenizer_info
from evenflow.server.tracing import RequestSpan

MAP_CELLS = 2048
WEB_FILES = files("evenflow.server") / "web"

Call = CompletionCall | ChatCall
Handler = Callable[[Request], Awaitable[Response]]


class Endpoints:
    """The handlers, each a method."""

    def __init__(self, front: Front) -> None:
        self.front = front

    async def completions(self, request: Request) -> Response:
        body, _ = await self._read(request, CompletionRequest)
        return await self._answer(request, CompletionCall(self.front, body), bool(body.stream))

    async def chat_completions(self, request: Request) -> Response:
        body, size = await self._read(request, ChatCompletionRequest)
        return await self._answer(request, ChatCall(self.front, body, size), bool(body.stream))

    async def responses(self, request: Request) -> Response:
        body, size = await self._read(request, ResponsesRequest)
        return await self._answer(request, ResponsesCall(self.front, body, size), bool(body.stream))

    async def _read(self, request: Request, kind: type[Any]) -> tuple[Any, int]:
        return await read_json_body(request.scope, request.receive, kind, self.front.config.max_body_mb * 1_000_000)

    async def _answer(self, request: Request, call: Call, is_streaming: bool) -> Response:
        """Queue the call; whatever ends it, the client's leaving too, ends its generation."""
        span = self._start_span(request)
        try:
            generation = await unless_disconnected(request.receive, call.open())
        except BaseException as error:
            if span is not None:
                span.finish({}, error=str(error.status) if isinstance(error, ApiError) else type(error).__name__)
            raise
        if span is not None:
            generation.trace(span, call.id, call.operation)
        if is_streaming:
            return EventStream(call.frames(generation), generation)
        try:
            return json_response(await unless_disconnected(request.receive, call.whole(generation)))
        finally:
            generation.close()

    def _start_span(self, request: Request) -> RequestSpan | None:
        tracer = self.front.tracer
        return None if tracer is None else tracer.start(dict(request.headers))

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self.front.check_model(request.path_params["model_id"])
        return json_response(self._model())

    def _model(self) -> dict[str, Any]:
        front = self.front
        return {
            "id": front.model_name,
            "object": "model",
            "created": front.started_s,
            "owned_by": "evenflow",
            "root": front.client.config.model,
            "parent": None,
            "max_model_len": front.max_model_len,
        }

    async def tokenize(self, request: Request) -> Response:
        return await self._text(request, TokenizeRequest, tokenize)

    async def detokenize(self, request: Request) -> Response:
        return await self._text(request, DetokenizeRequest, detokenize)

    async def _text(self, request: Request, kind: type[Any], work: Callable[[Front, Any], dict[str, Any]]) -> Response:
        body, size = await self._read(request, kind)
        self.front.check_model(body.model)
        try:
            return json_response(await self.front.client.off_loop(size, work, self.front, body))
        except ValueError as error:
            raise bad_request(error) from None

    async def tokenizer_info(self, request: Request) -> Response:
        return json_response(tokenizer_info(self.front))

    async def health(self, request: Request) -> Response:
        """The process answers; kernels: of a device, whether they were found right at the start."""
        account = self.front.client.kernel_account
        return json_response({"status": "alive"} | ({"kernels": account} if account else {}))

    async def ready(self, request: Request) -> Response:
        """The engine takes requests and steps."""
        front = self.front
        is_ready = front.state is State.READY and await front.client.is_ready()
        state = front.state.value if front.state is not State.READY or is_ready else "not answering"
        return json_response({"status": state}, status=200 if is_ready else 503)

    async def metrics(self, request: Request) -> Response:
        body, content_type = self.front.metrics.render()
        return Response(body, headers={"Content-Type": content_type})

    async def version(self, request: Request) -> Response:
        return json_response({"version": __version__})

    async def live(self, request: Request) -> Response:
        """What the page shows. The map of the blocks is the engine's; without its answer it is left out."""
        front = self.front
        answer: dict[str, Any] = {"model": front.model_name, "version": __version__, "state": front.state.value}
        answer |= front.metrics.live() | {"uptime_s": round(time.time() - front.started_s, 1)}
        if (pong := await front.client.ping(timeout_s=0.5, max_cells=MAP_CELLS)) is not None:
            answer["kv"] = answer["kv"] | {"blocks_per_cell": pong.blocks_per_cell, "map": pong.block_map}
        return json_response(answer)

    async def page(self, request: Request) -> Response:
        """The page and its parts: the files that are there, and no others."""
        name = request.path_params.get("name", "index.html")
        found = {file.name: file for file in WEB_FILES.iterdir()}.get(name)
        if found is None or not found.is_file():
            raise ApiError(404, f"there is no {request.scope['path']:.200}")
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Cache-Control": "no-cache"}
        return Response(found.read_bytes(), headers=headers)


def make_app(front: Front) -> ASGIApp:
    """The routes. What they raise, ApiError above all, is for RequestLog, which must be put around them."""
    on = Endpoints(front)
    routes: list[tuple[str, str, Handler]] = [
        ("POST", "/v1/completions", on.completions),
        ("POST", "/v1/chat/completions", on.chat_completions),
        ("POST", "/v1/responses", on.responses),
        ("GET", "/v1/models", on.models),
        ("GET", "/v1/models/{model_id:path}", on.model),
        ("POST", "/tokenize", on.tokenize),
        ("POST", "/detokenize", on.detokenize),
        ("GET", "/tokenizer_info", on.tokenizer_info),
        ("GET", "/health", on.health),
        ("GET", "/ready", on.ready),
        ("GET", "/metrics", on.metrics),
        ("GET", "/version", on.version),
        ("GET", "/live", on.live),
        ("GET", "/", on.page),
        ("GET", "/web/{name}", on.page),
    ]
    return Router(
        [_route(path, _only(method, handler)) for method, path, handler in routes],
        redirect_slashes=False,
        default=_not_found,
    )


def _route(path: str, handler: Handler) -> Route:
    route = Route(path, handler)
    route.methods = None  # all: `_only` refuses in JSON
    return route


def _only(method: str, handler: Handler) -> Handler:
    """The handler for one method, HEAD with GET; 405 for the others."""
    allowed = ("GET", "HEAD") if method == "GET" else (method,)

    async def checked(request: Request) -> Response:
        if request.method not in allowed:
            message = f"{request.scope['path']:.200} takes {method}, not {request.method}"
            raise ApiError(405, message, headers={"Allow": ", ".join(allowed)})
        return await handler(request)

    return checked


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    raise ApiError(404, f"there is no {scope['path']:.200}; the API is under /v1")


def json_response(content: Any, status: int = 200) -> Response:
    """`content`: something to encode, or JSON that is encoded already."""
    body = content if isinstance(content, bytes) else encode_json(content)
    return Response(body, status_code=status, media_type="application/json")
