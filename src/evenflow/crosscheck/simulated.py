"""Launching a kernel on the simulator instead of a GPU: the launchers of `kernels` run unchanged, with CPU tensors.

A launch compiles for the target with what triton's own launcher would specialize on, so the grid, the strides and the
choice of tile are tested with the machine code.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

from evenflow.crosscheck.artefacts import Code, read_amdgcn
from evenflow.crosscheck.cdna.run import RunReport, run_kernel
from evenflow.crosscheck.child import make_kernel
from evenflow.crosscheck.targets import Target
from evenflow.kernels.specializations import bind, replaced_kernels, specialize

Rewrite = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Launched:
    """One launch that ran to its end. code: what the kernel takes; shared_bytes: LDS with what the launch adds."""

    kernel: str
    report: RunReport
    code: Code
    shared_bytes: int


class SimulatedKernel:
    """Stands where a @triton.jit function stood: `kernel[grid](...)` runs its machine code for `target`."""

    def __init__(self, name: str, kernel: Any, target: Target, launched: list[Launched], rewrite: Rewrite) -> None:
        self._name, self._kernel, self._target, self._launched, self._rewrite = name, kernel, target, launched, rewrite

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
        code = read_amdgcn(made.asm["amdgcn"])
        shared_bytes = made.metadata.shared + code.static_shared_bytes
        self._launched.append(Launched(self._name.strip("_").removesuffix("_kernel"), report, code, shared_bytes))


@contextmanager
def simulated(
    module: ModuleType,
    target: Target,
    rewrite: Rewrite = lambda assembly: assembly,
    others: Sequence[ModuleType] = (),
) -> Iterator[list[Launched]]:
    """While it lasts, the `*_kernel` functions of the modules run on the simulator; yields what was launched.

    rewrite: what to do to the machine code before it runs, for tests that damage it.
    """
    launched: list[Launched] = []
    with ExitStack() as stack:
        for owner in (module, *others):
            replace = partial(SimulatedKernel, target=target, launched=launched, rewrite=rewrite)
            stack.enter_context(replaced_kernels(owner, replace))
        yield launched
