"""POST /v1/completions: all four forms of a prompt, echo, log-probabilities, best_of, streamed or whole."""

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from evenflow.request import CompletionOutput, RequestOutput
from evenflow.sampling_params import SamplingParams
from evenflow.server.errors import ApiError
from evenflow.server.front import Front, ObservedGeneration, bad_request, raise_if_failed
from evenflow.server.logprobs import TextOffsets, completion_logprobs, plain_prompt_logprobs
from evenflow.server.protocol import CompletionRequest, check_num_sequences, split_prompts
from evenflow.server.streaming import encode_json, stream_frames

DEFAULT_MAX_TOKENS = 16


class CompletionCall:
    """One call, checked: raises ApiError before anything is queued."""

    operation = "text_completion"

    def __init__(self, front: Front, body: CompletionRequest) -> None:
        front.check_model(body.model)
        self.front, self.body = front, body
        self.prompts = split_prompts(body.prompt)
        self.n = 1 if body.n is None else body.n
        self.wants_output = body.max_tokens != 0 or not body.echo
        self.params = self._params()
        check_num_sequences(len(self.prompts), self.params.n)
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._envelope = {
            "id": self.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": front.model_name,
        }

    def _params(self) -> SamplingParams:
        body = self.body
        self._check_combinations()
        fixed: dict[str, Any] = {"n": body.best_of or self.n, "logprobs": body.logprobs}
        fixed["max_tokens"] = body.max_tokens
        if body.max_tokens is None:
            fixed["max_tokens"] = max(DEFAULT_MAX_TOKENS, body.min_tokens or 0)
        elif not self.wants_output:
            fixed["max_tokens"] = 1  # the engine computes a prompt by sampling after it; that token is dropped
        if fixed["n"] > self.n and body.logprobs is None:
            fixed["logprobs"] = 0
        fixed["prompt_logprobs"] = body.prompt_logprobs
        if self.echoes_logprobs:
            fixed["prompt_logprobs"] = max(body.logprobs or 0, body.prompt_logprobs or 0)
        try:
            return body.to_params(self.front.opened.default_params, **fixed)
        except ValueError as error:
            raise bad_request(error) from None

    def _check_combinations(self) -> None:
        body, best_of = self.body, self.body.best_of or self.n
        if best_of < self.n:
            raise ApiError(400, f"best_of={best_of} must be at least n={self.n}", param="best_of")
        if body.stream and best_of > self.n:
            raise ApiError(400, f"best_of={best_of} cannot be streamed; raise n, or do not stream", param="best_of")
        if body.stream and body.prompt_logprobs is not None:
            raise ApiError(400, "prompt_logprobs cannot be streamed; use echo with logprobs", param="prompt_logprobs")

    @property
    def echoes_logprobs(self) -> bool:
        return bool(self.body.echo) and self.body.logprobs is not None

    async def open(self) -> ObservedGeneration:
        return await self.front.open(
            self.prompts,
            self.params,
            streaming=bool(self.body.stream),
            cache_salt=self.body.cache_salt,
            add_special_tokens=self.body.add_special_tokens is not False,
            structure_name=self.body.structure_name(),
        )

    async def whole(self, generation: ObservedGeneration) -> bytes:
        """The answer as one JSON object."""
        choices: dict[int, list[dict[str, Any]]] = {}
        async for prompt_index, output in generation:
            raise_if_failed(output)
            choices[prompt_index] = [
                self._choice(prompt_index, rank, output, completion)
                for rank, completion in enumerate(self._best(output.outputs))
            ]
        in_order = [choice for prompt_index in sorted(choices) for choice in choices[prompt_index]]
        usage = generation.usage(counts_output=self.wants_output)
        return encode_json(self._envelope | {"choices": in_order, "usage": usage})

    def _best(self, completions: list[CompletionOutput]) -> list[CompletionOutput]:
        if len(completions) == self.n:
            return completions
        return sorted(completions, key=_mean_logprob, reverse=True)[: self.n]

    def _choice(
        self, prompt_index: int, rank: int, output: RequestOutput, completion: CompletionOutput
    ) -> dict[str, Any]:
        choice = _Choice(self, prompt_index * self.n + rank).part(output, completion)
        if self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = plain_prompt_logprobs(output.prompt_logprobs or [])
        return choice

    def frames(self, generation: ObservedGeneration) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""
        parts = self._parts(generation)
        return stream_frames(parts, self._envelope, self.body.stream_options, generation, self.wants_output)

    async def _parts(self, generation: ObservedGeneration) -> AsyncGenerator[dict[str, Any], None]:
        """Parts of choices as they come. An echo with log-probabilities waits until the prompt's are complete."""
        choices = [_Choice(self, index) for index in range(len(self.prompts) * self.n)]
        held: list[list[CompletionOutput]] = [[] for _ in self.prompts]
        sources: dict[int, RequestOutput] = {}  # by prompt: what an echo is made of
        async for prompt_index, output in generation:
            raise_if_failed(output)
            held[prompt_index] += output.outputs
            if output.prompt_logprobs is not None or not self.echoes_logprobs:
                sources.setdefault(prompt_index, output)
            if (source := sources.get(prompt_index)) is not None:
                told, held[prompt_index] = held[prompt_index], []
                for completion in told:
                    yield choices[prompt_index * self.n + completion.index].part(source, completion)


class _Choice:
    """One choice, and how much of it has been told."""

    def __init__(self, call: CompletionCall, index: int) -> None:
        self._call, self._index = call, index
        self._is_first = True
        self._offsets = TextOffsets(call.front.opened.tokenizer, call.params.skip_special_tokens)

    def part(self, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        """The next part of it: all of it where nothing is streamed."""
        call, tokenizer = self._call, self._call.front.opened.tokenizer
        text, token_ids = completion.text, completion.token_ids
        entries: list[Any] = list(completion.logprobs or [])
        if not call.wants_output:
            text, token_ids, entries = "", [], []
        if self._is_first and call.body.echo:
            text = self._prompt_text(output) + text
            if call.echoes_logprobs:
                token_ids = output.prompt_token_ids + token_ids
                entries = list(output.prompt_logprobs or []) + entries
        logprobs = None
        if call.body.logprobs is not None:
            logprobs = completion_logprobs(token_ids, entries, call.body.logprobs, tokenizer, self._offsets)
        self._is_first = False
        return {
            "index": self._index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason if call.wants_output or not completion.finished() else "length",
            "stop_reason": completion.stop_reason,
        }

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        return self._call.front.tokenizer.decode(output.prompt_token_ids, self._call.params.skip_special_tokens)


def _mean_logprob(completion: CompletionOutput) -> float:
    return (completion.cumulative_logprob or 0.0) / max(1, len(completion.token_ids))
