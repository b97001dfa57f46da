"""Matrix products whose weight is split over the tensor-parallel ranks by rows or by columns.

A column-parallel product needs no communication. A row-parallel one gives each rank a share of a sum;
RMSNorm.add_and_norm, which follows every one of them, adds the shares.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from evenflow.distributed import TensorParallel
from evenflow.kernels.language import arch_of
from evenflow.kernels.linear import linear
from evenflow.kernels.tuning import ADDING_PIECE_ROWS, adding_product_rows
from evenflow.layers.loading import Placement, Slot


class ColumnParallelLinear(nn.Module):
    """One product for several checkpoint tensors: parts = {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024}.

    Every rank has a slice of each part's output; of those in `shared`, over the ranks that are given there, see
    TensorParallel.sharing. forward: [T, in_features] -> [T, sum of our slices].
    """

    def __init__(
        self,
        in_features: int,
        parts: dict[str, int],
        bias: bool,
        place: Placement,
        shared: dict[str, TensorParallel] | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.full_parts = in_features, parts
        self.ranks = {name: (shared or {}).get(name, place.tp) for name in parts}
        self.parts = {name: self.ranks[name].split(name, size) for name, size in parts.items()}
        out_features = sum(self.parts.values())
        self.weight = place.empty(out_features, in_features)
        self.bias = place.empty(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def slots(self) -> Iterator[tuple[str, Slot]]:
        sizes = list(self.parts.values())
        for index, (name, size) in enumerate(self.parts.items()):
            full, rows = self.full_parts[name], self.ranks[name].slice(size)
            yield f"{name}.weight", Slot(self.weight.split(sizes)[index], (full, self.in_features), (rows,))
            if self.bias is not None:
                yield f"{name}.bias", Slot(self.bias.split(sizes)[index], (full,), (rows,))


class RowParallelLinear(nn.Module):
    """Every rank has a slice of the input. forward: [T, our inputs] -> our share of the sum, [T, out_features].

    The bias is in the share of rank 0. Given the residual, [T, out_features], the product may be added to it in place,
    and is None then: that saves a pass over both, where one rank has the whole sum and there are many tokens.
    """

    def __init__(self, name: str, in_features: int, out_features: int, bias: bool, place: Placement) -> None:
        super().__init__()
        self.name, self.tp, self.full_in_features = name, place.tp, in_features
        self.in_features = place.tp.split(name, in_features)
        self.weight = place.empty(out_features, self.in_features)
        self.bias = place.empty(out_features) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | None:
        is_whole = self.tp.size == 1 and self.bias is None
        if residual is not None and is_whole and x.shape[0] >= adding_product_rows(arch_of(x)):
            for piece, sums in zip(_pieces(x), _pieces(residual), strict=True):
                sums.addmm_(piece, self.weight.t())
            return None
        return linear(x, self.weight, self.bias if self.tp.rank == 0 else None)

    def slots(self) -> Iterator[tuple[str, Slot]]:
        out_features = self.weight.shape[0]
        index = (slice(None), self.tp.slice(self.in_features))
        yield f"{self.name}.weight", Slot(self.weight, (out_features, self.full_in_features), index)
        if self.bias is not None:
            yield f"{self.name}.bias", Slot(self.bias, (out_features,))


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Views of like numbers of tokens, of ADDING_PIECE_ROWS or more, or x itself."""
    return x.tensor_split(max(x.shape[0] // ADDING_PIECE_ROWS, 1))
