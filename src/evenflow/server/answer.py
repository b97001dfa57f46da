"""One choice of a chat on its way: text in, events out, and what they add up to. Chat and responses share it."""

from dataclasses import dataclass

from evenflow.server.tool_use import ToolUse
from evenflow.server.tools import TextDelta, ToolCallArguments, ToolCallStart, ToolEvent


@dataclass(slots=True)
class ToolCall:
    """A call that the model made. call_id is what the client sends back with its result."""

    name: str
    call_id: str
    arguments: str = ""


class Answer:
    """Collects what the events say; `feed` also returns them, for whoever streams."""

    def __init__(self, tools: ToolUse) -> None:
        self._parser, self._new_call_id = tools.new_parser(), tools.new_call_id
        self._pieces: list[str] = []
        self.calls: list[ToolCall] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def feed(self, text: str, *, is_last: bool) -> list[ToolEvent]:
        events = self._parser.feed(text) if text else []
        if is_last:
            events += self._parser.finish()
        for event in events:
            if isinstance(event, TextDelta):
                self._pieces.append(event.text)
            elif isinstance(event, ToolCallStart):
                self.calls.append(ToolCall(event.name, self._new_call_id()))
            elif isinstance(event, ToolCallArguments):
                self.calls[event.index].arguments += event.delta
        return events

    def finish_reason(self, reason: str | None) -> str | None:
        """OpenAI's: an answer that ended by itself with calls ended for them."""
        return "tool_calls" if reason == "stop" and self.calls else reason
