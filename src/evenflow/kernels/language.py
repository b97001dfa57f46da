"""Triton where it is installed, and a stand-in where it is not: only the launchers need it, the references do not.

Kernels are written for Triton 3.6 to 3.9: no block pointers, no autotuning, plain pointers and masks, or tensor
descriptors that the host makes.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

from evenflow.kernels.tuning import has_dependent_launch
from evenflow.platforms import detect

ALIGNED = 8  # 16-bit elements of an access of 16 bytes
DEFAULT_MULTIPROCESSORS = 108

tl: Any
_triton: Any
try:
    _triton = import_module("triton")
    tl = import_module("triton.language")
except ImportError:
    _triton = None
    tl = SimpleNamespace(constexpr=lambda value: value)  # annotations, and constants that kernels share with the host
try:
    _TensorDescriptor = import_module("triton.tools.tensor_descriptor").TensorDescriptor
except ImportError:
    _TensorDescriptor = None
try:
    _dependent = import_module("triton.language.extra.cuda")
    gdc_wait, gdc_launch_dependents = _dependent.gdc_wait, _dependent.gdc_launch_dependents
    approximate_log2 = import_module("triton.language.extra.cuda.libdevice").fast_log2f
except ImportError:
    gdc_wait = gdc_launch_dependents = approximate_log2 = None


class _Absent:
    def __init__(self, kernel: Any) -> None:
        self.name = kernel.__name__

    def __getitem__(self, grid: object) -> None:
        raise RuntimeError(
            f"kernel {self.name} needs Triton on a GPU: `pip install triton`, or PyTorch's own build of it"
        )


def jit(kernel: Any = None, *, do_not_specialize: tuple[str, ...] = ()) -> Any:
    """triton.jit; without Triton, something that says so when it is launched.

    do_not_specialize: integers that vary from step to step, so that nothing is compiled anew when one is 1 or 16.
    """
    if kernel is None:
        return lambda kernel: jit(kernel, do_not_specialize=do_not_specialize)
    return _Absent(kernel) if _triton is None else _triton.jit(kernel, do_not_specialize=do_not_specialize)


@jit
def wait_for_previous(PDL: tl.constexpr):
    """Let the next kernel's programs start, and wait for the end of the kernel before; nothing unless PDL.

    With programmatic dependent launch a kernel's programs start as soon as all of the kernel before have come here, and
    what they do before they wait runs beside it. A kernel that is launched so (dependent_launch) calls this once in
    every program: before it reads what another kernel wrote, before it writes anything, and before it returns early.
    Then the end of a kernel means the end of all before it. What it may read earlier is what no kernel writes while the
    engine runs: weights.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@jit
def fetch_ahead(ptrs, PDL: tl.constexpr):
    """Have the lines of 128 bytes that are pointed to, one each, brought to the L2 cache; nothing unless PDL.

    For what a kernel reads first after it has waited. More than that would be in the way of the kernel it waits for.
    """
    if PDL:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptrs.to(tl.int64)], tl.int32, is_pure=False, pack=1
        )


@jit
def arrives_last(arrived_ptr, number):
    """Count this program, of `number` that share a result; true for the last, which then sees what all of them wrote.

    The count is 0 again after it.
    """
    tl.debug_barrier()  # what all threads wrote comes before the count
    is_last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") == number - 1
    if is_last:
        tl.debug_barrier()  # and nothing is read before it
        tl.store(arrived_ptr, 0)
    return is_last


@jit
def log2(x, APPROXIMATE: tl.constexpr):
    """Logarithm to base 2: the hardware's own, off by 2.4e-7, absolutely between 1/2 and 2 and relatively elsewhere."""
    if APPROXIMATE:
        y = approximate_log2(x)
    else:
        y = tl.log2(x)
    return y


@cache
def dependent_launch(arch: str) -> dict[str, bool]:
    """Arguments of the launch of a kernel that calls wait_for_previous."""
    return {"PDL": True, "launch_pdl": True} if has_dependent_launch(arch) else {"PDL": False}


def descriptor(tensor: Any, block: list[int]) -> Any:
    """What a kernel loads and stores blocks of this shape by. Beyond the tensor are zeros; nothing is written there.

    tensor: rows of unit stride that begin at multiples of 16 bytes.
    """
    return _TensorDescriptor.from_tensor(tensor, block)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def triton_version() -> str:
    """ "" where it is not installed."""
    return "" if _triton is None else str(_triton.__version__)


@cache
def current_arch() -> str:
    """The first GPU's architecture, as Platform.arch spells it; "" where there is none, as in the interpreter."""
    platform = detect()
    return "" if platform.device == "cpu" else platform.arch


@cache
def num_multiprocessors() -> int:
    """The first GPU's; DEFAULT_MULTIPROCESSORS where there is none."""
    if not torch.cuda.is_available():
        return DEFAULT_MULTIPROCESSORS
    return torch.cuda.get_device_properties(0).multi_processor_count


def arch_of(x: Any, arch: str | None = None) -> str:
    """The architecture that a kernel on this tensor runs on; "" for one that is interpreted or simulated.

    arch: what a launcher was told, which wins.
    """
    if arch is not None:
        return arch
    return current_arch() if x.is_cuda else ""
