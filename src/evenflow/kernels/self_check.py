"""Does every kernel compute on this device what its reference does? On small inputs of a model's own shape.

Owns the inputs, the comparisons and their bounds. When it is asked, and how long an answer holds, is the runner's.
References run on the CPU, so that nothing of the device's own is trusted. The inputs are such that what is compared is
what steps launch later, compiled once: a model that was checked compiles nothing more for its plain steps.
"""

import math
import os
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, pairwise, product

import numpy as np
import torch
from torch import Tensor

from evenflow.kernels.all_reduce import PeerBuffers, launch_reduce_add_rms_norm, reduce_add_rms_norm
from evenflow.kernels.attention_plan import DeviceRows, launch_plan_attention, make_plan
from evenflow.kernels.draw import launch_draw
from evenflow.kernels.filter import filter_thresholds, launch_filter_thresholds
from evenflow.kernels.language import ALIGNED, current_arch, num_multiprocessors
from evenflow.kernels.linear import (
    FEW_ROWS,
    few_row_launch,
    gated_linear,
    launch_few_row_linear,
    launch_linear,
    linear,
)
from evenflow.kernels.logprobs import launch_token_logprobs, token_logprobs
from evenflow.kernels.many_row_linear import launch_many_row_gated_linear, tiles_taken
from evenflow.kernels.masks import apply_masks_, launch_apply_masks_
from evenflow.kernels.paged_attention import launch_paged_attention, paged_attention
from evenflow.kernels.penalties import apply_penalties_, launch_apply_penalties_
from evenflow.kernels.philox import log_noise
from evenflow.kernels.rms_norm import add_rms_norm, launch_add_rms_norm, launch_rms_norm, rms_norm
from evenflow.kernels.rotary import launch_rotary_and_store, rotary_and_store
from evenflow.kernels.sampling_table import pack_params
from evenflow.kernels.silu_and_mul import launch_silu_and_mul, silu_and_mul
from evenflow.kernels.step_inputs import (
    expand_rows_ref,
    launch_expand_rows,
    launch_scatter_words,
    scatter_words,
)
from evenflow.kernels.tuning import FewRowTile, ManyRowTile, own_product_rows

NUM_TOKENS = 19
NUM_OUTS = 24  # of a product of one row, whose weights would be most of what is copied
NUM_FEW_TILES = 2  # of outputs, of a product of a few rows
# What a step's rows are padded to for its plan. With more rows it is compiled when they come.
PLANNED_ROWS = (32, 64, 128, 256, 512, 1024)
MAX_WINDOW = 8192  # rows of larger windows would cost more than they tell
# Kernel and reference round at different places: two units in the last place, and what sums in float32 differ by.
# Interpreted kernels were at most 0.8 units off in float16 and bfloat16, and 8e-7 in float32.
UNITS, FLOAT32_SUMS = 2.0, 2e-5
EIGHT_BIT_SHARE = 5e-3  # of the mean: few of the values that are rounded to 8 bits lie so near to the middle
TOP_P_SHIFT = 1e-5  # by how much of the mass sums in float32 may be off
EPS = 1e-5
CHECK_POLLS = 1 << 24  # of a peer that may be compiling: some ten seconds


