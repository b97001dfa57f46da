"""The draw against float64 noise, against the CPU's own sampler, and against the distribution."""

import pytest
import torch
from sampling_cases import DTYPES, REQUESTS, exact_scores, ints, make_logits, make_table
from scipy import stats

from evenflow.kernels.draw import draw, draw_tile, launch_draw
from evenflow.kernels.sampling import filter_thresholds, filtered_argmax, gumbel_argmax

TILE = draw_tile(1)[0] * 256
ROUNDING = 4 * 2.0**-23  # of a score, relative: four units in the last place


def assert_best(token: int, scores: torch.Tensor) -> None:
    best = scores.max().item()
    chosen = scores[token].item()
    assert chosen >= best - ROUNDING * max(1.0, abs(best)), f"token {token} scores {chosen}, the best {best}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 63, 256, 1000, TILE, TILE + 1, 5003])
def test_the_best_score_of_float64_wins(vocab_size, dtype):
    logits = make_logits(len(REQUESTS), vocab_size, dtype)
    slots, lengths = list(reversed(range(len(REQUESTS)))), [9 + row for row in range(len(REQUESTS))]
    tokens = launch_draw(logits, make_table(REQUESTS), ints(slots), ints(lengths))
    for row, slot in enumerate(slots):
        assert_best(int(tokens[row]), exact_scores(logits[row], REQUESTS[slot], lengths[row]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [3, 20])
def test_the_tokens_are_the_cpu_samplers(num_rows, dtype):
    requests = [
        {"seed": 2**62 * row + row, "num_prompt_tokens": row, "temperature": 0.5 + row} for row in range(num_rows)
    ]
    logits, table = make_logits(num_rows, 6000, dtype), make_table(requests)
    slots, lengths = ints(range(num_rows)), ints(range(7, 7 + num_rows))
    tokens = launch_draw(logits, table, slots, lengths)
    seeds = torch.tensor([(2**62 * row + row + 2**63) % 2**64 - 2**63 for row in range(num_rows)])
    temperatures = torch.tensor([0.5 + row for row in range(num_rows)])
    _, expected = gumbel_argmax(logits.float(), temperatures, seeds, torch.full((num_rows,), 7))
    assert tokens.tolist() == expected.tolist() == draw(logits, table, slots, lengths).tolist()


def test_tokens_below_the_threshold_are_never_drawn():
    num_rows, vocab_size = 12, 1500
    logits = make_logits(num_rows, vocab_size)
    table = make_table([{"seed": row, "temperature": 1.5, "top_k": 5} for row in range(num_rows)])
    slots, lengths = ints(range(num_rows)), ints([3] * num_rows)
    top_k, ones = torch.full((num_rows,), 5), torch.ones(num_rows)
    temperatures, seeds, positions = 1.5 * ones, torch.arange(num_rows), torch.full((num_rows,), 3)
    thresholds = filter_thresholds(logits / 1.5, top_k, ones.double(), 0 * ones)
    tokens = launch_draw(logits, table, slots, lengths, thresholds=thresholds)
    _, expected = filtered_argmax(logits, temperatures, top_k, ones.double(), 0 * ones, seeds, positions)
    assert tokens.tolist() == expected.tolist()
    unfiltered = launch_draw(logits, table, slots, lengths)
    assert unfiltered.tolist() != tokens.tolist()


def test_a_threshold_does_not_hide_a_bad_row_and_greedy_rows_ignore_it():
    logits = make_logits(3, 300)
    logits[0, 17] = torch.nan
    logits[1, 17] = torch.inf
    table = make_table([{}, {}, {"temperature": 0.0}])
    thresholds = torch.tensor([torch.inf, torch.inf, torch.inf])
    tokens = launch_draw(logits, table, ints([0, 1, 2]), ints([1, 1, 1]), thresholds=thresholds)
    assert tokens.tolist() == [-1, -1, int(logits[2].argmax())]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.nan])
