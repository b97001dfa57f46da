"""From the rows of a step to its tokens, on the device: what each token is, where it stands, where its keys go.

The host sends a few integers a row; everything per token is worked out here, from the token buffer and the block tables
that stay on the device. So a sampled token is read by the next step without having been on the host.

Shapes: R rows, T tokens (padded), S tokens per block.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import torch
from torch import Tensor

from evenflow.kernels.language import (
    arch_of,
    cdiv,
    dependent_launch,
    jit,
    next_power_of_2,
    tl,
    wait_for_previous,
)

BLOCK = 128  # tokens a program
UPDATE_BLOCK = 256


def expand_rows(
    query_starts: Tensor,
    starts: Tensor,
    slots: Tensor,
    token_buffer: Tensor,
    block_tables: Tensor,
    block_size: int,
    token_ids: Tensor,
    positions: Tensor,
    store_index: Tensor,
) -> None:
    """Fill token_ids, positions, store_index (each [T]) for tokens query_starts[r] .. query_starts[r + 1] of every row.

    query_starts: [R + 1], its last entry the number of tokens; starts: [R], the position of each row's first token;
    slots: [R], row of token_buffer ([max_num_seqs, L]) and block_tables ([max_num_seqs, blocks]); all int32.
    Token t of row r stands at p = starts[r] + t - query_starts[r]: store_index is its block * S + p % S. Beyond the
    last token: token 0 at position 0, with store_index -1, which nothing is stored at.
    """
    launch = launch_expand_rows if token_ids.is_cuda else expand_rows_ref
    launch(
        query_starts, starts, slots, token_buffer, block_tables, block_size, token_ids, positions, store_index
    )  # fmt: skip


def expand_rows_ref(
    query_starts, starts, slots, token_buffer, block_tables, block_size, token_ids, positions, store_index
):  # fmt: skip
    t = torch.arange(len(token_ids), device=token_ids.device)
    rows = (torch.searchsorted(query_starts, t.to(torch.int32), right=True) - 1).clamp(max=len(starts) - 1)
    is_real = t < query_starts[-1]
    p = torch.where(is_real, starts[rows] + t - query_starts[rows], 0).long()
    slot = slots[rows].long()
    token_ids.copy_(torch.where(is_real, token_buffer[slot, p], 0))
    positions.copy_(p)
    blocks = block_tables[slot, p // block_size].long()
    store_index.copy_(torch.where(is_real, blocks * block_size + p % block_size, -1))


@jit(do_not_specialize=("R", "T", "num_steps"))
def _expand_rows_kernel(
    query_starts_ptr, starts_ptr, slots_ptr, token_buffer_ptr, block_tables_ptr, token_ids_ptr, positions_ptr,
    store_index_ptr, R, T, buffer_stride, table_stride, num_steps,
    S: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    is_real = t < tl.load(query_starts_ptr + R)
    low = tl.zeros([BLOCK], tl.int32)  # the last row that begins at or before t
    high = tl.zeros([BLOCK], tl.int32) + R
    for _ in range(num_steps):
        middle = (low + high) // 2
        is_at_or_before = tl.load(query_starts_ptr + middle) <= t
        low = tl.where(is_at_or_before & (middle < R), middle, low)
        high = tl.where(is_at_or_before, high, middle)
    first = tl.load(query_starts_ptr + low)
    p = tl.where(is_real, tl.load(starts_ptr + low) + t - first, 0)
    slot = tl.load(slots_ptr + low).to(tl.int64)
    token_id = tl.load(token_buffer_ptr + slot * buffer_stride + p, mask=is_real, other=0)
    block = tl.load(block_tables_ptr + slot * table_stride + p // S, mask=is_real, other=0).to(tl.int64)
    inside = t < T
    tl.store(token_ids_ptr + t, token_id.to(tl.int64), mask=inside)
    tl.store(positions_ptr + t, p.to(tl.int64), mask=inside)
    tl.store(store_index_ptr + t, tl.where(is_real, block * S + p % S, -1), mask=inside)


def launch_expand_rows(
    query_starts: Tensor,
    starts: Tensor,
    slots: Tensor,
    token_buffer: Tensor,
    block_tables: Tensor,
    block_size: int,
    token_ids: Tensor,
    positions: Tensor,
    store_index: Tensor,
    *,
    arch: str | None = None,
) -> None:
    """The kernel of expand_rows. arch: None for that of token_ids."""
    num_rows, num_tokens = len(starts), len(token_ids)
    num_steps = next_power_of_2(num_rows + 1).bit_length()
    _expand_rows_kernel[(cdiv(num_tokens, BLOCK),)](
        query_starts, starts, slots, token_buffer, block_tables, token_ids, positions, store_index,
        num_rows, num_tokens, token_buffer.stride(0), block_tables.stride(0), num_steps,
        S=block_size, BLOCK=BLOCK, num_warps=4,
        **dependent_launch(arch_of(token_ids, arch)),
    )  # fmt: skip


def scatter_words(target: Tensor, updates: Tensor, count: int) -> None:
    """target.view(-1)[updates[0, i]] = updates[1, i] for i < count. target: contiguous int32; updates: [2, n] int32."""
    if count == 0:
        return
    if target.is_cuda:
        launch_scatter_words(target, updates, count)
    else:
        target.view(-1)[updates[0, :count].long()] = updates[1, :count]


@jit(do_not_specialize=("index_ptr", "value_ptr", "count"))
def _scatter_words_kernel(target_ptr, index_ptr, value_ptr, count, BLOCK: tl.constexpr):
    """Updates stand anywhere in a step's words: what their addresses are divisible by must compile nothing anew."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    index = tl.load(index_ptr + i, mask=mask, other=0).to(tl.int64)
    tl.store(target_ptr + index, tl.load(value_ptr + i, mask=mask, other=0), mask=mask)


def launch_scatter_words(target: Tensor, updates: Tensor, count: int) -> None:
    """The kernel of scatter_words."""
    _scatter_words_kernel[(cdiv(count, UPDATE_BLOCK),)](
        target, updates[0], updates[1], count, BLOCK=UPDATE_BLOCK, num_warps=4
    )  # fmt: skip
