"""Causal attention of a ragged batch to its paged keys and values, on a GPU: decode rows, prompts, and both mixed.

    out[t, h] = sum_j softmax_j(cap(scale * q[t, h] . k[j, h // G])) v[j, h // G],   p - window < j <= p = position(t)

where cap(x) = soft_cap * tanh(x / soft_cap), if there is a cap. Shapes: R rows (sequences), T query tokens, H query
heads, Hkv key heads, G = H / Hkv, D head size, S tokens per block. A layer's cache is [num_blocks, 2, Hkv, S, D]; it
may be of 8-bit floats, which are converted to the queries' type as they are read.

Softmax is the online one (Milakov and Gimelshein 2018; Dao et al., FlashAttention, 2022), in float32 and base 2. The
queries of the G heads that share a key head are the rows of one tile, so keys are read once.

Rows of one query (decode) are cut into pieces of like length, which attention_plan.py lists once a step. A row of one
piece is written at once; several leave float32 sums, which the program that comes last adds up, or, where that was not
tried, `_merge_pieces_kernel` (tuning.MERGING_DECODE). Rows of more queries (prompts) are cut by query, and programs
share the blocks, each finding its prompt by binary search. Grids depend on upper bounds only; surplus programs return
at once.

Owns the kernels for devices. `attention` is the CPU's own; the reference here is the plain definition, row by row.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from evenflow.kernels.attention_plan import ITEM_FIELDS, PROMPT_FIELDS, SPLIT_FIELDS, DeviceRows, Launch
from evenflow.kernels.language import (
    arch_of,
    arrives_last,
    cdiv,
    dependent_launch,
    jit,
    next_power_of_2,
    tl,
    wait_for_previous,
)
from evenflow.kernels.tuning import Tile, decode_tile, merges_in_decode, prefill_tile

LOG2_E = math.log2(math.e)
MERGED_PIECES = 16  # partial sums that are read at a time
MERGED_SUMS = 32  # times heads, by the program that comes last


def paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    rows: DeviceRows,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Attend to the cache, which holds this step's keys and values already. q: [T, H, D]; returns [T, H, D].

    q's tokens may be strided, its heads are not. window: attend to that many last tokens only. k_scale, v_scale: what
    the cache's keys and values are to be multiplied by, float32, of one element or [Hkv].
    """
    if q.is_cuda:
        return launch_paged_attention(q, kv_cache, rows, scale, window, soft_cap, k_scale, v_scale)
    num_kv_heads, block_size = kv_cache.shape[2:4]
    out = torch.zeros_like(q)
    starts = rows.query_starts.tolist()
    for row, (start, end) in enumerate(pairwise(starts)):
        if start == end:
            continue
        num_keys = int(rows.seq_lens[row])
        table = rows.block_tables[int(rows.slots[row]), : cdiv(num_keys, block_size)]
        pages = kv_cache[table.long()].to(torch.float32).permute(1, 2, 0, 3, 4)  # [2, Hkv, blocks, S, D]
        keys, values = pages.reshape(2, num_kv_heads, -1, q.shape[2])[:, :, :num_keys]
        if k_scale is not None:
            keys = keys * k_scale.view(-1, 1, 1)
        if v_scale is not None:
            values = values * v_scale.view(-1, 1, 1)
        out[start:end] = _attend_row(q[start:end], keys, values, scale, window, soft_cap)
    return out


def _attend_row(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None, soft_cap: float | None
) -> Tensor:
    """The last queries of one sequence. q: [Q, H, D]; keys, values: [Hkv, L, D] in float32; returns [Q, H, D]."""
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads, num_keys, _ = keys.shape
    grouped = q.float().view(num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = torch.einsum("qhgd,hld->qhgl", grouped, keys) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    key = torch.arange(num_keys, device=q.device)
    query = torch.arange(num_keys - num_queries, num_keys, device=q.device)[:, None]
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    weights = scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1)
    return torch.einsum("qhgl,hld->qhgd", weights, values).reshape(q.shape).to(q.dtype)


