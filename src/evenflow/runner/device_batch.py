"""A step on its way to the device: the integers of its rows in one pinned buffer, and the tensors made from them there.

The host writes a few words a row; token ids, positions and the places of keys are worked out on the device (see
kernels/step_inputs.py) from the token buffer and the block tables, which live there. The words of step N are read by
the device some time before step N is collected, so as many buffers take turns as steps are in flight, and one more.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evenflow.kernels.sampling_table import NUM_COLUMNS, pack_params
from evenflow.kernels.step_inputs import scatter_words
from evenflow.request import AdmittedRequest, StepPlan
from evenflow.runner.sampler import is_greedy
from evenflow.runner.stream import Stream

Ints = npt.NDArray[np.int64]
MIN_UPDATES = 1 << 14


def aligned_words(count: int) -> int:
    """So many int32 words or a few more, divisible by 16: what a model's kernels are compiled for does not depend on
    how many requests, tokens or blocks a server is started for."""
    return -(-count // 16) * 16


class RowWords:
    """Views of one buffer of int32 words: what a step says of its N = max_num_seqs rows.

    query_starts: [N + 1]; starts, seq_lens, slots: [N]. Of the rows that sample, first: sample_tokens (the index of
    each one's last token), sample_slots, sample_lengths (prompt and output so far): [N]. Beyond them is 0, an index
    that padding may be read with. Each begins where its address is divisible by 16, see aligned_words.
    """

    def __init__(self, words: Tensor, max_num_seqs: int) -> None:
        self.words = words
        parts = words.view(7, -1)
        self.query_starts = parts[0, : max_num_seqs + 1]
        self.starts, self.seq_lens, self.slots = parts[1:4, :max_num_seqs]
        self.sample_tokens, self.sample_slots, self.sample_lengths = parts[4:, :max_num_seqs]

    @staticmethod
    def num_words(max_num_seqs: int) -> int:
        return 7 * aligned_words(max_num_seqs + 1)


@dataclass(frozen=True, slots=True)
class Updates:
    """Words that change on the device before the rows run: for each target, [2, count] of flat index and value."""

    blocks: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]
    params: npt.NDArray[np.int32]

    @property
    def parts(self) -> tuple[npt.NDArray[np.int32], ...]:
        return self.blocks, self.tokens, self.params


@dataclass(slots=True)
class HostBuffers:
    """The pinned memory of one step in flight. rows: its RowWords; out: [max_num_seqs], the sampled tokens."""

    rows: RowWords
    updates: Tensor
    out: Tensor


@dataclass(frozen=True, slots=True)
class HostStep:
    """What the host keeps of a step. slots, starts, ends, query_starts: [R]; sampling_rows: which of them sample."""

    slots: Ints
    starts: Ints
    ends: Ints
    query_starts: Ints
    sampling_rows: Ints
    num_tokens: int
    max_query_len: int
    counts: tuple[int, ...]  # of the updates


class DeviceSlots:
    """What is known of the running requests, by slot, on the device; and what must be known of them on the host.

    token_ids: [max_num_seqs, max_model_len + 1]; block_tables: [max_num_seqs, blocks of a full-length request]; params:
    [max_num_seqs, NUM_COLUMNS], see sampling_table.py; all int32. Rows may be longer, see aligned_words.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        vocab_size: int,
        stream: Stream,
        num_buffers: int,
    ) -> None:
        self.block_size, self.vocab_size, self.stream = block_size, vocab_size, stream
        device = stream.device
        row_words, max_blocks = aligned_words(max_model_len + 1), aligned_words(-(-max_model_len // block_size))
        if max_num_seqs * row_words >= 1 << 31:  # words are told apart by 32 bits
            raise ValueError(
                f"max_num_seqs={max_num_seqs} requests of max_model_len={max_model_len} tokens are more than 2**31 "
                "tokens together; lower either"
            )
        self.token_ids = torch.zeros(max_num_seqs, row_words, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(max_num_seqs, max_blocks, dtype=torch.int32, device=device)
        self.params = torch.zeros(max_num_seqs, NUM_COLUMNS, dtype=torch.int32, device=device)
        self.num_blocks = [0] * max_num_seqs
        num_words = RowWords.num_words(max_num_seqs)
        self.rows = RowWords(torch.zeros(num_words, dtype=torch.int32, device=device), max_num_seqs)
        self.updates = torch.zeros(MIN_UPDATES, dtype=torch.int32, device=device)
        self._buffers = [
            HostBuffers(
                RowWords(stream.pinned(num_words), max_num_seqs),
                stream.pinned(MIN_UPDATES),
                stream.pinned(max_num_seqs),
            )
            for _ in range(num_buffers)
        ]
        self._next_buffer = 0

    def write(self, plan: StepPlan) -> tuple[HostStep, HostBuffers]:
        """Write the plan into the next buffer. Python loops over rows only where they are new or get new blocks."""
        buffers = self._buffers[self._next_buffer]
        self._next_buffer = (self._next_buffer + 1) % len(self._buffers)
        updates = self._updates(plan)
        counts = tuple(part.shape[1] for part in updates.parts)
        self._write_updates(buffers, updates)
        return self._write_rows(buffers.rows, plan, counts), buffers

    def _write_rows(self, words: RowWords, plan: StepPlan, counts: tuple[int, ...]) -> HostStep:
        rows, num_rows = plan.rows, len(plan.rows)
        table = np.array([(row.slot, row.start, row.end, row.samples) for row in rows], dtype=np.int64)
        slots, starts, ends, samples = table.T
        lens = ends - starts
        query_ends = np.cumsum(lens)
        query_starts = query_ends - lens
        num_tokens = int(query_ends[-1])
        sampling_rows = np.flatnonzero(samples)
        out = words.query_starts.numpy()
        out[:num_rows], out[num_rows:] = query_starts, num_tokens
        for target, values in (
            (words.starts, starts),
            (words.seq_lens, ends),
            (words.slots, slots),
            (words.sample_tokens, query_ends[sampling_rows] - 1),
            (words.sample_slots, slots[sampling_rows]),
            (words.sample_lengths, ends[sampling_rows]),
        ):
            array = target.numpy()
            array[: len(values)], array[len(values) :] = values, 0
        max_query_len = int(lens.max())
        return HostStep(slots, starts, ends, query_starts, sampling_rows, num_tokens, max_query_len, counts)

    def _updates(self, plan: StepPlan) -> Updates:
        """New blocks of every row, tokens and parameters of the requests that enter."""
        table_stride, token_stride = self.block_tables.stride(0), self.token_ids.stride(0)
        tokens: list[npt.NDArray[np.int32]] = []
        params: list[npt.NDArray[np.int32]] = []
        for request in plan.admitted:
            self.num_blocks[request.slot] = 0
            ids = np.array(request.token_ids, dtype=np.int32)
            first = request.slot * token_stride
            tokens.append(np.stack([np.arange(first, first + len(ids), dtype=np.int32), ids]))
            first = request.slot * NUM_COLUMNS
            params.append(np.stack([np.arange(first, first + NUM_COLUMNS, dtype=np.int32), self._params_of(request)]))
        indices: list[int] = []
        blocks: list[int] = []
        for row in plan.rows:
            if new := row.new_block_ids:
                first = row.slot * table_stride + self.num_blocks[row.slot]
                indices += range(first, first + len(new))
                blocks += new
                self.num_blocks[row.slot] += len(new)
        nothing = np.zeros((2, 0), dtype=np.int32)
        return Updates(
            np.array([indices, blocks], dtype=np.int32),
            np.concatenate(tokens, axis=1) if tokens else nothing,
            np.concatenate(params, axis=1) if params else nothing,
        )

    def _params_of(self, request: AdmittedRequest) -> npt.NDArray[np.int32]:
        params = request.params
        return pack_params(
            temperature=0.0 if is_greedy(params) else params.temperature,
            top_k=params.top_k if params.top_k < self.vocab_size else 0,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
            seed=params.seed or 0,
            num_prompt_tokens=request.num_prompt_tokens,
        )

    def _write_updates(self, buffers: HostBuffers, updates: Updates) -> None:
        total = sum(part.size for part in updates.parts)
        if total > len(buffers.updates):  # many prompt tokens: it grows a few times
            buffers.updates = self.stream.pinned(2 * total)
        words, start = buffers.updates.numpy(), 0
        for part in updates.parts:
            words[start : start + part.size] = part.reshape(-1)
            start += part.size

    def send(self, step: HostStep, buffers: HostBuffers) -> None:
        """Part of the device's queue: copy the words over and apply the updates."""
        self.rows.words.copy_(buffers.rows.words, non_blocking=True)
        total = 2 * sum(step.counts)
        if not total:
            return
        if total > len(self.updates):
            self.updates = torch.zeros(2 * total, dtype=torch.int32, device=self.updates.device)
        self.updates[:total].copy_(buffers.updates[:total], non_blocking=True)
        start = 0
        for target, count in zip((self.block_tables, self.token_ids, self.params), step.counts, strict=True):
            scatter_words(target, self.updates[start : start + 2 * count].view(2, count), count)
            start += 2 * count
