"""Small inputs for every kernel that is run on the simulator: shapes that do not fill a tile, strides, several heads.

Owns the inputs only; `running` executes and compares. torch is imported by whoever asks for inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Case:
    """`launch_<op>` of module must agree with `<op>`, its reference, on inputs(dtype)."""

    module: str
    op: str
    what: str
    inputs: Callable[["torch.dtype"], tuple[Any, ...]]
    dtypes: tuple[str, ...] = DTYPES

    def label(self, dtype: str) -> str:
        return f"{self.op}/{self.what}, {dtype}"


def _normal(shape: tuple[int, ...], dtype: "torch.dtype", seed: int = 0) -> "Tensor":
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _norm_rows(num_rows: int, size: int) -> Callable[["torch.dtype"], tuple[Any, ...]]:
    return lambda dtype: (_normal((num_rows, size), dtype), 1 + 0.1 * _normal((size,), dtype, 1), 1e-5)


def _norm_heads(dtype: "torch.dtype") -> tuple[Any, ...]:
    """Keys in the middle of a joint projection: rows are strided and start past the storage's beginning."""
    joint = _normal((5, 4, 3 * 128), dtype)
    return joint[:, :, 128:256], 1 + 0.1 * _normal((128,), dtype, 1), 1e-6


def _add_norm(dtype: "torch.dtype") -> tuple[Any, ...]:
    x, residual = _normal((3, 512), dtype)[:, :256], _normal((3, 256), dtype, 1)
    return x, residual, 1 + 0.1 * _normal((256,), dtype, 2), 1e-5


NORM = "evenflow.kernels.rms_norm"
CASES = (
    Case(NORM, "rms_norm", "3 rows of 256", _norm_rows(3, 256)),
    Case(NORM, "rms_norm", "2 rows of 200", _norm_rows(2, 200)),
    Case(NORM, "rms_norm", "4 heads of 128, strided", _norm_heads),
    Case(NORM, "add_rms_norm", "3 rows of 256, strided", _add_norm),
    Case("evenflow.kernels.silu_and_mul", "silu_and_mul", "3 rows of 2 x 1100", lambda t: (_normal((3, 2200), t),)),
)
