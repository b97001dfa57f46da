"""The runner's sampler: logits of the rows that sample -> tokens and log-probabilities.

Owns the sampling parameters of the running requests, by slot. They are read once, when a request is admitted; a step
gathers them by slot, and a stage runs only if, and only on, rows that need it. Nothing else is kept between steps:
penalties count the token buffer anew and the noise is a function of (seed, number of output tokens), so preemption,
batching and order leave no trace in the tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evenflow.kernels.logprobs import token_logprobs
from evenflow.kernels.sampling import (
    apply_masks_,
    apply_penalties_,
    bad_word_bias,
    filtered_argmax,
    gumbel_argmax,
    row_max,
)
from evenflow.request import AdmittedRequest, TokenLogprobs, TokenMasks
from evenflow.sampling_params import SamplingParams

Ints = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

SMALLEST_TEMPERATURE = 1e-5  # below it a request is greedy
CANDIDATES = (64, 256)  # sorted first, on CPU: for rows with top_k below 64, and for the other filtered rows
PROMPT_CHUNK_BYTES = 64 * 2**20  # of float32 logits


def is_greedy(params: SamplingParams) -> bool:
    """Whether the likeliest token is certain to be drawn, or the temperature is too low to divide by."""
    return params.temperature < SMALLEST_TEMPERATURE or params.top_k == 1


class SamplingState:
    """One entry a slot. Row-wise numbers are arrays; `edits` and `bad_words` hold what differs in length."""

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.temperature = np.ones(max_num_seqs, dtype=np.float32)  # 0 is greedy
        self.top_k = np.zeros(max_num_seqs, dtype=np.int64)  # 0 keeps all
        self.top_p = np.ones(max_num_seqs, dtype=np.float64)
        self.min_p = np.zeros(max_num_seqs, dtype=np.float32)
        self.repetition = np.ones(max_num_seqs, dtype=np.float32)
        self.presence = np.zeros(max_num_seqs, dtype=np.float32)
        self.frequency = np.zeros(max_num_seqs, dtype=np.float32)
        self.seed = np.zeros(max_num_seqs, dtype=np.int64)  # the 64 bits
        self.num_prompt_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self.min_tokens = np.zeros(max_num_seqs, dtype=np.int64)  # 0 without stop tokens
        self.num_logprobs = np.full(max_num_seqs, -1, dtype=np.int64)  # -1: none asked for
        self.is_penalised = np.zeros(max_num_seqs, dtype=bool)
        self.is_filtered = np.zeros(max_num_seqs, dtype=bool)
        self.has_bias = np.zeros(max_num_seqs, dtype=bool)
        self.has_bad_words = np.zeros(max_num_seqs, dtype=bool)
        no_ids: Ints = np.zeros(0, dtype=np.int64)
        self.stop_ids: list[Ints] = [no_ids] * max_num_seqs
        self.bias_ids: list[Ints] = [no_ids] * max_num_seqs
        self.biases: list[Array] = [np.zeros(0, dtype=np.float32)] * max_num_seqs
        self.bad_word_prefixes: list[Ints] = [no_ids] * max_num_seqs  # [words, longest prefix], -1 on the left
        self.bad_word_ends: list[Ints] = [no_ids] * max_num_seqs  # [words], the last token of each

    def admit(self, request: AdmittedRequest) -> None:
        """Overwrite the slot. A seed is taken modulo 2**64; None counts as 0."""
        slot, params = request.slot, request.params
        self.temperature[slot] = 0.0 if is_greedy(params) else params.temperature
        self.top_k[slot] = params.top_k if params.top_k < self.vocab_size else 0
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.is_filtered[slot] = self.top_k[slot] > 0 or params.top_p < 1 or params.min_p > 0
        self.repetition[slot] = params.repetition_penalty
        self.presence[slot] = params.presence_penalty
        self.frequency[slot] = params.frequency_penalty
        self.is_penalised[slot] = (
            params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        )
        seed = (params.seed or 0) % 2**64
        self.seed[slot] = seed - 2**64 if seed >= 2**63 else seed
        self.num_prompt_tokens[slot] = request.num_prompt_tokens
        self.num_logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        self._admit_lists(request)

    def _admit_lists(self, request: AdmittedRequest) -> None:
        slot, params = request.slot, request.params
        self.stop_ids[slot] = np.array([i for i in request.stop_token_ids if i < self.vocab_size], dtype=np.int64)
        self.min_tokens[slot] = params.min_tokens if len(self.stop_ids[slot]) else 0
        self.bias_ids[slot] = np.array(list(params.logit_bias), dtype=np.int64)
        self.biases[slot] = np.array(list(params.logit_bias.values()), dtype=np.float32)
        self.has_bias[slot] = len(params.logit_bias) > 0
        words = [word for word in request.bad_words_ids if word and word[-1] < self.vocab_size]
        longest = max((len(word) for word in words), default=1) - 1
        padded = [[-1] * (longest + 1 - len(word)) + word for word in words]
        table = np.array(padded, dtype=np.int64).reshape(len(words), longest + 1)
        self.bad_word_prefixes[slot], self.bad_word_ends[slot] = table[:, :-1], table[:, -1]
        self.has_bad_words[slot] = len(words) > 0


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """Of R rows, on the device. token_ids: [R] int64, -1 where is_bad: [R]. The properties wait for the device.

    logprob_rows: the rows that asked for log-probabilities, and how many each wants beside its token.
    """

    token_ids: Tensor
    is_bad: Tensor
    logprob_rows: list[tuple[int, int]]
    logprob_tensors: tuple[Tensor, Tensor, Tensor] | None

    @property
    def bad_rows(self) -> list[int]:
        """Rows whose logits hold NaN or +inf, or nothing but -inf after all edits."""
        return [row for row, is_bad in enumerate(self.is_bad.tolist()) if is_bad]

    @property
    def logprobs(self) -> dict[int, TokenLogprobs]:
        """By row, of the rows that asked and are not bad."""
        if self.logprob_tensors is None:
            return {}
        bad = set(self.bad_rows)
        lists = zip(self.logprob_rows, *(tensor.tolist() for tensor in self.logprob_tensors), strict=True)
        return {
            row: TokenLogprobs(ids[: 1 + wanted], logprobs[: 1 + wanted], rank)
            for (row, wanted), ids, logprobs, rank in lists
            if row not in bad
        }


def to_lists(chunks: list[tuple[Tensor, Tensor, Tensor]]) -> list[TokenLogprobs]:
    """One entry a row of the chunks. Waits for the device."""
    found = []
    for tensors in chunks:
        columns = zip(*(tensor.tolist() for tensor in tensors), strict=True)
        found += [TokenLogprobs(ids, logprobs, rank) for ids, logprobs, rank in columns]
    return found


class Sampler:
    """Samples the next token of every row by its slot's parameters, in vLLM's order of operations."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self.device = device
        self.state = SamplingState(max_num_seqs, vocab_size)

    def admit(self, request: AdmittedRequest) -> None:
        """Take over the parameters of a request that enters the running set."""
        self.state.admit(request)

    @torch.inference_mode()
    def sample(
        self,
        logits: Tensor,
        slots: Ints,
        lengths: Ints,
        token_ids: Tensor | Array,
        masks: TokenMasks | None = None,
    ) -> SampledTokens:
        """logits: [R, V], overwritten if float32; slots, lengths (prompt + output so far): [R], on the host.

        token_ids: the token buffer, [max_num_seqs, at least the longest length], an array or a tensor on the device.
        masks: what grammars allow in some of the R rows.
        """
        state = self.state
        logits = logits.float()
        asking = np.flatnonzero(state.num_logprobs[slots] >= 0)
        raw = logits[self._tensor(asking)] if len(asking) else None
        buffer = torch.as_tensor(token_ids)
        self._add_biases(logits, slots, lengths, buffer)
        self._penalise(logits, slots, lengths, buffer)
        if masks is not None:
            apply_masks_(logits, self._tensor(np.array(masks.rows)), self._tensor(masks.bits))
        best, sampled = self._draw(logits, slots, lengths)
        is_bad = ~torch.isfinite(best)
        tensors, wanted = None, []
        if raw is not None:
            counts = state.num_logprobs[slots[asking]]
            wanted = list(zip(asking.tolist(), counts.tolist(), strict=True))
            tensors = token_logprobs(raw, sampled[self._tensor(asking)], int(counts.max()))
        return SampledTokens(sampled.masked_fill(is_bad, -1), is_bad, wanted, tensors)

    @torch.inference_mode()
    def prompt_logprobs(
        self, to_logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, k: int
    ) -> list[TokenLogprobs]:
        """Log-probabilities of `targets`: [P] under to_logits(hidden: [P, D]), each with the k best.

        The logits exist for as many rows at a time as fit PROMPT_CHUNK_BYTES.
        """
        return to_lists(self.prompt_logprob_tensors(to_logits, hidden, targets, k))

    @torch.inference_mode()
    def prompt_logprob_tensors(
        self, to_logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, k: int
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The same on the device, a chunk of rows each: token_logprobs' (ids, logprobs, ranks)."""
        step = max(1, PROMPT_CHUNK_BYTES // (4 * self.state.vocab_size))
        return [
            token_logprobs(
                to_logits(hidden[start : start + step]).float(),
                targets[start : start + step].to(hidden.device),
                k,
            )
            for start in range(0, len(hidden), step)
        ]

    def _add_biases(self, logits: Tensor, slots: Ints, lengths: Ints, buffer: Tensor) -> None:
        """logit_bias, -inf for stop tokens before min_tokens, and -inf for what would complete a bad word.

        All are added in one scatter: -inf wins whatever the order, and a NaN stays one.
        """
        state = self.state
        rows: list[Ints] = []
        ids: list[Ints] = []
        biases: list[Array] = []
        for row in np.flatnonzero(state.has_bias[slots]).tolist():
            rows.append(np.full(len(state.bias_ids[slots[row]]), row))
            ids.append(state.bias_ids[slots[row]])
            biases.append(state.biases[slots[row]])
        num_output_tokens = lengths - state.num_prompt_tokens[slots]
        for row in np.flatnonzero(num_output_tokens < state.min_tokens[slots]).tolist():
            stop_ids = state.stop_ids[slots[row]]
            rows.append(np.full(len(stop_ids), row))
            ids.append(stop_ids)
            biases.append(np.full(len(stop_ids), -np.inf, dtype=np.float32))
        if rows:
            index = self._tensor(np.concatenate(rows)), self._tensor(np.concatenate(ids))
            logits.index_put_(index, self._tensor(np.concatenate(biases)), accumulate=True)
        if state.has_bad_words[slots].any():
            self._ban_words(logits, slots, lengths, buffer)

    def _ban_words(self, logits: Tensor, slots: Ints, lengths: Ints, buffer: Tensor) -> None:
        state = self.state
        rows = np.flatnonzero(state.has_bad_words[slots])
        tables = [state.bad_word_prefixes[slot] for slot in slots[rows]]
        ends = np.concatenate([state.bad_word_ends[slot] for slot in slots[rows]])
        prefixes = np.full((len(ends), max(table.shape[1] for table in tables)), -1, dtype=np.int64)
        start = 0
        for table in tables:
            prefixes[start : start + len(table), prefixes.shape[1] - table.shape[1] :] = table
            start += len(table)
        word_rows = np.repeat(rows, [len(table) for table in tables])
        columns = lengths[word_rows, None] + np.arange(-prefixes.shape[1], 0)
        tails = buffer[self._tensor(slots[word_rows, None]), self._tensor(columns.clip(min=0))]
        bias = bad_word_bias(
            tails.to(torch.int64),
            self._tensor(state.num_prompt_tokens[slots[word_rows]]),
            self._tensor(lengths[word_rows]),
            self._tensor(prefixes),
        )
        logits.index_put_((self._tensor(word_rows), self._tensor(ends)), bias, accumulate=True)

    def _penalise(self, logits: Tensor, slots: Ints, lengths: Ints, buffer: Tensor) -> None:
        state = self.state
        rows = np.flatnonzero(state.is_penalised[slots])
        if not len(rows):
            return
        part = slots[rows]
        index = self._tensor(rows)
        penalised = logits if len(rows) == len(slots) else logits[index]
        apply_penalties_(
            penalised,
            buffer[self._tensor(part), : int(lengths[rows].max())].to(torch.int64),
            self._tensor(state.num_prompt_tokens[part]),
            self._tensor(lengths[rows]),
            self._tensor(state.repetition[part]),
            self._tensor(state.presence[part]),
            self._tensor(state.frequency[part]),
        )
        if penalised is not logits:
            logits[index] = penalised

    def _draw(self, logits: Tensor, slots: Ints, lengths: Ints) -> tuple[Tensor, Tensor]:
        """(best score, token id) of every row: greedy rows, plain draws and filtered draws, each kind together."""
        is_greedy = self.state.temperature[slots] == 0
        is_filtered = self.state.is_filtered[slots] & ~is_greedy
        is_small = is_filtered & (self.state.top_k[slots] > 0) & (self.state.top_k[slots] < CANDIDATES[0])
        kinds = [is_greedy, ~is_greedy & ~is_filtered, is_small, is_filtered & ~is_small]
        best = torch.empty(len(slots), dtype=torch.float32, device=logits.device)
        token_ids = torch.empty(len(slots), dtype=torch.int64, device=logits.device)
        for kind, mask in enumerate(kinds):
            rows = np.flatnonzero(mask)
            if len(rows) == len(slots):
                return self._draw_kind(kind, logits, slots, lengths)
            if len(rows):
                index = self._tensor(rows)
                best[index], token_ids[index] = self._draw_kind(kind, logits[index], slots[rows], lengths[rows])
        return best, token_ids

    def _draw_kind(self, kind: int, logits: Tensor, slots: Ints, lengths: Ints) -> tuple[Tensor, Tensor]:
        if kind == 0:
            return row_max(logits)
        state = self.state
        temperatures = self._tensor(state.temperature[slots])
        seeds = self._tensor(state.seed[slots])
        positions = self._tensor(lengths - state.num_prompt_tokens[slots])
        if kind == 1:
            return gumbel_argmax(logits, temperatures, seeds, positions)
        top_k, top_p, min_p = (self._tensor(values[slots]) for values in (state.top_k, state.top_p, state.min_p))
        num_candidates = CANDIDATES[kind - 2] if self.device.type == "cpu" else 0
        return filtered_argmax(logits, temperatures, top_k, top_p, min_p, seeds, positions, num_candidates)

    def _tensor(self, array: Array) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)
