"""Launching a kernel on the simulator instead of a GPU: the launchers of `kernels` run unchanged, with CPU tensors.

A launch compiles for the target with what triton's own launcher would specialize on, so the grid, the strides and the
choice of tile are tested with the machine code.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from evenflow.crosscheck.cdna.run import RunReport, run_kernel
from evenflow.crosscheck.child import make_kernel
from evenflow.crosscheck.targets import Target
from evenflow.kernels.specializations import bind, replaced_kernels, specialize

Rewrite = Callable[[str], str]


class SimulatedKernel:
    """Stands where a @triton.jit function stood: `kernel[grid](...)` runs its machine code for `target`."""

    def __init__(self, kernel: Any, target: Target, reports: list[RunReport], rewrite: Rewrite) -> None:
        self._kernel, self._target, self._reports, self._rewrite = kernel, target, reports, rewrite

    def __getitem__(self, grid: Sequence[int] | Callable[[dict[str, Any]], Sequence[int]]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int = 4, num_stages: int = 2, **kwargs: Any) -> None:
            arguments = bind(self._kernel, args, kwargs)
            sizes = tuple(grid(arguments) if callable(grid) else grid)
            self._run((*sizes, 1, 1)[:3], arguments, num_warps, num_stages)

        return launch

    def _run(self, grid: Sequence[int], arguments: dict[str, Any], num_warps: int, num_stages: int) -> None:
        specialization = specialize(self._kernel, arguments, num_warps, num_stages)
        made = make_kernel(self._kernel, specialization, self._target)
        report = run_kernel(
            self._rewrite(made.asm["amdgcn"]),
            self._target.arch,
            grid,
            [arguments[name] for name in self._kernel.arg_names if name in specialization.signature],
            num_warps=num_warps,
            shared_bytes=made.metadata.shared,
        )
        self._reports.append(report)


@contextmanager
def simulated(
    module: ModuleType, target: Target, rewrite: Rewrite = lambda assembly: assembly
) -> Iterator[list[RunReport]]:
    """While it lasts, the `*_kernel` functions of `module` run on the simulator; yields a report of each launch.

    rewrite: what to do to the machine code before it runs, for tests that damage it.
    """
    reports: list[RunReport] = []
    with replaced_kernels(module, lambda name, kernel: SimulatedKernel(kernel, target, reports, rewrite)):
        yield reports
