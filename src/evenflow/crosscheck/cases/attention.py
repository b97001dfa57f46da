"""Paged attention of ragged rows in shuffled pages, with dense attention as the reference.

What no row owns is NaN (in 8 bits: the largest number), in the cache and where block tables end, so that a key too many
is no small error.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from evenflow.crosscheck.cases.case import EIGHT_BITS, FLOATS, SIXTEEN_BITS, Case, cache_types
from evenflow.kernels.attention_plan import AttentionPlan, DeviceRows, launch_plan_attention, make_plan

BLOCK_SIZE = 16
NUM_PROGRAMS = 5  # that share the prompts and the merging: fewer than there is work, so that they go round
TARGET_ITEMS, GRANULE = 4, 32  # pieces of decode rows: 200 keys or so make several
MODULE, PLAN = "evenflow.kernels.paged_attention", "evenflow.kernels.attention_plan"
MIXED = ((1, 50), (9, 9), (1, 1), (20, 70), (1, 129))
DECODE = ((1, 1), (1, 15), (1, 33), (1, 200))


@dataclass(frozen=True)
class Shape:
    """rows: (queries, keys) of each; (0, 0) is a padding row. padding: tokens more. scales: of an 8-bit cache, "one"
    for all heads or "by head"."""

    rows: tuple[tuple[int, int], ...] = MIXED
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    window: int | None = None
    soft_cap: float | None = None
    padding: int = 0
    scales: str = "one"
    logit_scale: float = 1.0


def inputs(dtype: torch.dtype, shape: Shape) -> tuple[Any, ...]:
    """The arguments of paged_attention. q is a strided view of a joint projection."""
    dtype, cache_dtype = cache_types(dtype)
    generator = torch.Generator().manual_seed(0)
    num_pages = [-(-keys // BLOCK_SIZE) for _, keys in shape.rows]
    num_blocks = sum(num_pages) + 2
    pages = torch.randperm(num_blocks, generator=generator).tolist()
    unused = math.nan if cache_dtype.itemsize > 1 else 240.0
    cache = torch.full((num_blocks, 2, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim), unused)
    slots = torch.randperm(len(shape.rows) + 2, generator=generator)[: len(shape.rows)]
    tables = torch.full((len(shape.rows) + 2, max(num_pages) + 2), pages.pop(), dtype=torch.int32)
    for (_, keys), number, slot in zip(shape.rows, num_pages, slots.tolist(), strict=True):
        values = torch.randn(2, shape.num_kv_heads, keys, shape.head_dim, generator=generator)
        for page in range(number):
            block = pages.pop()
            part = values[:, :, page * BLOCK_SIZE : (page + 1) * BLOCK_SIZE]
            cache[block, :, :, : part.shape[2]] = part
            tables[slot, page] = block
    starts = [0, *accumulate(queries for queries, _ in shape.rows)]
    num_tokens = starts[-1] + shape.padding
    width = shape.num_heads + 2 * shape.num_kv_heads
    joint = torch.randn(num_tokens, width, shape.head_dim, generator=generator).to(dtype)
    rows = DeviceRows(
        query_starts=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor([keys for _, keys in shape.rows], dtype=torch.int32),
        slots=slots.to(torch.int32),
        block_tables=tables,
        store_index=torch.full((num_tokens,), -1),
        positions=torch.zeros(num_tokens, dtype=torch.int64),
        max_query_len=max(queries for queries, _ in shape.rows),
        plan=_plan(shape),
    )
    scale = shape.logit_scale / math.sqrt(shape.head_dim)
    options = (shape.window, shape.soft_cap, *_scales(shape, cache_dtype, generator))
    return joint[:, : shape.num_heads], cache.to(cache_dtype), rows, scale, *options


def _plan(shape: Shape) -> AttentionPlan:
    return make_plan(
        len(shape.rows), shape.num_heads, shape.num_kv_heads, shape.head_dim, "cpu",
        arch="", target_items=TARGET_ITEMS, granule=GRANULE, num_programs=NUM_PROGRAMS,
    )  # fmt: skip


def _scales(shape: Shape, cache_dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
    if cache_dtype.itemsize > 1:
        return None, None
    size = shape.num_kv_heads if shape.scales == "by head" else 1
    return 0.5 + torch.rand(size, generator=generator), 0.5 + torch.rand(size, generator=generator)


def launch(module: ModuleType, q: Tensor, kv_cache: Tensor, rows: DeviceRows, *options: Any, arch: str) -> Tensor:
    """Both launches of a step; what padding tokens get is not defined, and is left out."""
    launch_plan_attention(rows)
    out: Tensor = module.launch_paged_attention(q, kv_cache, rows, *options, arch=arch)
    return out[: int(rows.query_starts[-1])]


def attend(
    q: Tensor,
    kv_cache: Tensor,
    rows: DeviceRows,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """Dense attention row by row, all of it in q's type. Returns [tokens, H, D]."""
    outs = []
    for row, (start, end) in enumerate(pairwise(rows.query_starts.tolist())):
        num_keys = int(rows.seq_lens[row])
        table = rows.block_tables[int(rows.slots[row])].long()
        position = torch.arange(num_keys)
        pages, offsets = table[position // BLOCK_SIZE], position % BLOCK_SIZE
        keys, values = kv_cache[pages, :, :, offsets].to(q.dtype).permute(1, 2, 0, 3)  # [Hkv, L, D] each
        if k_scale is not None and v_scale is not None:
            keys, values = (x * s.to(q.dtype)[:, None, None] for x, s in ((keys, k_scale), (values, v_scale)))
        group = q.shape[1] // len(keys)
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        scores = torch.einsum("qhd,hld->qhl", q[start:end], keys) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        query = torch.arange(num_keys - (end - start), num_keys)[:, None]
        hidden = position > query
        if window is not None:
            hidden |= position <= query - window
        weights = scores.masked_fill(hidden[:, None], -math.inf).softmax(-1)
        outs.append(torch.einsum("qhl,hld->qhd", weights, values))
    return torch.cat(outs)


def _case(what: str, dtypes: tuple[str, ...], shape: Shape) -> Case:
    return Case(MODULE, "paged_attention", what, partial(inputs, shape=shape), dtypes, attend, launch, (PLAN,))


CASES = (
    *(
        _case(f"mixed, heads of {size}", (*FLOATS, *EIGHT_BITS), Shape(head_dim=size))
        for size in (64, 80, 96, 128, 256)
    ),
    _case("decode only", (*SIXTEEN_BITS, *EIGHT_BITS), Shape(rows=DECODE)),
    _case("window of 24", SIXTEEN_BITS, Shape(rows=((1, 200), (30, 90), (1, 5), (12, 12)), window=24)),
    _case("soft cap of 5", SIXTEEN_BITS, Shape(rows=((1, 60), (10, 40)), soft_cap=5.0, logit_scale=6.0)),
    _case("padding rows", SIXTEEN_BITS, Shape(rows=((1, 20), (6, 6), (0, 0), (0, 0)), padding=5)),
    _case("one query a key", SIXTEEN_BITS, Shape(rows=((1, 40), (18, 30)), num_heads=3, num_kv_heads=3)),
    _case("three queries a key", SIXTEEN_BITS, Shape(rows=((1, 40), (50, 60)), num_heads=6)),
    _case("eight queries a key", SIXTEEN_BITS, Shape(rows=((1, 40), (20, 60)), num_heads=8, num_kv_heads=1)),
    _case("whole tiles", SIXTEEN_BITS, Shape(rows=((64, 128),), num_heads=2, head_dim=128)),
    _case("scales by head", EIGHT_BITS, Shape(rows=((1, 40), (9, 30), (1, 130)), scales="by head")),
)
