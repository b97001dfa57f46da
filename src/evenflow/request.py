"""The data that flows, in its order: Request -> StepPlan -> StepResult -> RequestDelta -> RequestOutput.

Owns the shapes of what the stages hand to each other and no behaviour. Imports no torch: the front end, the scheduler
and the benchmarks read these too.
"""

from dataclasses import dataclass, field
from enum import Enum

import msgspec
import numpy as np
import numpy.typing as npt

from evenflow.sampling_params import SamplingParams


class FinishReason(str, Enum):
    """Why a request ended. The values are OpenAI's where OpenAI has one."""

    STOP = "stop"  # end-of-sequence, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the context
    ABORT = "abort"  # the client left
    ERROR = "error"  # this request failed; `error` says why


@dataclass(eq=False, slots=True)
class Request:
    """One sequence on its way through the engine. The front fills the first block, the scheduler owns the rest.

    `token_ids` holds prompt and output and grows by one per sampled token. `max_tokens` is resolved (prompt and
    max_tokens fit the context). `stop_token_ids` contains the model's end-of-sequence ids unless the user ignores
    them.
    """

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    bad_words_ids: list[list[int]] = field(default_factory=list)  # each: token ids that may not appear in this order
    cache_salt: str = ""  # requests share cached blocks only with requests of the same salt
    num_prompt_tokens: int = 0  # set from token_ids

    num_computed_tokens: int = (
        0  # tokens whose keys and values are in the cache, or will be once the launched steps ran
    )
    num_inflight_tokens: int = 0  # sampled by a launched step, not collected yet
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache when first admitted
    num_preemptions: int = 0
    num_prompt_logprobs: int = 0  # prompt positions already reported
    num_registered_blocks: int = 0  # blocks of the table that the prefix cache knows, from the first
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # chained hashes of the full blocks of token_ids
    slot: int = -1  # row of the runner's state while running
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None  # the stop token that ended it, if it was not the end-of-sequence token
    error: str | None = None

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


class AdmittedRequest(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What the runner must know of a request that enters (or, after preemption, re-enters) the running set.

    From here on the runner appends the tokens that it samples by itself.
    """

    slot: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    stop_token_ids: list[int]  # sorted; not sampled before params.min_tokens
    bad_words_ids: list[list[int]]


class ScheduledRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One row of the next batch: compute tokens [start, end) of the request in `slot`, then sample one if `samples`.

    `new_block_ids` extend the slot's block table, which starts empty when the slot is admitted.
    """

    slot: int
    start: int
    end: int
    samples: bool
    new_block_ids: list[int]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, decided. Everything but `requests` is all that a worker receives.

    admitted: applied before the rows. rows: at most one per slot. requests: the request of each row, for the engine.
    zero_block_ids: blocks to be zeroed before this step writes (a failed request may have left NaNs in them).
    """

    admitted: list[AdmittedRequest]
    rows: list[ScheduledRow]
    requests: list[Request]
    zero_block_ids: list[int]

    @property
    def num_tokens(self) -> int:
        return sum(row.end - row.start for row in self.rows)


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Which tokens a grammar allows next. rows: indices into StepPlan.rows; bits: [len(rows), ceil(V / 32)] int32.

    Bit i of word w stands for token 32 * w + i.
    """

    rows: list[int]
    bits: npt.NDArray[np.int32]


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probabilities at one position. Entry 0 is the token that stands there, the rest the best, in falling order.

    `rank` is the 1-based rank of entry 0 over the vocabulary.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the runner sampled, aligned with StepPlan.rows.

    token_ids: -1 where the row does not sample or failed. logprobs: by row index, where asked for.
    prompt_logprobs: by row index, one entry per prompt position p in [start, end) with p + 1 < num_prompt_tokens, about
    token p + 1. errors: by row index; the rows that failed alone.
    """

    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


class RequestDelta(msgspec.Struct, array_like=True, gc=False):
    """What one step brought to one request: engine -> front."""

    request_id: str
    new_token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None  # one per new token, where asked for
    prompt_logprobs: list[TokenLogprobs] | None = None  # the next part of them
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    is_grammar_end: bool = False  # a complete grammar ended it with a token that is text


@dataclass(frozen=True, slots=True)
class Logprob:
    """One alternative: its log-probability, its 1-based rank in the vocabulary, and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's `n` completions. `stop_reason` is the stop string or stop token id that ended it."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    lora_request: None = None  # vLLM's field

    def finished(self) -> bool:
        """Whether it has ended. A method, as in vLLM; RequestOutput.finished is none."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """What the caller gets for one prompt. `prompt_logprobs[0]` is None: nothing precedes the first token.

    prompt: the text, where one was given; a chat's as the template rendered it.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: None = None  # vLLM's fields
    lora_request: None = None
