"""Paged attention on ragged batches against float64 loops."""

import numpy as np
import pytest
import torch

from evenflow.kernels import attention
from evenflow.kernels.attention import AttentionBatch, paged_attention

BLOCK_SIZE = 4


def make_batch(rng, rows: list[tuple[int, int]], num_kv_heads: int, head_dim: int):
    """rows: (query length, sequence length). Returns q's token count, the cache, the batch and each row's blocks."""
    pages = [-(-seq_len // BLOCK_SIZE) for _, seq_len in rows]
    num_blocks = sum(pages) + 2
    free = rng.permutation(num_blocks).tolist()
    tables = np.zeros((len(rows), max(pages)), dtype=np.int64)
    for row, count in enumerate(pages):
        tables[row, :count] = [free.pop() for _ in range(count)]
    query_lens = np.array([q for q, _ in rows])
    cache = torch.from_numpy(rng.standard_normal((num_blocks, 2, num_kv_heads, BLOCK_SIZE, head_dim))).float()
    return cache, AttentionBatch(
        query_starts=np.cumsum(query_lens) - query_lens,
        query_lens=query_lens,
        seq_lens=np.array([s for _, s in rows]),
        block_tables=tables,
        store_index=torch.empty(0, dtype=torch.int64),
        workspace=torch.full((64, BLOCK_SIZE * head_dim), float("nan")),
    )


def exact(q, cache, batch, scale, window):
    """One query head of one token at a time, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // cache.shape[2]
    for row, start in enumerate(batch.query_starts):
        seq_len, query_len = int(batch.seq_lens[row]), int(batch.query_lens[row])
        blocks = batch.block_tables[row, : -(-seq_len // BLOCK_SIZE)]
        keys, values = cache[blocks].double().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :seq_len]
        for i in range(query_len):
            last = seq_len - query_len + i
            first = 0 if window is None else max(last - window + 1, 0)
            for head in range(q.shape[1]):
                seen = slice(first, last + 1)
                scores = keys[head // group, seen] @ q[start + i, head].double() * scale
                out[start + i, head] = scores.softmax(0) @ values[head // group, seen]
    return out


MIXES = {
    "one token": [(1, 1)],
    "decode": [(1, 1), (1, 4), (1, 5), (1, 40), (1, 39), (1, 17)],
    "prefill": [(5, 5), (6, 6), (1, 1), (33, 33)],
    "chunks": [(5, 20), (4, 4), (7, 8), (3, 41)],
    "mixed": [(1, 9), (12, 12), (1, 30), (5, 33), (1, 4), (2, 2)],
}


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("mix", MIXES)
def test_against_float64(mix, heads, window):
    rng = np.random.default_rng(0)
    cache, batch = make_batch(rng, MIXES[mix], heads[1], 16)
    q = torch.from_numpy(rng.standard_normal((int(batch.query_lens.sum()), heads[0], 16))).float()
    expected = exact(q, cache, batch, 0.25, window)
    # Measured: 3e-7; values are of magnitude 1.
    torch.testing.assert_close(paged_attention(q, cache, batch, 0.25, window).double(), expected, rtol=0, atol=2e-6)


def test_group_size_does_not_change_the_result(monkeypatch):
    rng = np.random.default_rng(0)
    rows = [(1, int(n)) for n in rng.integers(1, 60, 40)] + [(int(n), int(n)) for n in rng.integers(2, 20, 10)]
    cache, batch = make_batch(rng, rows, 2, 16)
    q = torch.from_numpy(rng.standard_normal((int(batch.query_lens.sum()), 4, 16))).float()
    whole = paged_attention(q, cache, batch, 0.25, None)
    monkeypatch.setattr(attention, "MAX_GROUP_ELEMENTS", 1)
    batch.groups = None
    single = paged_attention(q, cache, batch, 0.25, None)
    assert len(batch.groups) == len(rows)
    torch.testing.assert_close(whole, single, rtol=0, atol=2e-6)


def test_what_lies_beyond_a_sequence_is_not_read():
    """A page's tail holds what an earlier owner left; only its being finite is relied on."""
    rng = np.random.default_rng(0)
    rows = [(1, 5), (3, 7), (1, 30)]
    cache, batch = make_batch(rng, rows, 2, 16)
    q = torch.from_numpy(rng.standard_normal((5, 4, 16))).float()
    before = paged_attention(q, cache, batch, 0.25, None)
    for row, (_, seq_len) in enumerate(rows):
        cache[batch.block_tables[row, seq_len // BLOCK_SIZE], :, :, seq_len % BLOCK_SIZE :] = 1e6
    assert torch.equal(paged_attention(q, cache, batch, 0.25, None), before)


def test_the_oracle_can_fail():
    rng = np.random.default_rng(0)
    cache, batch = make_batch(rng, MIXES["mixed"], 2, 16)
    q = torch.from_numpy(rng.standard_normal((int(batch.query_lens.sum()), 4, 16))).float()
    expected = exact(q, cache, batch, 0.25, None)
    batch.seq_lens = batch.seq_lens - 1  # the last key is left out
    batch.query_lens = np.minimum(batch.query_lens, batch.seq_lens)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(paged_attention(q, cache, batch, 0.25, None).double(), expected, rtol=0, atol=2e-6)
