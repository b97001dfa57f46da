"""POST /v1/responses: OpenAI's newer API, answered by the chat's machinery. Nothing is stored."""

import re
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import msgspec

from evenflow.chat_template import check_messages
from evenflow.request import CompletionOutput
from evenflow.server.answer import Answer, ToolCall
from evenflow.server.chat import ChatCall
from evenflow.server.errors import ApiError, error_body
from evenflow.server.front import Front, ObservedGeneration, raise_if_failed
from evenflow.server.protocol import (
    Absent,
    ChatCompletionRequest,
    ChatFields,
    JsonObject,
    JsonSchemaFormat,
    ResponseFormat,
)
from evenflow.server.streaming import encode_json
from evenflow.server.tools import TextDelta, ToolCallStart, ToolEvent


class TextFormat(msgspec.Struct, kw_only=True):
    """The format of the text: what chat's response_format says, flattened."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema: JsonObject | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, kw_only=True):
    format: TextFormat | None = None


class ResponsesRequest(ChatFields, kw_only=True):
    """What is stored on OpenAI's side (previous_response_id, conversation) is refused; `store` is ignored.

    What a chat takes is taken here too, as in vLLM, but for the fields that have other names or places.
    """

    input: str | list[JsonObject]
    instructions: str | None = None
    max_output_tokens: int | None = None
    include: list[str] | None = None
    text: TextOptions | None = None
    metadata: dict[str, str] | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: str | JsonObject | None = None
    logprobs: Annotated[Any, Absent("use top_logprobs")] = None
    max_completion_tokens: Annotated[Any, Absent("use max_output_tokens")] = None
    max_tokens: Annotated[Any, Absent("use max_output_tokens")] = None
    messages: Annotated[Any, Absent("use input")] = None
    n: Annotated[Any, Absent("send several requests", (1,))] = None
    prompt: Annotated[Any, Absent("no prompts are stored; use instructions and input")] = None
    response_format: Annotated[Any, Absent("use text.format")] = None

    def to_chat(self) -> ChatCompletionRequest:
        """The same question to the chat API. Raises ApiError for what would need a memory of ours."""
        for name in ("previous_response_id", "conversation", "background"):
            if getattr(self, name):
                raise ApiError(
                    400, f"{name} needs stored responses, and this server stores none; send the whole input", param=name
                )
        wants_logprobs = "message.output_text.logprobs" in (self.include or []) or bool(self.top_logprobs)
        changed: dict[str, Any] = {
            "n": None,
            "top_logprobs": self.top_logprobs if wants_logprobs else None,
            "tools": [_nested_tool(i, tool) for i, tool in enumerate(self.tools)] if self.tools else None,
            "tool_choice": _nested_choice(self.tool_choice),
            "response_format": self._response_format(),
        }
        return ChatCompletionRequest(
            messages=self._messages(),
            max_completion_tokens=self.max_output_tokens,
            logprobs=wants_logprobs or None,
            **{name: getattr(self, name) for name in ChatFields.__struct_fields__} | changed,
        )

    def _messages(self) -> list[JsonObject]:
        messages: list[JsonObject] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        if not self.input:
            raise ApiError(400, "input is empty; send a text, or a list of at least one item", param="input")
        for index, item in enumerate(self.input):
            _add_item(messages, index, item)
        return messages

    def _response_format(self) -> ResponseFormat | None:
        asked = self.text.format if self.text is not None else None
        if asked is None or asked.type == "text":
            return None
        schema = JsonSchemaFormat(name=asked.name, schema=asked.schema) if asked.type == "json_schema" else None
        return ResponseFormat(type=asked.type, json_schema=schema)


def _add_item(messages: list[JsonObject], index: int, item: JsonObject) -> None:
    """An item of the input as a message; calls in a row become one message, as templates expect."""
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        message = {"role": "system" if role == "developer" else role, "content": _content(index, item, "content")}
        messages.append(_checked(index, message, "content"))
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        _checked(index, {"role": "assistant", "tool_calls": [call]}, "arguments")
        if messages and messages[-1].get("tool_calls"):
            messages[-1]["tool_calls"].append(call)
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    elif kind == "function_call_output":
        message = {"role": "tool", "tool_call_id": item.get("call_id"), "content": _content(index, item, "output")}
        messages.append(_checked(index, message, "output"))
    elif kind != "reasoning":
        raise ApiError(400, f"input[{index}] is of type {kind!r:.80}, which is not implemented", param="input")


def _checked(index: int, message: JsonObject, key: str) -> JsonObject:
    """The message, or ApiError that names the item, and its `key` for the content, instead of the message."""
    try:
        check_messages([message])
    except ValueError as error:
        text = str(error).replace("messages[0].tool_calls[0].function", f"input[{index}]")
        text = text.replace("messages[0].content", f"input[{index}].{key}").replace("messages[0]", f"input[{index}]")
        raise ApiError(400, text.replace("has no content", f"has no {key}"), param="input") from None
    return message


def _content(index: int, item: JsonObject, key: str) -> Any:
    content = item.get(key)
    if not isinstance(content, list):
        return content
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in ("input_text", "output_text", "text"):
            raise ApiError(400, f"input[{index}].{key}[{i}]: only parts of text are implemented", param="input")
    return [{"type": "text", "text": part.get("text")} for part in content]


def _nested_tool(index: int, tool: JsonObject) -> JsonObject:
    if tool.get("type") != "function":
        raise ApiError(
            400, f"tools[{index}] is of type {tool.get('type')!r:.80}; only functions are implemented", param="tools"
        )
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _nested_choice(choice: str | JsonObject | None) -> str | JsonObject | None:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


# Fields of the chat API that have other names here.
_OWN_NAMES = {
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
}
_CHAT_NAME = re.compile(rf"\b({'|'.join(_OWN_NAMES)})\b(?!['\"])")


@contextmanager
def _own_names() -> Iterator[None]:
    """What the chat's machinery refuses, in this API's words."""
    try:
        yield
    except ApiError as error:
        message = _CHAT_NAME.sub(lambda match: _OWN_NAMES[match[1]], error.message)
        param = "input" if error.param == "prompt" else _OWN_NAMES.get(error.param or "", error.param)
        field = None if param is None else param.split(".")[0]
        raise ApiError(error.status, message, param=field, code=error.code, headers=error.headers) from None


class ResponsesCall(ChatCall):
    """One call, checked. What runs is a chat; what is told are items."""

    def __init__(self, front: Front, body: ResponsesRequest, size: int) -> None:
        chat = body.to_chat()
        with _own_names():
            super().__init__(front, chat, size)
        self._asked = body
        self.id = f"resp_{uuid.uuid4().hex}"

    async def open(self) -> ObservedGeneration:
        with _own_names():
            return await super().open()

    async def whole(self, generation: ObservedGeneration) -> bytes:
        async for _, output in generation:
            raise_if_failed(output)
            (completion,) = output.outputs
        items = _Items(self)
        for _ in items.events(completion):
            pass
        return encode_json(self._response(items, completion.finish_reason, generation))

    def _response(self, items: "_Items | None", reason: str | None, generation: ObservedGeneration) -> dict[str, Any]:
        """The response object: in progress without items."""
        asked, is_cut = self._asked, reason == "length"
        status = "in_progress" if items is None else "incomplete" if is_cut else "completed"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self.front.model_name,
            "output": [] if items is None else items.done,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": self.params.temperature,
            "text": {"format": asked.text.format if asked.text and asked.text.format else {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_p": self.params.top_p,
            "truncation": "disabled",
            "usage": None if items is None else _usage(generation),
        }

    async def frames(self, generation: ObservedGeneration) -> AsyncGenerator[bytes, None]:
        items, reason = _Items(self), None
        try:
            yield items.frame("response.created", response=self._response(None, None, generation))
            yield items.frame("response.in_progress", response=self._response(None, None, generation))
            async for _, output in generation:
                raise_if_failed(output)
                for completion in output.outputs:
                    reason = completion.finish_reason
                    for frame in items.events(completion):
                        yield frame
            kind = "response.incomplete" if reason == "length" else "response.completed"
            yield items.frame(kind, response=self._response(items, reason, generation))
        except ApiError as error:
            cause = msgspec.json.decode(error_body(error))["error"]
            failed = self._response(items, None, generation) | {"status": "failed", "error": cause}
            yield items.frame("response.failed", response=failed)
        finally:
            generation.close()


class _Items:
    """The output items so far, and the events that tell them. At most one item is open at a time."""

    def __init__(self, call: ResponsesCall) -> None:
        self.done: list[dict[str, Any]] = []
        self._call = call
        self._answer = Answer(call.tools)
        self._open: dict[str, Any] | None = None
        self._sequence_number = 0

    def frame(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._sequence_number, **fields}
        self._sequence_number += 1
        return b"event: " + kind.encode() + b"\ndata: " + encode_json(data) + b"\n\n"

    def events(self, completion: CompletionOutput) -> Iterator[bytes]:
        """What a part of the completion, or all of it, brings."""
        logprobs = self._call.logprobs(completion)
        tokens = logprobs["content"] if logprobs else []
        for event in self._answer.feed(completion.text, is_last=completion.finished()):
            if isinstance(event, TextDelta):
                yield from self._on_text(event.text, tokens)
                tokens = []
            else:
                yield from self._on_call(event)
        if completion.finished():
            if not self.done and self._open is None:
                yield from self._open_message()
            yield from self._close("incomplete" if completion.finish_reason == "length" else "completed")

    def _on_text(self, text: str, tokens: list[dict[str, Any]]) -> Iterator[bytes]:
        if self._open is None or self._open["type"] != "message":
            yield from self._close("completed")
            yield from self._open_message()
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += text
        part["logprobs"] += tokens
        yield self.frame("response.output_text.delta", **self._where(), content_index=0, delta=text, logprobs=tokens)

    def _on_call(self, event: ToolEvent) -> Iterator[bytes]:
        if isinstance(event, ToolCallStart):
            yield from self._close("completed")
            call: ToolCall = self._answer.calls[event.index]
            self._open = {
                "type": "function_call",
                "id": f"fc_{uuid.uuid4().hex}",
                "call_id": call.call_id,
                "name": call.name,
                "arguments": "",
                "status": "in_progress",
            }
            yield self.frame("response.output_item.added", output_index=len(self.done), item=self._open)
        elif not isinstance(event, TextDelta):
            assert self._open is not None
            self._open["arguments"] += event.delta
            yield self.frame("response.function_call_arguments.delta", **self._where(), delta=event.delta)

    def _open_message(self) -> Iterator[bytes]:
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item = {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "role": "assistant", "status": "in_progress"}
        yield self.frame("response.output_item.added", output_index=len(self.done), item=item | {"content": []})
        self._open = item | {"content": [part]}
        yield self.frame("response.content_part.added", **self._where(), content_index=0, part=part)

    def _close(self, status: str) -> Iterator[bytes]:
        """End the open item, if there is one."""
        if (item := self._open) is None:
            return
        item["status"] = status
        where = self._where()
        if item["type"] == "message":
            part = item["content"][0]
            text, logprobs = part["text"], part["logprobs"]
            yield self.frame("response.output_text.done", **where, content_index=0, text=text, logprobs=logprobs)
            yield self.frame("response.content_part.done", **where, content_index=0, part=part)
        else:
            arguments = item["arguments"]
            yield self.frame("response.function_call_arguments.done", **where, name=item["name"], arguments=arguments)
        yield self.frame("response.output_item.done", output_index=len(self.done), item=item)
        self.done.append(item)
        self._open = None

    def _where(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self.done)}


def _usage(generation: ObservedGeneration) -> dict[str, Any]:
    usage: dict[str, Any] = generation.usage()
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
