"""Penalties for tokens that a row already has: repetition over prompt and output, presence and frequency over output.

Two kernels over the tokens of each row, whatever the vocabulary: the first counts them in a scratch of one word per
token of the vocabulary, the second takes each count out again, which only one of equal tokens gets, and applies it. So
the scratch is zero before and after. Sources: Keskar et al., CTRL (2019); OpenAI's API reference.

Shapes: R rows, V vocabulary, L tokens that a row of the token buffer holds.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
from torch import Tensor

from evenflow.kernels import sampling_table
from evenflow.kernels.language import cdiv, jit, tl
from evenflow.kernels.sampling import apply_penalties_ as apply_gathered_penalties_

_NUM_COLUMNS = tl.constexpr(sampling_table.NUM_COLUMNS)
_REPETITION = tl.constexpr(sampling_table.REPETITION)
_PRESENCE = tl.constexpr(sampling_table.PRESENCE)
_FREQUENCY = tl.constexpr(sampling_table.FREQUENCY)
_NUM_PROMPT_TOKENS = tl.constexpr(sampling_table.NUM_PROMPT_TOKENS)
_IN_PROMPT = tl.constexpr(1 << 30)  # beside the number of times that a token is in the output

BLOCK = 512  # tokens at a time
NUM_WARPS = 4
MOST_PROGRAMS = 16  # of one row; each takes every so many-th block


def apply_penalties_(
    logits: Tensor, token_buffer: Tensor, params: Tensor, slots: Tensor, lengths: Tensor, scratch: Tensor
) -> None:
    """Penalise, in place, the tokens that a row already has. logits: [R, V] float32, rows may be strided.

    token_buffer: [max_num_seqs, L] int32. params: the table of sampling_table.py. slots, lengths (prompt and output so
    far): [R] int32, a slot of -1 is padding. scratch: [at least R, V] int32, zero before and after.
    """
    if logits.is_cuda:
        launch_apply_penalties_(logits, token_buffer, params, slots, lengths, scratch)
        return
    rows = torch.nonzero((slots >= 0) & (lengths > 0))[:, 0]
    table = params[slots[rows].long()]
    reals = table.view(torch.float32)
    penalised = logits[rows]
    apply_gathered_penalties_(
        penalised,
        token_buffer[slots[rows].long()].long(),
        table[:, sampling_table.NUM_PROMPT_TOKENS],
        lengths[rows],
        reals[:, sampling_table.REPETITION],
        reals[:, sampling_table.PRESENCE],
        reals[:, sampling_table.FREQUENCY],
    )
    logits[rows] = penalised


@jit
def _count_tokens_kernel(
    token_buffer_ptr, params_ptr, slots_ptr, lengths_ptr, scratch_ptr, buffer_stride, V, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    params_ptr += slot * _NUM_COLUMNS
    repetition = tl.load(params_ptr + _REPETITION).to(tl.float32, bitcast=True)
    presence = tl.load(params_ptr + _PRESENCE).to(tl.float32, bitcast=True)
    frequency = tl.load(params_ptr + _FREQUENCY).to(tl.float32, bitcast=True)
    if (repetition == 1.0) & (presence == 0.0) & (frequency == 0.0):
        return
    length = tl.load(lengths_ptr + row)
    num_prompt_tokens = tl.load(params_ptr + _NUM_PROMPT_TOKENS)
    token_buffer_ptr += slot.to(tl.int64) * buffer_stride
    scratch_ptr += row.to(tl.int64) * V
    for start in range(tl.program_id(1) * BLOCK, length, tl.num_programs(1) * BLOCK):
        steps = start + tl.arange(0, BLOCK)
        tokens = tl.load(token_buffer_ptr + steps, mask=steps < length, other=-1)
        is_token = (tokens >= 0) & (tokens < V)
        is_prompt = steps < num_prompt_tokens
        tl.atomic_or(scratch_ptr + tokens, _IN_PROMPT, mask=is_token & is_prompt, sem="relaxed")
        tl.atomic_add(scratch_ptr + tokens, 1, mask=is_token & ~is_prompt, sem="relaxed")


@jit
def _apply_penalties_kernel(
    logits_ptr, token_buffer_ptr, params_ptr, slots_ptr, lengths_ptr, scratch_ptr, row_stride, buffer_stride, V,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    params_ptr += slot * _NUM_COLUMNS
    repetition = tl.load(params_ptr + _REPETITION).to(tl.float32, bitcast=True)
    presence = tl.load(params_ptr + _PRESENCE).to(tl.float32, bitcast=True)
    frequency = tl.load(params_ptr + _FREQUENCY).to(tl.float32, bitcast=True)
    if (repetition == 1.0) & (presence == 0.0) & (frequency == 0.0):
        return
    length = tl.load(lengths_ptr + row)
    token_buffer_ptr += slot.to(tl.int64) * buffer_stride
    scratch_ptr += row.to(tl.int64) * V
    logits_ptr += row.to(tl.int64) * row_stride
    for start in range(tl.program_id(1) * BLOCK, length, tl.num_programs(1) * BLOCK):
        steps = start + tl.arange(0, BLOCK)
        tokens = tl.load(token_buffer_ptr + steps, mask=steps < length, other=-1)
        is_token = (tokens >= 0) & (tokens < V)
        found = tl.atomic_and(scratch_ptr + tokens, 0, mask=is_token, sem="relaxed")  # and leave 0
        is_first = is_token & (found != 0)
        count = (found & (_IN_PROMPT - 1)).to(tl.float32)
        x = tl.load(logits_ptr + tokens, mask=is_first, other=0.0)
        x = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
        x -= frequency * count + tl.where(count > 0, presence, 0.0)
        tl.store(logits_ptr + tokens, x, mask=is_first)


def launch_apply_penalties_(
    logits: Tensor, token_buffer: Tensor, params: Tensor, slots: Tensor, lengths: Tensor, scratch: Tensor
) -> None:
    """The kernels of apply_penalties_."""
    num_rows, vocab_size = logits.shape
    assert logits.dtype == torch.float32
    assert logits.stride(1) == token_buffer.stride(1) == 1
    assert params.is_contiguous()
    assert scratch.is_contiguous()
    assert scratch.shape[1] == vocab_size
    assert len(scratch) >= num_rows
    assert all(x.dtype == torch.int32 for x in (token_buffer, params, slots, lengths, scratch))
    if num_rows == 0:
        return
    grid = (num_rows, min(cdiv(token_buffer.shape[1], BLOCK), MOST_PROGRAMS))
    _count_tokens_kernel[grid](
        token_buffer, params, slots, lengths, scratch, token_buffer.stride(0), vocab_size,
        BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    _apply_penalties_kernel[grid](
        logits, token_buffer, params, slots, lengths, scratch, logits.stride(0), token_buffer.stride(0), vocab_size,
        BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
