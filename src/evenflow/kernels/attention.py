"""Paged attention over one ragged batch: prefill, chunked prefill and decode rows alike.

Shapes: R rows (sequences), T query tokens, H query heads, Hkv key heads, G = H / Hkv, D head size, S tokens per block.
The cache of a layer is [num_blocks, 2, Hkv, S, D]: what one head keeps of one block is a contiguous page, so a single
index_select gathers keys and values of many sequences as dense [n, Hkv, L, D].

The reference attends to groups of rows of like size, padded to Q queries and L keys. How rows are grouped and masked
does not depend on the layer, so it is worked out once per step and kept in the AttentionBatch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Ints = npt.NDArray[np.int64]

# Elements of keys and values gathered at a time: small enough to stay in a core's cache until they are read. For 256
# sequences of 256 tokens this took 14 ms where one gather of everything took 20 ms, and 60 ms when freshly allocated.
MAX_GROUP_ELEMENTS = 1 << 20
MAX_PADDING = 1.25  # a group's longest row is at most this much longer than its shortest, in pages and in queries


@dataclass(frozen=True, slots=True)
class Group:
    """Rows attended together. n rows of Q queries over L keys.

    heads: Hkv where the G queries of a key head can share its keys (Q = 1), else H. query_index: [n * Q] tokens of the
    batch, a row's last one repeated as padding. valid: which of these are no padding; None: all. page_index:
    [2 * n * heads * pages] pages of the cache. query_positions: [n, Q].
    """

    num_rows: int
    num_queries: int
    num_keys: int
    heads: int
    query_index: Tensor
    valid: Tensor | None
    page_index: Tensor
    query_positions: Tensor
    masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class AttentionBatch:
    """The rows of one step. Row r computes the last query_lens[r] tokens of a sequence of seq_lens[r] tokens.

    query_starts: [R] first query token of each row. block_tables: [R, max blocks], valid up to seq_lens.
    store_index: [T * 2 * Hkv], where this step's keys and values go (see store_kv). workspace: see make_workspace.
    """

    query_starts: Ints
    query_lens: Ints
    seq_lens: Ints
    block_tables: Ints
    store_index: Tensor
    workspace: Tensor
    groups: list[Group] | None = None  # made by the first layer, used by all


def make_workspace(kv_cache: Tensor) -> Tensor:
    """Memory for the keys and values of one group, used again by every group, layer and step: fresh memory costs page
    faults, 4,000 a step for 256 sequences."""
    page_elements = kv_cache.shape[3] * kv_cache.shape[4]
    return kv_cache.new_empty(max(MAX_GROUP_ELEMENTS // page_elements, 1), page_elements)


def paged_attention(q: Tensor, kv_cache: Tensor, batch: AttentionBatch, scale: float, window: int | None) -> Tensor:
    """Causal attention of this step's queries to their sequences' cached keys. q: [T, H, D]; returns [T, H, D].

    The keys and values of this step are already in the cache. window: attend to that many last tokens only.
    """
    num_kv_heads, block_size, head_dim = kv_cache.shape[2:]
    if batch.groups is None:
        batch.groups = list(_make_groups(batch, q.shape[1], num_kv_heads, block_size, head_dim))
    pages = kv_cache.view(-1, block_size * head_dim)
    out = torch.empty_like(q)
    for group in batch.groups:
        attended = _attend(q, pages, batch.workspace, group, _mask(group, window, q.dtype), scale)
        if group.valid is None:
            out.index_copy_(0, group.query_index, attended)
        else:
            out.index_copy_(0, group.query_index[group.valid], attended[group.valid])
    return out


def _attend(q: Tensor, pages: Tensor, workspace: Tensor, group: Group, mask: Tensor, scale: float) -> Tensor:
    """One padded group. Returns [n * Q, H, D]."""
    n, (_, num_heads, head_dim) = group.num_rows, q.shape
    num_pages = len(group.page_index)
    if num_pages <= len(workspace):
        gathered = torch.index_select(pages, 0, group.page_index, out=workspace[:num_pages])
    else:
        gathered = pages.index_select(0, group.page_index)
    keys, values = gathered.to(q.dtype).view(2, n, group.heads, group.num_keys, head_dim)
    queries = q.index_select(0, group.query_index)
    if group.num_queries == 1:  # the G queries of a key head stand where its queries in time would
        queries = queries.view(n, group.heads, num_heads // group.heads, head_dim)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
        return out.reshape(n, num_heads, head_dim)
    queries = queries.view(n, group.num_queries, num_heads, head_dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).reshape(n * group.num_queries, num_heads, head_dim)


def _mask(group: Group, window: int | None, dtype: torch.dtype) -> Tensor:
    """Additive mask [n, 1, Q, L]: 0 where a query sees a key, else -inf."""
    if (mask := group.masks.get((window, dtype))) is None:
        query_positions = group.query_positions[:, None, :, None]
        key_positions = torch.arange(group.num_keys)
        hidden = key_positions > query_positions
        if window is not None:
            hidden |= key_positions <= query_positions - window
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
        group.masks[window, dtype] = mask
    return mask


def _make_groups(
    batch: AttentionBatch, num_heads: int, num_kv_heads: int, block_size: int, head_dim: int
) -> Iterator[Group]:
    num_pages = -(-batch.seq_lens // block_size)
    order = np.lexsort((num_pages, batch.query_lens))
    page_elements = 2 * block_size * head_dim
    start = 0
    while start < len(order):
        rows = order[
            start : _group_end(batch.query_lens, num_pages, order, start, page_elements, num_heads, num_kv_heads)
        ]
        heads = num_kv_heads if batch.query_lens[rows[-1]] == 1 else num_heads
        yield _make_group(batch, rows, num_pages[rows], heads, num_kv_heads, block_size)
        start += len(rows)


def _group_end(
    query_lens: Ints, num_pages: Ints, order: Ints, start: int, page_elements: int, num_heads: int, num_kv_heads: int
) -> int:
    """How far the group that begins at order[start] goes: like sizes only, and within the cache's size."""
    first = order[start]
    heads = num_kv_heads if query_lens[first] == 1 else num_heads
    # Rows are sorted by queries, then pages; candidates that pad too much end the group.
    max_queries = query_lens[first] if query_lens[first] == 1 else query_lens[first] * MAX_PADDING
    candidates = order[start:]
    longest = np.maximum.accumulate(num_pages[candidates])
    shortest = np.minimum.accumulate(num_pages[candidates])
    elements = longest * np.arange(1, len(candidates) + 1) * heads * page_elements
    fits = (query_lens[candidates] <= max_queries) & (elements <= MAX_GROUP_ELEMENTS)
    fits &= longest <= np.maximum(shortest * MAX_PADDING, shortest + 1)
    fits[0] = True
    return start + (len(fits) if fits.all() else int(np.argmin(fits)))


