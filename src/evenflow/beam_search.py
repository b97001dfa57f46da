"""Beam search over an engine that continues sequences by one token. Owns the beams; the prefix cache keeps it cheap."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from evenflow.sampling_params import BeamSearchParams

# Sequences of token ids -> for each, its best next tokens with their log-probabilities, best first.
NextTokens = Callable[[Sequence[list[int]]], list[list[tuple[int, float]]]]


@dataclass(frozen=True, slots=True)
class BeamSequence:
    """One continuation. token_ids: generated ones only, with the end-of-sequence token if it ended so."""

    token_ids: list[int]
    cumulative_logprob: float
    finish_reason: str | None = None
    text: str = ""
    prompt_token_ids: list[int] = field(default_factory=list, repr=False)

    @property
    def tokens(self) -> list[int]:
        """vLLM's name, which counts the prompt in: prompt_token_ids + token_ids."""
        return self.prompt_token_ids + self.token_ids

    @property
    def cum_logprob(self) -> float:
        """vLLM's name of cumulative_logprob."""
        return self.cumulative_logprob

    def score(self, length_penalty: float) -> float:
        length: float = max(len(self.token_ids), 1) ** length_penalty
        return self.cumulative_logprob / length


@dataclass(slots=True)
class BeamSearchOutput:
    """The best continuations of one prompt, best first."""

    prompt_token_ids: list[int]
    sequences: list[BeamSequence]


@dataclass(slots=True)
class _Search:
    prompt: list[int]
    max_tokens: int
    beams: list[BeamSequence] = field(default_factory=lambda: [BeamSequence([], 0.0)])
    ended: list[BeamSequence] = field(default_factory=list)


def beam_search(
    prompts: Sequence[list[int]],
    params: BeamSearchParams,
    eos_token_ids: frozenset[int],
    next_tokens: NextTokens,
    max_model_len: int = 1 << 31,
) -> list[BeamSearchOutput]:
    """Search every prompt at once, a token per step. next_tokens must return at least 2 * beam_width candidates.

    max_model_len: of a prompt and its continuation together; a long prompt does not shorten the others' answers.
    """
    searches = [_Search(list(prompt), min(params.max_tokens, max_model_len - len(prompt))) for prompt in prompts]
    ends = frozenset() if params.ignore_eos else eos_token_ids
    for step in range(params.max_tokens):
        going = [search for search in searches if step < search.max_tokens and search.beams]
        if not going:
            break
        found = iter(next_tokens([search.prompt + beam.token_ids for search in going for beam in search.beams]))
        for search in going:
            _extend(search, [next(found) for _ in search.beams], params.beam_width, ends)
    return [BeamSearchOutput(search.prompt, _best(search, params)) for search in searches]


def _extend(search: _Search, found: list[list[tuple[int, float]]], width: int, ends: frozenset[int]) -> None:
    """The best `width` open continuations go on; an end among the best `width` candidates is kept aside."""
    candidates = [
        BeamSequence([*beam.token_ids, token_id], beam.cumulative_logprob + logprob)
        for beam, tokens in zip(search.beams, found, strict=True)
        for token_id, logprob in tokens[: 2 * width]
    ]
    candidates.sort(key=lambda beam: beam.cumulative_logprob, reverse=True)
    search.beams = []
    for rank, beam in enumerate(candidates):
        if beam.token_ids[-1] not in ends:
            search.beams.append(beam)
        elif rank < width:
            search.ended.append(BeamSequence(beam.token_ids, beam.cumulative_logprob, "stop"))
        if len(search.beams) == width:
            break


def _best(search: _Search, params: BeamSearchParams) -> list[BeamSequence]:
    unended = [BeamSequence(beam.token_ids, beam.cumulative_logprob, "length") for beam in search.beams]
    sequences = sorted(search.ended + unended, key=lambda beam: beam.score(params.length_penalty), reverse=True)
    return [replace(beam, prompt_token_ids=search.prompt) for beam in sequences[: params.beam_width]]
