"""The gated activation of LLaMA's MLP."""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import torch.nn.functional as F
from torch import Tensor

from evenflow.kernels.language import arch_of, cdiv, dependent_launch, jit, tl, wait_for_previous

BLOCK = 1024  # columns a program
NUM_WARPS = 4


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up. x: [N, 2 * D], gate in the first half; returns [N, D]."""
    if x.is_cuda:
        return launch_silu_and_mul(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@jit
def activated(gate, up):
    """silu(gate) * up, in float32 and rounded before the product."""
    gate32 = gate.to(tl.float32)
    return (gate32 / (1.0 + tl.exp(-gate32))).to(gate.dtype) * up


@jit
def _silu_and_mul_kernel(x_ptr, out_ptr, x_stride, D, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    wait_for_previous(PDL)
    gate = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    up = tl.load(x_ptr + row * x_stride + D + cols, mask=mask, other=0.0)
    tl.store(out_ptr + row * D + cols, activated(gate, up), mask=mask)


def launch_silu_and_mul(x: Tensor, *, arch: str | None = None) -> Tensor:
    """The kernel of silu_and_mul. Rows of x may be strided. arch: None for that of x."""
    N, D = x.shape[0], x.shape[1] // 2
    assert x.ndim == 2
    assert x.stride(1) == 1
    out = torch.empty(N, D, dtype=x.dtype, device=x.device)
    if N:
        _silu_and_mul_kernel[(N, cdiv(D, BLOCK))](
            x, out, x.stride(0), D,
            BLOCK=BLOCK, num_warps=NUM_WARPS, **dependent_launch(arch_of(x, arch)),
        )  # fmt: skip
    return out
