"""A request's body: read within its limits, decoded into a closed type, or refused with the field at fault."""

import asyncio
import re
from typing import Any, TypeVar, get_args

import msgspec
from starlette.types import Receive, Scope

from evenflow.server.errors import ApiError, ClientDisconnected

T = TypeVar("T")

MAX_DEPTH = 64
LONG_BODY = 64 * 1024  # bytes: beyond, decoding is done in a thread
_JSON_TYPE = re.compile(r"application/(json|[\w.+-]{1,64}\+json)")
_FIELD = re.compile(r"`\$\.?([A-Za-z_][A-Za-z0-9_]*)?([^`]*)`")
_ESCAPED_PAIR = re.compile(rb"\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")  # or a backslash
_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


async def read_json_body(scope: Scope, receive: Receive, kind: type[T], max_bytes: int) -> tuple[T, int]:
    """The body as `kind`, and its length in bytes. Raises ApiError 400, 413 or 415, or ClientDisconnected."""
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    check_type(headers)
    data = await read_body(headers, receive, max_bytes)
    if len(data) > LONG_BODY:
        return await asyncio.to_thread(decode, data, kind), len(data)
    return decode(data, kind), len(data)


def check_type(headers: dict[bytes, str]) -> None:
    kind, _, parameters = headers.get(b"content-type", "application/json").partition(";")
    charset = parameters.strip().lower().replace('"', "")
    if not _JSON_TYPE.fullmatch(kind.strip().lower()) or charset not in ("", "charset=utf-8"):
        raise ApiError(415, "the body must be JSON in UTF-8; send Content-Type: application/json")
    encoding = headers.get(b"content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise ApiError(415, "compressed bodies are not taken; send it without Content-Encoding")


async def read_body(headers: dict[bytes, str], receive: Receive, max_bytes: int) -> bytes:
    """All of it, or 413 as soon as it is known to be too long."""
    length = headers.get(b"content-length", "")
    if length.isascii() and length.isdigit() and int(length) > max_bytes:
        raise too_long(max_bytes)
    data = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        data += message.get("body", b"")
        if len(data) > max_bytes:
            raise too_long(max_bytes)
        if not message.get("more_body", False):
            return bytes(data)


def too_long(max_bytes: int) -> ApiError:
    return ApiError(413, f"the body is longer than {max_bytes} bytes; send less", headers={"Connection": "close"})


def decode(data: bytes, kind: type[T]) -> T:
    """Strict JSON: no NaN, no lone surrogate, at most MAX_DEPTH levels. Of a key that comes twice, the last counts."""
    if not data:
        raise ApiError(400, "the body is empty; send a JSON object")
    try:
        value = _typed(data, kind)
    except msgspec.ValidationError as error:
        raise invalid(str(error)) from None
    except msgspec.DecodeError as error:
        if (half := _lone_surrogate(data)) is not None:
            what = f"{half} is half of a surrogate pair, which no text holds; escape both halves, or none"
            raise ApiError(400, f"the body is not valid JSON: {what}") from None
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    except (RecursionError, UnicodeDecodeError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else "not valid UTF-8"
        raise ApiError(400, f"the body is {what}") from None
    check_depth(value)
    return value


def _typed(data: bytes, kind: type[T]) -> T:
    """Takes 4.0 for 4 in fields that are an integer, as JSON Schema does; up to 2**53, where floats skip integers."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        if "got `float`" not in str(error):
            raise
        fields = msgspec.json.decode(data)
        for name in _integer_fields(kind) & fields.keys() if isinstance(fields, dict) else ():
            number = fields[name]
            if isinstance(number, float) and number.is_integer() and abs(number) < 2**53:
                fields[name] = int(number)
        return msgspec.convert(fields, kind)


def _integer_fields(kind: type[Any]) -> set[str]:
    fields = msgspec.structs.fields(kind)
    return {field.name for field in fields if int in get_args(field.type) and float not in get_args(field.type)}


def _lone_surrogate(data: bytes) -> str | None:
    """The first escape of half a surrogate pair, which the decoder takes for an end too early."""
    match = _LONE_SURROGATE.search(_ESCAPED_PAIR.sub(b" ", data))
    return None if match is None else match[0].decode()


def invalid(message: str) -> ApiError:
    """msgspec's 'Expected `int`, got `str` - at `$.n`' with the field in front."""
    text, _, place = message.partition(" - at ")
    match = _FIELD.fullmatch(place)
    if match is None or match[1] is None:
        missing = re.search(r"required field `(\w+)`", text)
        return ApiError(400, f"the body: {text}", param=missing[1] if missing else None)
    return ApiError(400, f"{match[1]}{match[2]}: {text}", param=match[1])


def check_depth(value: Any) -> None:
    """The untyped parts of a body hold at most MAX_DEPTH levels. Goes by levels, so it needs no deep stack."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return
    raise ApiError(400, f"the body is nested more than {MAX_DEPTH} levels deep")


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        children = list(value.values())
    elif isinstance(value, list):
        children = value
    elif isinstance(value, msgspec.Struct):
        children = [getattr(value, name) for name in value.__struct_fields__]
    else:
        return []
    return [child for child in children if isinstance(child, (dict, list, msgspec.Struct))]
