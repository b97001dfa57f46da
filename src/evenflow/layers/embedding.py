"""Token ids to vectors, and vectors to logits, with the vocabulary split over the tensor-parallel ranks."""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from evenflow.kernels.linear import linear
from evenflow.layers.loading import Placement, Slot


class Embedding(nn.Module):
    """forward: ids [T] -> our share of [T, hidden]: zeros for the ids of other ranks. As a head: `logits`.

    Every rank has ceil(vocab / ranks) rows; those beyond the vocabulary are zeros, and their logits are dropped.
    """

    def __init__(self, vocab_size: int, hidden_size: int, place: Placement) -> None:
        super().__init__()
        self.tp, self.vocab_size = place.tp, vocab_size
        self.num_rows = -(-vocab_size // place.tp.size)
        ours = place.tp.slice(self.num_rows)
        self.rows = slice(min(ours.start, vocab_size), min(ours.stop, vocab_size))
        self.weight = place.empty(self.num_rows, hidden_size)
        self.weight.data[self.rows.stop - self.rows.start :] = 0

    def forward(self, token_ids: Tensor) -> Tensor:
        if self.tp.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.rows.start
        is_other = (local < 0) | (local >= self.num_rows)
        return F.embedding(local.masked_fill(is_other, 0), self.weight).masked_fill(is_other[:, None], 0)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] -> [R, vocab], in the weight's type, the same on every rank."""
        logits = self.tp.all_gather(linear(hidden, self.weight))
        return logits if logits.shape[-1] == self.vocab_size else logits[:, : self.vocab_size].contiguous()

    def slots(self) -> Iterator[tuple[str, Slot]]:
        target = self.weight[: self.rows.stop - self.rows.start]
        yield ".weight", Slot(target, (self.vocab_size, self.weight.shape[1]), (self.rows,))
