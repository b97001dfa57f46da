"""LLaMA's gated product of many tokens, whose activation is applied before anything is written.

Shapes: N tokens, K inputs, D gates and as many of what they gate. Apart from the library's product, which is as fast,
it saves writing and reading 2 * D numbers a token. Tiles of both operands are fetched whole by the copy engine (tensor
descriptors); a program computes one tile of the output after another, and fetches for the next while it ends one.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from functools import cache

import torch
from torch import Tensor

from evenflow.kernels.language import (
    ALIGNED,
    arch_of,
    cdiv,
    dependent_launch,
    descriptor,
    jit,
    num_multiprocessors,
    tl,
    wait_for_previous,
)
from evenflow.kernels.silu_and_mul import activated
from evenflow.kernels.tuning import ManyRowTile, many_row_tiles

MAX_DOWN = 64  # with so many tiles of rows none is left unfilled


@cache
def many_row_tile(
    arch: str, num_tokens: int, num_gates: int, in_features: int, num_programs: int
) -> ManyRowTile | None:
    """The tile that so many tokens are computed in, or None, where the library is faster or no tile fits.

    num_programs: that run at once, one on a multiprocessor.
    """
    if not num_tokens or in_features % ALIGNED or num_gates % ALIGNED:
        return None
    for tile in many_row_tiles(arch):
        num_rounds = cdiv(_num_tiles(tile, num_tokens, num_gates), num_programs)
        room = num_rounds * num_programs * tile.block_m * tile.block_n // 2
        if num_tokens <= tile.max_rows and num_tokens * num_gates >= tile.min_fill * room:
            return tile
    return None


def tiles_taken(arch: str, num_gates: int, in_features: int, num_programs: int) -> set[ManyRowTile]:
    """By any number of tokens."""
    numbers = {
        min(num_down * tile.block_m, tile.max_rows)  # the last of them is full
        for tile in many_row_tiles(arch)
        for num_down in range(1, MAX_DOWN + 1)
    }
    taken = {many_row_tile(arch, number, num_gates, in_features, num_programs) for number in numbers}
    return {tile for tile in taken if tile is not None}


def _num_tiles(tile: ManyRowTile, num_tokens: int, num_gates: int) -> int:
    return cdiv(num_tokens, tile.block_m) * cdiv(num_gates, tile.block_n // 2)


@jit(do_not_specialize=("num_tokens",))
def _many_row_gated_linear_kernel(
    x, weight, out, num_tokens, D, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Descriptors: x [num_tokens, K], weight [2, D, K], out [num_tokens, D]. BLOCK_N: gates and ups of a tile together.

    Tiles are taken by GROUP rows of tiles, down and then across, so that what programs fetch at a time is shared.
    """
    wait_for_previous(PDL)
    HALF: tl.constexpr = BLOCK_N // 2
    num_down, num_across = tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(D, HALF)
    for tile in tl.range(tl.program_id(0), num_down * num_across, tl.num_programs(0), flatten=True):
        first = tile // (GROUP * num_across) * GROUP
        height = tl.minimum(num_down - first, GROUP)
        within = tile % (GROUP * num_across)
        token = (first + within % height) * BLOCK_M
        gate = within // height * HALF
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(tl.cdiv(K, BLOCK_K)):
            rows = x.load([token, step * BLOCK_K])
            columns = tl.reshape(weight.load([0, gate, step * BLOCK_K]), [BLOCK_N, BLOCK_K])
            sums = tl.dot(rows, columns.T, sums)
        pairs = tl.permute(tl.reshape(sums.to(x.dtype), [BLOCK_M, 2, HALF]), (0, 2, 1))
        gates, ups = tl.split(pairs)
        out.store([token, gate], activated(gates, ups))


def launch_many_row_gated_linear(x: Tensor, weight: Tensor, tile: ManyRowTile, *, arch: str | None = None) -> Tensor:
    """silu_and_mul(x @ weight.T), rounded alike, in 16 bits. x: [N, K]; weight: [2 * D, K]; returns [N, D].

    D, K: divisible by ALIGNED. arch: None for that of x.
    """
    (num_tokens, in_features), num_gates = x.shape, weight.shape[0] // 2
    assert weight.shape == (2 * num_gates, in_features)
    assert x.dtype == weight.dtype
    assert x.dtype.itemsize == 2
    assert x.is_contiguous()
    assert weight.is_contiguous()
    assert num_gates % ALIGNED == 0
    half = tile.block_n // 2
    out = torch.empty(num_tokens, num_gates, dtype=x.dtype, device=x.device)
    _many_row_gated_linear_kernel[(min(_num_tiles(tile, num_tokens, num_gates), num_multiprocessors()),)](
        descriptor(x, [tile.block_m, tile.block_k]),
        descriptor(weight.view(2, num_gates, in_features), [2, half, tile.block_k]),
        descriptor(out, [tile.block_m, half]),
        num_tokens, num_gates, in_features,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP=tile.group,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **dependent_launch(arch_of(x, arch)),
    )  # fmt: skip
    return out
