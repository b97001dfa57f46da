"""Log-probabilities of chosen tokens, their ranks, and the best alternatives. Shapes: R rows, V vocabulary, k best."""

import torch
from torch import Tensor

LOWEST_LOGPROB = -9999.0  # stands for -inf, which JSON lacks; NaN stays, for the caller to refuse
_NUM_SPARE = 16  # candidates beyond k, so that a tie at the k-th place is rarely cut


def token_logprobs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits: [R, V] float32; token_ids: [R]. Returns (ids [R, 1 + k], logprobs [R, 1 + k], ranks [R]).

    Column 0 is the given token, then the k best in falling order, equals by id. rank: 1 + the number of larger logits.
    """
    own = logits.gather(1, token_ids[:, None])
    ranks = 1 + (logits > own).sum(-1)
    largest = logits.amax(-1, keepdim=True)
    log_total = (logits - largest).exp_().sum(-1, keepdim=True).log_()
    values, ids = own, token_ids[:, None]
    if k > 0:
        best_values, best_ids = _top(logits, min(k, logits.shape[1]))
        values, ids = torch.cat([own, best_values], 1), torch.cat([ids, best_ids], 1)
    logprobs = (values - largest) - log_total
    return ids, logprobs.clamp(min=LOWEST_LOGPROB), ranks


def _top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """topk in falling order, equals in the order of their ids whatever k is asked for."""
    values, ids = logits.topk(min(k + _NUM_SPARE, logits.shape[1]))
    ids, order = ids.sort(-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order)
    if values.shape[1] < logits.shape[1]:
        cut = torch.nonzero(values[:, k - 1] == values[:, -1])[:, 0]
        if len(cut):
            whole = logits[cut].sort(dim=-1, descending=True, stable=True)
            values[cut], ids[cut] = whole.values[:, : values.shape[1]], whole.indices[:, : values.shape[1]]
    return values[:, :k], ids[:, :k]
