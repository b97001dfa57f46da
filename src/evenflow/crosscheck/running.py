"""Executing the kernels' AMD machine code on small inputs and comparing it with the references; one child per target.

The measure is PyTorch: against float64, a kernel may err twice as much as the reference in the kernel's own type.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from evenflow.crosscheck.compiling import child_environment, how_it_ended
from evenflow.crosscheck.targets import find_target

if TYPE_CHECKING:
    from torch import Tensor

    from evenflow.crosscheck.cases import Case
    from evenflow.crosscheck.simulated import Launched

ARCHS = ("gfx90a", "gfx942", "gfx950")  # whose instructions the simulator knows
CHILD = "evenflow.crosscheck.running"
ALLOWED = 2.0  # times PyTorch's own error


@dataclass(frozen=True, slots=True)
class KernelRun:
    """One kernel of a case, over all its launches. waves: started. num_instructions: executed, counted for each wave.

    registers, scratch_bytes, shared_bytes: what one launch takes, the most of all.
    """

    kernel: str
    launches: int
    waves: int
    num_instructions: int
    registers: int
    scratch_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class Ran:
    """One case on one target. error_ratio: of what is allowed, None exactly when `error` says why there is none."""

    target: str
    label: str
    error: str
    error_ratio: float | None
    seconds: float
    kernels: list[KernelRun] = field(default_factory=list)

    @property
    def num_instructions(self) -> int:
        return sum(kernel.num_instructions for kernel in self.kernels)

    @property
    def failure(self) -> str:
        """What is wrong, or nothing."""
        if self.error_ratio is None:
            return self.error
        if self.error_ratio <= 1.0:
            return ""
        return f"its error against float64 is {self.error_ratio * ALLOWED:.3g} times PyTorch's, {ALLOWED:g} are allowed"


def run_all(
    labels: dict[str, list[str]],
    num_processes: int,
    on_result: Callable[[Ran], None] = lambda ran: None,
) -> list[Ran]:
    """Run the cases of these labels, by architecture. on_result is called from several threads."""
    stop = threading.Event()
    with (
        tempfile.TemporaryDirectory(prefix="evenflow-crosscheck-") as folder,
        ThreadPoolExecutor(num_processes) as pool,
    ):
        futures = [
            pool.submit(_run_target, arch, part, Path(folder) / f"{arch}-{index}", on_result, stop)
            for arch, of_arch in labels.items()
            for index, part in enumerate(_shares(of_arch, -(-num_processes // len(labels))))
        ]
        try:
            done = {(ran.target, ran.label): ran for future in futures for ran in future.result()}
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [done[arch, label] for arch, of_arch in labels.items() for label in of_arch]


def _shares(labels: list[str], number: int) -> list[list[str]]:
    parts = [labels[start::number] for start in range(number)]
    return [part for part in parts if part]


def _run_target(
    arch: str, labels: list[str], folder: Path, on_result: Callable[[Ran], None], stop: threading.Event
) -> list[Ran]:
    """One child after the other until each case has a result."""
    folder.mkdir()
    done: list[Ran] = []
    while len(done) < len(labels) and not stop.is_set():
        rest = labels[len(done) :]
        command = [sys.executable, "-m", CHILD, arch, *rest]
        stderr = folder / "stderr"
        with (
            stderr.open("wb") as file,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, env=child_environment(folder)) as child,
        ):
            assert child.stdout is not None
            for line in child.stdout:
                done.append(msgspec.json.decode(line, type=Ran))
                on_result(done[-1])
            code = child.wait()
        if len(done) < len(labels):  # the case at which the child died
            said = stderr.read_text(errors="replace").strip().splitlines()[-1:]
            reason = " ".join([f"the process died ({how_it_ended(code)})", *said])
            done.append(Ran(arch, labels[len(done)], reason, None, 0.0))
            on_result(done[-1])
    return done


def select_runs(archs: list[str] | None = None, kernels: list[str] | None = None) -> dict[str, list[str]]:
    """Labels by architecture that were asked for; None asks for all. Raises ValueError for what cannot be run."""
    from evenflow.crosscheck.cases import CASES, all_cases

    for arch in archs or ():
        if find_target(arch).arch not in ARCHS:
            raise ValueError(f"target {arch!r} has no simulator; `run` knows {', '.join(ARCHS)}")
    labels = {
        arch: [label for label in all_cases(arch) if not kernels or any(_matches(label, p) for p in kernels)]
        for arch in dict.fromkeys(archs or ARCHS)
    }
    for pattern in kernels or ():
        if not any(_matches(label, pattern) for of_arch in labels.values() for label in of_arch):
            ops = dict.fromkeys(case.op for case in CASES)
            raise ValueError(f"kernel {pattern!r} has no case to run; there are cases of {', '.join(ops)}")
    return labels


def _matches(label: str, pattern: str) -> bool:
    return fnmatchcase(label, pattern) or fnmatchcase(label.partition("/")[0], pattern)


def run_case(case: "Case", dtype: str, arch: str, rewrite: Callable[[str], str] = lambda assembly: assembly) -> Ran:
    """Launch on the simulator, and compare with the reference; whatever goes wrong is in the result.

    rewrite: what to do to the machine code before it runs, for tests that damage it.
    """
    from evenflow.crosscheck.simulated import simulated

    start_s = time.perf_counter()
    error, ratio = "", None
    launched: list[Launched] = []
    try:
        module = import_module(case.module)
        others = [import_module(name) for name in case.others]
        with simulated(module, find_target(arch), rewrite, others) as launched:
            ratio = error_ratio(case, dtype, case.launch_of(module, arch), case.reference_of(module))
    except Exception as problem:  # a wrong access, a race, a compile error: this case's failure
        error = f"{type(problem).__name__}: {problem}"
    return Ran(arch, case.label(dtype), error, ratio, time.perf_counter() - start_s, _by_kernel(launched))


def _by_kernel(launched: "list[Launched]") -> list[KernelRun]:
    kernels: dict[str, list[Launched]] = {}
    for launch in launched:
        kernels.setdefault(launch.kernel, []).append(launch)
    return [
        KernelRun(
            kernel=name,
            launches=len(launches),
            waves=sum(launch.report.num_waves for launch in launches),
            num_instructions=sum(launch.report.num_instructions for launch in launches),
            registers=max(launch.code.registers for launch in launches),
            scratch_bytes=max(launch.code.scratch_bytes for launch in launches),
            shared_bytes=max(launch.shared_bytes for launch in launches),
        )
        for name, launches in kernels.items()
    ]


def error_ratio(case: "Case", dtype: str, launch: Callable[..., Any], reference: Callable[..., Any]) -> float:
    """The launch's error over the allowed one, the worst of everything that is returned or written in place."""
    import torch

    found = _outcome(launch, case.inputs(getattr(torch, dtype)))
    eager = _outcome(reference, case.inputs(getattr(torch, dtype)))
    exact = _outcome(reference, tuple(_widened(value) for value in case.inputs(getattr(torch, dtype))))
    return max(_ratio(*tensors) for tensors in zip(found, eager, exact, strict=True))


