"""The threshold on scaled logits that min-p, then top-k, then top-p set, without a sort.

A program a row searches by bisection over order-preserving integer keys of float32: the top-k-th largest value is the
largest that at least k values reach; the last value of top-p is the smallest whose larger ones have less than top_p of
the mass. Both are values of the row, so ties stay. Logits are compared unscaled: division keeps their order.

Most of a row is far from the answer. The k-th largest of 4,096 interleaved maxima bounds top-k's from below, and a few
looks at the whole row bound top-p's from both sides; what lies between, at most 4,096 values, is gathered and searched.
Counts are integers and sums have a fixed order: the answer is the same every time. Shapes: R rows, V vocabulary.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
from torch import Tensor

from evenflow.kernels import sampling_table
from evenflow.kernels.language import current_arch, jit, tl
from evenflow.kernels.sampling import filter_thresholds as sorted_thresholds
from evenflow.kernels.tuning import filter_warps

_NUM_COLUMNS = tl.constexpr(sampling_table.NUM_COLUMNS)
_TEMPERATURE = tl.constexpr(sampling_table.TEMPERATURE)
_TOP_K = tl.constexpr(sampling_table.TOP_K)
_TOP_P = tl.constexpr(sampling_table.TOP_P)
_LOG_MIN_P = tl.constexpr(sampling_table.LOG_MIN_P)
_INF = tl.constexpr(float("inf"))
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST_KEY = tl.constexpr(-0x7F800001)  # of -inf
_NUM_VALUE_STEPS = tl.constexpr(4)  # of top-p by value; then by key, which ends whatever the values

LANES, WIDTH = 512, 8  # of a block: WIDTH neighbours stay in one thread, and are added there


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
def _load(x_ptr, start, size, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """A block, -inf beyond size: [LANES, WIDTH] float32."""
    cols = start + tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return tl.load(x_ptr + cols, mask=cols < size, other=-_INF).to(tl.float32)


@jit
def _filter_thresholds_kernel(
    logits_ptr, params_ptr, slots_ptr, candidates_ptr, out_ptr, row_stride, V,
    LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = LANES * WIDTH
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
    candidates_ptr += row * BLOCK
    most = tl.full([LANES, WIDTH], -_INF, tl.float32)
    for start in range(0, V, BLOCK):
        most = tl.maximum(most, _load(logits_ptr, start, V, LANES, WIDTH))
    largest = tl.max(tl.max(most, axis=1), axis=0)
    floor = tl.div_rn(largest, temperature) + log_min_p
    low = tl.full([], _LOWEST_KEY, tl.int64)
    num_candidates = BLOCK + 1  # gathered for top-k: more than a block says that there are none
    if has_top_k:
        if top_k <= BLOCK // 2:
            # The k-th largest of the maxima of separate parts of the row: at least k values reach it.
            _store(candidates_ptr, most, LANES, WIDTH)
            low = _kth_key(candidates_ptr, BLOCK, top_k, low, _key(largest), LANES, WIDTH)
            num_candidates = _gather(logits_ptr, V, _value(low), largest, candidates_ptr, LANES, WIDTH)
        if num_candidates <= BLOCK:
            low = _kth_key(candidates_ptr, BLOCK, top_k, low, _key(largest), LANES, WIDTH)
        else:
            low = _kth_key(logits_ptr, V, top_k, low, _key(largest), LANES, WIDTH)
        floor = tl.maximum(floor, tl.div_rn(_value(low), temperature))
    if top_p < 1.0:
        scale = _LOG2_E / temperature
        low = tl.maximum(low, tl.minimum(_key(floor * temperature), _key(largest)))
        if num_candidates <= BLOCK:
            last = _top_p_key(candidates_ptr, top_p, largest, scale, low, LANES, WIDTH)
        else:
            last = _top_p_key_of_row(logits_ptr, V, top_p, largest, scale, low, candidates_ptr, LANES, WIDTH)
        floor = tl.maximum(floor, tl.div_rn(_value(last), temperature))
    tl.store(out_ptr + row, floor)


@jit
def _store(x_ptr, x, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """A block, where every thread of the program sees it."""
    cols = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(x_ptr + cols, x.to(x_ptr.dtype.element_ty))
    tl.debug_barrier()


@jit
def _gather(x_ptr, size, low, high, out_ptr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Put the values from low to high into out, in their order, and -inf behind; returns how many there are.

    out takes a block, and the rest is lost.
    """
    tl.debug_barrier()  # out may still be read
    _store(out_ptr, tl.full([LANES, WIDTH], -_INF, tl.float32), LANES, WIDTH)
    num = tl.full([], 0, tl.int32)
    for start in range(0, size, LANES * WIDTH):
        x = _load(x_ptr, start, size, LANES, WIDTH)
        is_kept = (x >= low) & (x <= high)
        kept = is_kept.to(tl.int32)
        of_lane = tl.sum(kept, axis=1)
        before = tl.cumsum(of_lane, axis=0) - of_lane
        places = num + before[:, None] + tl.cumsum(kept, axis=1) - 1
        tl.store(out_ptr + places, x.to(out_ptr.dtype.element_ty), mask=is_kept & (places < LANES * WIDTH))
        num += tl.sum(of_lane, axis=0)
    tl.debug_barrier()
    return num


