"""The thresholds against those of sorted rows."""

import pytest
import torch
from sampling_cases import DTYPES, FILTERS, ints, make_logits, make_table, threshold_columns

from evenflow.kernels import sampling
from evenflow.kernels.filter import LANES, WIDTH, filter_thresholds, launch_filter_thresholds

BLOCK = LANES * WIDTH


UNCERTAIN = 1e-6  # of the mass, that sums in float32 may be off; measured: 2e-7


def kept(logits: torch.Tensor, requests, thresholds: torch.Tensor) -> torch.Tensor:
    """What the draw keeps: greedy rows have no temperature to divide by."""
    temperatures = torch.tensor([request.get("temperature", 1.0) or 1.0 for request in requests])
    return logits.float() / temperatures[:, None] >= thresholds[:, None]


def check(logits: torch.Tensor, requests) -> torch.Tensor:
    """The same tokens are kept as by sorting; where they are not, a top_p that much nearer or farther keeps them."""
    table, slots = make_table(requests), ints(range(len(requests)))
    thresholds = launch_filter_thresholds(logits, table, slots)
    temperatures, top_k, top_p, min_p = threshold_columns(table, slots, logits.shape[1])
    is_greedy = temperatures == 0
    scaled = logits.float() / temperatures.masked_fill(is_greedy, 1.0)[:, None]

    def expected(shift: float = 0.0) -> torch.Tensor:
        moved = torch.where(top_p < 1, (top_p + shift).clamp(max=1 - 1e-9), top_p)
        found = sampling.filter_thresholds(scaled, top_k, moved, min_p)
        return kept(logits, requests, found.masked_fill(is_greedy, -torch.inf))

    found = kept(logits, requests, thresholds)
    lower, higher = expected(-UNCERTAIN), expected(UNCERTAIN)
    is_right = (found == expected()).all(-1) | (top_p < 1) & (found >= lower).all(-1) & (found <= higher).all(-1)
    assert is_right.all(), [request for request, right in zip(requests, is_right, strict=True) if not right]
    is_exact = (top_k > 0) & (top_p >= 1) & (min_p == 0) & ~is_greedy
    assert torch.equal(thresholds[is_exact], sampling.filter_thresholds(scaled, top_k, top_p, min_p)[is_exact])
    assert torch.equal(kept(logits, requests, filter_thresholds(logits, table, slots)), expected())
    return thresholds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 100, BLOCK, 9001])
def test_every_filter(vocab_size, dtype):
    check(make_logits(len(FILTERS), vocab_size, dtype), FILTERS)


@pytest.mark.parametrize("scale", [1e-3, 0.3, 40.0])
def test_flat_and_peaked_rows(scale):
    check(make_logits(len(FILTERS), 700, scale=scale, seed=3), FILTERS)


def test_ties_are_kept_together():
    logits = make_logits(len(FILTERS), 600, scale=2.0).round()
    thresholds = check(logits, FILTERS)
    num_kept = kept(logits, FILTERS, thresholds).sum(-1)
    assert num_kept[FILTERS.index({"top_k": 7})] > 7


def test_equal_rows_keep_everything():
    thresholds = check(torch.full((len(FILTERS), 90), -0.75), FILTERS)
    assert kept(torch.full((len(FILTERS), 90), -0.75), FILTERS, thresholds).all()


@pytest.mark.parametrize("num_values", [1, 3, 40])
def test_more_ties_than_can_be_gathered(num_values):
    """Whole rows are searched where a block does not hold what ties, or a top_k is as large."""
    logits = (make_logits(3, 3 * BLOCK, scale=1.0) * num_values).round().clamp(-num_values // 2, num_values // 2)
    check(logits, [{"top_k": 10}, {"top_k": BLOCK // 2 + 1}, {"top_k": 100, "top_p": 0.6}])
    check(logits, [{"top_p": 0.7}, {"top_p": 0.999, "temperature": 5.0}, {"top_p": 0.02, "min_p": 0.1}])


def test_zeros_of_both_signs_tie():
    logits = torch.tensor([[0.0, -0.0, -1.0, -0.0, 0.0, -5.0]]).repeat(3, 1)
    requests = [{"top_k": 1}, {"top_p": 0.1}, {"top_k": 3}]
    thresholds = launch_filter_thresholds(logits, make_table(requests), ints(range(3)))
    assert kept(logits, requests, thresholds).sum(-1).tolist() == [4, 4, 4]


def test_banned_tokens_stay_banned():
    logits = make_logits(len(FILTERS), 400)
    logits[:, ::3] = -torch.inf
    logits[:, 5:] = torch.where(torch.arange(395) < 390, -torch.inf, logits[:, 5:])
    check(logits, FILTERS)


def test_extreme_values():
    logits = torch.tensor([[3e38, -3e38, 1e-40, -1e-40, 0.0, 1e30, 65504.0, -1.0]]).repeat(4, 1)
    check(logits, [{"top_k": 3}, {"top_k": 5}, {"top_p": 0.5}, {"top_k": 8}])


@pytest.mark.parametrize("temperature", [1e-5, 1e-2, 100.0])
def test_extreme_temperatures(temperature):
    requests = [request | {"temperature": temperature} for request in FILTERS]
    check(make_logits(len(requests), 300), requests)


def test_bad_rows_end_and_padding_keeps_all():
    logits = make_logits(5, 300)
    logits[0, 3], logits[1, 3] = torch.nan, torch.inf
    logits[2] = -torch.inf
    table = make_table([{"top_k": 5, "top_p": 0.5}])
    thresholds = launch_filter_thresholds(logits, table, ints([0, 0, 0, -1, 0]))
    assert thresholds[3] == -torch.inf
    assert thresholds[4].isfinite()
    assert launch_filter_thresholds(logits[:0], table, ints([])).shape == (0,)