def _outcome(function: Callable[..., Any], args: tuple[Any, ...]) -> "list[Tensor]":
    """What a call returned, then its tensor arguments, which it may have written."""
    import torch

    result = function(*args)
    outputs = result if isinstance(result, tuple) else (result,)
    return [value for value in (*outputs, *args) if isinstance(value, torch.Tensor)]


def _widened(value: Any) -> Any:
    """In float64, but for 8-bit floats, whose type says how they are read and written."""
    import torch

    is_wide = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype.itemsize > 1
    return value.double() if is_wide else value


def _ratio(found: "Tensor", eager: "Tensor", exact: "Tensor") -> float:
    """Of integers: 0 or infinity. Of 8-bit floats: steps between the numbers that there are; one is allowed always.

    Of others half a unit in the last place of the largest value is always allowed. What is not finite must be so in
    the same place and of the same sign.
    """
    import torch

    if found.shape != exact.shape or found.dtype != eager.dtype:
        return float("inf")
    if not found.is_floating_point():
        return 0.0 if torch.equal(found, eager) else float("inf")
    if found.dtype.itemsize == 1:
        steps, of_eager = ((_ordinals(x) - _ordinals(exact)).abs().max().item() for x in (found, eager))
        return steps / max(ALLOWED * of_eager, 1.0)
    wide = found.double()
    is_finite = exact.isfinite()
    if not torch.equal(*(x.masked_fill(is_finite, 0.0).nan_to_num(nan=1.5) for x in (wide, exact.double()))):
        return float("inf")
    exact, wide, eager = exact[is_finite], wide[is_finite], eager[is_finite].double()
    if not exact.numel():
        return 0.0
    if not wide.isfinite().all():
        return float("inf")
    error = (wide - exact).abs().max().item()
    unit = torch.finfo(found.dtype).eps * exact.abs().max().item() / 2
    allowed = ALLOWED * (eager - exact).abs().max().item() + unit
    return error / allowed if error else 0.0


def _ordinals(x: "Tensor") -> "Tensor":
    """Of 8-bit floats: integers of the same order, without gaps."""
    import torch

    bits = x.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)


def main(arch: str, labels: list[str]) -> None:
    """The child: a JSON line per case on what was its standard output; whatever else is printed is noise."""
    from evenflow.crosscheck.cases import all_cases

    results = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    cases = all_cases(arch)
    for label in labels:
        results.write(msgspec.json.encode(run_case(*cases[label], arch)) + b"\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
