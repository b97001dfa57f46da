"""From logits to a token: logit edits, penalties, min-p / top-k / top-p, and the draw by Gumbel noise.

The next token is argmax(logits / temperature - log E), E exponential noise of a counter-based generator (philox.py): a
draw from the softmax that depends on nothing but its own row, seed and position.

Filters keep what is at least a threshold: tokens that tie with the last one kept are kept too, so no order among equals
is invented. NaN or +inf in a row, or nothing but -inf, gives a best score that is not finite.

Shapes: R rows, V vocabulary, K candidates, L tokens of the longest row.
"""

import torch
from torch import Tensor

from evenflow.kernels.philox import LANE, TILE, log_noise, log_noise_at

NUM_CHUNK_ELEMENTS = 1 << 20  # of a filter that sorts whole rows; bounds its memory


def row_max(x: Tensor) -> tuple[Tensor, Tensor]:
    """(largest value, its lowest index) of every row of x: [R, V]. NaN counts as the largest.

    In two steps: the maximum of a run is vectorised, which its index is not (R=256, V=3072: 0.1 ms for 0.4).
    """
    num_rows, size = x.shape
    if size % LANE or size < 4 * LANE:
        values, indices = x.max(-1)
        return values, indices
    runs = x.unflatten(-1, (-1, LANE))
    run = runs.amax(-1).argmax(-1)
    values, inner = runs[torch.arange(num_rows, device=x.device), run].max(-1)
    return values, run * LANE + inner


