"""The threshold on scaled logits that min-p, then top-k, then top-p set, without a sort.

Two bisections over order-preserving integer keys of float32: the top-k-th largest value is the largest with at least k
values not below it; the last value of top-p is the smallest whose larger ones have less than top_p of the mass. Both
are exact values of the row, so that ties stay. Logits are compared unscaled, which keeps their order.

One program a row reads it some 12 to 30 times, from the L2 cache. Counts are integers and sums have a fixed order, so
that the answer is the same every time. Shapes: R rows, V vocabulary.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
from torch import Tensor

from evenflow.kernels import sampling_table
from evenflow.kernels.language import jit, tl
from evenflow.kernels.sampling import filter_thresholds as sorted_thresholds

_NUM_COLUMNS = tl.constexpr(sampling_table.NUM_COLUMNS)
_TEMPERATURE = tl.constexpr(sampling_table.TEMPERATURE)
_TOP_K = tl.constexpr(sampling_table.TOP_K)
_TOP_P = tl.constexpr(sampling_table.TOP_P)
_LOG_MIN_P = tl.constexpr(sampling_table.LOG_MIN_P)
_INF = tl.constexpr(float("inf"))
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST_KEY = tl.constexpr(-0x7F800001)  # of -inf


def filter_thresholds(logits: Tensor, params: Tensor, slots: Tensor) -> Tensor:
    """The smallest logit / temperature that a row's filters keep: [R] float32, -inf where they keep all.

    logits: [R, V], rows may be strided. params: the table of sampling_table.py. slots: [R] int32, -1 is padding.
    """
    if logits.is_cuda:
        return launch_filter_thresholds(logits, params, slots)
    table = params[slots.clamp(min=0).long()]
    reals = table.view(torch.float32)
    temperatures, top_k = reals[:, sampling_table.TEMPERATURE], table[:, sampling_table.TOP_K].long()
    is_off = (slots < 0) | (temperatures == 0)
    scaled = logits.float() / temperatures.masked_fill(is_off, 1.0)[:, None]
    min_p, top_p = reals[:, sampling_table.LOG_MIN_P].exp(), reals[:, sampling_table.TOP_P].double()
    top_k = top_k.masked_fill(top_k >= logits.shape[1], 0)
    return sorted_thresholds(scaled, top_k, top_p, min_p).masked_fill_(is_off, -torch.inf)


@jit
def _key(value):
    """Of a scalar float32: an integer of the same order."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@jit
