"""The one address of all replicas: hands each request to one of them, and to another if that one dies in time.

Reads a request's body whole, so that it can be routed by its prompt and asked again. Everything else about a request,
keys and limits too, is the replica's, which has the server's own routes.
"""

import asyncio
import logging
from typing import Any

from ray import exceptions
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evenflow.engine.client import EngineDeadError
from evenflow.ray.call import HttpCall
from evenflow.ray.merging import merge_metrics
from evenflow.server.body import read_body
from evenflow.server.config import ServerConfig
from evenflow.server.errors import ApiError, ClientDisconnected, error_body, error_response
from evenflow.server.streaming import DONE, unless_disconnected

logger = logging.getLogger("evenflow")

NUM_TRIES = 3
QUERY_TIMEOUT_S = 10.0  # of what is no generation: with no replica up, a GET must not wait for one
LONG_BODY = 64 * 1024  # bytes: beyond, reading the prompt would hold the event loop
LOST = (
    EngineDeadError,
    ReplicaUnavailableError,
    exceptions.RayActorError,
    exceptions.ObjectLostError,
    exceptions.NodeDiedError,
)


class Endpoint:
    """The deployment that Ray's HTTP proxies talk to. Keeps no state, so it may have replicas of its own."""

    def __init__(self, engines: DeploymentHandle[Any], server: ServerConfig, is_prefix_aware: bool) -> None:
        self._engines, self._server, self._is_prefix_aware = engines, server, is_prefix_aware

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What serve.ingress() serves."""
        return EndpointApp(self._engines, self._server, self._is_prefix_aware)


class EndpointApp:
    """The ASGI application of the endpoint."""

    def __init__(self, engines: Any, server: ServerConfig, is_prefix_aware: bool) -> None:
        self._answers = engines.options(method_name="answer", stream=True)
        self._engines, self._server, self._is_prefix_aware = engines, server, is_prefix_aware

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = _Exchange(send)
        try:
            call = await self._read(scope, receive)
            await unless_disconnected(receive, self._answer(call, exchange))
        except ClientDisconnected:
            return
        except ApiError as error:
            await exchange.fail(error, scope, receive)
        except Exception:
            logger.exception("a request could not be handed on")
            await exchange.fail(ApiError(500, "the endpoint failed; its log has the cause"), scope, receive)

    async def _read(self, scope: Scope, receive: Receive) -> HttpCall:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        body = await read_body(headers, receive, self._server.max_body_mb * 1_000_000)
        if len(body) > LONG_BODY:
            return await asyncio.to_thread(HttpCall.of, scope, body)
        return HttpCall.of(scope, body)

    async def _answer(self, call: HttpCall, exchange: "_Exchange") -> None:
        if call.method == "POST":
            return await self._generate(call, exchange)
        work = self._metrics(call, exchange) if call.path == "/metrics" else self._hand_on(call, exchange, is_new=False)
        try:
            await asyncio.wait_for(work, QUERY_TIMEOUT_S)
        except (asyncio.TimeoutError, *LOST, DeploymentUnavailableError):
            raise unavailable("no replica answers") from None
        return None

    async def _generate(self, call: HttpCall, exchange: "_Exchange") -> None:
        """Until the first byte has been sent, another replica can answer instead: a request changes nothing."""
        for number in range(NUM_TRIES):
            try:
                return await self._hand_on(call, exchange, is_new=number == 0)
            except BackPressureError:
                raise ApiError(429, "the queue is full; try again", headers={"Retry-After": "1"}) from None
            except DeploymentUnavailableError:
                raise unavailable("no replica can be started") from None
            except LOST as error:
                logger.warning("a replica was lost with a request in it: %s", type(error).__name__)
                if exchange.has_begun:
                    break
        raise unavailable("the replica that had this request ended")

    async def _hand_on(self, call: HttpCall, exchange: "_Exchange", *, is_new: bool) -> None:
        """Send what a replica answers, as it comes."""
        # Ray's router looks for a prompt in positional arguments, and in them only.
        is_routed = is_new and self._is_prefix_aware and call.prompt
        answer = self._answers.remote(call) if is_routed else self._answers.remote(call=call)
        try:
            async for messages in answer:
                for message in messages:
                    await exchange.send(message)
        finally:
            answer.cancel()

    async def _metrics(self, call: HttpCall, exchange: "_Exchange") -> None:
        """Those of all replicas, each sample with its replica. One that dies meanwhile is left out."""
        answers = await self._engines.broadcast("whole", call=call).results_async(return_exceptions=True)
        found = [answer for answer in answers if isinstance(answer, tuple)]
        if not found:
            raise unavailable("no replica answers")
        _, status, body = max(found, key=lambda answer: int(answer[1]))
        if status == 200:
            body = await asyncio.to_thread(merge_metrics, {replica: text.decode() for replica, _, text in found})
        content_type = "text/plain; version=0.0.4; charset=utf-8" if status == 200 else "application/json"
        await Response(body, status, {"Content-Type": content_type, "Cache-Control": "no-store"})(
            call.scope(), _nothing, exchange.send
        )


class _Exchange:
    """What the client has been sent so far."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_begun, self._is_event_stream, self._is_complete = False, False, False
        self._has_said_done = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            headers = [(name, value) for name, value in message["headers"] if name != b"x-request-id"]  # Ray sends it
            self._is_event_stream = dict(headers).get(b"content-type", b"").startswith(b"text/event-stream")
            message["headers"] = headers
        else:
            self._is_complete = not message.get("more_body", False)
            self._has_said_done = self._has_said_done or message.get("body", b"").endswith(DONE)
        await self._send(message)

    async def fail(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        """An answer of its own, the last event of a stream, or a cut connection: never an end like any other."""
        if not self.has_begun:
            await error_response(error)(scope, receive, self._send)
        elif self._is_event_stream and not self._is_complete:
            last = b"" if self._has_said_done else b"data: " + error_body(error) + b"\n\n" + DONE
            await self._send({"type": "http.response.body", "body": last, "more_body": False})
        elif not self._is_complete:
            raise ConnectionError("the answer was cut off")


async def _nothing() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": kind + ".complete"})
        if kind == "lifespan.shutdown":
            return


def unavailable(what: str) -> ApiError:
    return ApiError(503, f"{what}; try again", headers={"Retry-After": "1"})
