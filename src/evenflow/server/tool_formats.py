"""How models write tool calls: the markers of each format, its grammar, and a parser for text that arrives in pieces.

A call is a JSON object with the function's name and, under the format's key, its arguments.
"""

import json
from dataclasses import dataclass

from evenflow.guided.schema import prepared
from evenflow.server.tools import (
    TextDelta,
    ToolCallArguments,
    ToolCallStart,
    ToolChoice,
    ToolEvent,
    ToolFunction,
)


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """begin, end: around every call, with `padding` inside. opening, closing: around all calls instead.

    opening_token: the name of the special token that is the opening; the text shows it only with
    skip_special_tokens=False. Without `begin`, an answer that starts with "{" is calls throughout.
    """

    name: str
    arguments_key: str
    separator: str
    begin: str = ""
    end: str = ""
    padding: str = ""
    opening_token: str = ""
    opening: str = ""
    closing: str = ""


FORMATS = {
    "hermes": ToolFormat("hermes", "arguments", "\n", begin="<tool_call>", end="</tool_call>", padding="\n"),
    "llama3_json": ToolFormat("llama3_json", "parameters", "; ", opening_token="<|python_tag|>"),
    "mistral": ToolFormat("mistral", "arguments", ", ", opening_token="[TOOL_CALLS]", opening="[", closing="]"),
}


def detect_format(chat_template: str | None) -> ToolFormat:
    """By the markers that the model's own template writes; Hermes' is the most common where nothing is said."""
    template = chat_template or ""
    if "<tool_call>" in template:
        return FORMATS["hermes"]
    if "[TOOL_CALLS]" in template:
        return FORMATS["mistral"]
    if "<|python_tag|>" in template or "Environment: ipython" in template:
        return FORMATS["llama3_json"]
    return FORMATS["hermes"]


def tool_grammar(
    tool_format: ToolFormat,
    functions: list[ToolFunction],
    choice: ToolChoice,
    *,
    parallel: bool,
    opening_token_id: int | None = None,
) -> str | None:
    """Lark for llguidance: calls whose arguments are valid by construction. None: nothing is to be constrained.

    required, named: nothing but calls, without the opening; of a named function exactly one. auto: text, or calls that
    are valid from beginning to end. opening_token_id: of the format's opening token, where the model has it.
    """
    if choice.kind == "none" or not functions:
        return None
    allowed = [function for function in functions if choice.kind != "named" or function.name == choice.name]
    rules = [_call_rule(tool_format, i, function) for i, function in enumerate(allowed)]
    body = " | ".join(f"call_{i}" for i in range(len(allowed)))
    rules.append(f"inner: {_text(tool_format.padding)} ({body}) {_text(tool_format.padding + tool_format.end)}")
    begin, separator = _text(tool_format.begin), _text(tool_format.separator)
    more = f"({separator} {begin} inner)*" if parallel and choice.kind != "named" else ""
    if choice.kind != "auto":
        rules.append(f"start: {begin} inner {more}")
    elif tool_format.begin:
        # Lazy: the text ends with the first marker.
        rules += [f"start: TEXT | before inner {more}", f"before[lazy]: TEXT {begin}", r"TEXT: /(.|\n)*/"]
    else:
        calls = f"{_text(tool_format.opening)} inner {more} {_text(tool_format.closing)}"
        marked = "" if opening_token_id is None else f"<[{opening_token_id}]> {calls} | "
        bare = "" if tool_format.opening else f"inner {more} | "
        if not marked and not bare:
            return None
        # A text has no special token in it; where calls need none, it must not look like one.
        rules.append(f"start: {marked}{bare}TEXT")
        rules.append(r"TEXT: /([^{](.|\n)*)?/" if bare else r"TEXT: /(.|\n)*/")
    return "\n".join(rules) + "\n"


def _call_rule(tool_format: ToolFormat, index: int, function: ToolFunction) -> str:
    head = '{"name": ' + json.dumps(function.name) + f', "{tool_format.arguments_key}": '
    return f'call_{index}: {json.dumps(head)} arguments_{index} "}}"\narguments_{index}: {_arguments(function)}'