def _make_group(
    batch: AttentionBatch, rows: Ints, num_pages: Ints, heads: int, num_kv_heads: int, block_size: int
) -> Group:
    query_lens, most_pages = batch.query_lens[rows], int(num_pages.max())
    num_queries = int(query_lens.max())
    steps = np.minimum(np.arange(num_queries), query_lens[:, None] - 1)  # [n, Q], the last query repeated
    query_index = batch.query_starts[rows][:, None] + steps
    positions = (batch.seq_lens[rows] - query_lens)[:, None] + steps
    is_real = np.arange(num_queries) < query_lens[:, None]
    # Padding pages repeat block 0 of the row: any finite memory will do, the mask hides it.
    page = np.arange(most_pages)
    blocks = batch.block_tables[rows][:, np.minimum(page, batch.block_tables.shape[1] - 1)]
    blocks = np.where(page < num_pages[:, None], blocks, blocks[:, :1])
    key_heads = np.arange(heads) * num_kv_heads // heads
    page_index = (blocks[None, :, None, :] * 2 + np.arange(2)[:, None, None, None]) * num_kv_heads + key_heads[:, None]
    return Group(
        num_rows=len(rows),
        num_queries=num_queries,
        num_keys=most_pages * block_size,
        heads=heads,
        query_index=torch.from_numpy(query_index.reshape(-1)),
        valid=None if is_real.all() else torch.from_numpy(np.flatnonzero(is_real)),
        page_index=torch.from_numpy(page_index.reshape(-1)),
        query_positions=torch.from_numpy(positions),
    )