def _value(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def _filter_thresholds_kernel(logits_ptr, params_ptr, slots_ptr, out_ptr, row_stride, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row)
    params_ptr += tl.maximum(slot, 0) * _NUM_COLUMNS
    temperature = tl.load(params_ptr + _TEMPERATURE).to(tl.float32, bitcast=True)
    top_k = tl.load(params_ptr + _TOP_K)
    top_p = tl.load(params_ptr + _TOP_P).to(tl.float32, bitcast=True)
    log_min_p = tl.load(params_ptr + _LOG_MIN_P).to(tl.float32, bitcast=True)
    has_top_k = (top_k > 0) & (top_k < V)
    is_off = (slot < 0) | (temperature == 0.0)
    if is_off | ((not has_top_k) & (top_p >= 1.0) & (log_min_p == -_INF)):
        tl.store(out_ptr + row, -_INF)
        return
    logits_ptr += row.to(tl.int64) * row_stride
    cols = tl.arange(0, BLOCK)
    most = tl.full([BLOCK], -_INF, tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < V, other=-_INF).to(tl.float32)
        most = tl.maximum(most, x)
    largest = tl.max(most, axis=0)
    end = _key(largest) + 1
    low = tl.full([], _LOWEST_KEY, tl.int64)
    if has_top_k:
        low = _kth_key(logits_ptr, V, top_k, end, cols, BLOCK)
    floor = tl.div_rn(largest, temperature) + log_min_p
    if top_p < 1.0:
        low = tl.maximum(low, tl.minimum(_key(floor * temperature), end - 1))
        low = _top_p_key(logits_ptr, V, top_p, largest, _LOG2_E / temperature, low, end, cols, BLOCK)
        floor = tl.maximum(floor, tl.div_rn(_value(low), temperature))
    elif has_top_k:
        floor = tl.maximum(floor, tl.div_rn(_value(low), temperature))
    tl.store(out_ptr + row, floor)


@jit
def _kth_key(logits_ptr, V, k, end, cols, BLOCK: tl.constexpr):
    """The largest key with at least k values not below it; `end` has fewer."""
    low = tl.full([], _LOWEST_KEY, tl.int64)
    while end - low > 1:
        step = tl.maximum((end - low) // 4, 1)
        pivot1, pivot2, pivot3 = _value(low + step), _value(low + 2 * step), _value(low + 3 * step)
        count1 = tl.zeros([BLOCK], tl.int32)
        count2 = tl.zeros([BLOCK], tl.int32)
        count3 = tl.zeros([BLOCK], tl.int32)
        for start in range(0, V, BLOCK):
            mask = start + cols < V
            x = tl.load(logits_ptr + start + cols, mask=mask, other=-_INF).to(tl.float32)
            count1 += ((x >= pivot1) & mask).to(tl.int32)
            count2 += ((x >= pivot2) & mask).to(tl.int32)
            count3 += ((x >= pivot3) & mask).to(tl.int32)
        has1 = tl.sum(count1, axis=0) >= k
        has2 = tl.sum(count2, axis=0) >= k
        has3 = (tl.sum(count3, axis=0) >= k) & (low + 3 * step < end)
        has2 = has2 & (low + 2 * step < end)
        num_steps = has1.to(tl.int64) + has2.to(tl.int64) + has3.to(tl.int64)
        if num_steps < 3:
            end = tl.minimum(end, low + (num_steps + 1) * step)
        low += num_steps * step
    return low


@jit
def _top_p_key(logits_ptr, V, top_p, largest, scale, low, end, cols, BLOCK: tl.constexpr):
    """The smallest key, of `low` or more, whose larger values have less than top_p of the mass from `low` on."""
    mass = tl.zeros([BLOCK], tl.float32)
    floor = _value(low)
    for start in range(0, V, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < V, other=-_INF).to(tl.float32)
        mass += tl.where(x >= floor, tl.exp2((x - largest) * scale), 0.0)
    wanted = top_p * tl.sum(mass, axis=0)
    low -= 1  # from here on: larger values than `low` have enough, larger than `high` have not
    high = end - 1
    while high - low > 1:
        step = tl.maximum((high - low) // 4, 1)
        pivot1, pivot2, pivot3 = _value(low + step), _value(low + 2 * step), _value(low + 3 * step)
        mass1 = tl.zeros([BLOCK], tl.float32)
        mass2 = tl.zeros([BLOCK], tl.float32)
        mass3 = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            x = tl.load(logits_ptr + start + cols, mask=start + cols < V, other=-_INF).to(tl.float32)
            mass = tl.exp2((x - largest) * scale)
            mass1 += tl.where(x > pivot1, mass, 0.0)
            mass2 += tl.where(x > pivot2, mass, 0.0)
            mass3 += tl.where(x > pivot3, mass, 0.0)
        has1 = tl.sum(mass1, axis=0) >= wanted
        has2 = (tl.sum(mass2, axis=0) >= wanted) & (low + 2 * step < high)
        has3 = (tl.sum(mass3, axis=0) >= wanted) & (low + 3 * step < high)
        num_steps = has1.to(tl.int64) + has2.to(tl.int64) + has3.to(tl.int64)
        if num_steps < 3:
            high = tl.minimum(high, low + (num_steps + 1) * step)
        low += num_steps * step
    return high


BLOCK = 4096
NUM_WARPS = 16


def launch_filter_thresholds(logits: Tensor, params: Tensor, slots: Tensor) -> Tensor:
    """The kernel of filter_thresholds."""
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1
    assert params.is_contiguous()
    assert slots.dtype == params.dtype == torch.int32
    out = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        _filter_thresholds_kernel[(num_rows,)](
            logits, params, slots, out, logits.stride(0), vocab_size, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    return out
