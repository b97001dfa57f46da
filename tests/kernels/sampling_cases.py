"""Inputs for the sampling kernels, on any device, and what float64 says of a draw."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evenflow.kernels import sampling_table
from evenflow.kernels.philox import LANE, TILE, philox_4x32
from evenflow.kernels.sampling_table import pack_params

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WORD = 0xFFFFFFFF
# Requests that between them use every column of the table.
REQUESTS: tuple[dict[str, Any], ...] = (
    {"seed": 0},
    {"seed": 2**63 + 12345, "num_prompt_tokens": 3},
    {"temperature": 0.0, "seed": 5},
    {"temperature": 0.7, "seed": -1, "num_prompt_tokens": 7},
    {"temperature": 1.7, "seed": 2**40 + 1},
    {"temperature": 0.01, "seed": 2**32 - 1},
    {"temperature": 50.0, "seed": 77},
)
FILTERS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0, "top_k": 4},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10**6},
    {"top_p": 1e-9},
    {"top_p": 0.3},
    {"top_p": 0.95, "temperature": 1.3},
    {"top_p": 0.999999, "temperature": 0.6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"min_p": 0.2, "temperature": 2.5},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 3, "top_p": 0.99, "min_p": 0.3},
    {"top_k": 50, "top_p": 0.5, "min_p": 0.01, "temperature": 0.7},
    {"top_k": 40, "min_p": 0.02},
)


def make_table(requests: Sequence[dict[str, Any]], device: str = "cpu") -> Tensor:
    """A table with a row for each, filled up with a row that no test means to use."""
    rows = [pack_params(**request) for request in requests] + [pack_params(temperature=0.0, seed=999)]
    return torch.from_numpy(np.stack(rows)).to(device)


def make_logits(
    num_rows: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    scale: float = 3.0,
    seed: int = 0,
) -> Tensor:
    """Normal logits in rows with a gap between them."""
    generator = torch.Generator().manual_seed(seed)
    wide = scale * torch.randn(num_rows, vocab_size + 24, generator=generator)
    return wide.to(dtype).to(device)[:, 8 : vocab_size + 8]


def ints(values: Sequence[int], device: str = "cpu") -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=device)


def exact_scores(logits: Tensor, request: dict[str, Any], length: int) -> Tensor:
    """Of one row, on the CPU: logit / temperature - log E with float64 noise; the quotient is float32 by definition."""
    vocab_size = len(logits)
    temperature = request.get("temperature", 1.0)
    if temperature == 0:
        return logits.double()
    counters = torch.arange(-(-vocab_size // TILE) * LANE)
    position = torch.tensor([length - request.get("num_prompt_tokens", 0)])
    seed, zero = request.get("seed", 0), torch.zeros(1, dtype=torch.int64)
    words = philox_4x32(
        counters, position, zero, zero, torch.tensor([seed & WORD]), torch.tensor([(seed >> 32) & WORD])
    )
    noise = torch.stack([word.view(-1, LANE) for word in words], 1).flatten()[:vocab_size]
    exponential = -torch.log1p(-(noise.double() + 0.5) / 2**32)
    scaled = logits.float() / torch.tensor(temperature, dtype=torch.float32)
    return scaled.double() - exponential.log()


def threshold_columns(table: Tensor, slots: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(temperature, top_k, top_p, min_p) of each row, as filter_thresholds of kernels/sampling.py takes them."""
    rows = table[slots.long()]
    reals = rows.view(torch.float32)
    top_k = rows[:, sampling_table.TOP_K].long()
    return (
        reals[:, sampling_table.TEMPERATURE],
        top_k.masked_fill(top_k >= vocab_size, 0),
        reals[:, sampling_table.TOP_P].double(),
        reals[:, sampling_table.LOG_MIN_P].exp(),
    )
