"""From logits to tokens: draws, filters, penalties, masks and log-probabilities, with padding rows and strided logits.

The noise of a draw is a function of seed and position, so tokens are compared one by one.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evenflow.crosscheck.cases.case import Case, ints, normal
from evenflow.kernels.logprobs import token_logprobs
from evenflow.kernels.sampling_table import pack_params

REQUESTS: tuple[dict[str, Any], ...] = (
    {"seed": 0},
    {"seed": 2**63 + 12345, "num_prompt_tokens": 3, "temperature": 0.7},
    {"temperature": 0.0},
    {"temperature": 1.7, "seed": 2**40 + 1},
)
FILTERS: tuple[dict[str, Any], ...] = (
    {"top_k": 7},
    {"top_p": 0.9, "temperature": 1.3},
    {"min_p": 0.05, "temperature": 0.8},
    {},
    {"top_k": 50, "top_p": 0.5, "min_p": 0.01, "temperature": 0.7},
    {"temperature": 0.0, "top_k": 4},
)
PENALTIES: tuple[dict[str, Any], ...] = (
    {"repetition": 1.3, "num_prompt_tokens": 40},
    {"presence": 0.7, "frequency": 0.25, "num_prompt_tokens": 5},
    {},
    {"repetition": 0.8, "presence": -0.5, "frequency": 0.1, "num_prompt_tokens": 600},
)


def table(requests: tuple[dict[str, Any], ...]) -> Tensor:
    """A row for each, and one behind that nothing means to use."""
    return torch.from_numpy(np.stack([pack_params(**request) for request in (*requests, {"seed": 999})]))


def logits(num_rows: int, vocab_size: int, dtype: torch.dtype, scale: float = 3.0) -> Tensor:
    """In rows with a gap between them."""
    return (scale * normal(num_rows, vocab_size + 24)).to(dtype)[:, 8 : vocab_size + 8]


def _draw(dtype: torch.dtype, num_rows: int, has_thresholds: bool = False) -> tuple[Any, ...]:
    slots = ints(*([3, 0, -1, 2, 1] * 2)[:num_rows])
    lengths = ints(*([9, 19, 0, 6, 20] * 2)[:num_rows])  # the buffer's last place, and a row that is full
    thresholds = (torch.full((num_rows,), 4.0),) if has_thresholds else ()
    slots = torch.where(torch.arange(num_rows) < 5, slots, -1).to(torch.int32)  # a slot writes one place
    buffer = torch.zeros(5, 20, dtype=torch.int32)
    return logits(num_rows, 1500, dtype), table(REQUESTS), slots, lengths, buffer, *thresholds


def _filter(dtype: torch.dtype, vocab_size: int, scale: float = 3.0) -> tuple[Any, ...]:
    slots = ints(4, 0, -1, 2, 1, 3, 5)
    return logits(len(slots), vocab_size, dtype, scale), table(FILTERS), slots


def _penalties(dtype: torch.dtype) -> tuple[Any, ...]:
    buffer = torch.randint(0, 90, (5, 700), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    slots, lengths = ints(1, 3, 0, -1, 2), ints(650, 700, 41, 8, 30)
    return logits(5, 100, dtype), buffer, table(PENALTIES), slots, lengths, torch.zeros(5, 100, dtype=torch.int32)


def _masks(dtype: torch.dtype) -> tuple[Any, ...]:
    bits = torch.randint(-(2**31), 2**31, (3, 157), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    return logits(4, 5001, dtype), ints(2, -1, 0), bits


def _logprobs(dtype: torch.dtype, k: int) -> tuple[Any, ...]:
    return logits(3, 2500, dtype, scale=6.0), torch.tensor([0, 1250, 2499]), k


def _logprobs_reference(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """In float32 at least, as the kernel answers."""
    return token_logprobs(logits if logits.dtype == torch.float64 else logits.float(), token_ids, k)


def _filter_launch(module: Any, *args: Any, arch: str) -> Any:
    return module.launch_filter_thresholds(*args, arch=arch)


DRAW, FILTER, LOGPROBS = (f"evenflow.kernels.{name}" for name in ("draw", "filter", "logprobs"))
CASES = (
    Case(DRAW, "draw", "5 rows", partial(_draw, num_rows=5)),
    Case(DRAW, "draw", "9 rows with thresholds", partial(_draw, num_rows=9, has_thresholds=True)),
    Case(FILTER, "filter_thresholds", "7 rows of 900", partial(_filter, vocab_size=900), launch=_filter_launch),
    Case(
        FILTER,
        "filter_thresholds",
        "7 flat rows of 9000",
        partial(_filter, vocab_size=9000, scale=0.5),
        ("float32", "bfloat16"),
        launch=_filter_launch,
    ),
    Case("evenflow.kernels.penalties", "apply_penalties_", "5 rows", _penalties, ("float32",)),
    Case("evenflow.kernels.masks", "apply_masks_", "4 rows of 5001", _masks),
    Case(LOGPROBS, "token_logprobs", "20 best", partial(_logprobs, k=20), reference=_logprobs_reference),
    Case(LOGPROBS, "token_logprobs", "the token alone", partial(_logprobs, k=0), reference=_logprobs_reference),
)