def _arguments(function: ToolFunction) -> str:
    return f"%json {json.dumps(prepared(function.parameters, is_lenient=not function.is_strict))}"


def arguments_grammar(function: ToolFunction) -> str:
    """Lark for the arguments alone."""
    return f"start: {_arguments(function)}\n"


def _text(text: str) -> str:
    return json.dumps(text) if text else ""


class ToolParser:
    """Text in pieces -> events, the same for every way to cut it into pieces. What is no call comes out as text.

    `feed` what arrives, then `finish`. Held back is only what may begin a marker, and white space around calls, which
    is not told.
    """

    def __init__(self, tool_format: ToolFormat) -> None:
        self._format = tool_format
        self._marker = tool_format.opening_token or tool_format.begin
        self._closing = tool_format.closing or tool_format.end
        self._held = ""  # not looked at, or not decided
        self._raw = ""  # of the calls' syntax since the marker or the last call: text, should no call come of it
        self._is_inside = False  # between the marker and the closing
        self._is_gap = True  # nothing but white space since the beginning, or since the last call
        self._call: _CallReader | None = None
        self._num_calls = 0

    def feed(self, text: str) -> list[ToolEvent]:
        self._held += text
        return self._run(is_end=False)

    def finish(self) -> list[ToolEvent]:
        """No more will come."""
        return self._run(is_end=True)

    def _run(self, *, is_end: bool) -> list[ToolEvent]:
        events: list[ToolEvent] = []
        while self._held or is_end:
            if self._call is not None:
                goes_on = self._read_call(self._call, events)
            elif self._is_inside:
                goes_on = self._read_syntax(events, is_end)
            else:
                goes_on = self._read_text(events, is_end)
            if not goes_on:
                break
        if is_end:
            self._end(events)
        return _joined(events)

    def _end(self, events: list[ToolEvent]) -> None:
        """A call that was told stays as far as it came, the mere beginning of one more is dropped, all else is text."""
        unfinished = self._call.text if self._call is not None and not self._call.is_told else ""
        rest, self._raw, self._held, self._call = self._raw + unfinished + self._held, "", "", None
        if not self._num_calls or not _begins_call(unfinished):
            self._tell(events, rest)

    def _tell(self, events: list[ToolEvent], text: str) -> None:
        if text:
            self._is_gap = self._is_gap and not text.strip()
            events.append(TextDelta(text))

    def _read_text(self, events: list[ToolEvent], is_end: bool) -> bool:
        """Text, up to what begins calls. True if something was decided and there is more."""
        held, stripped = self._held, self._held.lstrip()
        if self._is_gap and not stripped:
            return False
        if self._is_gap and not self._format.begin and stripped.startswith("{") and not self._num_calls:
            self._is_inside, self._raw, self._held = True, held[: len(held) - len(stripped)], stripped
            return True
        if (at := held.find(self._marker)) >= 0:
            if not self._is_gap or held[:at].strip():
                self._tell(events, held[:at])
                self._raw = self._marker
            else:
                self._raw = held[:at] + self._marker
            self._is_inside, self._held = True, held[at + len(self._marker) :]
            return True
        if is_end and self._is_gap and self._num_calls and self._marker.startswith(stripped):
            return False
        keep = 0 if is_end else _overlap(held, self._marker)
        if self._is_gap and not held[: len(held) - keep].strip():
            return False
        self._tell(events, held[: len(held) - keep])
        self._held = held[len(held) - keep :]
        return False

    def _read_syntax(self, events: list[ToolEvent], is_end: bool) -> bool:
        """White space and separators between calls, then a call, the closing, or what makes all of it text."""
        skipped = self._held.lstrip(" \n\t" if self._format.begin else " \n\t,;[")
        self._raw += self._held[: len(self._held) - len(skipped)]
        self._held = skipped
        if skipped.startswith("{"):
            self._call = _CallReader(self._format.arguments_key)
            return True
        if self._closing and skipped.startswith(self._closing) and self._num_calls:
            self._is_inside, self._is_gap, self._raw = False, True, ""
            self._held = skipped[len(self._closing) :]
            return True
        if self._closing.startswith(skipped) and (not is_end or self._num_calls):
            return False
        self._is_inside = False
        raw, self._raw = self._raw, ""
        self._tell(events, raw + skipped[:1])
        self._held = skipped[1:]
        return bool(self._held)

    def _read_call(self, call: "_CallReader", events: list[ToolEvent]) -> bool:
        was_told = call.is_told
        used = call.read(self._held)
        self._held = self._held[used:]
        if call.is_told:
            self._raw = ""
            if not was_told:
                assert call.name is not None
                events.append(ToolCallStart(self._num_calls, call.name))
            if arguments := call.take_arguments():
                events.append(ToolCallArguments(self._num_calls, arguments))
        if not call.is_done:
            return False
        self._call = None
        self._num_calls += call.is_told
        if not call.is_told:  # an object, but no call
            raw, self._raw, self._is_inside = self._raw, "", False
            self._tell(events, raw + call.text)
        return True


