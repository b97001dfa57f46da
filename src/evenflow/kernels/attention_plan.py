"""The work lists of a step's attention: which keys each program reads; written on the device before the first layer.

Rows of one query (decode) are cut into pieces of like length (Flash-Decoding, 2023), since only the device knows the
lengths when a graph is replayed; rows of more queries (prompts) are listed. Read by the kernels of paged_attention.py.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from evenflow.kernels.language import (
    arch_of,
    current_arch,
    dependent_launch,
    jit,
    next_power_of_2,
    num_multiprocessors,
    tl,
    wait_for_previous,
)
from evenflow.kernels.tuning import split_of

# 32 bytes, so that a program reads its item by one access: token, slot, first, last, seq_len, partial, and of its row
# the first partial and the number of them.
ITEM_FIELDS = 8
SPLIT_FIELDS = 4  # token, first partial, number of partials
_LEVELS = tl.constexpr(4)  # of length, by which pieces are ordered
PROMPT_FIELDS = 8  # prompt queries before it, first token, queries, keys, slot


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What a step's rows are cut into. Memory is allocated once; plan_attention fills it.

    items: [max_items, 8] int32, a piece each, long ones first: query token, row of the block tables, first key, end of
    keys, keys of the row, index of its partial sums (-1: it is its row's only piece), the first one of its row, their
    number. splits: [max_splits, 4] int32, a row of several pieces each: query token, first partial, number of partials.
    prompts: [max_rows, 8] int32, a row of several queries each: queries of the prompts before it, first query token,
    queries, keys, row of the block tables. counts: [4] int32, items, splits and prompts in use, and the queries of all
    prompts. partials: [max_partials, H, D] float32, and stats: [max_partials, H, 2] float32, maximum and sum of the
    weights. arrived: [max_partials, Hkv] int32, zeros between launches, how many pieces of the row whose first partial
    it is are written. target_items: pieces aimed at. granule: keys that a piece's length is a multiple of.
    most_prompt_programs, most_merge_programs: that share the prompts' queries, and the split rows.
    """

    items: Tensor
    splits: Tensor
    prompts: Tensor
    counts: Tensor
    partials: Tensor
    stats: Tensor
    arrived: Tensor
    target_items: int
    granule: int
    most_prompt_programs: int
    most_merge_programs: int


@dataclass(slots=True)
class DeviceRows:
    """Rows of one step, all on the device, int32 where not said otherwise, padded to R rows and T tokens.

    query_starts: [R + 1] first query token of each row, and the end. seq_lens: [R] keys of each row, this step's
    included. slots: [R] row of block_tables. block_tables: [max_num_seqs, max_blocks]. store_index: [T] int64, block *
    S + offset of each token, -1 for padding. positions: [T] int64. max_query_len: upper bound that the host knows; 1:
    decode rows only. Padding rows have no query and no key; what padding tokens attend to is not defined.
    """

    query_starts: Tensor
    seq_lens: Tensor
    slots: Tensor
    block_tables: Tensor
    store_index: Tensor
    positions: Tensor
    max_query_len: int
    plan: AttentionPlan


