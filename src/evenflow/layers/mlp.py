"""LLaMA's gated MLP."""

from torch import Tensor, nn

from evenflow.kernels.linear import gated_linear
from evenflow.layers.linear import ColumnParallelLinear, RowParallelLinear
from evenflow.layers.loading import Placement


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one product. [T, hidden] -> our share of [T, hidden].

    Or None, where it was added to the residual, see RowParallelLinear.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool, place: Placement) -> None:
        super().__init__()
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = ColumnParallelLinear(hidden_size, parts, bias, place)
        self.down_proj = RowParallelLinear("down_proj", intermediate_size, hidden_size, bias, place)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | None:
        gated = gated_linear(x, self.gate_up_proj.weight, self.gate_up_proj.bias)
        share: Tensor | None = self.down_proj(gated, residual)
        return share
