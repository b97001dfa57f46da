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
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from evenflow.crosscheck.cases import CASES, Case
from evenflow.crosscheck.compiling import child_environment, how_it_ended
from evenflow.crosscheck.targets import find_target

if TYPE_CHECKING:
    from torch import Tensor

ARCHS = ("gfx90a", "gfx942", "gfx950")  # whose instructions the simulator knows
CHILD = "evenflow.crosscheck.running"
ALLOWED = 2.0  # times PyTorch's own error


@dataclass(frozen=True, slots=True)
class Ran:
    """One case on one target. error_ratio: of what is allowed, None exactly when `error` says why there is none."""

    target: str
    label: str
    error: str
    error_ratio: float | None
    num_instructions: int
    seconds: float

    @property
    def failure(self) -> str:
        """What is wrong, or nothing."""
        if self.error_ratio is None:
            return self.error
        if self.error_ratio <= 1.0:
            return ""
        return f"its error against float64 is {self.error_ratio * ALLOWED:.3g} times PyTorch's, {ALLOWED:g} are allowed"


def run_all(
    archs: list[str],
    labels: list[str],
    num_processes: int,
    on_result: Callable[[Ran], None] = lambda ran: None,
) -> list[Ran]:
    """Run the cases of these labels on each architecture. on_result is called from several threads."""
    stop = threading.Event()
    with (
        tempfile.TemporaryDirectory(prefix="evenflow-crosscheck-") as folder,
        ThreadPoolExecutor(num_processes) as pool,
    ):
        futures = [pool.submit(_run_target, arch, labels, Path(folder) / arch, on_result, stop) for arch in archs]
        try:
            return [ran for future in futures for ran in future.result()]
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


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
            done.append(Ran(arch, labels[len(done)], reason, None, 0, 0.0))
            on_result(done[-1])
    return done


def all_cases() -> dict[str, tuple[Case, str]]:
    """(case, dtype) by label."""
    return {case.label(dtype): (case, dtype) for case in CASES for dtype in case.dtypes}


def select_runs(archs: list[str] | None = None, kernels: list[str] | None = None) -> tuple[list[str], list[str]]:
    """(architectures, labels) that were asked for; None asks for all. Raises ValueError for what cannot be run."""
    for arch in archs or ():
        if find_target(arch).arch not in ARCHS:
            raise ValueError(f"target {arch!r} has no simulator; `run` knows {', '.join(ARCHS)}")
    labels = [label for label in all_cases() if not kernels or any(_matches(label, pattern) for pattern in kernels)]
    for pattern in kernels or ():
        if not any(_matches(label, pattern) for label in labels):
            ops = dict.fromkeys(case.op for case in CASES)
            raise ValueError(f"kernel {pattern!r} has no case to run; there are cases of {', '.join(ops)}")
    return list(dict.fromkeys(archs or ARCHS)), labels


def _matches(label: str, pattern: str) -> bool:
    return fnmatchcase(label, pattern) or fnmatchcase(label.partition("/")[0], pattern)


def run_case(case: Case, dtype: str, arch: str) -> Ran:
    """Launch on the simulator, and compare with the reference; whatever goes wrong is in the result."""
    from evenflow.crosscheck.simulated import simulated

    start_s = time.perf_counter()
    error, ratio, reports = "", None, []
    try:
        module = import_module(case.module)
        with simulated(module, find_target(arch)) as reports:
            ratio = error_ratio(case, dtype, getattr(module, f"launch_{case.op}"), getattr(module, case.op))
    except Exception as problem:  # a wrong access, a race, a compile error: this case's failure
        error = f"{type(problem).__name__}: {problem}"
    num_instructions = sum(report.num_instructions for report in reports)
    return Ran(arch, case.label(dtype), error, ratio, num_instructions, time.perf_counter() - start_s)


def error_ratio(case: Case, dtype: str, launch: Callable[..., Any], reference: Callable[..., Any]) -> float:
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
    import torch

    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _ratio(found: "Tensor", eager: "Tensor", exact: "Tensor") -> float:
    """Of integers: 0 or infinity. Half a unit in the last place of the largest value is always allowed."""
    import torch

    if found.shape != exact.shape or found.dtype != eager.dtype or not bool(found.double().isfinite().all()):
        return float("inf")
    if not found.is_floating_point():
        return 0.0 if torch.equal(found, eager) else float("inf")
    error = (found.double() - exact).abs().max().item()
    unit = torch.finfo(found.dtype).eps * exact.abs().max().item() / 2
    allowed = ALLOWED * (eager.double() - exact).abs().max().item() + unit
    return error / allowed if error else 0.0


def main(arch: str, labels: list[str]) -> None:
    """The child: a JSON line per case on what was its standard output; whatever else is printed is noise."""
    results = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    cases = all_cases()
    for label in labels:
        results.write(msgspec.json.encode(run_case(*cases[label], arch)) + b"\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
