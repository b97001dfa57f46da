"""What stands between the socket and the routes: ids and the access log, who may ask, and headers of every answer.

Decides on the raw path and headers of the scope alone, the same for every route. Pure ASGI: an answer that streams is
never buffered.
"""

import hashlib
import hmac
import logging
import re
import time
import uuid
from base64 import b64decode
from collections.abc import Callable, Iterable, Sequence
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evenflow.server.errors import ApiError, ClientDisconnected, error_response, internal_error

logger = logging.getLogger("evenflow")
access_logger = logging.getLogger("evenflow.access")

CLIENT_LEFT = 499  # nginx's number for it: nobody is left to read one
POLLED = ("/health", "/ready", "/metrics", "/live")  # logged when they fail
PROBED = ("/health", "/ready")  # by supervisors, which hold no key: a word on the state, and nothing else
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def header(scope: Scope, name: bytes) -> str | None:
    """The header's value; None if it is not there."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


class RequestLog:
    """The outermost: gives every request an id, logs its end, and turns what nobody caught into an answer.

    on_error: told the status of every answer that is an error.
    """

    def __init__(self, app: ASGIApp, *, is_logging: bool, on_error: Callable[[int], None]) -> None:
        self._app, self._is_logging, self._on_error = app, is_logging, on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        sent = header(scope, b"x-request-id") or ""
        exchange = _Exchange(scope, send, sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex)
        scope["state"]["request_id"] = exchange.request_id
        try:
            await self._app(scope, receive, exchange.send)
        except ClientDisconnected:
            exchange.status = CLIENT_LEFT
        except ApiError as error:
            await exchange.answer(error, scope, receive)
        except Exception:
            logger.exception("request %s failed", exchange.request_id)
            await exchange.answer(internal_error(exchange.request_id), scope, receive)
        finally:
            if exchange.status >= 400:
                self._on_error(exchange.status)
            if self._is_logging and (exchange.status not in (200, 503) or scope["path"] not in POLLED):
                exchange.log()


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, send: Send, request_id: str) -> None:
        self._scope, self._send, self.request_id = scope, send, request_id
        self._start_s = time.perf_counter()
        self.status, self._num_bytes = 0, 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
        else:
            self._num_bytes += len(message.get("body", b""))
        await self._send(message)

    async def answer(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        """Tell the client, if nothing has been told yet; else cut the connection, so that it sees an end too early."""
        if self.status:
            self.status = 500
            raise ConnectionError("the answer was cut off")
        await error_response(error)(scope, receive, self.send)

    def log(self) -> None:
        scope = self._scope
        fields = {
            "request_id": self.request_id,
            "client": (scope["client"] or ("-",))[0],
            "method": scope["method"],
            # No line of the log, and no field of one, is the client's to write.
            "path": scope["path"].encode("unicode_escape").decode().replace('"', "%22"),
            "status": self.status or CLIENT_LEFT,
            "bytes": self._num_bytes,
            "duration_ms": round(1000 * (time.perf_counter() - self._start_s), 1),
        }
        text = '%(client)s "%(method)s %(path)s" %(status)d %(bytes)d B %(duration_ms).1f ms %(request_id)s'
        access_logger.info(text, fields, extra={"fields": fields})


class HostCheck:
    """A server on a loopback address answers to its own names only, so that no web page reaches it by a DNS trick.

    names: of this server, None to answer to any. A page of another site may not ask in any case.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str] | None) -> None:
        self._app = app
        self._names = None if names is None else frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hosts = [value.decode("latin-1").lower() for key, value in scope["headers"] if key == b"host"]
        host = hosts[0] if len(hosts) == 1 else ""
        if self._names is not None and _without_port(host) not in self._names:
            raise ApiError(
                403, "this server answers to localhost only; name further hosts with --allowed-hosts", code="wrong_host"
            )
        origin = header(scope, b"origin")
        if origin is not None and not self._is_ours(origin.lower(), host):
            raise ApiError(403, "requests of another site's pages are not answered", code="wrong_origin")
        await self._app(scope, receive, send)

    def _is_ours(self, origin: str, host: str) -> bool:
        try:
            netloc = urlsplit(origin).netloc
        except ValueError:
            return False
        return bool(netloc) and (netloc == host or (self._names is not None and _without_port(netloc) in self._names))


def _without_port(host: str) -> str:
    name, _, port = host.rpartition(":")
    return name if name and port.isascii() and port.isdigit() else host


class ApiKey:
    """With keys, every path but the probed ones needs one: `Authorization: Bearer KEY`, or a browser's password."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._digests and scope["path"] not in PROBED and not self._is_known(_key_of(scope)):
            is_browser = scope["method"] == "GET" and "text/html" in (header(scope, b"accept") or "")
            challenge = 'Basic realm="evenflow", charset="UTF-8"' if is_browser else "Bearer"
            raise ApiError(
                401,
                "this server needs an API key; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": challenge},
            )
        await self._app(scope, receive, send)

    def _is_known(self, key: bytes) -> bool:
        """Compares with all of them, in a time that tells nothing: neither which, nor how long it is."""
        digest = _digest(key)
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _key_of(scope: Scope) -> bytes:
    kind, _, value = (header(scope, b"authorization") or "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip().encode("latin-1")
    if kind.lower() == "basic":
        try:
            return b64decode(value.strip(), validate=True).partition(b":")[2]
        except ValueError:
            return b""
    return b""


class SecurityHeaders:
    """Headers of every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message.get("headers", ())}
                message["headers"] = [
                    *message.get("headers", ()),
                    *((name, value) for name, value in _SECURITY if name not in names),
                ]
            await send(message)

        await self._app(scope, receive, with_headers)


_SECURITY = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", PAGE_POLICY.encode()),
    (b"cache-control", b"no-store"),
)
