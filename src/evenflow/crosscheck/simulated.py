"""Launching a kernel on the simulator instead of a GPU: the launchers of `kernels` run unchanged, with CPU tensors.

A launch compiles for the target with what triton's own launcher would specialize on, so the grid, the strides and the
choice of tile are tested with the machine code.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from evenflow.crosscheck.cdna.run import RunReport, run_kernel
from evenflow.crosscheck.child import make_kernel
from evenflow.crosscheck.targets import Target
from evenflow.kernels.specializations import Specialization

TENSOR_TYPES = {
    "float64": "fp64",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e4m3fnuz": "fp8e4b8",
    "float8_e5m2": "fp8e5",
    "float8_e5m2fnuz": "fp8e5b16",
    "int64": "i64",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
    "uint32": "u32",
    "uint8": "u8",
    "bool": "i1",
}
INT32_LIMIT = 1 << 31


class SimulatedKernel:
    """Stands where a @triton.jit function stood: `kernel[grid](...)` runs its machine code for `target`."""

    def __init__(self, kernel: Any, target: Target, reports: list[RunReport]) -> None:
        self._kernel, self._target, self._reports = kernel, target, reports

    def __getitem__(self, grid: Sequence[int] | Callable[[dict[str, Any]], Sequence[int]]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int = 4, num_stages: int = 2, **kwargs: Any) -> None:
            bound = inspect.signature(self._kernel.fn).bind(*args, **kwargs)
            bound.apply_defaults()
            sizes = tuple(grid(bound.arguments) if callable(grid) else grid)
            self._run((*sizes, 1, 1)[:3], bound.arguments, num_warps, num_stages)

        return launch

    def _run(self, grid: Sequence[int], arguments: dict[str, Any], num_warps: int, num_stages: int) -> None:
        specialization = specialize(self._kernel, arguments, num_warps, num_stages)
        made = make_kernel(self._kernel, specialization, self._target)
        report = run_kernel(
            made.asm["amdgcn"],
            self._target.arch,
            grid,
            [arguments[name] for name in self._kernel.arg_names if name in specialization.signature],
            num_warps=num_warps,
            shared_bytes=made.metadata.shared,
        )
        self._reports.append(report)


def specialize(kernel: Any, arguments: dict[str, Any], num_warps: int, num_stages: int) -> Specialization:
    """What triton's launcher compiles for these arguments: 1 and None become constants, multiples of 16 are noted."""
    constexprs, signature, aligned = {}, {}, []
    for parameter in kernel.params:
        value = arguments[parameter.name]
        is_free = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not is_free):
            constexprs[parameter.name] = value
            continue
        signature[parameter.name] = _type_of(value)
        if not is_free and _is_aligned(value):
            aligned.append(parameter.name)
    return Specialization("", signature, constexprs, tuple(aligned), num_warps, num_stages, "")


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -INT32_LIMIT <= value < INT32_LIMIT else "i64"
    if isinstance(value, float):
        return "fp32"
    return "*" + TENSOR_TYPES[str(value.dtype).removeprefix("torch.")]


def _is_aligned(value: Any) -> bool:
    if isinstance(value, (bool, float)):
        return False
    if isinstance(value, int):
        return value % 16 == 0
    return bool(value.storage_offset() * value.element_size() % 16 == 0)


@contextmanager
def simulated(module: ModuleType, target: Target) -> Iterator[list[RunReport]]:
    """While it lasts, the `*_kernel` functions of `module` run on the simulator; yields a report of each launch."""
    kernels = {name: kernel for name, kernel in vars(module).items() if name.endswith("_kernel")}
    reports: list[RunReport] = []
    try:
        for name, kernel in kernels.items():
            setattr(module, name, SimulatedKernel(kernel, target, reports))
        yield reports
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