@jit
def _pivots(low, high, by_value):
    """Three keys between low and high, neither included, in rising order: quarters of the keys, or of the values."""
    step = tl.maximum((high - low) // 4, 1)
    key1, key2, key3 = low + step, low + 2 * step, low + 3 * step
    if by_value:
        start = _value(low)
        width = (_value(high) - start) * 0.25
        key1, key2, key3 = _key(start + width), _key(start + 2 * width), _key(start + 3 * width)
    key1 = tl.minimum(tl.maximum(key1, low + 1), high - 1)
    key2 = tl.minimum(tl.maximum(key2, key1), high - 1)
    return key1, key2, tl.minimum(tl.maximum(key3, key2), high - 1)


@jit
def _total_count(count1, count2, count3):
    """The sums over all lanes, in one reduction: 21 bits each."""
    packed = count1.to(tl.int64) | (count2.to(tl.int64) << 21) | (count3.to(tl.int64) << 42)
    packed = tl.sum(packed, axis=0)
    return packed & 0x1FFFFF, (packed >> 21) & 0x1FFFFF, packed >> 42


@jit
def _kth_key(x_ptr, size, k, low, high, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The largest key, of those from low to high, that at least k values reach; low is one that k reach."""
    end = high + 1
    while end - low > 1:
        key1, key2, key3 = _pivots(low, end, False)
        pivot1, pivot2, pivot3 = _value(key1), _value(key2), _value(key3)
        count1 = tl.zeros([LANES], tl.int32)
        count2 = tl.zeros([LANES], tl.int32)
        count3 = tl.zeros([LANES], tl.int32)
        for start in range(0, size, LANES * WIDTH):
            x = _load(x_ptr, start, size, LANES, WIDTH)
            count1 += tl.sum((x >= pivot1).to(tl.int32), axis=1)
            count2 += tl.sum((x >= pivot2).to(tl.int32), axis=1)
            count3 += tl.sum((x >= pivot3).to(tl.int32), axis=1)
        num1, num2, num3 = _total_count(count1, count2, count3)
        has1, has2, has3 = num1 >= k, num2 >= k, num3 >= k
        end = tl.where(has3, end, tl.where(has2, key3, tl.where(has1, key2, key1)))
        low = tl.where(has3, key3, tl.where(has2, key2, tl.where(has1, key1, low)))
    return low


@jit
def _top_p_key(x_ptr, top_p, largest, scale, floor, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The smallest key, of `floor` or more, whose larger values have less than top_p of the mass from `floor` on.

    x: a block.
    """
    BLOCK: tl.constexpr = LANES * WIDTH
    total, num = _mass(x_ptr, BLOCK, _value(floor), _value(floor), largest, scale, LANES, WIDTH)
    return _search_top_p(
        x_ptr, BLOCK, top_p * total, largest, scale, floor - 1, _key(largest), total * 0.0, num, 0, LANES, WIDTH
    )[1]


@jit
def _top_p_key_of_row(
    x_ptr, size, top_p, largest, scale, floor, candidates_ptr, LANES: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """The same of a row, looking at all of it only until the answer is among few enough values to gather."""
    BLOCK: tl.constexpr = LANES * WIDTH
    # What is further below the largest has, all together, less than 1 - top_p of its mass.
    reach = (tl.log2(size.to(tl.float32)) - tl.log2(1.0 - top_p)) / scale
    start = tl.maximum(floor, _key(largest - reach))
    total, num = _mass(x_ptr, size, _value(floor), _value(start), largest, scale, LANES, WIDTH)
    wanted = top_p * total
    low, high, above, num = _search_top_p(
        x_ptr, size, wanted, largest, scale, start - 1, _key(largest), total * 0.0, num, BLOCK, LANES, WIDTH
    )
    if high - low > 1:
        _gather(x_ptr, size, _value(low + 1), _value(high), candidates_ptr, LANES, WIDTH)
        high = _search_top_p(candidates_ptr, BLOCK, wanted, largest, scale, low, high, above, num, 0, LANES, WIDTH)[1]
    return high


@jit
def _mass(x_ptr, size, floor, start_value, largest, scale, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """(mass of the values from floor on, how many are start_value or more). The largest value has mass 1."""
    mass = tl.zeros([LANES], tl.float32)
    count = tl.zeros([LANES], tl.int32)
    for start in range(0, size, LANES * WIDTH):
        x = _load(x_ptr, start, size, LANES, WIDTH)
        mass += tl.sum(tl.where(x >= floor, tl.exp2((x - largest) * scale), 0.0), axis=1)
        count += tl.sum((x >= start_value).to(tl.int32), axis=1)
    return tl.sum(mass, axis=0), tl.sum(count, axis=0).to(tl.int64)


@jit
def _search_top_p(
    x_ptr, size, wanted, largest, scale, low, high, above, num, most, LANES: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Narrow (low, high] until neighbours are left, or at most `most` values in between: (low, high, above, num).

    Always the values larger than low have the mass that is wanted, and those larger than high have not: it is `above`.
    x holds at least the values in (low, high]; num: how many there are.
    """
    num_steps = num * 0
    while (high - low > 1) & (num > most):
        key1, key2, key3 = _pivots(low, high, num_steps < _NUM_VALUE_STEPS)
        pivot1, pivot2, pivot3, top = _value(key1), _value(key2), _value(key3), _value(high)
        mass1 = tl.zeros([LANES], tl.float32)
        mass2 = tl.zeros([LANES], tl.float32)
        mass3 = tl.zeros([LANES], tl.float32)
        count1 = tl.zeros([LANES], tl.int32)
        count2 = tl.zeros([LANES], tl.int32)
        count3 = tl.zeros([LANES], tl.int32)
        for start in range(0, size, LANES * WIDTH):
            x = _load(x_ptr, start, size, LANES, WIDTH)
            mass = tl.where(x <= top, tl.exp2((x - largest) * scale), 0.0)
            mass1 += tl.sum(tl.where(x > pivot1, mass, 0.0), axis=1)
            mass2 += tl.sum(tl.where(x > pivot2, mass, 0.0), axis=1)
            mass3 += tl.sum(tl.where(x > pivot3, mass, 0.0), axis=1)
            count1 += tl.sum(((x > pivot1) & (x <= top)).to(tl.int32), axis=1)
            count2 += tl.sum(((x > pivot2) & (x <= top)).to(tl.int32), axis=1)
            count3 += tl.sum(((x > pivot3) & (x <= top)).to(tl.int32), axis=1)
        sum1, sum2, sum3 = above + tl.sum(mass1, axis=0), above + tl.sum(mass2, axis=0), above + tl.sum(mass3, axis=0)
        num1, num2, num3 = _total_count(count1, count2, count3)
        has1, has2, has3 = sum1 >= wanted, sum2 >= wanted, sum3 >= wanted
        num = tl.where(has3, num3, tl.where(has2, num2 - num3, tl.where(has1, num1 - num2, num - num1)))
        above = tl.where(has3, above, tl.where(has2, sum3, tl.where(has1, sum2, sum1)))
        high = tl.where(has3, high, tl.where(has2, key3, tl.where(has1, key2, key1)))
        low = tl.where(has3, key3, tl.where(has2, key2, tl.where(has1, key1, low)))
        num_steps += 1
    return low, high, above, num


def launch_filter_thresholds(logits: Tensor, params: Tensor, slots: Tensor, arch: str | None = None) -> Tensor:
    """The kernel of filter_thresholds, for an architecture as Platform.arch spells it; None: the GPU's at hand."""
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1
    assert params.is_contiguous()
    assert slots.dtype == params.dtype == torch.int32
    assert vocab_size < 1 << 21  # of counts that are summed three to a word
    out = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        candidates = torch.empty(num_rows, LANES * WIDTH, dtype=logits.dtype, device=logits.device)
        _filter_thresholds_kernel[(num_rows,)](
            logits, params, slots, candidates, out, logits.stride(0), vocab_size,
            LANES=LANES, WIDTH=WIDTH, num_warps=filter_warps(current_arch() if arch is None else arch),
        )  # fmt: skip
    return out