@dataclass(frozen=True, slots=True)
class CheckedShape:
    """What of a model decides how its kernels are compiled, on one rank.

    windows: of its layers, 0 for none. products: (outputs, inputs, is gated) of those without a bias.
    """

    dtype: str
    cache_dtype: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    block_size: int
    windows: tuple[int, ...]
    has_head_norm: bool
    products: tuple[tuple[int, int, bool], ...]

    def __str__(self) -> str:
        cache = "" if self.cache_dtype == self.dtype else f" with a cache of {self.cache_dtype}"
        return f"{self.num_heads}/{self.num_kv_heads} heads of {self.head_dim} in {self.dtype}{cache}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """error: how far a kernel is from its reference; bound: how far it may be, in the same unit."""

    kernel: str
    error: float
    bound: float

    @property
    def is_right(self) -> bool:
        return self.error <= self.bound  # NaN is not


class KernelError(RuntimeError):
    """A kernel does not run, or computes something else than its reference."""


def check_all_reduce(peers: PeerBuffers, hidden_size: int, dtype: torch.dtype) -> list[Comparison]:
    """Compare the sums over `peers` with their definition; all ranks call this at the same time. Raises KernelError.

    Three of each kind, since two halves of a buffer take turns. A peer that does not come makes the result NaN, and
    then nothing more is compared; else all is, also when it is wrong, since the others wait for us.
    """
    found: list[Comparison] = []
    peers = replace(peers, max_polls=CHECK_POLLS)
    for method in ("one_shot", "two_shot"):
        for epoch in range(3):
            generator = torch.Generator().manual_seed(epoch)
            size = (peers.size + 1, 2 * epoch + 3, hidden_size)
            *shares, residual = torch.randn(size, generator=generator).to(dtype)
            weight = 1 + 0.1 * torch.randn(hidden_size, generator=generator).to(dtype)
            x, r, w = (tensor.to(peers.state.device) for tensor in (shares[peers.rank], residual, weight))
            try:
                results = launch_reduce_add_rms_norm(x, r, w, EPS, peers, method)
                expected = reduce_add_rms_norm(shares, residual, weight, EPS)
                found += [_floats(f"all_reduce ({method})", *pair) for pair in zip(results, expected, strict=True)]
                if found[-1].error == math.inf:
                    return found
            except Exception as error:  # as below
                raise KernelError(f"all_reduce does not run: {type(error).__name__}: {error}") from error
    return found


def check_kernels(shape: CheckedShape, device: torch.device, kernels: Container[str] | None = None) -> list[Comparison]:
    """Compare every kernel that a model of this shape uses. Raises KernelError if one does not even run.

    device: where they are launched; a CPU only under an interpreter. On a GPU the checks run side by side: nearly all
    of their time is the compiler's, which works beside Python. kernels: only these.
    """
    num_threads, start = 1, None
    arch = current_arch() if device.type == "cuda" else ""
    checks = [(kernel, check) for kernel, check in all_checks(shape, arch) if kernels is None or kernel in kernels]
    if device.type == "cuda":
        num_threads = min(len(checks), os.cpu_count() or 1)
        start = partial(torch.cuda.set_device, torch.cuda.current_device())  # each thread has its own
    with ThreadPoolExecutor(num_threads, "evenflow-check", start) as pool:
        found = list(pool.map(partial(_run_check, shape, device), checks))
    return list(chain.from_iterable(found))


def all_checks(shape: CheckedShape, arch: str) -> list[tuple[str, "Check"]]:
    """By kernel. Each compiles little, so that they spread over the processors; what compiles longest is first."""
    logits = dict.fromkeys((shape.dtype, "float32"))
    return [
        *(
            ("paged_attention", partial(_check_paged_attention, window=window, is_mixed=is_mixed))
            for window in sorted(set(shape.windows))
            for is_mixed in (True, False)
        ),
        *(("filter_thresholds", partial(_check_filter_thresholds, dtype=dtype)) for dtype in logits),
        *(
            ("draw", partial(_check_draw, dtype=dtype, num_rows=num_rows, is_filtered=is_filtered))
            for dtype in logits
            for num_rows in (3, len(_SLOTS))
            for is_filtered in (False, True)
        ),
        *(("plan_attention", partial(_check_plan, num_rows=num_rows)) for num_rows in PLANNED_ROWS),
        *(("linear", check) for check in _product_checks(shape, arch)),
        *(("many_row_linear", check) for check in _many_row_checks(shape, arch)),
        ("rms_norm", _check_rms_norm),
        ("silu_and_mul", _check_silu_and_mul),
        ("rotary_and_store", _check_rotary_and_store),
        ("expand_rows", _check_step_inputs),
        ("apply_penalties", _check_penalties),
        ("apply_masks", _check_masks),
        ("token_logprobs", _check_token_logprobs),
    ]


def _run_check(shape: CheckedShape, device: torch.device, item: tuple[str, "Check"]) -> list[Comparison]:
    kernel, check = item
    try:
        return list(check(_Inputs(shape, device)))
    except Exception as error:  # the compiler's and the driver's have no common type
        raise KernelError(f"kernel {kernel} does not run: {type(error).__name__}: {error}") from error


class _Inputs:
    """Random inputs on the CPU, the same every time, and their way to the device."""

    def __init__(self, shape: CheckedShape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.dtype, self.cache_dtype = getattr(torch, shape.dtype), getattr(torch, shape.cache_dtype)
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(size, generator=self.generator).to(dtype or self.dtype)

    def integers(self, high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=self.generator, dtype=torch.int32)

    def kv_scales(self) -> list[Tensor]:
        """Of keys and of values, where the cache has 8 bits; else none."""
        return [torch.tensor([scale]) for scale in (0.6, 0.3)] if self.cache_dtype.itemsize == 1 else []

    def on_device(self, *tensors: Tensor) -> list[Tensor]:
        """Copies, also where the device is the CPU."""
        return [tensor.to(self.device, copy=True) for tensor in tensors]


def _floats(kernel: str, found: Tensor, expected: Tensor) -> Comparison:
    """The largest difference, as a share of the value and a typical one. What is infinite must be so in both."""
    bound = UNITS * torch.finfo(expected.dtype).eps + FLOAT32_SUMS
    found, expected = found.cpu().double(), expected.double()
    sizes = expected.abs().masked_fill(~expected.isfinite(), 0.0)
    difference = (found - expected).abs().masked_fill(found == expected, 0.0)
    error = (difference / (sizes + sizes.square().mean().sqrt())).nan_to_num(nan=math.inf).max().item()
    return Comparison(kernel, error, bound)


def _exact(kernel: str, *pairs: tuple[Tensor, Tensor]) -> Comparison:
    """The number of values that differ: none may."""
    return Comparison(kernel, float(sum(int((found.cpu() != expected).sum()) for found, expected in pairs)), 0.0)


def _check_rms_norm(inputs: _Inputs) -> Iterator[Comparison]:
    shape = inputs.shape
    x, residual = inputs.normal(2, NUM_TOKENS, shape.hidden_size)
    weight = 1 + 0.1 * inputs.normal(shape.hidden_size)
    dx, dresidual, dweight = inputs.on_device(x, residual, weight)
    yield _floats("rms_norm", launch_rms_norm(dx, dweight, EPS), rms_norm(x, weight, EPS))
    pairs = zip(launch_add_rms_norm(dx, dresidual, dweight, EPS), add_rms_norm(x, residual, weight, EPS), strict=True)
    for found, expected in pairs:
        yield _floats("add_rms_norm", found, expected)
    if shape.has_head_norm:
        joint = inputs.normal(NUM_TOKENS, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim)
        weight = 1 + 0.1 * inputs.normal(shape.head_dim)
        djoint, dweight = inputs.on_device(joint, weight)
        queries, keys = slice(shape.num_heads), slice(shape.num_heads, shape.num_heads + shape.num_kv_heads)
        for heads in (queries, keys):
            found, expected = launch_rms_norm(djoint[:, heads], dweight, EPS), rms_norm(joint[:, heads], weight, EPS)
            yield _floats("rms_norm of heads", found, expected)


def _check_silu_and_mul(inputs: _Inputs) -> Iterator[Comparison]:
    x = 3 * inputs.normal(NUM_TOKENS, 2 * inputs.shape.intermediate_size)
    yield _floats("silu_and_mul", launch_silu_and_mul(*inputs.on_device(x)), silu_and_mul(x))


def _product_checks(shape: CheckedShape, arch: str) -> Iterator["Check"]:
    """Of one row by the length of a weight's rows, and of a few rows by how they are launched. The library is right."""
    most = own_product_rows(arch) if arch else max(FEW_ROWS)  # interpreted wherever it fits
    if getattr(torch, shape.dtype).itemsize != 2 or most == 0:
        return
    for size, is_gated in dict.fromkeys((size, is_gated) for _, size, is_gated in shape.products):
        yield partial(_check_product, num_outs=NUM_OUTS, size=size, is_gated=is_gated)
    seen = set()
    for num_rows, (num_outs, size, is_gated) in product(FEW_ROWS, shape.products):
        launch = few_row_launch(arch, num_rows, num_outs, size)
        if launch is None or num_rows > most:
            continue
        options, num_splits = launch.arguments, launch.grid[1]
        tile = FewRowTile(
            options["BLOCK_N"],
            options["BLOCK_K"],
            options["num_warps"],
            options["num_stages"],
            num_programs=NUM_FEW_TILES * num_splits,
        )
        key = (num_rows, size, is_gated, num_splits, tile)
        if key not in seen:
            seen.add(key)
            yield partial(
                _check_product,
                num_outs=NUM_FEW_TILES * tile.block_n, size=size, is_gated=is_gated, num_rows=num_rows - 3, tile=tile,
            )  # fmt: skip


