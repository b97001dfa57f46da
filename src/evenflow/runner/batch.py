"""What the runner remembers of the running requests, by slot, and the tensors of one step made from it.

Everything per token is vectorised; Python loops only over requests that enter or get new blocks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evenflow.kernels.attention import AttentionBatch, Ints
from evenflow.request import AdmittedRequest, ScheduledRow


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. T tokens, R rows, of which some sample.

    token_ids, positions: [T]. slots, starts, ends: [R]. sampling_rows: indices of the rows that sample;
    sampling_tokens: the index of each one's last token.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Ints
    starts: Ints
    ends: Ints
    query_starts: Ints
    sampling_rows: Ints
    sampling_tokens: Ints
    attention: AttentionBatch


class SlotState:
    """token_ids: [max_num_seqs, max_model_len + 1]; block_tables: [max_num_seqs, blocks of a full-length request]."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self.block_size = block_size
        self.token_ids = np.zeros((max_num_seqs, max_model_len + 1), dtype=np.int64)
        self.block_tables = np.zeros((max_num_seqs, -(-max_model_len // block_size)), dtype=np.int64)
        self.num_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_prompt_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self.wants_prompt_logprobs = np.full(max_num_seqs, -1, dtype=np.int64)

    def admit(self, request: AdmittedRequest) -> None:
        slot = request.slot
        self.token_ids[slot, : len(request.token_ids)] = request.token_ids
        self.num_blocks[slot] = 0
        self.num_prompt_tokens[slot] = request.num_prompt_tokens
        wanted = request.params.prompt_logprobs
        self.wants_prompt_logprobs[slot] = -1 if wanted is None else wanted

    def make_batch(self, rows: list[ScheduledRow], num_kv_heads: int, workspace: Tensor) -> Batch:
        """Extend the block tables and lay the rows' tokens out one after the other."""
        for row in rows:
            if row.new_block_ids:
                count, slot = self.num_blocks[row.slot], row.slot
                self.block_tables[slot, count : count + len(row.new_block_ids)] = row.new_block_ids
                self.num_blocks[slot] += len(row.new_block_ids)
        table = np.array([(row.slot, row.start, row.end, row.samples) for row in rows], dtype=np.int64)
        slots, starts, ends, samples = table.T
        lens = ends - starts
        query_ends = np.cumsum(lens)
        query_starts = query_ends - lens
        token_slots = np.repeat(slots, lens)
        positions = np.arange(query_ends[-1]) + np.repeat(starts - query_starts, lens)
        sampling_rows = np.flatnonzero(samples)
        most_blocks = -(-int(ends.max()) // self.block_size)
        return Batch(
            token_ids=torch.from_numpy(self.token_ids[token_slots, positions]),
            positions=torch.from_numpy(positions),
            slots=slots,
            starts=starts,
            ends=ends,
            query_starts=query_starts,
            sampling_rows=sampling_rows,
            sampling_tokens=query_ends[sampling_rows] - 1,
            attention=AttentionBatch(
                query_starts=query_starts,
                query_lens=lens,
                seq_lens=ends,
                block_tables=self.block_tables[slots, :most_blocks],
                store_index=self._store_index(token_slots, positions, num_kv_heads),
                workspace=workspace,
            ),
        )

    def _store_index(self, token_slots: Ints, positions: Ints, num_kv_heads: int) -> Tensor:
        """Row of the cache, seen as [num_blocks * 2 * Hkv * block_size, D], of every token's keys, then values."""
        blocks = self.block_tables[token_slots, positions // self.block_size]
        pages = blocks[:, None] * (2 * num_kv_heads) + np.arange(2 * num_kv_heads)
        return torch.from_numpy((pages * self.block_size + (positions % self.block_size)[:, None]).reshape(-1))
