"""Penalties against counting in Python with float64."""

from collections import Counter

import pytest
import torch
from sampling_cases import ints, make_logits, make_table

from evenflow.kernels import penalties
from evenflow.kernels.penalties import apply_penalties_, launch_apply_penalties_

REQUESTS = (
    {"repetition": 1.5, "num_prompt_tokens": 4},
    {"presence": 0.5, "num_prompt_tokens": 0},
    {"frequency": -0.25, "num_prompt_tokens": 30},
    {},
    {"repetition": 0.8, "presence": -1.0, "frequency": 0.3, "num_prompt_tokens": 9},
    {"repetition": 2.0, "frequency": 2.0, "num_prompt_tokens": 40},
)


def exact(logits: torch.Tensor, tokens: list[int], request) -> torch.Tensor:
    logits, start = logits.double(), request.get("num_prompt_tokens", 0)
    counts = Counter(tokens[start:])
    for token in set(tokens):
        x, repetition = logits[token], request.get("repetition", 1.0)
        x = x / repetition if x > 0 else x * repetition
        x -= request.get("frequency", 0.0) * counts[token] + request.get("presence", 0.0) * (counts[token] > 0)
        logits[token] = x
    return logits


@pytest.mark.parametrize("length", [1, 37, 1100])
@pytest.mark.parametrize("launch", [launch_apply_penalties_, apply_penalties_])
def test_against_counting(launch, length):
    num_rows, vocab_size = len(REQUESTS), 300
    logits = make_logits(num_rows, vocab_size)
    logits[:, 5] = -torch.inf
    generator = torch.Generator().manual_seed(1)
    buffer = torch.randint(40, (num_rows + 1, length + 50), generator=generator, dtype=torch.int32)
    slots = [5, 4, 3, 2, 1, 0]
    lengths = [max(length - 3 * row, 1) for row in range(num_rows)]
    scratch = torch.zeros(num_rows + 2, vocab_size, dtype=torch.int32)
    expected = [
        exact(logits[row], buffer[slot, : lengths[row]].tolist(), REQUESTS[slot]) for row, slot in enumerate(slots)
    ]
    for _ in range(2):  # twice: what the first call left in the scratch would show
        found = logits.clone()
        launch(found, buffer, make_table(REQUESTS), ints(slots), ints(lengths), scratch)
        torch.testing.assert_close(found.double(), torch.stack(expected), rtol=3e-7, atol=3e-7)
        assert not scratch.any()
    assert torch.equal(found[2], logits[2])


def test_blocks_of_one_row_go_round(monkeypatch):
    """A long row takes several rounds of the programs that it has."""
    monkeypatch.setattr(penalties, "MOST_PROGRAMS", 2)
    monkeypatch.setattr(penalties, "BLOCK", 16)
    test_against_counting(launch_apply_penalties_, 300)


def test_padding_empty_rows_and_foreign_tokens():
    logits = make_logits(3, 64)
    before = logits.clone()
    buffer = torch.full((2, 8), 64, dtype=torch.int32)  # beyond the vocabulary, as padding of an embedding may be
    buffer[1, 0] = -1
    scratch = torch.zeros(3, 64, dtype=torch.int32)
    table = make_table([{"repetition": 3.0}, {"presence": 1.0}])
    launch_apply_penalties_(logits, buffer, table, ints([-1, 0, 1]), ints([5, 0, 5]), scratch)
    assert torch.equal(logits, before)
    assert not scratch.any()
    launch_apply_penalties_(logits[:0], buffer, table, ints([]), ints([]), scratch)
