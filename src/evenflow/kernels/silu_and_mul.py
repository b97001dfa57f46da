"""The gated activation of LLaMA's MLP."""

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up. x: [N, 2 * D], gate in the first half; returns [N, D]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
