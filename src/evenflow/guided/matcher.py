"""The engine's side of structured output: one matcher a request, masks for the rows that sample, tokens taken in.

A matcher has consumed exactly the request's output tokens, so preemption and recomputation leave it alone.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer

from evenflow.guided.grammar import LIMITS, refusal, to_grammar
from evenflow.request import Request, StepPlan, StepResult, TokenMasks
from evenflow.sampling_params import StructuredOutputsParams
from evenflow.tokenizer import Tokenizer

logger = logging.getLogger("evenflow")

MAX_CACHED_GRAMMARS = 64
NOTHING_LEFT = (
    "structured_outputs: bad_words, min_tokens or logit_bias leave no token that the grammar allows, or the model's "
    "logits are not finite"
)


class GuidedDecoding:
    """Of one engine. `begin` a request, wait until it `is_ready`, then `masks` and `advance` at every step.

    vocab_size: the width of the logits. eos_token_ids: allowed exactly where the grammar accepts.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._vocab_size, self._eos_token_ids = vocab_size, frozenset(eos_token_ids)
        self._make_tokenizer: Callable[[], LLTokenizer] = lambda: make_tokenizer(
            tokenizer, vocab_size, self._eos_token_ids
        )
        self._tokenizer: LLTokenizer | None = None  # takes up to a second for a large vocabulary: when first needed
        self._executor: LLExecutor | None = None
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="evenflow-grammar")
        self._matchers: dict[str, LLMatcher] = {}
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()  # by grammar; copied for each request

    def begin(self, request: Request) -> "Future[LLMatcher]":
        """Build the request's matcher in a thread; pass the result to `ready`, or its exception to whoever waits."""
        assert request.params.structured_outputs is not None
        return self._threads.submit(self._build, request.params.structured_outputs)

    def ready(self, request_id: str, matcher: LLMatcher) -> None:
        self._matchers[request_id] = matcher

    def forget(self, request_id: str) -> None:
        """The request has ended; harmless if unknown."""
        self._matchers.pop(request_id, None)

    def is_end(self, token_id: int) -> bool:
        """Is it an end-of-sequence token, which is no text also where a request ignores it?"""
        return token_id in self._eos_token_ids

    def _build(self, params: StructuredOutputsParams) -> LLMatcher:
        """In the thread, which alone touches the tokenizer and the compiled ones. Raises ValueError."""
        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer()
        grammar = to_grammar(params)
        if (known := self._compiled.get(grammar)) is None:
            known = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
            if known.is_error():
                raise ValueError(f"structured_outputs: {refusal(params, f'{known.get_error():.300}')}")
            self._compiled[grammar] = known
            if len(self._compiled) > MAX_CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return known.deep_copy()

    def masks(self, plan: StepPlan) -> TokenMasks | None:
        """Of the plan's guided rows that sample; None without any."""
        if not self._matchers:
            return None
        matchers = self._matchers
        found = [
            (index, matchers[request.request_id])
            for index, (row, request) in enumerate(zip(plan.rows, plan.requests, strict=True))
            if row.samples and request.request_id in matchers
        ]
        if not found:
            return None
        bits = np.full((len(found), -(-self._vocab_size // 32)), -1, dtype=np.int32)
        if self._executor is None:
            self._executor = LLExecutor()
        numbered = [(matcher, i) for i, (_, matcher) in enumerate(found)]
        self._executor.unsafe_compute_mask_ptr(numbered, bits.ctypes.data, bits.shape[1] * 4, len(found))
        return TokenMasks([index for index, _ in found], bits)

    def advance(self, plan: StepPlan, masks: TokenMasks, result: StepResult) -> list[str]:
        """Take the sampled tokens in. Returns the ids of the requests whose text is complete.

        A matcher that failed, or a token that it does not take, becomes an error of its row. Of a request that ended
        while the step ran nothing is known any more.
        """
        complete = []
        for index in masks.rows:
            request = plan.requests[index]
            if request.finish_reason is not None:
                continue
            if index in result.errors:
                params = request.params
                if params.bad_words or params.min_tokens or params.logit_bias:
                    result.errors[index] = NOTHING_LEFT
                continue
            request_id = request.request_id
            matcher = self._matchers[request_id]
            if matcher.is_error() or not matcher.consume_token(result.token_ids[index]):
                logger.error("request %s: its grammar failed: %s", request_id, matcher.get_error().partition("\n")[0])
                result.errors[index] = "structured_outputs: the grammar became too complex, or took no token"
            elif matcher.is_stopped():
                complete.append(request_id)
        return complete


class _Vocabulary:
    """What LLTokenizer asks for: the bytes of every token, and how a text is tokenized."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted(token_id for token_id in tokenizer.special_ids if token_id < vocab_size)
        special = set(self.special_token_ids)
        self.tokens = [
            tokenizer.token_text(token_id).encode() if token_id in special else tokenizer.token_bytes(token_id)
            for token_id in range(vocab_size)
        ]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def make_tokenizer(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> LLTokenizer:
    """The exact bytes of every token, as the detokenizer uses them; ids beyond the tokenizer's have none."""
    eos_ids = sorted(eos_token_ids) or [tokenizer.eos_token_id or 0]
    vocabulary: Any = _Vocabulary(tokenizer, vocab_size, eos_ids[0])
    return LLTokenizer(vocabulary, n_vocab=vocab_size, eos_token=eos_ids)
