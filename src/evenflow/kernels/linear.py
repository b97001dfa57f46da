"""A linear layer, and the products of one token and of a few that take the library's place where they are faster.

Shapes: N tokens, K inputs, O outputs. Few tokens read every weight once and compute little. Of one, a program reads the
rows of a few outputs, with the next piece always under way, and the first before the kernel before it has ended. Of
several it is a matrix product with the weight as the first operand, of which matrix units want more rows; where there
are few outputs, their rows are split over several programs, and the last of them adds the sums up. Both can take gates
and what they gate, D of each, in pairs, and apply LLaMA's activation to what they have just added up.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evenflow.kernels.language import (
    ALIGNED,
    arch_of,
    arrives_last,
    dependent_launch,
    fetch_ahead,
    jit,
    next_power_of_2,
    num_multiprocessors,
    tl,
    wait_for_previous,
)
from evenflow.kernels.many_row_linear import launch_many_row_gated_linear, many_row_tile
from evenflow.kernels.silu_and_mul import activated, silu_and_mul
from evenflow.kernels.tuning import (
    FewRowTile,
    ManyRowTile,
    few_row_tiles,
    many_row_tiles,
    own_product_rows,
    product_tile,
)

_LINE = tl.constexpr(64)  # 16-bit elements of a cache line of 128 bytes
MIN_ROWS = 16  # of a tile, which is what matrix units take
FEW_ROWS = (16, 32, 64)  # what a few rows are padded to
MIN_STEPS = 4  # of a program over K: fewer do not pay for its beginning and its end
NUM_SPLITS = (4, 2, 1)
MAX_SUMS = 1 << 20  # float32 of the splits of one product: 4 MiB
MAX_TILES = 1024  # of a product that is split


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, summed in float32. x: [N, K]; weight: [O, K]; bias: [O]; returns [N, O]."""
    if is_own_product(x, weight, bias):
        return launch_own_product(x, weight)
    return F.linear(x, weight, bias)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu_and_mul(linear(x, weight, bias)), rounded alike. weight: [2 * D, K], gates first; returns [N, D]."""
    if is_own_product(x, weight, bias):
        return launch_own_product(x, weight, gated=True)
    if (tile := gated_tile(x, weight, bias)) is not None:
        return launch_many_row_gated_linear(x, weight, tile)
    return silu_and_mul(F.linear(x, weight, bias))


def is_own_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, arch: str | None = None) -> bool:
    """Is it one that a kernel takes, where that is faster than the library? arch: None for that of x."""
    arch = arch_of(x, arch)
    num_tokens = x.shape[0]
    if not 0 < num_tokens <= own_product_rows(arch) or not _is_plain(x, weight, bias):
        return False
    out_features, in_features = weight.shape
    if num_tokens > 1:
        return few_row_launch(arch, num_tokens, out_features, in_features) is not None
    return in_features % ALIGNED == 0 and out_features % product_tile(in_features).block_n == 0


def gated_tile(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, arch: str | None = None) -> ManyRowTile | None:
    """Of the kernel that takes a gated product of many tokens, or None, where the library does. arch: as above."""
    arch = arch_of(x, arch)
    if not many_row_tiles(arch) or not _is_plain(x, weight, bias):
        return None
    return many_row_tile(arch, x.shape[0], weight.shape[0] // 2, weight.shape[1], num_multiprocessors())


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """In one type of 16 bits, with nothing between the rows, and without a bias."""
    is_dense = x.is_contiguous() and weight.is_contiguous()
    return bias is None and x.dtype == weight.dtype and x.dtype.itemsize == 2 and is_dense


def launch_own_product(x: Tensor, weight: Tensor, *, gated: bool = False, arch: str | None = None) -> Tensor:
    """The kernel of linear, or of gated_linear, for so many tokens. arch: None for that of x."""
    launch = launch_linear if x.shape[0] == 1 else launch_few_row_linear
    return launch(x, weight, gated=gated, arch=arch)


@jit
def _rows_of(tile, D, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """Of the weight. GATED: half of them gates, and then the ups that belong to them, D rows further on."""
    rows = tl.arange(0, BLOCK_N)
    if GATED:
        HALF: tl.constexpr = BLOCK_N // 2
        rows = tile * HALF + rows % HALF + rows // HALF * D
    else:
        rows += tile * BLOCK_N
    return rows


@jit
def _outputs(sums, GATED: tl.constexpr, DTYPE: tl.constexpr):
    """What is written of the sums of a tile, [BLOCK_N, tokens]. GATED: half as many, as silu_and_mul has them."""
    outs = sums.to(DTYPE)
    if GATED:
        pairs = tl.permute(tl.reshape(outs, [2, sums.shape[0] // 2, sums.shape[1]]), (1, 2, 0))
        gate, up = tl.split(pairs)
        outs = activated(gate, up)
    return outs


@jit
def _columns_of(tile, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """Of the output, that _outputs of a tile belong to."""
    WRITTEN: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    return tile * WRITTEN + tl.arange(0, WRITTEN)


@jit(do_not_specialize=("out_stride",))
def _linear_kernel(
    x_ptr, weight_ptr, out_ptr, out_stride,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of the weight by a token, which the second axis counts, over all of K in pieces of BLOCK_K."""
    outs = _rows_of(tl.program_id(0), out_stride, BLOCK_N, GATED)
    token = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + outs.to(tl.int64)[:, None] * K + cols[None, :]
    x_ptrs = x_ptr + token * K + cols
    LAST: tl.constexpr = (K - 1) // BLOCK_K * BLOCK_K  # where the last piece begins, which may be ragged
    weight = _piece(weight_ptrs, 0, cols[None, :], K, BLOCK_K)
    wait_for_previous(PDL)
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, LAST - BLOCK_K, BLOCK_K):
        next_weight = tl.load(weight_ptrs + (start + BLOCK_K))
        sums += weight.to(tl.float32) * tl.load(x_ptrs + start).to(tl.float32)[None, :]
        weight = next_weight
    if LAST > 0:
        next_weight = _piece(weight_ptrs, LAST, cols[None, :], K, BLOCK_K)
        sums += weight.to(tl.float32) * tl.load(x_ptrs + (LAST - BLOCK_K)).to(tl.float32)[None, :]
        weight = next_weight
    sums += weight.to(tl.float32) * _piece(x_ptrs, LAST, cols, K, BLOCK_K).to(tl.float32)[None, :]
    columns = _columns_of(tl.program_id(0), BLOCK_N, GATED)
    found = _outputs(tl.sum(sums, axis=1)[:, None], GATED, out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * out_stride + columns[:, None], found)


