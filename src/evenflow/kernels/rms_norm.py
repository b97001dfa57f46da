"""Root-mean-square norm, alone and fused with the residual addition before it. Shapes: N tokens, D hidden size.

On a GPU a program norms a few rows that it keeps in registers: each element is read once and written once.
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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension. x: [..., D]; weight: [D]; returns the shape and dtype of x.

    Computed in float32 and rounded before the scale, as Llama and Qwen are trained. On a GPU x is [N, D] or [N, heads,
    D], whose rows may be strided.
    """
    if x.is_cuda:
        return launch_rms_norm(x, weight, eps)
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return x32.to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual). x, residual: [N, D]."""
    if x.is_cuda:
        return launch_add_rms_norm(x, residual, weight, eps)
    residual = x + residual
    return rms_norm(residual, weight, eps), residual


@jit
def _normed(x, weight, D, eps):
    """x: [ROWS, BLOCK_D], 0 beyond D."""
    x32 = x.to(tl.float32)
    mean = tl.sum(x32 * x32, axis=1) / D
    return (x32 * tl.rsqrt(mean + eps)[:, None]).to(x.dtype) * weight[None, :]


@jit(do_not_specialize=("num_rows",))
def _rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, num_rows, num_heads, token_stride, head_stride, D, eps,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None] & (cols < D)[None, :]
    tokens, heads = rows // num_heads, rows % num_heads
    starts = tokens.to(tl.int64) * token_stride + heads * head_stride
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0)
    wait_for_previous(PDL)
    x = tl.load(x_ptr + starts[:, None] + cols[None, :], mask=mask, other=0.0)
    outs = rows.to(tl.int64)[:, None] * D + cols[None, :]
    tl.store(out_ptr + outs, _normed(x, weight, D, eps), mask=mask)


@jit(do_not_specialize=("num_rows",))
def _add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, num_rows, x_stride, residual_stride, D, eps,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None] & (cols < D)[None, :]
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0)
    wait_for_previous(PDL)
    x = tl.load(x_ptr + (rows * x_stride)[:, None] + cols[None, :], mask=mask, other=0.0)
    residual = tl.load(residual_ptr + (rows * residual_stride)[:, None] + cols[None, :], mask=mask, other=0.0)
    total = x + residual
    outs = (rows * D)[:, None] + cols[None, :]
    tl.store(sum_ptr + outs, total, mask=mask)
    tl.store(out_ptr + outs, _normed(total, weight, D, eps), mask=mask)


def row_tile(size: int) -> tuple[int, int, int]:
    """(rows a program, padded row, num_warps): about 2,048 elements a program, short rows together."""
    block = next_power_of_2(size)
    rows = max(2048 // block, 1)
    return rows, block, min(max(rows * block // 1024, 1), 16)


def launch_rms_norm(x: Tensor, weight: Tensor, eps: float, *, arch: str | None = None) -> Tensor:
    """The kernel of rms_norm. x: [N, D] or [N, heads, D] with unit stride in D. arch: None for that of x."""
    D = x.shape[-1]
    num_heads = x.shape[1] if x.ndim == 3 else 1
    assert x.ndim in (2, 3)
    assert x.stride(-1) == 1
    assert weight.is_contiguous()
    assert weight.dtype == x.dtype
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if (num_rows := x.shape[0] * num_heads) == 0:
        return out
    rows, block, num_warps = row_tile(D)
    _rms_norm_kernel[(cdiv(num_rows, rows),)](
        x, weight, out, num_rows, num_heads, x.stride(0), x.stride(1) if x.ndim == 3 else 0, D, eps,
        ROWS=rows, BLOCK_D=block, num_warps=num_warps, **dependent_launch(arch_of(x, arch)),
    )  # fmt: skip
    return out


def launch_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, arch: str | None = None
) -> tuple[Tensor, Tensor]:
    """The kernel of add_rms_norm. Rows of x and residual may be strided."""
    N, D = x.shape
    assert x.stride(1) == residual.stride(1) == 1
    assert residual.shape == x.shape
    assert weight.is_contiguous()
    assert x.dtype == residual.dtype == weight.dtype
    out, total = torch.empty(2, N, D, dtype=x.dtype, device=x.device)
    if N == 0:
        return out, total
    rows, block, num_warps = row_tile(D)
    _add_rms_norm_kernel[(cdiv(N, rows),)](
        x, residual, weight, out, total, N, x.stride(0), residual.stride(0), D, eps,
        ROWS=rows, BLOCK_D=block, num_warps=num_warps, **dependent_launch(arch_of(x, arch)),
    )  # fmt: skip
    return out, total