class _CallReader:
    """Reads one JSON object character by character: the value of "name", and the text of the arguments' value."""

    def __init__(self, arguments_key: str) -> None:
        self._arguments_key = arguments_key
        self._pieces: list[str] = []
        self._depth = 0
        self._in_string = self._is_escaped = False
        self._key: str | None = None  # whose value is being read, at depth 1
        self._token: list[str] = []  # characters of a string at depth 1
        self._arguments: list[str] = []  # not taken yet
        self.name: str | None = None
        self.is_done = False

    @property
    def is_told(self) -> bool:
        return self.name is not None

    @property
    def text(self) -> str:
        """All that was read."""
        return "".join(self._pieces)

    def take_arguments(self) -> str:
        """What has come of the arguments since the last call."""
        taken, self._arguments = "".join(self._arguments), []
        return taken

    def read(self, text: str) -> int:
        """Returns how many characters belong to the object: all, unless it ends in them."""
        for i, char in enumerate(text):
            was_inside = self._depth >= 2
            self._take(char)
            if self._key == self._arguments_key and (was_inside or self._depth >= 2):
                self._arguments.append(char)
            if self.is_done:
                self._pieces.append(text[: i + 1])
                return i + 1
        self._pieces.append(text)
        return len(text)

    def _take(self, char: str) -> None:
        if self._in_string:
            self._take_in_string(char)
        elif char == '"':
            self._in_string, self._token = True, []
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.is_done = self._depth <= 0
        elif char == "," and self._depth == 1:
            self._key = None

    def _take_in_string(self, char: str) -> None:
        if not self._is_escaped and char == '"':
            self._in_string = False
            if self._depth == 1:
                self._end_string("".join(self._token))
            return
        self._is_escaped = not self._is_escaped and char == "\\"
        if self._depth == 1:
            self._token.append(char)

    def _end_string(self, raw: str) -> None:
        """A key of the object, or the value of one."""
        try:
            value = json.loads(f'"{raw}"')
        except ValueError:
            return
        if self._key is None:
            self._key = value
        elif self._key == "name" and self.name is None:
            self.name = value


def _begins_call(text: str) -> bool:
    """Nothing, or as much of a call as comes before its function's name is complete."""
    head, compact = '{"name":"', "".join(text.split())
    return head.startswith(compact) or compact.startswith(head)


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker`."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0


def _joined(events: list[ToolEvent]) -> list[ToolEvent]:
    """Neighbours of the same kind in one."""
    joined: list[ToolEvent] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, TextDelta) and isinstance(last, TextDelta):
            joined[-1] = TextDelta(last.text + event.text)
        elif isinstance(event, ToolCallArguments) and isinstance(last, ToolCallArguments) and last.index == event.index:
            joined[-1] = ToolCallArguments(event.index, last.delta + event.delta)
        else:
            joined.append(event)
    return joined
