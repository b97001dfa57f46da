"""Token ids, positions and places of keys against a loop in Python; words that land where they are sent."""

import pytest
import torch
from sampling_cases import ints

from evenflow.kernels.step_inputs import (
    BLOCK,
    UPDATE_BLOCK,
    expand_rows,
    launch_expand_rows,
    launch_scatter_words,
    scatter_words,
)

BLOCK_SIZE, MAX_LEN, UNTOUCHED = 16, 200, -77
Row = tuple[int, int]  # tokens computed in this step, position of the first

# rows, and how many tokens the step is padded to
STEPS: dict[str, tuple[tuple[Row, ...], int]] = {
    "one token": (((1, 0),), 1),
    "one token, padded": (((1, 41),), 16),
    "decode": (((1, 0), (1, 15), (1, 16), (1, 17), (1, 199)), 5),
    "prompts": (((5, 0), (70, 0), (2, 0)), 77),
    "chunks": (((7, 33), (64, 1), (33, 97)), 112),
    "mixed": (((1, 50), (9, 0), (1, 1), (40, 50), (1, 128)), 64),
    "padding rows": (((1, 20), (6, 0), (0, 0), (0, 0)), 16),
    "empty rows first and between": (((0, 0), (3, 6), (0, 9), (0, 0), (4, 0)), 16),
    "nothing": (((0, 0), (0, 0)), 16),
    "a whole program": (((128, 3), (0, 0)), BLOCK),
    "one token more": (((100, 3), (29, 0)), BLOCK + 1),
    "one token less": (((1, 3), (126, 7)), BLOCK - 1),
    "many rows": (tuple((1 + row % 2, row % 190) for row in range(300)), 512),
}


def expand(launch, name: str, max_block: int = 500) -> tuple[torch.Tensor, ...]:
    """(found, expected), [3, T + 8] each: token ids, positions, places; nothing is written behind T."""
    rows, num_tokens = STEPS[name]
    generator = torch.Generator().manual_seed(len(name))
    max_seqs = len(rows) + 3
    buffer = torch.randint(3, 50_000, (max_seqs, MAX_LEN + 1), generator=generator, dtype=torch.int32)
    tables = torch.randint(0, max_block, (max_seqs, -(-MAX_LEN // BLOCK_SIZE)), generator=generator)
    tables[0, 0] = max_block
    slots = torch.randperm(max_seqs, generator=generator)[: len(rows)].tolist()
    if max_block > 500:
        slots[0] = 0
    expected = torch.full((3, num_tokens + 8), UNTOUCHED)
    expected[:, :num_tokens] = torch.tensor([0, 0, -1])[:, None]
    token, query_starts = 0, [0]
    for (count, start), slot in zip(rows, slots, strict=True):
        for position in range(start, start + count):
            place = int(tables[slot, position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE
            expected[:, token] = torch.tensor([int(buffer[slot, position]), position, place])
            token += 1
        query_starts.append(token)
    found = torch.full_like(expected, UNTOUCHED)
    outputs = [row[:num_tokens] for row in found]
    starts = ints([start for _, start in rows])
    launch(ints(query_starts), starts, ints(slots), buffer, tables.to(torch.int32), BLOCK_SIZE, *outputs)
    return found, expected


@pytest.mark.parametrize("launch", [launch_expand_rows, expand_rows])
@pytest.mark.parametrize("name", STEPS)
def test_every_token_is_where_its_row_stands(name, launch):
    found, expected = expand(launch, name)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("launch", [launch_expand_rows, expand_rows])
def test_the_last_block_of_the_largest_cache(launch):
    """block * S overflows 32 bits."""
    found, expected = expand(launch, "one token", max_block=2**31 - 1)
    assert expected[2, 0] == (2**31 - 1) * BLOCK_SIZE
    assert torch.equal(found, expected)


@pytest.mark.parametrize("launch", [launch_scatter_words, scatter_words])
@pytest.mark.parametrize("count", [1, 7, UPDATE_BLOCK, UPDATE_BLOCK + 1, 700])
def test_words_land_where_they_are_sent(count, launch):
    """What stands behind `count` is left from an earlier step."""
    generator = torch.Generator().manual_seed(count)
    target = torch.randint(100, (30, 40), generator=generator, dtype=torch.int32)
    updates = torch.stack([torch.randperm(1200, generator=generator)[:1000], torch.arange(1000) - 500]).to(torch.int32)
    updates[0, 0], expected = 1199, target.flatten().tolist()
    for index, value in updates[:, :count].T.tolist():
        expected[index] = value
    launch(target, updates, count)
    assert target.flatten().tolist() == expected


def test_nothing_is_sent():
    target = torch.zeros(4, dtype=torch.int32)
    scatter_words(target, torch.zeros(2, 0, dtype=torch.int32), 0)
    assert not target.any()
