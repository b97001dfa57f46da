"""The tensor-parallel group: who we are in it, how sizes are split, and its one collective."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """Rank `rank` of `size` equal ranks, each of which holds one slice of every sharded weight."""

    rank: int = 0
    size: int = 1

    def split(self, name: str, count: int) -> int:
        """Our share of `count` rows or columns; ValueError when it is not a whole number."""
        if count % self.size:
            raise ValueError(f"{name}={count} cannot be split over tensor_parallel_size={self.size}")
        return count // self.size

    def slice(self, size: int) -> slice:
        """Which of size * self.size rows are ours."""
        return slice(self.rank * size, (self.rank + 1) * size)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(x)
        return x
