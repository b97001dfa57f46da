"""The next token of every row: argmax over the kept tokens of logit / temperature - log E, E the noise of philox.py.

Greedy rows (temperature 0) take the largest logit, the lowest index among equals. Two kernels: tiles of the vocabulary
give their best score and its index, then a program a row takes the best of them, so that one row fills a GPU as well as
many do. A counter of the generator serves four runs of 64 indices: a tile is [runs, 4, 64], and every word is used.

Shapes: R rows, V vocabulary, L tokens that a row of the token buffer holds.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
from torch import Tensor

from evenflow.kernels import philox, sampling_table
from evenflow.kernels.language import arch_of, cdiv, jit, log2, next_power_of_2, tl
from evenflow.kernels.sampling import gumbel_argmax, row_max
from evenflow.kernels.tuning import has_approximate_log2

_LANE = tl.constexpr(philox.LANE)
_TILE = tl.constexpr(philox.TILE)
_NUM_COLUMNS = tl.constexpr(sampling_table.NUM_COLUMNS)
_TEMPERATURE = tl.constexpr(sampling_table.TEMPERATURE)
_SEED_LOW = tl.constexpr(sampling_table.SEED_LOW)
_SEED_HIGH = tl.constexpr(sampling_table.SEED_HIGH)
_NUM_PROMPT_TOKENS = tl.constexpr(sampling_table.NUM_PROMPT_TOKENS)
_UNIT = tl.constexpr(2.0**-32)
_MOST = tl.constexpr(1 - 2.0**-24)  # the float32 below 1
_INF = tl.constexpr(float("inf"))

NUM_ROWS_FOR_LARGE_TILES = 8  # from here on there are programs enough for any GPU


def draw(
    logits: Tensor,
    params: Tensor,
    slots: Tensor,
    lengths: Tensor,
    token_buffer: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    """The next token of every row: [R] int32, -1 where the row is bad or padding.

    logits: [R, V], rows may be strided. params: the table of sampling_table.py. slots, lengths (prompt and output so
    far): [R] int32; a slot of -1 is padding. token_buffer: [max_num_seqs, L] int32, gets max(token, 0) at lengths.
    thresholds: [R] float32, keep only tokens whose logit / temperature is at least that.
    A row is bad if it holds NaN or +inf, or nothing but -inf.
    """
    if logits.is_cuda:
        return launch_draw(logits, params, slots, lengths, token_buffer, thresholds)
    table = params[slots.clamp(min=0).long()]
    temperatures = table[:, sampling_table.TEMPERATURE].view(torch.float32)
    seeds = table[:, sampling_table.SEED_LOW].long() & 0xFFFFFFFF | table[:, sampling_table.SEED_HIGH].long() << 32
    positions = (lengths - table[:, sampling_table.NUM_PROMPT_TOKENS]).long()
    is_greedy = temperatures == 0
    scaled = logits.float() / temperatures.masked_fill(is_greedy, 1.0)[:, None]
    if thresholds is not None:
        scaled = scaled.masked_fill((scaled < thresholds[:, None]) & ~is_greedy[:, None], -torch.inf)
    greedy, drawn = row_max(scaled), gumbel_argmax(scaled, torch.ones_like(temperatures), seeds, positions)
    best, token_ids = (torch.where(is_greedy, a, b) for a, b in zip(greedy, drawn, strict=True))
    token_ids = token_ids.masked_fill(~best.isfinite() | (slots < 0), -1).to(torch.int32)
    if token_buffer is not None:
        rows = torch.nonzero((slots >= 0) & (lengths < token_buffer.shape[1]))[:, 0]
        token_buffer[slots[rows].long(), lengths[rows].long()] = token_ids[rows].clamp(min=0)
    return token_ids


@jit
def _log_exponential(words, APPROXIMATE: tl.constexpr):
    """philox.log_exponential_: log(-log(1 - v)), off by 2e-5 at most.

    The hardware's logarithm of 1 - v has no relative precision where v is small: that takes the series.
    """
    v = tl.minimum((words.to(tl.float32) + 0.5) * _UNIT, _MOST)
    small = v * (1.0 + v * (0.5 + v * (0.33333334 + v * 0.25)))
    exponential = tl.where(v < 0.015625, small, log2(1.0 - v, APPROXIMATE) * -0.6931472)
    return log2(exponential, APPROXIMATE) * 0.6931472


@jit
def _draw_tiles_kernel(
    logits_ptr, params_ptr, slots_ptr, lengths_ptr, thresholds_ptr, best_ptr, index_ptr, row_stride, V,
    HAS_THRESHOLDS: tl.constexpr, RUNS: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Best score and its index of one tile of RUNS * 256 tokens."""
    tile, row = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    params_ptr += slot * _NUM_COLUMNS
    temperature = tl.load(params_ptr + _TEMPERATURE).to(tl.float32, bitcast=True)
    runs = tile * RUNS + tl.arange(0, RUNS)[:, None]
    lanes = tl.arange(0, _LANE)[None, :]
    first = runs * _TILE + lanes
    logits_ptr += row.to(tl.int64) * row_stride
    x0 = tl.load(logits_ptr + first, mask=first < V, other=-_INF).to(tl.float32)
    x1 = tl.load(logits_ptr + first + _LANE, mask=first + _LANE < V, other=-_INF).to(tl.float32)
    x2 = tl.load(logits_ptr + first + 2 * _LANE, mask=first + 2 * _LANE < V, other=-_INF).to(tl.float32)
    x3 = tl.load(logits_ptr + first + 3 * _LANE, mask=first + 3 * _LANE < V, other=-_INF).to(tl.float32)
    if temperature > 0.0:
        seed_low = tl.load(params_ptr + _SEED_LOW).to(tl.uint32, bitcast=True).to(tl.uint64)
        seed_high = tl.load(params_ptr + _SEED_HIGH).to(tl.uint32, bitcast=True).to(tl.uint64)
        position = tl.load(lengths_ptr + row) - tl.load(params_ptr + _NUM_PROMPT_TOKENS)
        counters = runs * _LANE + lanes
        zero = counters * 0
        w0, w1, w2, w3 = tl.philox(seed_high << 32 | seed_low, counters, zero + position, zero, zero)
        if temperature != 1.0:  # the most common one saves a division that rounds right
            x0 = tl.div_rn(x0, temperature)
            x1 = tl.div_rn(x1, temperature)
            x2 = tl.div_rn(x2, temperature)
            x3 = tl.div_rn(x3, temperature)
        if HAS_THRESHOLDS:
            threshold = tl.load(thresholds_ptr + row)
            x0 = tl.where(x0 < threshold, -_INF, x0)
            x1 = tl.where(x1 < threshold, -_INF, x1)
            x2 = tl.where(x2 < threshold, -_INF, x2)
            x3 = tl.where(x3 < threshold, -_INF, x3)
        x0 -= _log_exponential(w0, APPROXIMATE)
        x1 -= _log_exponential(w1, APPROXIMATE)
        x2 -= _log_exponential(w2, APPROXIMATE)
        x3 -= _log_exponential(w3, APPROXIMATE)
    best, index = _nan_last(x0), first
    best, index = _better(best, index, _nan_last(x1), first + _LANE)
    best, index = _better(best, index, _nan_last(x2), first + 2 * _LANE)
    best, index = _better(best, index, _nan_last(x3), first + 3 * _LANE)
    most = tl.max(best)
    index = tl.min(tl.where(best == most, index, V))
    out = row * tl.num_programs(0) + tile
    tl.store(best_ptr + out, most)
    tl.store(index_ptr + out, index)


