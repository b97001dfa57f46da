"""Root-mean-square norm, alone and fused with the residual addition before it. Shapes: N tokens, D hidden size."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension. x: [..., D]; weight: [D]; returns the shape and dtype of x.

    Computed in float32 and rounded before the scale, as Llama and Qwen are trained.
    """
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return x32.to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual). x, residual: [N, D]."""
    residual = x + residual
    return rms_norm(residual, weight, eps), residual
