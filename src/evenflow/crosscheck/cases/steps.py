"""What a step does before its first layer: integers only, so exactly what the reference writes."""

from typing import Any

import torch

from evenflow.crosscheck.cases.case import Case, ints

MODULE = "evenflow.kernels.step_inputs"


def _expand_rows(dtype: torch.dtype) -> tuple[Any, ...]:
    """Prompts, a decode row, a chunk, padding rows and tokens; more tokens than a program has."""
    generator = torch.Generator().manual_seed(0)
    buffer = torch.randint(0, 32000, (7, 200), generator=generator, dtype=dtype)
    tables = torch.randint(0, 900, (7, 14), generator=generator, dtype=dtype)
    query_starts, starts, slots = ints(0, 90, 91, 131, 131, 131), ints(0, 150, 31, 0, 0), ints(4, 0, 6, 0, 0)
    made = (torch.full((150,), -7) for _ in range(3))
    return query_starts, starts, slots, buffer, tables, 16, *made


def _scatter_words(dtype: torch.dtype) -> tuple[Any, ...]:
    places = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:301].to(dtype)
    return torch.zeros(10, 100, dtype=dtype), torch.stack([places, 5 * places + 1]), 300


CASES = (
    Case(MODULE, "expand_rows", "5 rows, 150 tokens", _expand_rows, ("int32",)),
    Case(MODULE, "scatter_words", "300 words", _scatter_words, ("int32",)),
)
