"""The sampler of a device: the parameters of running requests live there, and a plain step is one launch.

Requests that want more (biases, bad words, penalties, grammar masks, filters, log-probabilities) cost launches for
their stage only; rows that do not want a stage leave its kernel at once. The semantics are those of sampler.py.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evenflow.kernels.draw import draw
from evenflow.kernels.filter import filter_thresholds
from evenflow.kernels.logprobs import token_logprobs
from evenflow.kernels.masks import apply_masks_
from evenflow.kernels.penalties import apply_penalties_
from evenflow.request import TokenMasks
from evenflow.runner.device_batch import DeviceSlots
from evenflow.runner.sampler import Ints, Sampler


@dataclass(frozen=True, slots=True)
class Sampled:
    """Of S rows, on the device. token_ids: [S] int32, -1 where the row is bad.

    logprob_rows: the rows that asked for log-probabilities, and how many each wants beside its token; logprobs: of
    these rows (ids, logprobs, ranks), see token_logprobs.
    """

    token_ids: Tensor
    logprob_rows: list[tuple[int, int]]
    logprobs: tuple[Tensor, Tensor, Tensor] | None


class DeviceSampler(Sampler):
    """Samples the next token of every row, and writes it to the token buffer."""

    def __init__(self, max_num_seqs: int, vocab_size: int, slots: DeviceSlots) -> None:
        super().__init__(max_num_seqs, vocab_size, slots.stream.device)
        self.slots = slots
        self._counts: Tensor | None = None  # of the penalised rows' tokens; zero between steps

    def draw(self, logits: Tensor, slots: Ints, lengths: Ints, masks: TokenMasks | None = None) -> Sampled:
        """logits: [S, V] of the first S of the step's sample_slots, which are `slots` and `lengths` on the host too."""
        state, count = self.state, len(slots)
        device_slots = self.slots.rows.sample_slots[:count]
        device_lengths = self.slots.rows.sample_lengths[:count]
        asking = np.flatnonzero(state.num_logprobs[slots] >= 0)
        raw = logits[self._tensor(asking)].float() if len(asking) else None
        logits = self._edited(logits, slots, lengths, device_slots, device_lengths, masks)
        thresholds = None
        if state.is_filtered[slots].any():
            thresholds = filter_thresholds(logits, self.slots.params, device_slots)
        token_ids = draw(logits, self.slots.params, device_slots, device_lengths, self.slots.token_ids, thresholds)
        tensors, wanted = None, []
        if raw is not None:
            counts = state.num_logprobs[slots[asking]]
            wanted = list(zip(asking.tolist(), counts.tolist(), strict=True))
            chosen = token_ids[self._tensor(asking)].clamp(min=0).to(torch.int64)
            tensors = token_logprobs(raw, chosen, int(counts.max()))
        return Sampled(token_ids, wanted, tensors)

    def _edited(
        self,
        logits: Tensor,
        slots: Ints,
        lengths: Ints,
        device_slots: Tensor,
        device_lengths: Tensor,
        masks: TokenMasks | None,
    ) -> Tensor:
        """In float32 after the first edit; the logits themselves when nobody wants any."""
        state, buffer = self.state, self.slots.token_ids
        is_short = lengths - state.num_prompt_tokens[slots] < state.min_tokens[slots]
        has_biases = bool((state.has_bias[slots] | is_short | state.has_bad_words[slots]).any())
        is_penalised = bool(state.is_penalised[slots].any())
        if not (has_biases or is_penalised or masks is not None):
            return logits
        logits = logits.float()
        if has_biases:
            self._add_biases(logits, slots, lengths, buffer)
        if is_penalised:
            counts = self._counts_for(logits)
            apply_penalties_(logits, buffer, self.slots.params, device_slots, device_lengths, counts)
        if masks is not None:
            apply_masks_(logits, self._tensor(np.array(masks.rows)), self._tensor(masks.bits))
        return logits

    def _counts_for(self, logits: Tensor) -> Tensor:
        if self._counts is None or len(self._counts) < len(logits):
            self._counts = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
        return self._counts[: len(logits)]
