"""Root-mean-square norm with its weight."""

from torch import Tensor, nn

from evenflow.kernels.rms_norm import rms_norm
from evenflow.layers.loading import Placement


class RMSNorm(nn.Module):
    """forward(x) norms over the last dimension; add_and_norm(x, residual) first adds, and returns the sum as well."""

    def __init__(self, size: int, eps: float, place: Placement) -> None:
        super().__init__()
        self.weight, self.eps, self.tp = place.empty(size), eps, place.tp

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add_and_norm(self, x: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(s), s) with s = residual + the sum over the ranks of x, which is this rank's share of it. [T, size].

        x is None where it has been added already.
        """
        if x is None:
            return self(residual), residual
        return self.tp.reduce_add_rms_norm(x, residual, self.weight, self.eps)
