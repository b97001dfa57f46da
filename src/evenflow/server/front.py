"""What the endpoints share: the engine's client, the model's name, who is admitted, what is observed of a request."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from enum import Enum

from evenflow.engine.client import EngineClient, EngineDeadError
from evenflow.engine.generation import Generation
from evenflow.engine.input import Prompt
from evenflow.engine.opening import OpenedModel
from evenflow.guided.checker import GrammarChecker
from evenflow.request import RequestOutput
from evenflow.sampling_params import SamplingParams, StructuredOutputsParams
from evenflow.server.config import ServerConfig
from evenflow.server.errors import ApiError
from evenflow.server.metrics import Metrics
from evenflow.server.protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest
from evenflow.server.tracing import RequestSpan, Tracer, request_attributes, response_attributes
from evenflow.tokenizer import Tokenizer

REQUEST_FIELDS = frozenset(
    CompletionRequest.__struct_fields__ + ChatCompletionRequest.__struct_fields__ + DetokenizeRequest.__struct_fields__
)
MAX_QUEUED_CONTEXTS = 64  # prompts of the full context, or as many tokens in shorter ones, may wait at a time


class State(str, Enum):
    """Of the server's life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"  # what runs may end, nothing new is taken
    DEAD = "dead"


class Front:
    """One model behind one server."""

    def __init__(
        self,
        client: EngineClient,
        config: ServerConfig,
        metrics: Metrics,
        tracer: Tracer | None,
        model_name: str,
    ) -> None:
        self.client, self.config, self.metrics, self.tracer = client, config, metrics, tracer
        self.model_name = model_name
        self.state = State.STARTING
        self.started_s = int(time.time())
        tokenizer = client.opened.tokenizer
        names = {} if tokenizer is None else {i: tokenizer.token_text(i) for i in sorted(tokenizer.special_ids)}
        self.checker = GrammarChecker(client.opened.model_config.vocab_size, names)
        self.num_live = 0  # HTTP requests that hold a generation

    @property
    def opened(self) -> OpenedModel:
        return self.client.opened

    @property
    def tokenizer(self) -> Tokenizer:
        if self.opened.tokenizer is None:
            raise ApiError(400, "this server was started with --skip-tokenizer-init; send and read token ids")
        return self.opened.tokenizer

    @property
    def max_model_len(self) -> int:
        return self.client.settings.max_model_len if self.client.settings else self.opened.model_config.max_context

    @property
    def default_max_tokens(self) -> int | None:
        """The model's own limit of an answer; None: up to the context."""
        if self.client.config.generation_config == "none":
            return None
        limit = self.opened.generation_config.get("max_new_tokens")
        return limit if isinstance(limit, int) else None

    def check_model(self, name: str | None) -> None:
        """A request may leave the model out, but not name another."""
        if name is not None and name != self.model_name:
            raise ApiError(
                404,
                f"the model {name!r:.200} does not exist; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    async def open(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        streaming: bool,
        cache_salt: str | None = None,
        add_special_tokens: bool = True,
        structure_name: str | None = None,
        structure_parts: Callable[[], Sequence[tuple[str, StructuredOutputsParams]]] = tuple,
    ) -> "ObservedGeneration":
        """Queue prompts, or raise what the client is told: 400 for a mistake, 429 when full, 503 while not serving.

        structure_name, structure_parts: what the structured output came from, see GrammarChecker.check.
        """
        self._admit(len(prompts) * params.n)
        asked_s = time.perf_counter()
        try:
            if params.structured_outputs is not None:
                name = structure_name or "structured_outputs"
                await asyncio.to_thread(self.checker.check, params.structured_outputs, name, structure_parts)
            generation = await self.client.open(
                prompts,
                params,
                streaming=streaming,
                cache_salt=cache_salt or "",
                add_special_tokens=add_special_tokens,
            )
        except ValueError as error:
            raise bad_request(error) from None
        except EngineDeadError:
            raise dead() from None
        return ObservedGeneration(self, generation, params, asked_s)

    def _admit(self, num_sequences: int) -> None:
        """Before tokenizing, which costs: is there room in the queue?"""
        if self.state is State.STARTING:
            raise ApiError(503, "the model is still loading; try again shortly", headers={"Retry-After": "2"})
        if self.state is State.DRAINING:
            raise ApiError(503, "the server is shutting down", headers={"Retry-After": "10"})
        if self.state is State.DEAD or self.client.settings is None:
            raise dead()
        settings, client = self.client.settings, self.client
        is_full = client.num_requests + num_sequences > settings.max_num_seqs + self.config.max_queue
        if is_full or client.num_prompt_tokens > MAX_QUEUED_CONTEXTS * settings.max_model_len:
            raise ApiError(429, "the queue is full; try again in a moment", headers={"Retry-After": "1"})