def make_plan(
    max_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device | str,
    *,
    arch: str | None = None,
    target_items: int | None = None,
    granule: int | None = None,
    num_programs: int | None = None,
) -> AttentionPlan:
    """Allocate the work lists of steps of at most max_rows rows. The options after arch are for tests and tuning.

    A device of P multiprocessors gets about num_resident * waves * P / Hkv pieces (tuning.SPLITS), but P / 2 at least,
    each run by Hkv programs: with fewer, of many heads, a long row outlasts the others. There are never more than
    target_items pieces on top of one a row, nor more than twice target_items that belong to rows of several pieces.
    num_programs: at most so many share the prompts' queries, or the split rows.
    """
    split = split_of(arch or current_arch())
    num_resident = split.num_resident * num_multiprocessors()
    if target_items is None:
        target_items = max(num_resident * split.waves // num_kv_heads, num_multiprocessors() // 2, 1)
    max_items = max_rows + target_items
    max_partials = min(max_items, 2 * target_items)
    return AttentionPlan(
        items=torch.zeros(max_items, ITEM_FIELDS, dtype=torch.int32, device=device),
        splits=torch.zeros(min(max_rows, target_items), SPLIT_FIELDS, dtype=torch.int32, device=device),
        prompts=torch.zeros(max_rows, PROMPT_FIELDS, dtype=torch.int32, device=device),
        counts=torch.zeros(4, dtype=torch.int32, device=device),
        partials=torch.empty(max_partials, num_heads, head_dim, dtype=torch.float32, device=device),
        stats=torch.empty(max_partials, num_heads, 2, dtype=torch.float32, device=device),
        arrived=torch.zeros(max_partials, num_kv_heads, dtype=torch.int32, device=device),
        target_items=target_items,
        granule=granule or split.granule,
        most_prompt_programs=num_programs or 1 << 30,
        most_merge_programs=num_programs or 2 * num_resident,
    )


def plan_attention(rows: DeviceRows) -> None:
    """Fill rows.plan for these rows; once a step, before the first layer."""
    if rows.query_starts.is_cuda:
        launch_plan_attention(rows)


@jit(do_not_specialize=("num_rows", "target_items"))
def _plan_kernel(
    query_starts_ptr, seq_lens_ptr, slots_ptr, items_ptr, splits_ptr, prompts_ptr, counts_ptr, num_rows, target_items,
    GRANULE: tl.constexpr, ITEM_FIELDS: tl.constexpr, SPLIT_FIELDS: tl.constexpr, PROMPT_FIELDS: tl.constexpr,
    BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: every row is an element. There are at most length / chunk + 1 pieces, so that the bounds hold."""
    wait_for_previous(PDL)
    row = tl.arange(0, BLOCK_R)
    is_row = row < num_rows
    token = tl.load(query_starts_ptr + row, mask=is_row, other=0)
    num_queries = tl.load(query_starts_ptr + row + 1, mask=is_row, other=0) - token
    seq_len = tl.load(seq_lens_ptr + row, mask=is_row, other=0)
    slot = tl.load(slots_ptr + row, mask=is_row, other=0)
    is_prompt = num_queries > 1
    prompt_queries = tl.where(is_prompt, num_queries, 0)
    prompt = tl.cumsum(is_prompt.to(tl.int32), axis=0) - is_prompt.to(tl.int32)
    prompt_ptrs = prompts_ptr + prompt * PROMPT_FIELDS
    tl.store(prompt_ptrs, tl.cumsum(prompt_queries, axis=0) - prompt_queries, mask=is_prompt)
    tl.store(prompt_ptrs + 1, token, mask=is_prompt)
    tl.store(prompt_ptrs + 2, num_queries, mask=is_prompt)
    tl.store(prompt_ptrs + 3, seq_len, mask=is_prompt)
    tl.store(prompt_ptrs + 4, slot, mask=is_prompt)
    tl.store(counts_ptr + 2, tl.sum(is_prompt.to(tl.int32), axis=0))
    tl.store(counts_ptr + 3, tl.sum(prompt_queries, axis=0))
    length = tl.where(num_queries == 1, seq_len, 0)
    chunk = tl.maximum(tl.cdiv(tl.cdiv(tl.sum(length, axis=0), target_items), GRANULE), 1) * GRANULE
    # A row that is a quarter longer than a piece stays whole: rows of one length would all be split for a few keys.
    aim = tl.maximum((length + chunk * 3 // 4) // chunk, 1)
    # Equal pieces rather than whole chunks and a rest; none is empty.
    piece_len = tl.maximum(tl.cdiv(tl.cdiv(length, aim), GRANULE), 1) * GRANULE
    pieces = tl.cdiv(length, piece_len)
    is_split = pieces > 1
    # Long pieces first, so that only short ones run when most of the GPU is idle already. Level 0: more than half a
    # chunk, 1: more than a quarter, and so on.
    level = tl.zeros([BLOCK_R], tl.int32)
    for shift in tl.static_range(1, _LEVELS):
        level += (piece_len <= chunk >> shift).to(tl.int32)
    first_item = tl.zeros([BLOCK_R], tl.int32)
    num_items = 0
    for this in tl.static_range(_LEVELS):
        number = tl.where(level == this, pieces, 0)
        first_item += tl.where(level == this, num_items + tl.cumsum(number, axis=0) - number, 0)
        num_items += tl.sum(number, axis=0)
    partials = tl.where(is_split, pieces, 0)
    first_partial = tl.cumsum(partials, axis=0) - partials
    split = tl.cumsum(is_split.to(tl.int32), axis=0) - is_split.to(tl.int32)
    tl.store(counts_ptr, num_items)
    tl.store(counts_ptr + 1, tl.sum(is_split.to(tl.int32), axis=0))
    split_ptrs = splits_ptr + split * SPLIT_FIELDS
    tl.store(split_ptrs, token, mask=is_split)
    tl.store(split_ptrs + 1, first_partial, mask=is_split)
    tl.store(split_ptrs + 2, pieces, mask=is_split)
    for piece in range(tl.max(pieces, axis=0)):
        exists = piece < pieces
        item_ptrs = items_ptr + (first_item + piece) * ITEM_FIELDS
        tl.store(item_ptrs, token, mask=exists)
        tl.store(item_ptrs + 1, slot, mask=exists)
        tl.store(item_ptrs + 2, piece * piece_len, mask=exists)
        tl.store(item_ptrs + 3, tl.minimum((piece + 1) * piece_len, length), mask=exists)
        tl.store(item_ptrs + 4, length, mask=exists)
        tl.store(item_ptrs + 5, tl.where(is_split, first_partial + piece, -1), mask=exists)
        tl.store(item_ptrs + 6, first_partial, mask=exists)
        tl.store(item_ptrs + 7, pieces, mask=exists)


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel is compiled: its constants, triton's options, and what dependent_launch gives."""

    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    dependence: dict[str, bool]

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the launch."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {**self.constexprs, **options, **self.dependence}


@cache
def plan_launch(num_rows: int, granule: int, arch: str) -> Launch:
    """How _plan_kernel is compiled for steps of num_rows rows."""
    block = max(next_power_of_2(num_rows), 32)
    constexprs = {
        "GRANULE": granule,
        "ITEM_FIELDS": ITEM_FIELDS,
        "SPLIT_FIELDS": SPLIT_FIELDS,
        "PROMPT_FIELDS": PROMPT_FIELDS,
        "BLOCK_R": block,
    }
    return Launch(constexprs, min(max(block // 128, 1), 8), num_stages=1, dependence=dependent_launch(arch))


def launch_plan_attention(rows: DeviceRows, *, arch: str | None = None) -> None:
    """The kernel of plan_attention. arch: None for that of the rows."""
    arch = arch_of(rows.seq_lens, arch)
    plan, num_rows = rows.plan, rows.seq_lens.shape[0]
    assert num_rows + plan.target_items <= plan.items.shape[0], "the plan was made for fewer rows"
    _plan_kernel[(1,)](
        rows.query_starts, rows.seq_lens, rows.slots, plan.items, plan.splits, plan.prompts, plan.counts, num_rows,
        plan.target_items, **plan_launch(num_rows, plan.granule, arch).arguments,
    )  # fmt: skip
