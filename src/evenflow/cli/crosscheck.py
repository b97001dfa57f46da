"""Check the GPU kernels without a GPU: compile them for every architecture, run AMD's machine code on a simulator."""

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from evenflow.crosscheck.budgets import Budgets
    from evenflow.crosscheck.compiling import Compiled, Job
    from evenflow.crosscheck.gate import Failure
    from evenflow.crosscheck.report import Results
    from evenflow.crosscheck.running import Ran
    from evenflow.crosscheck.selection import Specializations

EXAMPLES = """examples:
  evenflow crosscheck compile                              # everything, for every target
  evenflow crosscheck compile --target gfx942 sm_90
  evenflow crosscheck compile --kernel 'paged_attention*'  # names what is known when nothing matches
  evenflow crosscheck compile --update-budgets             # accept the instruction counts of today
  evenflow crosscheck run --target gfx942                  # execute the machine code, compare with float64
  evenflow crosscheck all --sample 1 --html report.html

compile: a kernel fails when it does not compile, spills registers, takes more shared memory than the target has, leaves
tl.dot to the vector units, reads the KV cache by narrow loads, makes the compiler write to standard error, or has 10%
more instructions than its budget in crosscheck/budgets/.
run: a kernel fails when a simulator of gfx90a, gfx942 and gfx950 sees a wrong access, a race or a missing wait, or when
its error against float64 is more than twice PyTorch's.

Exit code 0: nothing fails; 1: something does; 2: bad input, or no triton."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("check", choices=("compile", "run", "all"), help="what to do")
    parser.add_argument("--target", nargs="+", action="extend", metavar="ARCH", help="architectures (default: all)")
    parser.add_argument("--kernel", nargs="+", action="extend", metavar="NAME", help="only these; * and ? match")
    parser.add_argument("--sample", type=int, metavar="N", help="compile at most N specializations of each kernel")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (%(default)s)")
    parser.add_argument("--update-budgets", action="store_true", help="record the instruction counts as budgets")
    parser.add_argument("--json", metavar="FILE", help="write every number")
    parser.add_argument("--html", metavar="FILE", help="write a page to look at")


def run(args: argparse.Namespace) -> int:
    from evenflow.crosscheck.budgets import Budgets
    from evenflow.crosscheck.report import Results

    _check_arguments(args)
    version = triton_version()
    compiled: list[Compiled] = []
    failures: list[Failure] = []
    budgets, runs = Budgets(version), []
    if args.check != "run":
        compiled, failures, budgets = _check_compiled(args, version)
    if args.check != "compile":
        runs = _check_runs(args)
    results = Results(compiled, failures, budgets, runs)
    _print_failures(results)
    _write_files(args, results)
    return 1 if results.num_failed else 0


def _check_arguments(args: argparse.Namespace) -> None:
    for name in ("sample", "jobs"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    if args.check == "run" and (args.sample or args.update_budgets):
        raise ValueError(
            "--sample and --update-budgets are of `crosscheck compile` and `all`; `run` has no use for them"
        )


def _check_compiled(args: argparse.Namespace, version: str) -> "tuple[list[Compiled], list[Failure], Budgets]":
    from evenflow.crosscheck.budgets import load_budgets, save_budgets, updated
    from evenflow.crosscheck.gate import judge
    from evenflow.crosscheck.selection import select

    compiled = _compile(select(_all_specializations(), args.target, args.kernel, args.sample), args.jobs)
    budgets = load_budgets(version)
    if args.update_budgets:
        budgets = updated(budgets, version, compiled, is_complete=not (args.kernel or args.sample))
        print(f"budgets written to {save_budgets(budgets)}")
    failures = [failure for result in compiled for failure in judge(result, budgets)]
    _print_compiled(compiled, failures, budgets, per_specialization=bool(args.kernel))
    return compiled, failures, budgets


def _check_runs(args: argparse.Namespace) -> "list[Ran]":
    from evenflow.crosscheck.running import ARCHS, run_all, select_runs
    from evenflow.crosscheck.tables import runs_table

    targets = args.target
    if args.check == "all" and targets:  # there, a target without a simulator is compiled only
        targets = [arch for arch in targets if arch in ARCHS]
        if not targets:
            return []
    labels = select_runs(targets, args.kernel)
    with _progress() as progress:
        bars = {arch: progress.add_task(f"run {arch}", total=len(part), last="") for arch, part in labels.items()}
        runs = run_all(labels, args.jobs, lambda ran: _advance(progress, bars[ran.target], ran.label))
    _console().print(runs_table(runs))
    _console().print()
    return runs


def triton_version() -> str:
    """Raises ValueError where there is no triton."""
    try:
        return str(import_module("triton").__version__)
    except ImportError as error:
        raise ValueError(f"crosscheck needs triton ({error}); install it: pip install 'triton>=3.6,<3.10'") from error


def _all_specializations() -> "Specializations":
    from evenflow.kernels.specializations import all_specializations

    return all_specializations


def _compile(jobs: "list[Job]", num_processes: int) -> "list[Compiled]":
    from evenflow.crosscheck.compiling import compile_all

    with _progress() as progress:
        bars = {job.target: progress.add_task(job.target, total=len(job.specializations), last="") for job in jobs}
        return compile_all(
            jobs,
            num_processes,
            on_result=lambda compiled: _advance(progress, bars[compiled.target], compiled.label),
        )


def _advance(progress: "Progress", bar: "TaskID", last: str) -> None:
    """One more is done. Where no bars are shown, a line says when all are."""
    progress.update(bar, advance=1, last=last)
    task = next(task for task in progress.tasks if task.id == bar)
    if progress.disable and task.finished:
        print(f"{task.description}: {task.total:,.0f} done", file=sys.stderr, flush=True)


def _progress() -> "Progress":
    """Bars on standard error; none where it is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description:10s}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[last]}"),
        console=console,
        disable=not console.is_terminal,
    )


def _console() -> "Console":
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, soft_wrap=not sys.stdout.isatty(), highlight=False)


def _print_compiled(
    compiled: "list[Compiled]", failures: "list[Failure]", budgets: "Budgets", per_specialization: bool
) -> None:
    from evenflow.crosscheck.tables import target_table
    from evenflow.crosscheck.targets import find_target

    for arch in dict.fromkeys(result.target for result in compiled):
        ours = [result for result in compiled if result.target == arch]
        theirs = [failure for failure in failures if failure.target == arch]
        _console().print(target_table(find_target(arch), ours, theirs, budgets, per_specialization))
        _console().print()


def _print_failures(results: "Results") -> None:
    from rich.markup import escape

    from evenflow.crosscheck.gate import condensed

    console = _console()
    lines = [str(failure) for failure in condensed(results.failures)]
    lines += [f"{ran.target} {ran.label}: run: {ran.failure}" for ran in results.runs if ran.failure]
    for line in lines:
        console.print(f"[red]FAIL[/red] {escape(line)}")
    console.print(f"{results.summary} (triton {results.budgets.triton})")


def _write_files(args: argparse.Namespace, results: "Results") -> None:
    from evenflow.crosscheck.report import environment, to_html, to_json

    versions = environment(results.budgets.triton)
    if args.json:
        Path(args.json).write_bytes(to_json(results, versions))
    if args.html:
        Path(args.html).write_text(to_html(results, versions), encoding="utf-8")
