"""What one chat does with tools: reads the body's fields, constrains the sampling, says how its text is to be read."""

import uuid
from dataclasses import dataclass
from typing import Any

from evenflow.sampling_params import SamplingParams, StructuredOutputsParams
from evenflow.server.protocol import ChatCompletionRequest
from evenflow.server.tool_formats import FORMATS, ToolFormat, ToolParser, arguments_grammar, detect_format, tool_grammar
from evenflow.server.tools import (
    TextDelta,
    ToolChoice,
    ToolEvent,
    ToolFunction,
    check_tools,
    parse_tool_choice,
)
from evenflow.tokenizer import Tokenizer


class PlainText:
    """The parser of an answer that has no tools: all of it is text."""

    def feed(self, text: str) -> list[ToolEvent]:
        return [TextDelta(text)] if text else []

    def finish(self) -> list[ToolEvent]:
        return []


@dataclass(frozen=True, slots=True)
class ToolUse:
    """for_template: the tools that the model is shown."""

    for_template: list[dict[str, Any]] | None
    functions: list[ToolFunction]
    choice: ToolChoice
    is_parallel: bool
    tool_format: ToolFormat
    opening_token_id: int | None

    @classmethod
    def of(cls, body: ChatCompletionRequest, tokenizer: Tokenizer, asked_format: str) -> "ToolUse":
        """Raises ValueError that names the field."""
        functions = check_tools(body.tools or [])
        choice = parse_tool_choice(body.tool_choice, functions)
        source = tokenizer.chat_template_source
        tool_format = detect_format(source) if asked_format == "auto" else FORMATS[asked_format]
        token_id = tokenizer.backend.token_to_id(tool_format.opening_token) if tool_format.opening_token else None
        return cls(
            body.tools if choice.kind != "none" else None,
            functions,
            choice,
            body.parallel_tool_calls is not False,
            tool_format,
            token_id if token_id in tokenizer.special_ids else None,
        )

    def constrain(self, params: SamplingParams) -> SamplingParams:
        """Calls are valid by construction. Raises ValueError where the body also asks for another structure."""
        grammar = tool_grammar(
            self.tool_format,
            self.functions,
            self.choice,
            parallel=self.is_parallel,
            opening_token_id=self.opening_token_id,
        )
        if self.choice.kind == "none":
            return params
        changes: dict[str, Any] = {}
        if self.tool_format.opening_token:
            changes["skip_special_tokens"] = False
        if grammar is not None and params.structured_outputs is None:
            changes["structured_outputs"] = StructuredOutputsParams(grammar=grammar)
        elif params.structured_outputs is not None and self.choice.kind != "auto":
            raise ValueError(
                f"tool_choice={self.choice.kind!r} and response_format cannot be combined; drop one of them"
            )
        return params.replace(**changes)

    def structure_parts(self) -> list[tuple[str, StructuredOutputsParams]]:
        """What the calls' grammar is made of, by the field that it came from."""
        return [
            (f"tools[{i}].function.parameters", StructuredOutputsParams(grammar=arguments_grammar(function)))
            for i, function in enumerate(self.functions)
            if self.choice.kind != "named" or function.name == self.choice.name
        ]

    def new_call_id(self) -> str:
        """Mistral's templates refuse ids that are not nine letters or digits."""
        number = uuid.uuid4().hex
        return number[:9] if self.tool_format.name == "mistral" else f"call_{number[:24]}"

    def new_parser(self) -> ToolParser | PlainText:
        return PlainText() if self.choice.kind == "none" else ToolParser(self.tool_format)