@jit
def _load_pages(
    cache_ptr, table_ptr, positions, H_KV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, S: tl.constexpr
):
    """Keys as [BLOCK_D, n] and values as [n, BLOCK_D], 0 beyond D, of n valid positions of a sequence.

    cache_ptr: the key head's keys in block 0. Offsets are in 64 bits: a cache is larger than 2 GiB.
    """
    dims = tl.arange(0, BLOCK_D)
    block = tl.load(table_ptr + positions // S).to(tl.int64)
    offsets = block * (2 * H_KV * S * D) + (positions % S) * D
    k_ptrs = cache_ptr + offsets[None, :] + dims[:, None]
    v_ptrs = cache_ptr + H_KV * S * D + offsets[:, None] + dims[None, :]
    if D == BLOCK_D:
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)
    else:
        k = tl.load(k_ptrs, mask=dims[:, None] < D, other=0.0)
        v = tl.load(v_ptrs, mask=dims[None, :] < D, other=0.0)
    return k, v


@jit
def _scores(q, k, scale_log2, SOFT_CAP: tl.constexpr):
    """Logarithms of the weights, in base 2."""
    scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale_log2
    if SOFT_CAP > 0:
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 / SOFT_CAP)))
        scores = tanh * (SOFT_CAP * 1.4426950408889634)
    return scores


@jit
def _accumulate(scores, v, best, total, acc, DTYPE: tl.constexpr):
    """A step of online softmax. A hidden score is -inf; `best` starts at -1e30, so that all hidden is no NaN."""
    new_best = tl.maximum(best, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_best[:, None])
    rescale = tl.exp2(best - new_best)
    total = total * rescale + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(DTYPE), v.to(DTYPE), acc * rescale[:, None], input_precision="ieee")
    return new_best, total, acc