def gumbel_argmax(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from softmax(logits / temperature). logits: [R, V] float32; the rest [R], seeds and positions int64.

    Returns (best score, token id), each [R]. Rows go in chunks whose random words stay in the cache.
    """
    num_rows, vocab_size = logits.shape
    num_counters = num_rows * (-(-vocab_size // TILE) * LANE)
    num_chunks = min(num_rows, -(-num_counters // _most_counters(logits.device))) or 1
    step = max(1, -(-num_rows // num_chunks))
    scores = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        noise = log_noise(seeds[rows], positions[rows], vocab_size)
        torch.sub(logits[rows] / temperatures[rows, None], noise, out=noise)
        scores[rows], token_ids[rows] = row_max(noise)
    return scores, token_ids


def _most_counters(device: torch.device) -> int:
    """Of one chunk. Measured with 1 MiB of L2 a core: one thread is best inside it, more threads want longer runs."""
    if device.type != "cpu":
        return 1 << 21
    num_threads = torch.get_num_threads()
    return 24576 if num_threads == 1 else 49152 * num_threads


def threshold_of_sorted(
    values: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, row_total: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The smallest scaled logit that min_p, then top_k, then top_p keep. values: [R, K], the largest, in falling order.

    top_k: 0 keeps all. top_p: the smallest set whose probability, of what min_p and top_k left, reaches it.
    row_total: [R], the sum of exp(value - largest) over all of the row that min_p keeps; None if values are whole rows.
    Returns (threshold, is_exact): [R]; is_exact is False where the answer may lie beyond the values.
    """
    largest, last = values[:, :1], values[:, -1:]
    kth = values.gather(1, (top_k[:, None].clamp(max=values.shape[1]) - 1).clamp(min=0))
    floor = torch.maximum(largest + min_p.log()[:, None], kth.masked_fill(top_k[:, None] == 0, -torch.inf))
    mass = (values - largest).exp().masked_fill(values < floor, 0.0).double()
    reached = mass.cumsum(-1)
    total = reached[:, -1:]
    has_floor = (floor > last) | (last == -torch.inf)
    if row_total is not None:
        total = torch.where(has_floor, total, row_total[:, None])
    keeps = (values >= floor) & ((reached - mass < top_p[:, None] * total) | (top_p[:, None] >= 1))
    threshold = values.masked_fill(~keeps, torch.inf).amin(-1, keepdim=True)
    is_exact = (last == -torch.inf) | ((threshold > last) & (has_floor | (top_k[:, None] == 0)))
    return threshold[:, 0], is_exact[:, 0]


def filter_thresholds(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """threshold_of_sorted of whole rows. scaled: [R, V] logits / temperature; returns [R]."""
    thresholds = scaled.amax(-1) + min_p.log()
    rows = torch.arange(len(scaled), device=scaled.device)
    if scaled.device.type == "cpu":  # elsewhere the host would have to wait for the count
        rows = torch.nonzero((top_k > 0) | (top_p < 1))[:, 0]
    for part in rows.split(max(1, NUM_CHUNK_ELEMENTS // scaled.shape[1])):
        values = _sorted_values(scaled[part])
        thresholds[part] = threshold_of_sorted(values, top_k[part], top_p[part], min_p[part])[0]
    return thresholds


def _sorted_values(x: Tensor) -> Tensor:
    """Rows in falling order; x may be overwritten."""
    if x.device.type != "cpu":
        return x.sort(-1, descending=True).values
    ordered = x.numpy()
    ordered.sort(-1)  # vectorised: 7.6 ms for R=256, V=3072, where torch takes 41 on one thread
    return torch.from_numpy(ordered).flip(-1)


def filtered_argmax(
    logits: Tensor,
    temperatures: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    num_candidates: int = 0,
) -> tuple[Tensor, Tensor]:
    """gumbel_argmax over the tokens that the filters keep. logits: [R, V] float32, the rest [R], top_p float64.

    num_candidates: try this many best tokens of each row first, and sort whole rows only where they do not suffice
    (that needs an answer on the host); 0 sorts all. The tokens are the same.
    """
    scaled = logits / temperatures[:, None]
    if not 0 < num_candidates <= logits.shape[1] // 2:
        return _filtered_rows(scaled, top_k, top_p, min_p, seeds, positions)
    values, indices = scaled.topk(num_candidates)
    totals = _row_totals(scaled, values[:, 0], top_k, top_p, min_p)
    threshold, is_exact = threshold_of_sorted(values, top_k, top_p, min_p, totals)
    scores = values - log_noise_at(seeds, positions, indices)
    scores.masked_fill_(values < threshold[:, None], -torch.inf)
    best = scores.amax(-1)
    token_ids = indices.masked_fill(scores != best[:, None], logits.shape[1]).amin(-1)
    rest = torch.nonzero(~is_exact)[:, 0]
    if len(rest):
        best[rest], token_ids[rest] = _filtered_rows(
            scaled[rest], top_k[rest], top_p[rest], min_p[rest], seeds[rest], positions[rest]
        )
    return best, token_ids


def _row_totals(scaled: Tensor, largest: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The row_total of the rows that may need it."""
    totals = torch.zeros(len(scaled), dtype=torch.float64, device=scaled.device)
    rows = torch.nonzero((top_p < 1) & (top_k == 0))[:, 0]
    for part in rows.split(max(1, NUM_CHUNK_ELEMENTS // scaled.shape[1])):
        x = scaled[part]
        floor = largest[part] + min_p[part].log()
        x.masked_fill_(x < floor[:, None], -torch.inf)
        totals[part] = x.sub_(largest[part, None]).exp_().sum(-1, dtype=torch.float64)
    return totals


def _filtered_rows(
    scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    thresholds = filter_thresholds(scaled, top_k, top_p, min_p)
    kept = scaled.masked_fill(scaled < thresholds[:, None], -torch.inf)
    return gumbel_argmax(kept, torch.ones_like(thresholds), seeds, positions)


def apply_masks_(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """-inf for what a row's mask does not allow, in place. logits: [R, V]; rows: [K]; bits: [K, ceil(V / 32)] int32.

    Bit i of word w stands for token 32 * w + i. A NaN in a logit that is not allowed is no longer seen.
    """
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    allowed = ((bits[:, :, None] >> shifts) & 1).bool().flatten(1)[:, : logits.shape[1]]
    logits[rows] = logits[rows].masked_fill(~allowed, -torch.inf)


def apply_penalties_(
    logits: Tensor,
    token_ids: Tensor,
    num_prompt_tokens: Tensor,
    lengths: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """Penalise, in place, the tokens that a row already has. logits: [R, V]; token_ids: [R, L]; the rest [R].

    repetition, over prompt and output: divides positive logits, multiplies others (Keskar et al., CTRL, 2019).
    Then OpenAI's, over the output: - frequency * count - presence * (count > 0).
    """
    steps = torch.arange(token_ids.shape[1], device=logits.device)
    # Beyond a row's end its first token stands again: it is written twice, with the same value.
    token_ids = torch.where(steps < lengths[:, None], token_ids, token_ids[:, :1])
    is_output = (steps >= num_prompt_tokens[:, None]) & (steps < lengths[:, None])
    counts = torch.zeros_like(logits).scatter_add_(1, token_ids, is_output.to(logits.dtype)).gather(1, token_ids)
    found = logits.gather(1, token_ids)
    found = torch.where(found > 0, found / repetition[:, None], found * repetition[:, None])
    found -= frequency[:, None] * counts + presence[:, None] * (counts > 0)
    logits.scatter_(1, token_ids, found)


def bad_word_bias(token_ids: Tensor, num_prompt_tokens: Tensor, lengths: Tensor, prefixes: Tensor) -> Tensor:
    """-inf where the output ends with the prefix, else 0. prefixes: [W, P], right-aligned, -1 on the left; returns [W].

    token_ids: [W, P], the last P tokens of the word's row; num_prompt_tokens, lengths: [W].
    """
    steps = torch.arange(-prefixes.shape[1], 0, device=prefixes.device) + lengths[:, None]
    matches = (prefixes < 0) | ((prefixes == token_ids) & (steps >= num_prompt_tokens[:, None]))
    return torch.where(matches.all(-1), -torch.inf, 0.0)
