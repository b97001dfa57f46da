"""A linear layer, and the matrix-vector product that takes the library's place where it is faster.

Shapes: N tokens, K inputs, O outputs. One token reads every weight once and computes next to nothing: a program reads
the rows of a few outputs, with the next piece always under way, and the first before the kernel before it has ended.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import torch
import torch.nn.functional as F
from torch import Tensor

from evenflow.kernels.language import arch_of, dependent_launch, jit, tl, wait_for_previous
from evenflow.kernels.tuning import own_product_rows, product_tile

ALIGNED = 8  # 16-bit elements of an access of 16 bytes


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, summed in float32. x: [N, K]; weight: [O, K]; bias: [O]; returns [N, O]."""
    if is_own_product(x, weight, bias):
        return launch_linear(x, weight)
    return F.linear(x, weight, bias)


def is_own_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, arch: str | None = None) -> bool:
    """Is it one that the kernel takes, where that is faster than the library? arch: None for that of x."""
    if not 0 < x.shape[0] <= own_product_rows(arch_of(x) if arch is None else arch) or bias is not None:
        return False
    out_features, in_features = weight.shape
    return (
        x.dtype == weight.dtype
        and x.dtype.itemsize == 2
        and in_features % ALIGNED == 0
        and out_features % product_tile(in_features).block_n == 0
        and x.is_contiguous()
        and weight.is_contiguous()
    )


@jit(do_not_specialize=("out_stride",))
def _linear_kernel(
    x_ptr, weight_ptr, out_ptr, out_stride,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of a token, which the second axis counts, over all of K in pieces of BLOCK_K."""
    outs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
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
    tl.store(out_ptr + token * out_stride + outs, tl.sum(sums, axis=1).to(out_ptr.dtype.element_ty))


@jit
def _piece(ptrs, start: tl.constexpr, cols, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns [start, start + BLOCK_K) of rows of K, 0 beyond."""
    if start + BLOCK_K <= K:
        piece = tl.load(ptrs + start)
    else:
        piece = tl.load(ptrs + start, mask=cols < K - start, other=0.0)
    return piece


def launch_linear(x: Tensor, weight: Tensor, *, arch: str | None = None) -> Tensor:
    """The kernel of linear, without a bias. O: divisible by the outputs a program. arch: None for that of x."""
    (num_tokens, in_features), out_features = x.shape, weight.shape[0]
    tile = product_tile(in_features)
    assert weight.shape[1] == in_features
    assert out_features % tile.block_n == 0
    assert x.dtype == weight.dtype
    assert x.is_contiguous()
    assert weight.is_contiguous()
    out = torch.empty(num_tokens, out_features, dtype=x.dtype, device=x.device)
    if num_tokens:
        _linear_kernel[(out_features // tile.block_n, num_tokens)](
            x, weight, out, out_features,
            K=in_features, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, num_warps=tile.num_warps, num_stages=1,
            **dependent_launch(arch_of(x) if arch is None else arch),
        )  # fmt: skip
    return out
