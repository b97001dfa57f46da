"""The server's life: bind, load, serve, drain, end. Owns the order of these, the signals and the exit code."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from starlette.types import ASGIApp

from evenflow.config import EngineConfig
from evenflow.engine.client import EngineClient, EngineDeadError
from evenflow.engine.opening import open_model
from evenflow.garbage import only_new_objects
from evenflow.server.app import make_app
from evenflow.server.config import ServerConfig
from evenflow.server.front import Front, State, drained
from evenflow.server.metrics import Metrics
from evenflow.server.middleware import LOOPBACK_NAMES, ApiKey, HostCheck, RequestLog, SecurityHeaders
from evenflow.server.protocol_bounds import Bounds, bounded
from evenflow.server.tracing import make_tracer

logger = logging.getLogger("evenflow")

BACKLOG = 2048
CLOSE_TIMEOUT_S = 5.0  # for answers that were cut off to be written


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: ours drain."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(engine_config: EngineConfig, config: ServerConfig) -> int:
    """Serve until a signal, and return the exit code: 0 after a signal, 1 when the engine died, 2 for bad input.

    Raises ValueError or OSError for what is wrong before anything is started.
    """
    keys = config.api_keys()
    tracer = make_tracer(config.otlp_endpoint)
    opened = open_model(engine_config)
    listener = bind(config.host, config.port)
    name = config.served_model_name or default_model_name(engine_config.model)
    metrics = Metrics(name)
    client = EngineClient(engine_config, opened, engine_timeout_s=config.engine_timeout, observer=metrics)
    front = Front(client, config, metrics, tracer, name)
    try:
        return run_loop(Life(front, listener, keys))
    finally:
        if tracer is not None:
            tracer.shutdown()


class Life:
    """From the first connection to the exit code."""

    def __init__(self, front: Front, listener: socket.socket, api_keys: list[str]) -> None:
        self.front, self._listener = front, listener
        self._server = Server(uvicorn_config(with_middleware(make_app(front), front, api_keys), front.config))
        self._is_stopping, self._is_forced = asyncio.Event(), asyncio.Event()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        serving = asyncio.create_task(self._server.serve([self._listener]))
        try:
            return await self._load_and_wait()
        finally:
            await self.front.client.close()
            self.front.checker.close()
            self._server.should_exit = True
            await asyncio.wait((serving,), timeout=CLOSE_TIMEOUT_S)
            self._server.force_exit = True
            await serving

    async def _load_and_wait(self) -> int:
        """The engine's life, as seen from here."""
        front = self.front
        logger.info("loading %s; the address is told when it answers", front.model_name)
        starting = asyncio.create_task(front.client.start())
        stopping = asyncio.create_task(self._is_stopping.wait())
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            return 0
        try:
            starting.result()
        except EngineDeadError as error:
            return self._died(error)
        front.metrics.engine_up(True)
        front.state = State.READY
        self._say_ready()
        with only_new_objects():
            dying = asyncio.create_task(front.client.wait_dead())
            await asyncio.wait((dying, stopping), return_when=asyncio.FIRST_COMPLETED)
            if dying.done():
                return self._died(dying.result())
            return await self._drain()

    def _say_ready(self) -> None:
        host, port = self._listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        logger.info("%s", self.front.client.memory_account)
        logger.info("ready: %s on http://%s:%d (API under /v1, page at /)", self.front.model_name, host, port)

    def _died(self, error: EngineDeadError) -> int:
        self.front.state = State.DEAD
        self.front.metrics.engine_up(False)
        logger.error("error: %s", error)
        return 2 if error.is_bad_input else 1

    def _on_signal(self, number: int) -> None:
        if self._is_stopping.is_set():
            self._is_forced.set()
        self._is_stopping.set()

    async def _drain(self) -> int:
        """Take nothing new, let what runs end; a second signal or the time limit cuts it off."""
        front = self.front
        front.state = State.DRAINING
        if front.num_live:
            limit = front.config.drain_timeout
            logger.info(
                "stopping: %d requests may take up to %g s more; a second signal stops now", front.num_live, limit
            )
        draining = asyncio.create_task(drained(front, front.config.drain_timeout))
        forced = asyncio.create_task(self._is_forced.wait())
        await asyncio.wait((draining, forced), return_when=asyncio.FIRST_COMPLETED)
        if front.num_live:
            logger.warning("stopping: %d requests are cut off", front.num_live)
        return 0


def with_middleware(app: ASGIApp, front: Front, api_keys: list[str]) -> ASGIApp:
    """From the inside out: keys, hosts, headers of the answer, the log."""
    config = front.config
    names = None
    if config.is_loopback:
        further = [name.strip() for name in (config.allowed_hosts or "").split(",")]
        names = [*LOOPBACK_NAMES, config.host, *filter(None, further)]
    app = HostCheck(ApiKey(app, api_keys), names)
    return RequestLog(SecurityHeaders(app), is_logging=config.access_log, on_error=front.metrics.request_refused)


def uvicorn_config(app: ASGIApp, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=bounded(Bounds(receive_s=config.receive_timeout)),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=30,
    )


def run_loop(life: Life) -> int:
    """On uvloop where there is one."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(life.run())
    return uvloop.run(life.run())


def bind(host: str, port: int) -> socket.socket:
    """Listen at once, so that a port in use is known before the model is loaded. Raises OSError that names both."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise OSError(f"cannot listen on {host} port {port}: {reason}; choose another with --host or --port") from None
    listener.setblocking(False)
    return listener


def default_model_name(model: str) -> str:
    """A hub name as it is, a directory by its last part."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else model


def configure_logging(config: ServerConfig) -> None:
    """Messages on standard error, as lines of text or of JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if config.log_format == "json" else logging.Formatter("evenflow: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, message; of an access its fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"time": self.formatTime(record), "level": record.levelname.lower()}
        line |= getattr(record, "fields", None) or {"message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()
