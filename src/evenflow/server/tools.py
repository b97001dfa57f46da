"""Tool calls: what a client may ask for, how models write them, and the parser that tells them while they stream.

Pure text: knows no tokens and no engine. Formats are the models' own; a call is told in OpenAI's terms.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

MAX_TOOLS = 128
MAX_SCHEMA_CHARS = 64 * 1024
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class ToolFunction:
    """A function that the model may call. parameters: a JSON schema of an object. is_strict: all of it must be kept."""

    name: str
    parameters: dict[str, Any]
    is_strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """name: of the function that must be called, where kind is "named"."""

    kind: Literal["none", "auto", "required", "named"]
    name: str | None = None


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """The index-th call begins."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    delta: str


ToolEvent = TextDelta | ToolCallStart | ToolCallArguments


def check_tools(tools: list[dict[str, Any]]) -> list[ToolFunction]:
    """OpenAI's list of tools. Raises ValueError that names the entry."""
    if len(tools) > MAX_TOOLS:
        raise ValueError(f"tools has {len(tools)} entries; at most {MAX_TOOLS} are taken")
    functions = [_check_tool(f"tools[{i}]", tool) for i, tool in enumerate(tools)]
    names = [function.name for function in functions]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"tools names the function {twice[0]!r} twice; names must differ")
    if sum(len(json.dumps(function.parameters)) for function in functions) > MAX_SCHEMA_CHARS:
        raise ValueError(f"tools: all parameters together are longer than {MAX_SCHEMA_CHARS} characters")
    return functions


def _check_tool(where: str, tool: dict[str, Any]) -> ToolFunction:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict):
        raise ValueError(
            f"{where} must be {{'type': 'function', 'function': {{...}}}}; other tools are not implemented"
        )
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{where}.function.name={name!r:.80} must be 1 to 64 letters, digits, '_', '-' or '.'")
    if parameters is None:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise ValueError(f"{where}.function.parameters must be a JSON schema of type object")
    return ToolFunction(name, parameters | {"type": "object"}, function.get("strict") is True)


def parse_tool_choice(value: str | dict[str, Any] | None, functions: list[ToolFunction]) -> ToolChoice:
    """OpenAI's tool_choice. Raises ValueError that names what it may be."""
    if value is None:
        return ToolChoice("auto" if functions else "none")
    if value in ("none", "auto"):
        return ToolChoice("auto" if value == "auto" and functions else "none")
    if not functions:
        raise ValueError(f"tool_choice={value!r:.80} needs tools, and there are none")
    if value == "required":
        return ToolChoice("required")
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if not isinstance(function, dict):
        raise ValueError(f"tool_choice={value!r:.80} must be none, auto, required, or name a function")
    name, names = function.get("name"), [known.name for known in functions]
    if name not in names:
        raise ValueError(f"tool_choice names the function {name!r:.80}, but tools has {', '.join(names)}")
    return ToolChoice("named", name)
