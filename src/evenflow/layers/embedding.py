"""Token ids to vectors, and vectors to logits."""

import torch.nn.functional as F
from torch import Tensor, nn

from evenflow.layers.loading import Placement


class Embedding(nn.Module):
    """forward: ids [T] -> [T, hidden]. As a head: `logits`."""

    def __init__(self, vocab_size: int, hidden_size: int, place: Placement) -> None:
        super().__init__()
        self.weight = place.empty(vocab_size, hidden_size)

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] -> [R, vocab], in the weight's type."""
        return F.linear(hidden, self.weight)
