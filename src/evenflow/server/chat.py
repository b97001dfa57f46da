"""POST /v1/chat/completions: messages through the model's template, answers with text and tool calls."""

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from evenflow.request import CompletionOutput
from evenflow.sampling_params import SamplingParams
from evenflow.server.answer import Answer, ToolCall
from evenflow.server.errors import ApiError
from evenflow.server.front import Front, ObservedGeneration, bad_request, raise_if_failed
from evenflow.server.logprobs import chat_logprobs
from evenflow.server.protocol import MAX_MESSAGES, MAX_TOP_LOGPROBS, ChatCompletionRequest, check_num_sequences
from evenflow.server.streaming import encode_json, stream_frames
from evenflow.server.tokenization import encode_messages
from evenflow.server.tool_use import ToolUse
from evenflow.server.tools import TextDelta, ToolCallStart, ToolEvent


class ChatCall:
    """One call, checked: raises ApiError before anything is queued. size: bytes of the body."""

    operation = "chat"

    def __init__(self, front: Front, body: ChatCompletionRequest, size: int) -> None:
        front.check_model(body.model)
        self.front, self.body, self._size = front, body, size
        if len(body.messages) > MAX_MESSAGES:
            raise ApiError(400, f"{len(body.messages)} messages; at most {MAX_MESSAGES} are taken", param="messages")
        self.n = 1 if body.n is None else body.n
        check_num_sequences(1, self.n)
        try:
            self.tools = ToolUse.of(body, front.tokenizer, front.config.tool_format)
            self.params = self._params()
        except ValueError as error:
            raise bad_request(error) from None
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def _params(self) -> SamplingParams:
        body = self.body
        top_logprobs = body.top_logprobs or 0
        if not 0 <= top_logprobs <= MAX_TOP_LOGPROBS:
            raise ValueError(f"top_logprobs={top_logprobs} must be from 0 to {MAX_TOP_LOGPROBS}")
        if body.top_logprobs and not body.logprobs:
            raise ValueError(f"top_logprobs={top_logprobs} needs logprobs: true")
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        max_tokens: int | None = getattr(body, name)
        if max_tokens is not None and not 0 < max_tokens < 2**31:
            raise ValueError(f"{name}={max_tokens} must be an integer from 1 to {2**31 - 1}")
        if max_tokens is None:
            max_tokens = self.front.default_max_tokens
            max_tokens = None if max_tokens is None else max(max_tokens, body.min_tokens or 0)
        fixed: dict[str, Any] = {"n": self.n, "max_tokens": max_tokens, "prompt_logprobs": None}
        fixed["logprobs"] = top_logprobs if body.logprobs else None
        return self.tools.constrain(body.to_params(self.front.opened.default_params, **fixed))

    async def open(self) -> ObservedGeneration:
        front, body = self.front, self.body
        try:
            token_ids = await front.client.off_loop(self._size, self._encode)
        except ValueError as error:
            raise bad_request(error) from None
        prompt: dict[str, Any] = {"prompt_token_ids": token_ids}
        name = body.structure_name()
        try:
            return await front.open(
                [prompt],
                self.params,
                streaming=bool(body.stream),
                cache_salt=body.cache_salt,
                structure_name=name or "tools",
                structure_parts=self.tools.structure_parts if name is None else tuple,
            )
        except ApiError as error:
            if error.param == "prompt":  # which was made of them
                error.param = "messages"
            raise

    def _encode(self) -> list[int]:
        return encode_messages(self.front.tokenizer, self.body, self.body.messages, self.tools.for_template)

    async def whole(self, generation: ObservedGeneration) -> bytes:
        """The answer as one JSON object."""
        choices: list[dict[str, Any]] = []
        async for _, output in generation:
            raise_if_failed(output)
            choices = [self._choice(completion) for completion in output.outputs]
        return encode_json(self._envelope("chat.completion") | {"choices": choices, "usage": generation.usage()})

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.front.model_name}

    def _choice(self, completion: CompletionOutput) -> dict[str, Any]:
        answer = Answer(self.tools)
        answer.feed(completion.text, is_last=True)
        message: dict[str, Any] = {"role": "assistant", "content": answer.text}
        if answer.calls:
            message["content"] = answer.text or None
            message["tool_calls"] = [_call(call) for call in answer.calls]
        return {
            "index": completion.index,
            "message": message,
            "logprobs": self.logprobs(completion),
            "finish_reason": answer.finish_reason(completion.finish_reason),
            "stop_reason": completion.stop_reason,
        }

    def logprobs(self, completion: CompletionOutput) -> dict[str, Any] | None:
        if completion.logprobs is None:
            return None
        tokenizer = self.front.opened.tokenizer
        return chat_logprobs(completion.token_ids, completion.logprobs, self.params.logprobs or 0, tokenizer)

    def frames(self, generation: ObservedGeneration) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""
        envelope = self._envelope("chat.completion.chunk")
        return stream_frames(self._parts(generation), envelope, self.body.stream_options, generation)

    async def _parts(self, generation: ObservedGeneration) -> AsyncGenerator[dict[str, Any], None]:
        answers = [Answer(self.tools) for _ in range(self.n)]
        for index in range(self.n):
            yield _part(index, {"role": "assistant", "content": ""})
        async for _, output in generation:
            raise_if_failed(output)
            for completion in output.outputs:
                for part in self._new_parts(answers[completion.index], completion):
                    yield part

    def _new_parts(self, answer: Answer, completion: CompletionOutput) -> list[dict[str, Any]]:
        events = answer.feed(completion.text, is_last=completion.finished())
        parts = [_part(completion.index, _delta(event, answer)) for event in events]
        logprobs = self.logprobs(completion) if completion.token_ids else None
        if not parts and (logprobs is not None or completion.finished()):
            parts = [_part(completion.index, {})]
        if parts:
            parts[0]["logprobs"] = logprobs  # of the tokens that brought these parts
        if completion.finished():
            parts[-1]["finish_reason"] = answer.finish_reason(completion.finish_reason)
            parts[-1]["stop_reason"] = completion.stop_reason
        return parts


def _part(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _delta(event: ToolEvent, answer: Answer) -> dict[str, Any]:
    """A streamed event as the change of a message."""
    if isinstance(event, TextDelta):
        return {"content": event.text}
    if isinstance(event, ToolCallStart):
        call = _call(answer.calls[event.index]) | {"index": event.index}
        call["function"] = {"name": event.name, "arguments": ""}
        return {"tool_calls": [call]}
    return {"tool_calls": [{"index": event.index, "function": {"arguments": event.delta}}]}
