"""One engine with the server's routes, as a Ray actor. Owns the engine's process; is replaced by Ray when it dies."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator

from ray import serve
from starlette.types import Message

from evenflow.config import EngineConfig
from evenflow.engine.client import EngineClient
from evenflow.engine.opening import open_model
from evenflow.ray.call import HttpCall
from evenflow.server.app import make_app
from evenflow.server.config import ServerConfig
from evenflow.server.front import Front, State
from evenflow.server.metrics import Metrics
from evenflow.server.serving import configure_logging, default_model_name, with_middleware
from evenflow.server.streaming import cancel
from evenflow.server.tracing import make_tracer

logger = logging.getLogger("evenflow")

LAST_WORDS_S = 1.0  # after the engine's death, for its requests to be told


class EngineReplica:
    """Answers HttpCalls by the routes of `evenflow serve`."""

    async def __init__(self, engine: EngineConfig, server: ServerConfig) -> None:  # type: ignore[misc]  # Ray awaits it
        """Returns when the engine is ready, so Ray sends nothing earlier. Raises what `evenflow serve` would say."""
        configure_logging(server)
        opened = await asyncio.to_thread(open_model, engine)
        name = server.served_model_name or default_model_name(engine.model)
        metrics = Metrics(name)
        client = EngineClient(engine, opened, engine_timeout_s=server.engine_timeout, observer=metrics)
        self.replica_id: str = serve.get_replica_context().replica_id.unique_id
        self._front = Front(client, server, metrics, make_tracer(server.otlp_endpoint), name)
        self._answers: set[asyncio.Future[None]] = set()
        self._app = with_middleware(make_app(self._front), self._front, server.api_keys())
        await client.start()
        metrics.engine_up(True)
        self._front.state = State.READY
        self._watch = asyncio.create_task(self._end_with_engine())
        logger.info("replica %s is ready in process %d; %s", self.replica_id, os.getpid(), client.memory_account)

    async def _end_with_engine(self) -> None:
        """A replica without an engine would answer fastest of all, and so draw all requests: it ends at once."""
        error = await self._front.client.wait_dead()
        self._front.state = State.DEAD
        self._front.metrics.engine_up(False)
        logger.error("replica %s ends: %s", self.replica_id, error)
        if self._answers:
            await asyncio.wait(self._answers, timeout=LAST_WORDS_S)
        await self._front.client.close()
        os._exit(1)

    async def check_health(self) -> None:
        """Ray asks, and replaces a replica that raises."""
        if not await self._front.client.is_ready():
            raise RuntimeError(f"the engine of replica {self.replica_id} does not answer")

    async def answer(self, call: HttpCall) -> AsyncIterator[list[Message]]:
        """The answer as ASGI messages, in lists of what has come together. Left early, it is aborted.

        Raises EngineDeadError while nothing has been answered: another replica can.
        """
        sent: asyncio.Queue[Message] = asyncio.Queue(maxsize=1)
        exchange = asyncio.ensure_future(self._run(call, sent))
        self._answers.add(exchange)
        exchange.add_done_callback(self._answers.discard)
        held: list[Message] = []
        has_begun = False
        try:
            while (message := await _next(sent, exchange)) is not None:
                held.append(message)
                if message["type"] != "http.response.start":  # goes with what follows, so that it may fail until then
                    if not has_begun:
                        self._front.client.raise_if_dead()
                    has_begun = True
                    yield held
                    held = []
        finally:
            await cancel(exchange)

    async def _run(self, call: HttpCall, sent: "asyncio.Queue[Message]") -> None:
        body: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]
        forever = asyncio.Event()

        async def receive() -> Message:
            if not body:
                await forever.wait()  # a client that leaves ends `answer`, and with it this task
            return body.pop()

        await self._app(call.scope(), receive, sent.put)

    async def whole(self, call: HttpCall) -> tuple[str, int, bytes]:
        """For a question to every replica: which one answers, the status, and the body."""
        status, body = 500, bytearray()
        async for messages in self.answer(call):
            for message in messages:
                status = message.get("status", status)
                body += message.get("body", b"")
        return self.replica_id, status, bytes(body)

    async def __del__(self) -> None:
        """Ray calls it after the running requests have ended, or have had their time."""
        if hasattr(self, "_watch"):
            self._watch.cancel()
            await self._front.client.close()
            self._front.checker.close()


async def _next(sent: "asyncio.Queue[Message]", exchange: "asyncio.Future[None]") -> Message | None:
    """The next message; None when the exchange has ended. Raises what cut it off."""
    message = asyncio.ensure_future(sent.get())
    await asyncio.wait((message, exchange), return_when=asyncio.FIRST_COMPLETED)
    if not message.done() and not sent.empty():
        return await message
    if message.done():
        return message.result()
    await cancel(message)
    exchange.result()
    return None
