"""A request as it travels from the endpoint to a replica, and the part of it that decides which replica."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.types import Scope

ROUTED_CHARS = 4096  # of a prompt: enough to tell beginnings apart, and what the router keeps of it stays small
MAX_DEPTH = 8


@dataclass(frozen=True, slots=True)
class HttpCall:
    """An HTTP request with its whole body. prompt: its first characters, which Ray's router reads; '' without one."""

    method: str
    path: str
    query_string: bytes
    headers: list[tuple[bytes, bytes]]
    client: tuple[str, int] | None
    body: bytes
    prompt: str

    @classmethod
    def of(cls, scope: Scope, body: bytes) -> "HttpCall":
        client = scope.get("client")
        return cls(
            method=scope["method"],
            path=scope["path"],
            query_string=scope["query_string"],
            headers=[(bytes(name), bytes(value)) for name, value in scope["headers"]],
            client=None if client is None else (client[0], client[1]),
            body=body,
            prompt=prompt_beginning(body) if scope["method"] == "POST" else "",
        )

    def scope(self) -> Scope:
        """A new ASGI scope."""
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": self.method,
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": self.query_string,
            "headers": list(self.headers),
            "client": self.client,
            "server": None,
            "state": {},
        }


class _Prompted(msgspec.Struct):
    """The fields of any of the API's bodies that hold a prompt."""

    prompt: Any = None
    messages: Any = None
    input: Any = None
    cache_salt: Any = None


def prompt_beginning(body: bytes) -> str:
    """The first characters of what the body asks about; '' if it cannot be read, which the replica will tell."""
    try:
        asked = msgspec.json.decode(body, type=_Prompted)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return ""
    found: list[str] = []
    size = 0
    for text in _texts([asked.cache_salt, asked.prompt, asked.messages, asked.input]):
        found.append(text[:ROUTED_CHARS])
        size += len(found[-1])
        if size >= ROUTED_CHARS:
            break
    return "".join(found)[:ROUTED_CHARS]


def _texts(value: Any, depth: int = 0) -> Iterator[str]:
    """Texts and token ids, in order, of prompts, messages and their parts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, int):
        yield f"{value} "
    elif isinstance(value, list) and depth < MAX_DEPTH:
        for item in value:
            yield from _texts(item, depth + 1)
    elif isinstance(value, dict) and depth < MAX_DEPTH:
        for name in ("role", "content", "text"):
            yield from _texts(value.get(name), depth + 1)