@jit
def _nan_last(x):
    """NaN counts as the largest, and as bad as +inf."""
    return tl.where(x != x, _INF, x)


@jit
def _better(best, index, x, x_index):
    """Equals stay with what was first."""
    is_better = x > best
    return tl.where(is_better, x, best), tl.where(is_better, x_index, index)


@jit
def _pick_kernel(
    best_ptr, index_ptr, slots_ptr, lengths_ptr, token_buffer_ptr, out_ptr, num_tiles, buffer_stride, L,
    HAS_BUFFER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The best of a row's tiles."""
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        tl.store(out_ptr + row, -1)
        return
    tiles = tl.arange(0, BLOCK)
    best = tl.load(best_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=-_INF)
    index = tl.load(index_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=0x7FFFFFFF)
    most = tl.max(best, axis=0)
    index = tl.min(tl.where(best == most, index, 0x7FFFFFFF), axis=0)
    token = tl.where((most < _INF) & (most > -_INF), index, -1)
    tl.store(out_ptr + row, token)
    if HAS_BUFFER:
        length = tl.load(lengths_ptr + row)
        tl.store(token_buffer_ptr + slot.to(tl.int64) * buffer_stride + length, tl.maximum(token, 0), mask=length < L)


def draw_tile(num_rows: int) -> tuple[int, int]:
    """(runs of 256 tokens a program, num_warps): small tiles while programs are few."""
    return (8, 4) if num_rows >= NUM_ROWS_FOR_LARGE_TILES else (4, 4)


def launch_draw(
    logits: Tensor,
    params: Tensor,
    slots: Tensor,
    lengths: Tensor,
    token_buffer: Tensor | None = None,
    thresholds: Tensor | None = None,
    *,
    arch: str | None = None,
) -> Tensor:
    """The kernels of draw. arch: None for that of logits."""
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1
    assert params.is_contiguous()
    assert slots.dtype == lengths.dtype == params.dtype == torch.int32
    out = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows == 0:
        return out
    runs, num_warps = draw_tile(num_rows)
    num_tiles = cdiv(vocab_size, runs * philox.TILE)
    best = torch.empty(num_rows, num_tiles, dtype=torch.float32, device=logits.device)
    index = torch.empty(num_rows, num_tiles, dtype=torch.int32, device=logits.device)
    _draw_tiles_kernel[(num_tiles, num_rows)](
        logits, params, slots, lengths, thresholds, best, index, logits.stride(0), vocab_size,
        HAS_THRESHOLDS=thresholds is not None, RUNS=runs, APPROXIMATE=has_approximate_log2(arch_of(logits, arch)),
        num_warps=num_warps,
    )  # fmt: skip
    stride, length = (0, 0) if token_buffer is None else (token_buffer.stride(0), token_buffer.shape[1])
    _pick_kernel[(num_rows,)](
        best, index, slots, lengths, token_buffer, out, num_tiles, stride, length,
        HAS_BUFFER=token_buffer is not None, BLOCK=next_power_of_2(num_tiles), num_warps=1,
    )  # fmt: skip
    return out
