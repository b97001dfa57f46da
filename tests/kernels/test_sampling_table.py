"""The table of parameters: every word is where kernels look for it, and survives being packed."""

import math

import numpy as np
import pytest

from evenflow.kernels import sampling_table
from evenflow.kernels.sampling_table import NUM_COLUMNS, pack_params

REALS = ("TEMPERATURE", "TOP_P", "LOG_MIN_P", "REPETITION", "PRESENCE", "FREQUENCY")


def read(row: np.ndarray) -> dict[str, float | int]:
    """The row by the names of its columns; the seed in one piece."""
    reals = row.view(np.float32)
    found: dict[str, float | int] = {name: float(reals[getattr(sampling_table, name)]) for name in REALS}
    found |= {name: int(row[getattr(sampling_table, name)]) for name in ("TOP_K", "NUM_PROMPT_TOKENS")}
    words = row.view(np.uint32)
    return found | {"SEED": int(words[sampling_table.SEED_LOW]) + (int(words[sampling_table.SEED_HIGH]) << 32)}


def test_columns_do_not_overlap():
    names = (*REALS, "TOP_K", "NUM_PROMPT_TOKENS", "SEED_LOW", "SEED_HIGH")
    columns = [getattr(sampling_table, name) for name in names]
    assert len(set(columns)) == len(names)
    assert max(columns) < NUM_COLUMNS


def test_defaults_change_nothing():
    assert read(pack_params()) == {
        "TEMPERATURE": 1.0, "TOP_K": 0, "TOP_P": 1.0, "LOG_MIN_P": -math.inf, "REPETITION": 1.0, "PRESENCE": 0.0,
        "FREQUENCY": 0.0, "SEED": 0, "NUM_PROMPT_TOKENS": 0,
    }  # fmt: skip


def test_every_parameter_is_found_again():
    packed = pack_params(
        temperature=0.75, top_k=41, top_p=0.875, min_p=0.125, repetition=1.5, presence=-0.5, frequency=0.25, seed=99,
        num_prompt_tokens=12345,
    )  # fmt: skip
    found = read(packed)
    assert found.pop("LOG_MIN_P") == pytest.approx(math.log(0.125), rel=1e-7)
    assert found == {
        "TEMPERATURE": 0.75, "TOP_K": 41, "TOP_P": 0.875, "REPETITION": 1.5, "PRESENCE": -0.5, "FREQUENCY": 0.25,
        "SEED": 99, "NUM_PROMPT_TOKENS": 12345,
    }  # fmt: skip
    assert packed.dtype == np.int32
    assert packed.shape == (NUM_COLUMNS,)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, -1, -(2**63), 2**64 + 5])
def test_seeds_are_taken_modulo_two_to_the_64(seed):
    assert read(pack_params(seed=seed))["SEED"] == seed % 2**64
