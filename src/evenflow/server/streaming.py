"""Server-sent events, and the client's leaving: the writing side of an answer."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from evenflow.server.errors import ApiError, ClientDisconnected, error_body
from evenflow.server.front import ObservedGeneration
from evenflow.server.protocol import StreamOptions

T = TypeVar("T")

encode_json = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Sends frames as they come. However it ends, the generator is closed, and with it what it runs in the engine.

    What comes while the client reads slowly must be merged by the generator: at most one frame waits here.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes, None], generation: ObservedGeneration) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._frames, self._generation = frames, generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._send_frames(send))
        finally:
            await self._frames.aclose()
            self._generation.close()  # frames that were never begun have not done it

    async def _send_frames(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for frame in self._frames:
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def stream_frames(
    parts: AsyncGenerator[dict[str, Any], None],
    envelope: dict[str, Any],
    options: StreamOptions | None,
    generation: ObservedGeneration,
    counts_output: bool = True,
) -> AsyncGenerator[bytes, None]:
    """One event for every part of a choice, then the usage if asked for. The generation ends with it."""
    wants_usage = options is not None and bool(options.include_usage or options.continuous_usage_stats)
    is_continuous = options is not None and bool(options.continuous_usage_stats)
    try:
        async for part in parts:
            event = envelope | {"choices": [part]}
            if wants_usage:
                event["usage"] = generation.usage(counts_output=counts_output) if is_continuous else None
            yield b"data: " + encode_json(event) + b"\n\n"
        if wants_usage:
            event = envelope | {"choices": [], "usage": generation.usage(counts_output=counts_output)}
            yield b"data: " + encode_json(event) + b"\n\n"
    except ApiError as error:
        yield b"data: " + error_body(error) + b"\n\n"
    finally:
        await parts.aclose()
        generation.close()
    yield DONE


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves; then raises ClientDisconnected."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(wait_disconnect(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        await cancel(leaving)
        await cancel(working)
    if working.cancelled():
        raise ClientDisconnected
    return working.result()


async def wait_disconnect(receive: Receive) -> None:
    """Returns when the client has left. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel(task: "asyncio.Future[Any]") -> None:
    """Cancel a task and wait until it has ended. Its exception, if it has one, stays in it."""
    if not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
