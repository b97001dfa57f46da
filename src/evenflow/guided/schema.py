"""JSON schemas, as clients write them -> as llguidance compiles them. Owns what is added or left out; no checks."""

import re
from collections.abc import Callable, Collection
from typing import Any
from urllib.parse import unquote

# Compact: a model that may write spaces for ever sometimes does. oneOf is kept as anyOf: whether two branches overlap
# cannot always be decided.
OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": True}
# llguidance's; others are annotations, as JSON Schema has it.
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown")
# Look-around, atomic groups, comments; backreferences, word boundaries, ends of text: llguidance has none of them.
_IRREGULAR = re.compile(r"\\[^1-9bBcgGkKZz]|(\(\?(?!:|P?<\w|[imsxU-]+[:)])|\\[1-9bBcgGkKZz])", re.DOTALL)

Change = Callable[[dict[str, Any], bool], dict[str, Any]]

_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("prefixItems", "items", "anyOf", "oneOf", "allOf")
_SCHEMAS = ("items", "additionalProperties", "unevaluatedProperties", "additionalItems", "unevaluatedItems")
_COMPOSING = ("allOf", "anyOf", "oneOf", "$ref", "if", "then", "else", "dependentSchemas")
# With one of these an object has said which further keys it takes, or needs some.
_OPENING = ("additionalProperties", "patternProperties", "unevaluatedProperties", "minProperties", *_COMPOSING)


def prepared(schema: dict[str, Any], *, is_lenient: bool = False) -> dict[str, Any]:
    """The schema with its objects closed and without formats that llguidance does not know; takes no key otherwise.

    An object that lists properties and says nothing of others takes no others: a model that may invent keys sometimes
    does not stop. is_lenient: what llguidance lacks, and keywords that are null, are left out instead of refused.
    """
    schema = _Walk(lambda part, _: _known(part, is_lenient)).walk(schema)
    asked = schema["x-guidance"] if isinstance(schema.get("x-guidance"), dict) else {}
    options = asked | OPTIONS | ({"lenient": True} if is_lenient else {})
    return _Walk(_closed, _composed_targets(schema)).walk(schema) | {"x-guidance": options}


def _known(schema: dict[str, Any], is_lenient: bool) -> dict[str, Any]:
    schema = dict(schema)
    if isinstance(schema.get("format"), str) and schema["format"] not in FORMATS:
        del schema["format"]
    if not is_lenient:
        return schema
    for name in [name for name, value in schema.items() if value is None and name not in ("const", "default")]:
        del schema[name]
    if _is_irregular(schema.get("pattern")):
        del schema["pattern"]
    if isinstance(patterns := schema.get("patternProperties"), dict):
        schema["patternProperties"] = {key: value for key, value in patterns.items() if not _is_irregular(key)}
    return schema


def _is_irregular(pattern: object) -> bool:
    return isinstance(pattern, str) and any(match[1] for match in _IRREGULAR.finditer(pattern))


def _closed(schema: dict[str, Any], is_composed: bool) -> dict[str, Any]:
    properties, required = schema.get("properties"), schema.get("required", [])
    if is_composed or not isinstance(properties, dict) or any(name in schema for name in _OPENING):
        return schema
    if not isinstance(required, list) or any(name not in properties for name in required if isinstance(name, str)):
        return schema
    return schema | {"additionalProperties": False}


def _composed_targets(root: dict[str, Any]) -> set[str]:
    """Where the references lead that stand in a composition: these objects' properties are not all that there are."""
    found: dict[str, None] = {}

    def collect(schema: dict[str, Any], is_composed: bool) -> dict[str, Any]:
        if is_composed and isinstance(schema.get("$ref"), str):
            found[unquote(schema["$ref"])] = None
        return schema

    walk = _Walk(collect)
    walk.walk(root)
    targets: set[str] = set()
    seen: set[int] = set()  # a schema can be referred to in many ways
    while found:
        path, _ = found.popitem()
        targets.add(path)
        if (target := _resolved(root, path)) is not None and id(target) not in seen:
            seen.add(id(target))
            walk.walk(target, path, is_composed=True)  # what is composed may refer on
    return targets


def _resolved(root: dict[str, Any], path: str) -> dict[str, Any] | None:
    """The schema that a reference such as #/$defs/A leads to."""
    part: Any = root
    for key in path.split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        if isinstance(part, list) and key.isdecimal() and len(key) < 6 and int(key) < len(part):
            part = part[int(key)]
        else:
            part = part.get(key) if isinstance(part, dict) else None
    return part if isinstance(part, dict) and path.startswith("#") else None


class _Walk:
    """Applies `change(schema, is_composed)` to a schema and to all within it, where schemas stand and nowhere else.

    is_composed: its object is also described elsewhere, by a sibling in allOf or by the keywords beside a reference.
    """

    def __init__(self, change: Change, composed: Collection[str] = ()) -> None:
        self._change, self._composed = change, composed

    def walk(self, schema: dict[str, Any], path: str = "#", is_composed: bool = False) -> dict[str, Any]:
        """path: of the schema, as a reference to it is written."""
        is_composed = is_composed or path in self._composed
        within = is_composed or _composes(schema)
        changed = dict(self._change(schema, within))
        for name in _OF_SCHEMAS:
            if isinstance(parts := changed.get(name), dict):
                is_apart = name in ("$defs", "definitions")
                changed[name] = {
                    key: self._child(part, f"{path}/{name}/{_escaped(key)}", within and not is_apart)
                    for key, part in parts.items()
                }
        for name in _LISTS:
            if isinstance(parts := changed.get(name), list):
                changed[name] = [self._child(part, f"{path}/{name}/{i}", within) for i, part in enumerate(parts)]
        for name in _SCHEMAS:
            if isinstance(changed.get(name), dict):
                changed[name] = self._child(changed[name], f"{path}/{name}", within)
        return changed

    def _child(self, part: Any, path: str, is_composed: bool) -> Any:
        return self.walk(part, path, is_composed) if isinstance(part, dict) else part


def _composes(schema: dict[str, Any]) -> bool:
    """Whether several parts describe one object; a single reference, or alternatives alone, do not."""
    parts = [name for name in _COMPOSING if name in schema]
    several = isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1
    return several or len(parts) > 1 or (bool(parts) and "properties" in schema)


def _escaped(key: str) -> str:
    """A key as JSON pointers write it."""
    return key.replace("~", "~0").replace("/", "~1")