@jit
def _decode_attention_kernel(
    q_ptr, kv_cache_ptr, out_ptr, block_tables_ptr, items_ptr, counts_ptr, partials_ptr, stats_ptr, arrived_ptr,
    k_scale_ptr, v_scale_ptr, scale_log2, q_stride, table_stride,
    H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, SCALE_STRIDE: tl.constexpr, ITEM_FIELDS: tl.constexpr, MERGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (item, key head): the group's G queries of one token over the keys [first, last) of its sequence.

    The heads of an item run side by side: their pages are neighbours, and few of the GPU's address translations are in
    use at a time. MERGES: the last of a row's pieces adds all of them up, in their order, so that it does not matter
    which is last.
    """
    wait_for_previous(PDL)
    item = tl.program_id(0) // H_KV
    kv_head = tl.program_id(0) % H_KV
    if item >= tl.load(counts_ptr):
        return
    item_ptr = items_ptr + item * ITEM_FIELDS
    token = tl.load(item_ptr).to(tl.int64)
    slot = tl.load(item_ptr + 1).to(tl.int64)
    first = tl.load(item_ptr + 2)
    last = tl.load(item_ptr + 3)
    seq_len = tl.load(item_ptr + 4)
    partial = tl.load(item_ptr + 5)
    group = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    is_real = (group < G)[:, None] & (dims < D)[None, :]
    heads = kv_head * G + group
    q = tl.load(q_ptr + token * q_stride + heads[:, None] * D + dims[None, :], mask=is_real, other=0.0)
    if k_scale_ptr is not None:
        scale_log2 *= tl.load(k_scale_ptr + kv_head * SCALE_STRIDE)
    cache_ptr = kv_cache_ptr + kv_head.to(tl.int64) * (S * D)
    table_ptr = block_tables_ptr + slot * table_stride
    if WINDOW > 0:
        first = tl.maximum(first, seq_len - WINDOW)
    best = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_N):
        positions = start + tl.arange(0, BLOCK_N)
        k, v = _load_pages(cache_ptr, table_ptr, tl.minimum(positions, last - 1), H_KV, D, BLOCK_D, S)
        scores = _scores(q, k, scale_log2, SOFT_CAP)
        scores = tl.where(positions[None, :] < last, scores, float("-inf"))
        best, total, acc = _accumulate(scores, v, best, total, acc, q.dtype)
    value_scale = 1.0
    if v_scale_ptr is not None:
        value_scale = tl.load(v_scale_ptr + kv_head * SCALE_STRIDE)
    if partial < 0:
        out = (acc * (value_scale / total)[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + token * (H_KV * G * D) + heads[:, None] * D + dims[None, :], out, mask=is_real)
    else:
        index = partial * (H_KV * G) + heads
        tl.store(partials_ptr + index[:, None] * D + dims[None, :], acc, mask=is_real)
        tl.store(stats_ptr + index * 2, best, mask=group < G)
        tl.store(stats_ptr + index * 2 + 1, total, mask=group < G)
        if MERGES:
            first_partial = tl.load(item_ptr + 6)
            num_pieces = tl.load(item_ptr + 7)
            if arrives_last(arrived_ptr + first_partial * H_KV + kv_head, num_pieces):
                _merge_row(
                    partials_ptr + first_partial * (H_KV * G * D), stats_ptr + first_partial * (H_KV * G * 2), out_ptr,
                    token, kv_head, num_pieces, value_scale, H_KV, G, D, BLOCK_G, BLOCK_D, BLOCK_P,
                )  # fmt: skip


@jit
def _merge_row(
    partials_ptr, stats_ptr, out_ptr, token, kv_head, num_pieces, value_scale,
    H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Add up a row's pieces for the heads of a group, and write them. Pointers: to its first piece.

    A piece outside the window has total 0 and sums of 0.
    """
    dims = tl.arange(0, BLOCK_D)
    group = tl.arange(0, BLOCK_G)
    sums = tl.arange(0, BLOCK_P * BLOCK_G)
    best = tl.full([BLOCK_G], -1e30, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(0, num_pieces, BLOCK_P):
        piece = start + sums // BLOCK_G
        exists = (piece < num_pieces) & (sums % BLOCK_G < G)
        index = piece * (H_KV * G) + kv_head * G + sums % BLOCK_G
        piece_best = tl.load(stats_ptr + index * 2, mask=exists, other=-1e30, cache_modifier=".cg")
        piece_total = tl.load(stats_ptr + index * 2 + 1, mask=exists, other=0.0, cache_modifier=".cg")
        mask = exists[:, None] & (dims < D)[None, :]
        piece_acc = tl.load(
            partials_ptr + index[:, None] * D + dims[None, :], mask=mask, other=0.0, cache_modifier=".cg"
        )
        piece_best = tl.reshape(piece_best, [BLOCK_P, BLOCK_G])
        piece_total = tl.reshape(piece_total, [BLOCK_P, BLOCK_G])
        piece_acc = tl.reshape(piece_acc, [BLOCK_P, BLOCK_G, BLOCK_D])
        new_best = tl.maximum(best, tl.max(piece_best, axis=0))
        weights = tl.exp2(piece_best - new_best[None, :])
        rescale = tl.exp2(best - new_best)
        total = total * rescale + tl.sum(piece_total * weights, axis=0)
        acc = acc * rescale[:, None] + tl.sum(piece_acc * weights[:, :, None], axis=0)
        best = new_best
    heads = kv_head * G + group
    out = (acc * (value_scale / total)[:, None]).to(out_ptr.dtype.element_ty)
    is_real = (group < G)[:, None] & (dims < D)[None, :]
    tl.store(out_ptr + token * (H_KV * G * D) + heads[:, None] * D + dims[None, :], out, mask=is_real)


@jit
def _merge_pieces_kernel(
    partials_ptr, stats_ptr, splits_ptr, counts_ptr, v_scale_ptr, out_ptr,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SCALE_STRIDE: tl.constexpr, SPLIT_FIELDS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program takes a split row and a query head until there are no more: mostly few rows are split, or none.

    A piece outside the window has total 0 and sums of 0.
    """
    wait_for_previous(PDL)
    num_splits = tl.load(counts_ptr + 1)
    for work in range(tl.program_id(0), num_splits * H, tl.num_programs(0)):
        head = work % H
        split_ptr = splits_ptr + work // H * SPLIT_FIELDS
        token = tl.load(split_ptr).to(tl.int64)
        first = tl.load(split_ptr + 1)
        number = tl.load(split_ptr + 2)
        dims = tl.arange(0, BLOCK_D)
        best = -1e30
        total = 0.0
        acc = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, number, BLOCK_P):
            piece = start + tl.arange(0, BLOCK_P)
            exists = piece < number
            index = (first + piece) * H + head
            piece_best = tl.load(stats_ptr + index * 2, mask=exists, other=-1e30)
            piece_total = tl.load(stats_ptr + index * 2 + 1, mask=exists, other=0.0)
            mask = exists[:, None] & (dims < D)[None, :]
            sums = tl.load(partials_ptr + index[:, None] * D + dims[None, :], mask=mask, other=0.0)
            new_best = tl.maximum(best, tl.max(piece_best, axis=0))
            weights = tl.exp2(piece_best - new_best)
            rescale = tl.exp2(best - new_best)
            total = total * rescale + tl.sum(piece_total * weights, axis=0)
            acc = acc * rescale + tl.sum(sums * weights[:, None], axis=0)
            best = new_best
        factor = 1.0 / total
        if v_scale_ptr is not None:
            factor *= tl.load(v_scale_ptr + head // G * SCALE_STRIDE)
        out = (acc * factor).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + token * (H * D) + head * D + dims, out, mask=dims < D)


@jit
def _prefill_attention_kernel(
    q_ptr, kv_cache_ptr, out_ptr, prompts_ptr, counts_ptr, block_tables_ptr, k_scale_ptr, v_scale_ptr, scale_log2,
    q_stride, table_stride,
    H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, SCALE_STRIDE: tl.constexpr, PROMPT_FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKS_ALL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program takes blocks of queries, and a key head, until there are no more.

    A block is BLOCK_M // G queries of one prompt, times the G heads of the group.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // G
    wait_for_previous(PDL)
    num_prompts = tl.load(counts_ptr + 2)
    # Prompt i owns the blocks from (queries before it) // BLOCK_Q + i on: at least as many as its queries need.
    num_blocks = tl.load(counts_ptr + 3) // BLOCK_Q + num_prompts
    for work in range(tl.program_id(0), num_blocks * H_KV, tl.num_programs(0)):
        kv_head = work % H_KV
        block = num_blocks - 1 - work // H_KV  # a prompt's last blocks see most keys: begin with them
        low = 0
        high = num_prompts
        while low < high:
            middle = (low + high) // 2
            if tl.load(prompts_ptr + middle * PROMPT_FIELDS) // BLOCK_Q + middle <= block:
                low = middle + 1
            else:
                high = middle
        prompt_ptr = prompts_ptr + (low - 1) * PROMPT_FIELDS
        first_query = (block - (tl.load(prompt_ptr) // BLOCK_Q + low - 1)) * BLOCK_Q
        query_len = tl.load(prompt_ptr + 2)
        if first_query < query_len:
            first_token = tl.load(prompt_ptr + 1)
            seq_len = tl.load(prompt_ptr + 3)
            slot = tl.load(prompt_ptr + 4).to(tl.int64)
            _attend_block(
                q_ptr, kv_cache_ptr, out_ptr, block_tables_ptr + slot * table_stride, k_scale_ptr, v_scale_ptr,
                scale_log2, q_stride, first_token, first_query, query_len, seq_len, kv_head,
                H_KV, G, D, S, WINDOW, SOFT_CAP, SCALE_STRIDE, BLOCK_M, BLOCK_D, BLOCK_N, MASKS_ALL,
            )  # fmt: skip


@jit
def _attend_block(
    q_ptr, kv_cache_ptr, out_ptr, table_ptr, k_scale_ptr, v_scale_ptr, scale_log2, q_stride, first_token, first_query,
    query_len, seq_len, kv_head,
    H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, SCALE_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKS_ALL: tl.constexpr,
):  # fmt: skip
    """Queries [first_query, first_query + BLOCK_M // G) of the prompt whose first token is first_token."""
    BLOCK_Q: tl.constexpr = BLOCK_M // G
    pairs = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    query = first_query + pairs // G
    is_pair = (pairs < BLOCK_Q * G) & (query < query_len)
    is_real = is_pair[:, None] & (dims < D)[None, :]
    token = (first_token + query).to(tl.int64)
    columns = (kv_head * G + pairs % G)[:, None] * D + dims[None, :]
    q = tl.load(q_ptr + (token * q_stride)[:, None] + columns, mask=is_real, other=0.0)
    if k_scale_ptr is not None:
        scale_log2 *= tl.load(k_scale_ptr + kv_head * SCALE_STRIDE)
    cache_ptr = kv_cache_ptr + kv_head.to(tl.int64) * (S * D)
    position = seq_len - query_len + query
    first_position = seq_len - query_len + first_query
    end = tl.minimum(first_position + BLOCK_Q, seq_len)
    best = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if WINDOW > 0:
        masked_start = tl.maximum(first_position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    elif MASKS_ALL:
        masked_start = 0
    else:
        masked_start = (first_position + 1) // BLOCK_N * BLOCK_N
        for start in range(0, masked_start, BLOCK_N):  # keys that every query of the block sees
            k, v = _load_pages(cache_ptr, table_ptr, start + tl.arange(0, BLOCK_N), H_KV, D, BLOCK_D, S)
            scores = _scores(q, k, scale_log2, SOFT_CAP)
            best, total, acc = _accumulate(scores, v, best, total, acc, q.dtype)
    for start in range(masked_start, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k, v = _load_pages(cache_ptr, table_ptr, tl.minimum(key, end - 1), H_KV, D, BLOCK_D, S)
        scores = _scores(q, k, scale_log2, SOFT_CAP)
        visible = key[None, :] <= position[:, None]
        if WINDOW > 0:
            visible &= key[None, :] > position[:, None] - WINDOW
        scores = tl.where(visible, scores, float("-inf"))
        best, total, acc = _accumulate(scores, v, best, total, acc, q.dtype)
    factor = 1.0 / tl.where(total > 0, total, 1.0)
    if v_scale_ptr is not None:
        factor *= tl.load(v_scale_ptr + kv_head * SCALE_STRIDE)
    out = (acc * factor[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (token * (H_KV * G * D))[:, None] + columns, out, mask=is_real)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What of a layer and its cache decides how the kernels are compiled. query_bytes, cache_bytes: of an element.

    window: 0 for none. soft_cap: 0.0 for none. scale_stride: 1 if the cache's scales are one a key head, else 0.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 16
    query_bytes: int = 2
    cache_bytes: int = 2
    window: int = 0
    soft_cap: float = 0.0
    scale_stride: int = 0

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def block_d(self) -> int:
        return max(next_power_of_2(self.head_dim), 16)


@cache
def decode_launch(shape: AttentionShape, arch: str, tile: Tile | None = None, *, merges: bool = False) -> Launch:
    """How _decode_attention_kernel is compiled. tile: instead of the architecture's, of which block_m is not used."""
    tile = tile or decode_tile(arch, shape.block_d, shape.query_bytes, shape.cache_bytes)
    constexprs = _layer_constexprs(shape) | {"ITEM_FIELDS": ITEM_FIELDS, "MERGES": merges}
    block_g = next_power_of_2(shape.group)
    blocks = {
        "BLOCK_M": max(block_g, 16),
        "BLOCK_D": shape.block_d,
        "BLOCK_N": tile.block_n,
        "BLOCK_G": block_g,
        "BLOCK_P": max(min(MERGED_SUMS // block_g, MERGED_PIECES), 2),
    }
    return Launch(constexprs | blocks, tile.num_warps, tile.num_stages, dependent_launch(arch))


@cache
def merge_launch(shape: AttentionShape, arch: str) -> Launch:
    """How _merge_pieces_kernel is compiled."""
    constexprs = {
        "H": shape.num_heads,
        "G": shape.group,
        "D": shape.head_dim,
        "SCALE_STRIDE": shape.scale_stride,
        "SPLIT_FIELDS": SPLIT_FIELDS,
        "BLOCK_P": MERGED_PIECES,
        "BLOCK_D": shape.block_d,
    }
    return Launch(constexprs, num_warps=4, num_stages=1, dependence=dependent_launch(arch))


@cache
def prefill_launch(shape: AttentionShape, arch: str, tile: Tile | None = None) -> Launch:
    """How _prefill_attention_kernel is compiled. tile: instead of the architecture's."""
    tile = tile or prefill_tile(arch, shape.block_d, shape.query_bytes, shape.cache_bytes)
    blocks = {
        "BLOCK_M": max(tile.block_m, next_power_of_2(shape.group)),
        "BLOCK_D": shape.block_d,
        "BLOCK_N": tile.block_n,
    }
    constexprs = _layer_constexprs(shape) | {"PROMPT_FIELDS": PROMPT_FIELDS, "MASKS_ALL": tile.masks_all}
    return Launch(constexprs | blocks, tile.num_warps, tile.num_stages, dependent_launch(arch))


def _layer_constexprs(shape: AttentionShape) -> dict[str, Any]:
    return {
        "H_KV": shape.num_kv_heads,
        "G": shape.group,
        "D": shape.head_dim,
        "S": shape.block_size,
        "WINDOW": shape.window,
        "SOFT_CAP": shape.soft_cap,
        "SCALE_STRIDE": shape.scale_stride,
    }


def launch_paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    rows: DeviceRows,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    arch: str | None = None,
    decode: Tile | None = None,
    prefill: Tile | None = None,
    merges: bool | None = None,
) -> Tensor:
    """The kernels of paged_attention; rows.plan was filled by launch_plan_attention. decode, prefill: tiles to try.

    merges: see launch_decode_attention.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.shape[0] == 0:
        return out
    arch = arch_of(q, arch)
    options = (window, soft_cap, k_scale, v_scale)
    launch_decode_attention(q, kv_cache, rows, out, scale, *options, arch=arch, tile=decode, merges=merges)
    if rows.max_query_len > 1:
        launch_prefill_attention(q, kv_cache, rows, out, scale, *options, arch=arch, tile=prefill)
    return out


def launch_decode_attention(
    q: Tensor,
    kv_cache: Tensor,
    rows: DeviceRows,
    out: Tensor,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    arch: str,
    tile: Tile | None = None,
    merges: bool | None = None,
) -> None:
    """Write out, [T, H, D], for the rows of one query. merges: instead of the architecture's way."""
    merges = merges_in_decode(arch) if merges is None else merges
    shape, plan = _shape_of(q, kv_cache, window, soft_cap, k_scale, v_scale), rows.plan
    assert plan.partials.shape[1:] == q.shape[1:], "the plan was made for other heads"
    num_items = rows.seq_lens.shape[0] + plan.target_items
    _decode_attention_kernel[(num_items * shape.num_kv_heads,)](
        q, kv_cache, out, rows.block_tables, plan.items, plan.counts, plan.partials, plan.stats, plan.arrived, k_scale,
        v_scale, scale * LOG2_E, q.stride(0), rows.block_tables.stride(0),
        **decode_launch(shape, arch, tile, merges=merges).arguments,
    )  # fmt: skip
    if merges:
        return
    num_splits = min(rows.seq_lens.shape[0], plan.target_items)
    _merge_pieces_kernel[(min(num_splits * shape.num_heads, plan.most_merge_programs),)](
        plan.partials, plan.stats, plan.splits, plan.counts, v_scale, out, **merge_launch(shape, arch).arguments
    )


def launch_prefill_attention(
    q: Tensor,
    kv_cache: Tensor,
    rows: DeviceRows,
    out: Tensor,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    arch: str,
    tile: Tile | None = None,
) -> None:
    """Write out, [T, H, D], for the rows of several queries."""
    shape, plan = _shape_of(q, kv_cache, window, soft_cap, k_scale, v_scale), rows.plan
    launch, num_tokens = prefill_launch(shape, arch, tile), q.shape[0]
    block_q = launch.constexprs["BLOCK_M"] // shape.group
    num_blocks = num_tokens // block_q + expected_prompts(num_tokens, rows.seq_lens.shape[0])
    _prefill_attention_kernel[(min(num_blocks * shape.num_kv_heads, plan.most_prompt_programs),)](
        q, kv_cache, out, plan.prompts, plan.counts, rows.block_tables, k_scale, v_scale, scale * LOG2_E, q.stride(0),
        rows.block_tables.stride(0), **launch.arguments,
    )  # fmt: skip


def expected_prompts(num_tokens: int, num_rows: int) -> int:
    """How many prompts a step's programs suffice for at a block each; with more, some programs take several.

    A program for every block is fastest, and one for every row that might be a prompt would mostly be idle, which costs
    more among many decode rows (measured: docs/log.md).
    """
    return min(num_rows, num_tokens // 2, max(num_tokens // 128, 64))  # a prompt has two queries at least


def _shape_of(
    q: Tensor,
    kv_cache: Tensor,
    window: int | None,
    soft_cap: float | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> AttentionShape:
    _, num_heads, head_dim = q.shape
    _, two, num_kv_heads, block_size, cache_dim = kv_cache.shape
    assert (two, cache_dim) == (2, head_dim)
    assert num_heads % num_kv_heads == 0
    assert q.stride()[1:] == (head_dim, 1)
    assert kv_cache.is_contiguous()
    num_scales = {scale.numel() for scale in (k_scale, v_scale) if scale is not None}
    assert num_scales in (set(), {1}, {num_kv_heads}), "scales of keys and values have one element each, or Hkv"
    return AttentionShape(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        query_bytes=q.element_size(),
        cache_bytes=kv_cache.element_size(),
        window=window or 0,
        soft_cap=soft_cap or 0.0,
        scale_stride=int(num_scales == {num_kv_heads} and num_kv_heads > 1),
    )
