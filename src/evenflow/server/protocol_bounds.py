"""uvicorn's HTTP protocol with bounds that it lacks: size of the head, time to send a request, time to read an answer.

Owns what happens before an application sees a request and after it has written an answer. All limits hold while bytes
arrive, not after.
"""

import asyncio
import re
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from evenflow.server.errors import ApiError, error_body

MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 100
MAX_TARGET_BYTES = 16 * 1024
SLICE_BYTES = 16 * 1024  # fed to the parser at a time, so that the bounds hold within what arrives at once
MAX_PIPELINED = 64  # requests on one connection that wait for the answers before theirs
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)


class Bounds(msgspec.Struct, frozen=True):
    """receive_s: for a whole request to arrive. write_s: within which a reader must have taken something."""

    receive_s: float = 60.0
    write_s: float = 60.0


class BoundedProtocol(HttpToolsProtocol):
    """One connection. `bounded` makes the class that uvicorn is given."""

    bounds = Bounds()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_in_head, self._is_in_message, self._is_rejected = True, False, False
        self._num_field_bytes = 0
        self._num_syntax_bytes = 0  # arrived since the parser last told of something: an unfinished line
        self._receive_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # Time

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm_receive()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._receive_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def _arm_receive(self) -> None:
        if self._receive_timer is None:
            self._receive_timer = self.loop.call_later(self.bounds.receive_s, self._on_receive_timeout)

    def _on_receive_timeout(self) -> None:
        self._receive_timer = None
        if self.pipeline or (self.cycle and not self.cycle.response_complete and not self.cycle.more_body):
            self._arm_receive()  # an answer to a request before this one is on its way: it has the time it needs
        else:
            self.reject(408, f"the request did not arrive within {self.bounds.receive_s:g} s")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_tail()

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def _arm_write(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(self.bounds.write_s, self._on_write_timeout, waiting)

    def _on_write_timeout(self, before: int) -> None:
        """A reader that took nothing is disconnected; one that is slow goes on."""
        self._write_timer = None
        waiting = self.transport.get_write_buffer_size()
        if waiting >= before:
            self.transport.abort()
        elif waiting:
            self._arm_write()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_tail()

    def _watch_tail(self) -> None:
        """The end of an answer that is not taken holds the connection as well as its beginning."""
        if self._write_timer is None and self.transport.get_write_buffer_size():
            self._arm_write()

    # Size

    def data_received(self, data: bytes) -> None:
        if self._is_rejected:
            return
        if not self._is_in_message and (self.cycle is None or self.cycle.response_complete):
            self._arm_receive()  # also for bytes that begin no request
        if self._is_in_head:
            data = _without_upgrade(data)
        for start in range(0, len(data), SLICE_BYTES):
            part = data[start : start + SLICE_BYTES]
            self._num_syntax_bytes += len(part)
            super().data_received(part)
            if self._num_syntax_bytes > MAX_HEAD_BYTES:  # a field that never ends is not seen by on_header
                self.reject(431, f"the request has a line longer than {MAX_HEAD_BYTES} bytes")
            if self._is_rejected or self.transport.is_closing():
                return

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = self._is_in_message = True
        self._num_field_bytes = self._num_syntax_bytes = 0
        self._arm_receive()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._num_syntax_bytes = 0
        if len(self.url) > MAX_TARGET_BYTES:
            self.reject(414, f"the request's target is longer than {MAX_TARGET_BYTES} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_in_head:  # a trailer: uvicorn would add it to the headers that are in use
            self.reject(400, "trailers after a body are not taken; send them as headers")
            return
        super().on_header(name, value)
        self._num_syntax_bytes = 0
        self._num_field_bytes += len(name) + len(value)
        if len(self.headers) > MAX_HEADERS or self._num_field_bytes > MAX_HEAD_BYTES:
            self.reject(431, f"the request has more than {MAX_HEADERS} headers or {MAX_HEAD_BYTES} bytes of them")

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        if (complaint := self._complaint()) is not None:
            self.reject(400, complaint)
        if not self._is_rejected:
            super().on_headers_complete()

    def _complaint(self) -> str | None:
        """What is lenient in the parser, and would be read differently by something in front of us."""
        version, headers = self.parser.get_http_version(), dict(self.headers)
        if version not in ("1.0", "1.1"):
            return f"HTTP/{version} is not taken; use HTTP/1.1"
        if self.parser.should_upgrade():  # in a head that came in parts: the parser would drop the body
            return "upgrades are not taken; leave the Upgrade header out"
        coding = headers.get(b"transfer-encoding")
        if coding is not None and (coding.strip().lower() != b"chunked" or version == "1.0"):
            return "the only transfer coding taken is chunked, in HTTP/1.1"
        if sum(name == b"host" for name, _ in self.headers) != 1 and version == "1.1":
            return "a request has exactly one Host header"
        if len(self.pipeline) >= MAX_PIPELINED:
            return f"more than {MAX_PIPELINED} requests wait on this connection"
        return None

    def on_body(self, body: bytes) -> None:
        self._num_syntax_bytes = 0
        if not self._is_rejected:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_in_message, self._num_syntax_bytes = False, 0
        self._is_in_head = True  # of the next one
        if self._receive_timer is not None:
            self._receive_timer.cancel()
            self._receive_timer = None
        if not self._is_rejected:
            super().on_message_complete()

    # Refusal

    def send_400_response(self, msg: str) -> None:
        self.reject(400, "this is not a valid HTTP/1.1 request")

    def _unsupported_upgrade_warning(self) -> None:
        """Clients that offer an upgrade are answered in HTTP/1.1."""

    def reject(self, status: int, message: str) -> None:
        """Answer by ourselves and close. While another answer is being written, only close."""
        if self._is_rejected or self.transport.is_closing():
            return
        self._is_rejected = True
        cycle = self.cycle
        is_writing = bool(self.pipeline) or (
            cycle is not None and cycle.response_started and not cycle.response_complete
        )
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        if not is_writing:
            body = error_body(ApiError(status, message))
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
        self._watch_tail()


def _without_upgrade(data: bytes) -> bytes:
    """An offer to upgrade may be ignored, but the parser would drop the request's body for it: rename the header."""
    head, blank, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"\r\nx-ignored:", head) + blank + rest if b"pgrade" in head else data


def bounded(bounds: Bounds) -> type[BoundedProtocol]:
    """The protocol class with these bounds; uvicorn makes one object a connection."""
    return type("BoundedProtocol", (BoundedProtocol,), {"bounds": bounds})