def _check_product(
    inputs: _Inputs, num_outs: int, size: int, is_gated: bool, num_rows: int = 1, tile: FewRowTile | None = None
) -> Iterator[Comparison]:
    x, weight = inputs.normal(num_rows, size), inputs.normal(num_outs, size)
    expected = (gated_linear if is_gated else linear)(x.float(), weight.float()).to(x.dtype)
    dx, dweight = inputs.on_device(x, weight)
    if tile is None:
        found = launch_linear(dx, dweight, gated=is_gated)
    else:
        found = launch_few_row_linear(dx, dweight, gated=is_gated, tile=tile)
    yield _floats("linear", found, expected)


_INTERPRETED_TILE = ManyRowTile(
    block_m=16, block_n=32, block_k=64, num_warps=4, num_stages=1, group=2, max_rows=0, min_fill=0.0
)


def _many_row_checks(shape: CheckedShape, arch: str) -> Iterator["Check"]:
    """Of gated products, by how they are launched."""
    if getattr(torch, shape.dtype).itemsize != 2:
        return
    for num_outs, size, is_gated in shape.products:
        num_gates = num_outs // 2
        if not is_gated or size % ALIGNED or num_gates % ALIGNED:
            continue
        tiles = tiles_taken(arch, num_gates, size, num_multiprocessors()) if arch else {_INTERPRETED_TILE}
        for tile in {replace(tile, max_rows=0, min_fill=0.0) for tile in tiles}:  # as they are compiled
            yield partial(_check_many_rows, size=size, tile=tile)