@pytest.mark.parametrize("column", [0, 1029])
def test_nan_and_infinity_are_told(temperature, bad, column):
    logits = make_logits(2, 1030)
    logits[1, column] = bad
    tokens = launch_draw(logits, make_table([{"temperature": temperature}]), ints([0, 0]), ints([5, 5]))
    assert tokens[0] >= 0
    assert tokens[1] == -1


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e-5, 1e4])
def test_a_row_of_nothing_is_bad_and_one_token_is_enough(temperature):
    logits = torch.full((2, 700), -torch.inf)
    logits[1, 456] = -1e4
    tokens = launch_draw(logits, make_table([{"temperature": temperature}]), ints([0, 0]), ints([5, 5]))
    assert tokens.tolist() == [-1, 456]


def test_greedy_takes_the_lowest_of_equals():
    logits = torch.zeros(4, 3000)
    logits[1, [70, 64, 2999]] = 2.0
    logits[2, [1800, 1100, 1164]] = 2.0
    logits[3, [2999, 2600]] = 2.0
    tokens = launch_draw(logits, make_table([{"temperature": 0.0}]), ints([0] * 4), ints([1] * 4))
    assert tokens.tolist() == [0, 64, 1100, 2600]


@pytest.mark.parametrize(
    ("one", "other"),
    [({"seed": 1}, {"seed": 2}), ({"seed": 1}, {"seed": 1 + 2**32}), ({"seed": 1}, {"seed": 1 + 2**63})],
)
def test_every_bit_of_the_seed_and_the_position_count(one, other):
    logits = torch.zeros(1, 2000)
    table = make_table([one, other])
    first, same = (launch_draw(logits, table, ints([0]), ints([4])) for _ in range(2))
    seed, position = launch_draw(logits, table, ints([1]), ints([4])), launch_draw(logits, table, ints([0]), ints([5]))
    assert first == same
    assert len({int(first), int(seed), int(position)}) == 3


def test_a_row_depends_on_nothing_but_itself():
    logits = make_logits(10, 2100)
    table = make_table([{"seed": row, "num_prompt_tokens": row} for row in range(10)])
    slots, lengths = ints(range(10)), ints(range(20, 30))
    together = launch_draw(logits, table, slots, lengths)
    alone = [
        int(launch_draw(logits[row : row + 1], table, slots[row : row + 1], lengths[row : row + 1]))
        for row in range(10)
    ]
    assert together.tolist() == alone


def test_padding_writes_nothing_and_tokens_go_where_the_row_ends():
    logits = make_logits(4, 500)
    logits[3] = torch.nan
    memory = torch.full((6, 12), 77, dtype=torch.int32)
    buffer = memory[:5]
    slots, lengths = [2, -1, 4, 0], [3, 0, 12, 11]
    tokens = launch_draw(logits, make_table([{"seed": 1}] * 5), ints(slots), ints(lengths), buffer)
    assert tokens[1] == -1
    assert tokens[2] >= 0  # beyond the buffer: drawn, and not written
    expected = torch.full((5, 12), 77, dtype=torch.int32)
    expected[2, 3], expected[0, 11] = tokens[0], 0
    assert torch.equal(buffer, expected)
    assert (memory[5] == 77).all()
    plain = torch.full((5, 12), 77, dtype=torch.int32)
    assert torch.equal(draw(logits, make_table([{"seed": 1}] * 5), ints(slots), ints(lengths), plain), tokens)
    assert torch.equal(plain, expected)


def test_no_rows():
    empty = ints([])
    assert launch_draw(torch.zeros(0, 100), make_table([]), empty, empty).shape == (0,)


def test_the_distribution():
    """400 draws of 6 tokens from the softmax at temperature 2; a failure has a chance of one in a thousand."""
    num_draws = 400
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 3.0, 0.5])
    table = make_table([{"seed": 2**33 * seed + seed, "temperature": 2.0} for seed in range(num_draws)])
    rows = logits.expand(num_draws, -1).contiguous()
    tokens = launch_draw(rows, table, ints(range(num_draws)), ints([9] * num_draws))
    observed = torch.bincount(tokens.long(), minlength=6)
    expected = num_draws * torch.softmax(logits.double() / 2, 0)
    assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3
