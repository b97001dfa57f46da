"""How right is a kernel? Against float64 it may err at most twice as much as PyTorch does in the kernel's own type."""

import torch
from torch import Tensor

ALLOWED = 2.0


def assert_accurate(found: Tensor, eager: Tensor, exact: Tensor) -> None:
    """found: the kernel's; eager: PyTorch's in the same type; exact: float64.

    Half a unit in the last place of the largest value is always allowed, so that PyTorch may be exact by luck.
    """
    assert found.shape == exact.shape
    assert found.dtype == eager.dtype
    assert found.isfinite().all()
    if exact.numel() == 0:
        return
    unit = torch.finfo(found.dtype).eps * exact.abs().max().item() / 2
    allowed = ALLOWED * (eager.double() - exact).abs().max().item() + unit
    error = (found.double() - exact).abs().max().item()
    assert error <= allowed, f"the error is {error:.3g}, {allowed:.3g} is allowed"


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