class ObservedGeneration:
    """A generation with its bookkeeping: outputs pass through, metrics and usage are kept. End it with `close`."""

    def __init__(self, front: Front, generation: Generation, params: SamplingParams, asked_s: float) -> None:
        self._front, self._generation, self._asked_s = front, generation, asked_s
        self.params = params
        self.prompt_lengths = generation.prompt_lengths
        self.num_output_tokens = [0] * len(self.prompt_lengths)
        self.num_cached_tokens = [0] * len(self.prompt_lengths)
        self._reasons: list[str | None] = [None] * len(self.prompt_lengths)
        self._span: tuple[RequestSpan, str, str] | None = None
        front.num_live += 1
        for length in self.prompt_lengths:
            front.metrics.request_started(length)

    async def __aiter__(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        try:
            async for index, output in self._generation:
                self._note(index, output)
                yield index, output
        except EngineDeadError:
            self._reasons = [reason or "error" for reason in self._reasons]
            raise dead() from None

    def _note(self, index: int, output: RequestOutput) -> None:
        self.num_output_tokens[index] += sum(len(completion.token_ids) for completion in output.outputs)
        self.num_cached_tokens[index] = max(self.num_cached_tokens[index], output.num_cached_tokens)
        if output.finished:
            reasons = [completion.finish_reason for completion in output.outputs if completion.finish_reason]
            self._reasons[index] = "error" if "error" in reasons else reasons[0] if reasons else "stop"

    def usage(self, *, counts_output: bool = True) -> dict[str, object]:
        """OpenAI's usage of all prompts together, so far."""
        prompt_tokens = sum(self.prompt_lengths)
        completion_tokens = sum(self.num_output_tokens) if counts_output else 0
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.num_cached_tokens)},
        }

    def trace(self, span: RequestSpan, response_id: str, operation: str) -> None:
        """The span ends with the generation."""
        self._span = (span, response_id, operation)

    def _finish_span(self, e2e_s: float) -> None:
        if self._span is None:
            return
        span, response_id, operation = self._span
        model, reasons = self._front.model_name, [reason or "abort" for reason in self._reasons]
        response = response_attributes(
            response_id=response_id,
            model=model,
            finish_reasons=reasons,
            num_prompt_tokens=sum(self.prompt_lengths),
            num_output_tokens=sum(self.num_output_tokens),
            num_cached_tokens=sum(self.num_cached_tokens),
            e2e_s=e2e_s,
            queue_s=self._generation.queue_s,
            ttft_s=self._generation.ttft_s,
        )
        error = "engine_error" if "error" in reasons else None
        span.finish(request_attributes(model, operation, self.params) | response, error)

    def close(self) -> None:
        """Whatever still runs is aborted. Harmless twice."""
        if self._generation.is_closed:
            return
        self._generation.abort()
        self._front.num_live -= 1
        e2e_s = time.perf_counter() - self._asked_s
        self._finish_span(e2e_s)
        for index, reason in enumerate(self._reasons):
            self._front.metrics.request_finished(
                reason or "abort",
                e2e_s,
                self.prompt_lengths[index],
                self.num_output_tokens[index],
                self.num_cached_tokens[index],
            )


def bad_request(error: ValueError) -> ApiError:
    """A ValueError of ours begins with the field's name."""
    message = str(error)
    name = re.split(r"[^a-z_]", message.removeprefix("the "), maxsplit=1)[0].replace("prompt_token_ids", "prompt")
    code = "context_length_exceeded" if "max_model_len" in message else None
    return ApiError(400, message, param=name if name in REQUEST_FIELDS else None, code=code)


def raise_if_failed(output: RequestOutput) -> None:
    """A completion that failed by itself: by a grammar, which is the client's, or by logits that are no numbers."""
    for completion in output.outputs:
        if completion.finish_reason == "error":
            if completion.error is not None and completion.error.startswith("structured_outputs"):
                raise ApiError(400, completion.error, param="structured_outputs")
            raise ApiError(500, f"the completion failed: {completion.error}", code="generation_failed")


def dead() -> ApiError:
    return ApiError(503, "the engine has stopped; the server is going down", headers={"Retry-After": "10"})


async def drained(front: Front, timeout_s: float) -> bool:
    """Wait until no request runs; False if some still do after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while front.num_live and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    return not front.num_live