def _check_many_rows(inputs: _Inputs, size: int, tile: ManyRowTile) -> Iterator[Comparison]:
    """A whole tile and a part of one, down and across."""
    half = tile.block_n // 2
    x, weight = inputs.normal(tile.block_m + 3, size), inputs.normal(2 * (half + 16), size)
    expected = gated_linear(x.float(), weight.float()).to(x.dtype)
    dx, dweight = inputs.on_device(x, weight)
    yield _floats("many_row_linear", launch_many_row_gated_linear(dx, dweight, tile), expected)


def _check_rotary_and_store(inputs: _Inputs) -> Iterator[Comparison]:
    shape = inputs.shape
    num_blocks, num_positions = 3 + NUM_TOKENS // shape.block_size, 50
    qkv = inputs.normal(NUM_TOKENS, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim)
    cache = torch.zeros(num_blocks, 2, shape.num_kv_heads, shape.block_size, shape.head_dim).to(inputs.cache_dtype)
    angles = 3 * inputs.normal(num_positions, shape.head_dim // 2, dtype=torch.float32)
    positions = inputs.integers(num_positions, NUM_TOKENS).long()
    store_index = torch.randperm(num_blocks * shape.block_size, generator=inputs.generator)[:NUM_TOKENS]
    store_index[5] = -1
    scales = inputs.kv_scales()
    heads = (shape.num_heads, shape.num_kv_heads)
    dqkv, dcache, dcos, dsin, dpositions, dindex = inputs.on_device(
        qkv, cache, angles.cos(), angles.sin(), positions, store_index
    )
    launch_rotary_and_store(dqkv, dcache, dcos, dsin, dpositions, dindex, *heads, *inputs.on_device(*scales))
    rotary_and_store(qkv, cache, angles.cos(), angles.sin(), positions, store_index, *heads, *scales)
    yield _floats("rotary_and_store", dqkv, qkv)
    if cache.dtype.itemsize > 1:
        yield _floats("rotary_and_store", dcache, cache)
        return
    expected = cache.float()
    difference = (dcache.cpu().float() - expected).abs().mean().item()
    yield Comparison("rotary_and_store", difference, EIGHT_BIT_SHARE * expected.abs().mean().item())


def _check_paged_attention(inputs: _Inputs, window: int, is_mixed: bool) -> Iterator[Comparison]:
    """is_mixed: with prompts among the rows."""
    longest = min(window, MAX_WINDOW) + 70 if window else 300
    rows = [(9, 40), (1, longest), (35, 35), (1, 1), (3, longest)] if is_mixed else [(1, longest), (1, 17), (0, 0)]
    yield _attention(inputs, rows, window or None)


def _attention(inputs: _Inputs, rows: list[tuple[int, int]], window: int | None) -> Comparison:
    """rows: (queries, keys) of each."""
    shape = inputs.shape
    counts = torch.tensor([-(-keys // shape.block_size) for _, keys in rows])
    num_blocks = int(counts.sum())
    blocks = torch.randperm(num_blocks, generator=inputs.generator).to(torch.int32)
    tables = torch.zeros(len(rows), -(-int(counts.max()) // 16) * 16, dtype=torch.int32)  # as long as in a step
    tables[torch.arange(tables.shape[1]) < counts[:, None]] = blocks
    cache = inputs.normal(num_blocks, 2, shape.num_kv_heads, shape.block_size, shape.head_dim, dtype=inputs.cache_dtype)
    query_lens = [queries for queries, _ in rows]
    starts = torch.tensor([0, *np.cumsum(query_lens)], dtype=torch.int32)
    joint = inputs.normal(int(starts[-1]), shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim)
    seq_lens = torch.tensor([keys for _, keys in rows], dtype=torch.int32)

    def arguments(device: torch.device) -> tuple[Tensor, Tensor, DeviceRows]:
        nothing = torch.zeros(0, dtype=torch.int64, device=device)  # the keys are in the cache already
        step = DeviceRows(
            query_starts=starts.to(device),
            seq_lens=seq_lens.to(device),
            slots=torch.arange(len(rows), dtype=torch.int32, device=device),
            block_tables=tables.to(device),
            store_index=nothing,
            positions=nothing,
            max_query_len=max(query_lens),
            plan=make_plan(
                len(rows), shape.num_heads, shape.num_kv_heads, shape.head_dim, device, target_items=16, granule=64
            ),
        )
        return joint.to(device)[:, : shape.num_heads], cache.to(device), step

    scale, scales = shape.head_dim**-0.5, inputs.kv_scales()
    expected = paged_attention(*arguments(torch.device("cpu")), scale, window, None, *scales)
    q, kv_cache, step = arguments(inputs.device)
    launch_plan_attention(step)
    found = launch_paged_attention(q, kv_cache, step, scale, window, None, *inputs.on_device(*scales))
    return _floats("paged_attention", found, expected)


def _check_plan(inputs: _Inputs, num_rows: int) -> Iterator[Comparison]:
    """Counts decode rows whose pieces are not all of their keys, in order, and whether prompts are listed wrongly."""
    num_queries = inputs.integers(4, num_rows)
    seq_lens = torch.where(num_queries > 0, num_queries + inputs.integers(3000, num_rows), 0)
    query_starts = torch.cat([torch.zeros(1, dtype=torch.int32), num_queries.cumsum(0).to(torch.int32)])
    slots = torch.randperm(num_rows, generator=inputs.generator).to(torch.int32)
    plan = make_plan(num_rows, 1, 1, 16, inputs.device)
    dstarts, dlens, dslots = inputs.on_device(query_starts, seq_lens, slots)
    nothing = torch.zeros(0, dtype=torch.int64)
    launch_plan_attention(DeviceRows(dstarts, dlens, dslots, dslots[None], nothing, nothing, 4, plan))
    num_items, _, num_prompts, num_prompt_queries = plan.counts.cpu().tolist()
    tokens, lens, slots_of = query_starts.tolist(), seq_lens.tolist(), slots.tolist()
    planned: dict[int, list[tuple[int, ...]]] = {
        token: [] for token, n in zip(tokens, num_queries.tolist(), strict=False) if n == 1
    }
    for token, slot, first, end, length, *_ in sorted(plan.items[:num_items].cpu().tolist()):
        planned.setdefault(token, []).append((slot, first, end, length))
    wrong, total, prompts = 0, 0, []
    for row, n in enumerate(num_queries.tolist()):
        if n == 1:
            pieces = planned.pop(tokens[row])
            ends = [0, *(end for _, _, end, _ in pieces)]
            expected = [(slots_of[row], first, end, lens[row]) for first, end in pairwise(ends)]
            wrong += pieces != expected or ends[-1] != lens[row] or ends != sorted(set(ends))
        elif n > 1:
            prompts.append([total, tokens[row], n, lens[row], slots_of[row]])
            total += n
    wrong += len(planned) + (total != num_prompt_queries)
    wrong += prompts != [fields[:5] for fields in plan.prompts[:num_prompts].cpu().tolist()]
    yield Comparison("plan_attention", float(wrong), 0.0)


def _check_step_inputs(inputs: _Inputs) -> Iterator[Comparison]:
    block_size, length = inputs.shape.block_size, 80
    query_starts = torch.tensor([0, 1, 8, 8, 17, 17], dtype=torch.int32)
    starts = torch.tensor([41, 0, 0, 30, 0], dtype=torch.int32)
    slots = torch.tensor([3, 0, 0, 5, 0], dtype=torch.int32)
    buffer = inputs.integers(inputs.shape.vocab_size, 6, length)
    tables = inputs.integers(10**6, 6, -(-length // 16) * 16)  # of so many blocks or fewer
    expected, places = torch.full((3, 32), -9), torch.full((3, 32), -9)
    expand_rows_ref(query_starts, starts, slots, buffer, tables, block_size, *expected)
    dqueries, dstarts, dslots, dbuffer, dtables, found = inputs.on_device(
        query_starts, starts, slots, buffer, tables, places
    )
    launch_expand_rows(dqueries, dstarts, dslots, dbuffer, dtables, block_size, found[0], found[1], found[2])
    yield _exact("expand_rows", (found, expected))
    updates = torch.stack([torch.randperm(480, generator=inputs.generator)[:300], torch.arange(300)]).to(torch.int32)
    (dupdates,) = inputs.on_device(updates)
    launch_scatter_words(dbuffer, dupdates, 290)
    scatter_words(buffer, updates, 290)
    yield _exact("scatter_words", (dbuffer, buffer))


# Requests that between them use every path of the sampling kernels; the last row is padding.
_REQUESTS = (
    {"seed": 3},
    {"temperature": 0.0},
    {"temperature": 0.7, "seed": 2**63 + 9, "num_prompt_tokens": 4},
    {"top_k": 20, "seed": 2**40},
    {"top_p": 0.9, "temperature": 1.3, "seed": 11},
    {"min_p": 0.1, "seed": 12},
    {"top_k": 50, "top_p": 0.6, "min_p": 0.001, "temperature": 0.8, "seed": 2**32},
    {"repetition": 1.3, "num_prompt_tokens": 5},
    {"presence": 0.5, "frequency": -0.2, "num_prompt_tokens": 5},
)
_SLOTS, _LENGTHS = (*range(len(_REQUESTS)), -1), (30, 40, 9, 11, 12, 13, 14, 50, 60, 0)


def _table(top_p_shift: float = 0.0) -> Tensor:
    rows = []
    for request in _REQUESTS:
        top_p = request.get("top_p", 1.0)
        rows.append(pack_params(**{**request, "top_p": top_p + top_p_shift if top_p < 1 else 1.0}))  # type: ignore[arg-type]
    return torch.from_numpy(np.stack(rows))


def _rows() -> tuple[Tensor, Tensor]:
    return torch.tensor(_SLOTS, dtype=torch.int32), torch.tensor(_LENGTHS, dtype=torch.int32)


def _logits(inputs: _Inputs, dtype: torch.dtype) -> Tensor:
    return 3 * inputs.normal(len(_SLOTS), inputs.shape.vocab_size, dtype=dtype)


def _check_draw(inputs: _Inputs, dtype: str, num_rows: int, is_filtered: bool) -> Iterator[Comparison]:
    """dtype: as the model gives logits, or float32, as edits leave them. num_rows: few, or all."""
    (slots, lengths), table = (values[:num_rows] for values in _rows()), _table()
    logits = _logits(inputs, getattr(torch, dtype))[:num_rows]
    thresholds = filter_thresholds(logits, table, slots) if is_filtered else None
    buffer = inputs.integers(inputs.shape.vocab_size, len(_REQUESTS), 64)
    on_device = inputs.on_device(logits, table, slots, lengths, buffer)
    found = launch_draw(*on_device, *([] if thresholds is None else inputs.on_device(thresholds))).cpu()
    yield Comparison("draw", _lost_score(logits, found, thresholds), 1e-3)
    rows = slots >= 0
    buffer[slots[rows].long(), lengths[rows].long()] = found[rows].clamp(min=0)
    yield _exact("draw", (on_device[4], buffer))


def _lost_score(logits: Tensor, tokens: Tensor, thresholds: Tensor | None) -> float:
    """How much less the tokens score than the best ones do; infinite where there should be none, or should be one."""
    requests = _REQUESTS[: len(tokens)]
    num_rows = len(requests)
    if tokens[num_rows:].tolist() != [-1] * (len(tokens) - num_rows) or (tokens[:num_rows] < 0).any():
        return math.inf
    if (tokens >= logits.shape[1]).any():
        return math.inf
    temperatures = torch.tensor([float(request.get("temperature", 1.0)) for request in requests])
    is_greedy = temperatures == 0
    scores = logits[:num_rows].float() / temperatures.masked_fill(is_greedy, 1.0)[:, None]
    if thresholds is not None:
        hidden = (scores < thresholds[:num_rows, None]) & ~is_greedy[:, None]
        scores = scores.masked_fill(hidden, -math.inf)
    seeds = torch.tensor([(int(request.get("seed", 0)) + 2**63) % 2**64 - 2**63 for request in requests])
    prompts = torch.tensor([int(request.get("num_prompt_tokens", 0)) for request in requests])
    noise = log_noise(seeds, torch.tensor(_LENGTHS[:num_rows]) - prompts, logits.shape[1])
    scores -= noise.masked_fill(is_greedy[:, None], 0.0)
    return float((scores.amax(-1) - scores.gather(1, tokens[:num_rows, None].long())[:, 0]).max())


def _check_filter_thresholds(inputs: _Inputs, dtype: str) -> Iterator[Comparison]:
    """Thresholds may lie between those of a little more and a little less top_p."""
    slots, table = _rows()[0], _table()
    logits = _logits(inputs, getattr(torch, dtype))
    dlogits, dtable, dslots = inputs.on_device(logits, table, slots)
    found = launch_filter_thresholds(dlogits, dtable, dslots).cpu()
    low, high = (filter_thresholds(logits, _table(shift), slots) for shift in (TOP_P_SHIFT, -TOP_P_SHIFT))
    outside = torch.maximum(low - found, found - high).masked_fill((found == low) | (found == high), 0.0)
    yield Comparison("filter_thresholds", max(outside.max().item(), 0.0), 1e-5)


def _check_penalties(inputs: _Inputs) -> Iterator[Comparison]:
    (slots, lengths), table = _rows(), _table()
    logits = _logits(inputs, torch.float32)
    buffer = inputs.integers(min(inputs.shape.vocab_size, 40), len(_REQUESTS), 64)
    scratch = torch.zeros(logits.shape, dtype=torch.int32)
    on_device = inputs.on_device(logits, buffer, table, slots, lengths, scratch)
    launch_apply_penalties_(*on_device)
    apply_penalties_(logits, buffer, table, slots, lengths, scratch)
    yield _floats("apply_penalties", on_device[0], logits)
    yield _exact("apply_penalties", (on_device[5], scratch))


def _check_masks(inputs: _Inputs) -> Iterator[Comparison]:
    logits, rows = _logits(inputs, torch.float32), torch.tensor([6, -1, 2])
    num_words = -(-inputs.shape.vocab_size // 32)
    bits = torch.randint(-(2**31), 2**31, (3, num_words), generator=inputs.generator).to(torch.int32)
    on_device = inputs.on_device(logits, rows, bits)
    launch_apply_masks_(*on_device)
    apply_masks_(logits, rows, bits)
    yield _exact("apply_masks", (on_device[0], logits))


def _check_token_logprobs(inputs: _Inputs) -> Iterator[Comparison]:
    logits = _logits(inputs, torch.float32)
    token_ids = inputs.integers(inputs.shape.vocab_size, len(logits)).long()
    dlogits, dtokens = inputs.on_device(logits, token_ids)
    found = launch_token_logprobs(dlogits, dtokens, 5)
    expected = token_logprobs(logits, token_ids, 5)
    yield _floats("token_logprobs", found[1], expected[1])
    yield _exact("token_logprobs", (found[0], expected[0]), (found[2], expected[2]))


Check = Callable[[_Inputs], Iterator[Comparison]]
