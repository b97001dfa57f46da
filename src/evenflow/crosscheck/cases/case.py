"""What a case is, and the random numbers that cases are made of."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Inputs = Callable[[torch.dtype], tuple[Any, ...]]
SIXTEEN_BITS = ("bfloat16", "float16")
FLOATS = (*SIXTEEN_BITS, "float32")
EIGHT_BITS = ("float8_e4m3fn", "float8_e4m3fnuz")  # of a cache; what reads or writes it is bfloat16 then


@dataclass(frozen=True, slots=True)
class Case:
    """The kernels of `launch_<op>` must agree with a reference on inputs(dtype).

    module: where op is, by name. reference: what is right; called with the inputs and again with all floats but 8-bit
    ones in float64. launch: called with the module, the inputs and `arch`. None for either: the module's own, <op> and
    launch_<op>. others: modules whose kernels `launch` runs too.
    """

    module: str
    op: str
    what: str
    inputs: Inputs
    dtypes: tuple[str, ...] = FLOATS
    reference: Callable[..., Any] | None = None
    launch: Callable[..., Any] | None = None
    others: tuple[str, ...] = ()

    def label(self, dtype: str) -> str:
        return f"{self.op}/{self.what}, {dtype}"

    def reference_of(self, module: ModuleType) -> Callable[..., Any]:
        found: Callable[..., Any] = self.reference or getattr(module, self.op)
        return found

    def launch_of(self, module: ModuleType, arch: str) -> Callable[..., Any]:
        """As if on that architecture."""
        if self.launch is None:
            launcher: Callable[..., Any] = getattr(module, f"launch_{self.op}")
            return launcher
        launch = self.launch
        return lambda *args: launch(module, *args, arch=arch)


def cache_types(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """(of queries, of the cache) for a dtype of a case."""
    return (torch.bfloat16 if dtype.itemsize == 1 else dtype, dtype)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