@jit
def _piece(ptrs, start: tl.constexpr, cols, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns [start, start + BLOCK_K) of rows of K, 0 beyond."""
    if start + BLOCK_K <= K:
        piece = tl.load(ptrs + start)
    else:
        piece = tl.load(ptrs + start, mask=cols < K - start, other=0.0)
    return piece


def launch_linear(x: Tensor, weight: Tensor, *, gated: bool = False, arch: str | None = None) -> Tensor:
    """The kernel of linear for one token, or each of several, without a bias. arch: None for that of x.

    O: divisible by the rows of the weight that a program takes. gated: compute gated_linear; O is 2 * D then.
    """
    (num_tokens, in_features), out_features = x.shape, weight.shape[0]
    tile = product_tile(in_features)
    assert weight.shape[1] == in_features
    assert out_features % tile.block_n == 0
    assert x.dtype == weight.dtype
    assert x.is_contiguous()
    assert weight.is_contiguous()
    out = torch.empty(num_tokens, out_features // 2 if gated else out_features, dtype=x.dtype, device=x.device)
    if num_tokens:
        _linear_kernel[(out_features // tile.block_n, num_tokens)](
            x, weight, out, out.shape[1],
            K=in_features, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GATED=gated, num_warps=tile.num_warps,
            num_stages=1, **dependent_launch(arch_of(x, arch)),
        )  # fmt: skip
    return out


@jit(do_not_specialize=("num_tokens",))
def _few_row_linear_kernel(
    x_ptr, weight_ptr, out_ptr, sums_ptr, arrived_ptr, num_tokens, K, out_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, GATED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile, split): BLOCK_N rows of the weight by all tokens, at most BLOCK_M, over a share of K in steps of
    BLOCK_K.

    The last of a tile's programs adds all of them up, in their order, so that it does not matter which is last.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    num_steps = K // BLOCK_K
    first_step = split * num_steps // SPLITS
    outs = _rows_of(tile, out_stride, BLOCK_N, GATED)
    tokens = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_K)
    is_token = (tokens < num_tokens)[None, :]
    row_ptrs = weight_ptr + outs.to(tl.int64)[:, None] * K
    weight_ptrs = row_ptrs + cols[None, :]
    fetch_ahead(row_ptrs + (first_step * BLOCK_K + tl.arange(0, BLOCK_K // _LINE) * _LINE)[None, :], PDL)
    wait_for_previous(PDL)
    x_ptrs = x_ptr + tokens[None, :] * K + cols[:, None]
    out_ptrs = out_ptr + tokens[None, :] * out_stride + _columns_of(tile, BLOCK_N, GATED)[:, None]
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(first_step, (split + 1) * num_steps // SPLITS):
        weight = tl.load(weight_ptrs + step * BLOCK_K)
        x = tl.load(x_ptrs + step * BLOCK_K, mask=is_token, other=0.0)
        sums = tl.dot(weight, x, sums)
    if SPLITS == 1:
        tl.store(out_ptrs, _outputs(sums, GATED, out_ptr.dtype.element_ty), mask=is_token)
    else:
        SIZE: tl.constexpr = BLOCK_N * BLOCK_M
        tile_ptrs = sums_ptr + tile * (SPLITS * SIZE) + tokens[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        tl.store(tile_ptrs + split * SIZE, sums, mask=is_token)
        if arrives_last(arrived_ptr + tile, SPLITS):
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for part in tl.static_range(SPLITS):
                total += tl.load(tile_ptrs + part * SIZE, mask=is_token, other=0.0, cache_modifier=".cg")
            tl.store(out_ptrs, _outputs(total, GATED, out_ptr.dtype.element_ty), mask=is_token)


@dataclass(frozen=True, slots=True)
class FewRowLaunch:
    """How a product is launched. arguments: constants and options of the kernel."""

    grid: tuple[int, int]
    arguments: dict[str, Any]


@cache
def few_row_launch(
    arch: str, num_tokens: int, out_features: int, in_features: int, tile: FewRowTile | None = None
) -> FewRowLaunch | None:
    """None: no tile fits the product. tile: instead of the architecture's."""
    block_m = max(next_power_of_2(num_tokens), MIN_ROWS)
    for tried in few_row_tiles(arch, block_m) if tile is None else (tile,):
        num_tiles, num_steps = out_features // tried.block_n, in_features // tried.block_k
        is_whole = out_features % tried.block_n == 0 and in_features % tried.block_k == 0
        if not is_whole or num_steps < MIN_STEPS or out_features < tried.min_outs:
            continue
        blocks = {"BLOCK_M": block_m, "BLOCK_N": tried.block_n, "BLOCK_K": tried.block_k}
        num_splits = _num_splits(tried, num_tiles, num_steps, block_m)
        options = {"num_warps": tried.num_warps, "num_stages": tried.num_stages, **dependent_launch(arch)}
        return FewRowLaunch((num_tiles, num_splits), {**blocks, "SPLITS": num_splits, **options})
    return None


def _num_splits(tile: FewRowTile, num_tiles: int, num_steps: int, block_m: int) -> int:
    """As many as fill the GPU, leave each program enough to do, and have room for their sums."""
    if num_tiles > MAX_TILES:
        return 1
    most = min(tile.num_programs // num_tiles, num_steps // MIN_STEPS, MAX_SUMS // (num_tiles * tile.block_n * block_m))
    return next((number for number in NUM_SPLITS if number <= most), 1)


@cache
def split_sums(device: torch.device) -> tuple[Tensor, Tensor]:
    """Sums of splits, [MAX_SUMS] float32, and how many of a tile's are there, [MAX_TILES] int32: 0 between launches.

    One of each per device, since kernels follow one another there. They outlive every graph, so none may own them.
    """
    assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing(), "first used while a graph is captured"
    sums = torch.empty(MAX_SUMS, dtype=torch.float32, device=device)
    return sums, torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def launch_few_row_linear(
    x: Tensor, weight: Tensor, *, gated: bool = False, arch: str | None = None, tile: FewRowTile | None = None
) -> Tensor:
    """The kernel of linear, or of gated_linear, for a few tokens in 16 bits, without a bias. arch: None for that of x.

    tile: to try.
    """
    (num_tokens, in_features), out_features = x.shape, weight.shape[0]
    launch = few_row_launch(arch_of(x, arch), num_tokens, out_features, in_features, tile)
    assert launch is not None, "no tile fits"
    assert weight.shape[1] == in_features
    assert x.dtype == weight.dtype
    assert x.dtype.itemsize == 2
    assert x.is_contiguous()
    assert weight.is_contiguous()
    out = torch.empty(num_tokens, out_features // 2 if gated else out_features, dtype=x.dtype, device=x.device)
    sums, arrived = split_sums(x.device) if launch.grid[1] > 1 else (None, None)
    _few_row_linear_kernel[launch.grid](
        x, weight, out, sums, arrived, num_tokens, in_features, out.shape[1], GATED=gated, **launch.arguments
    )
    return out
