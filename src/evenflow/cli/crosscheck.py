"""Check the GPU kernels without a GPU: compile each for every supported architecture, and judge what comes out."""

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evenflow.crosscheck.budgets import Budgets
    from evenflow.crosscheck.compiling import Compiled, Job
    from evenflow.crosscheck.gate import Failure
    from evenflow.crosscheck.selection import Specializations

EXAMPLES = """examples:
  evenflow crosscheck compile                              # everything, for every target
  evenflow crosscheck compile --target gfx942 sm_90
  evenflow crosscheck compile --kernel 'paged_attention*'  # names what is known when nothing matches
  evenflow crosscheck compile --sample 1 --html report.html
  evenflow crosscheck compile --update-budgets             # accept the instruction counts of today

A kernel fails when it does not compile, spills registers, takes more shared memory than the target has, leaves tl.dot
to the vector units, reads the KV cache by narrow loads, makes the compiler write to standard error, or has 10% more
instructions than its budget in crosscheck/budgets/.

Exit code 0: nothing fails; 1: something does; 2: bad input, or no triton."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("check", choices=("compile",), help="what to do")
    parser.add_argument("--target", nargs="+", action="extend", metavar="ARCH", help="architectures (default: all)")
    parser.add_argument("--kernel", nargs="+", action="extend", metavar="NAME", help="only these; * and ? match")
    parser.add_argument("--sample", type=int, metavar="N", help="at most N specializations of each kernel")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (%(default)s)")
    parser.add_argument("--update-budgets", action="store_true", help="record the instruction counts as budgets")
    parser.add_argument("--json", metavar="FILE", help="write every number")
    parser.add_argument("--html", metavar="FILE", help="write a page to look at")


def run(args: argparse.Namespace) -> int:
    from evenflow.crosscheck.budgets import load_budgets, save_budgets, updated
    from evenflow.crosscheck.gate import judge
    from evenflow.crosscheck.selection import select

    for name in ("sample", "jobs"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    version = triton_version()
    jobs = select(_all_specializations(), args.target, args.kernel, args.sample)
    results = _compile(jobs, args.jobs)
    budgets = load_budgets(version)
    if args.update_budgets:
        is_complete = not (args.kernel or args.sample)
        budgets = updated(budgets, version, results, is_complete)
        print(f"budgets written to {save_budgets(budgets)}")
    failures = [failure for compiled in results for failure in judge(compiled, budgets)]
    _print_results(results, failures, budgets, per_specialization=bool(args.kernel))
    _write_files(args, results, failures, budgets)
    return 1 if failures else 0


def triton_version() -> str:
    """Raises ValueError where there is no triton."""
    try:
        return str(import_module("triton").__version__)
    except ImportError as error:
        raise ValueError(f"crosscheck needs triton ({error}); install it: pip install triton") from error


def _all_specializations() -> "Specializations":
    from evenflow.kernels.specializations import all_specializations

    return all_specializations


def _compile(jobs: "list[Job]", num_processes: int) -> "list[Compiled]":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from evenflow.crosscheck.compiling import compile_all

    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description:8s}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[last]}"),
        console=console,
        disable=not console.is_terminal,
    )
    with progress:
        bars = {job.target: progress.add_task(job.target, total=len(job.specializations), last="") for job in jobs}
        return compile_all(
            jobs,
            num_processes,
            on_result=lambda compiled: progress.update(bars[compiled.target], advance=1, last=compiled.label),
        )


def _print_results(
    results: "list[Compiled]", failures: "list[Failure]", budgets: "Budgets", per_specialization: bool
) -> None:
    from rich.console import Console
    from rich.markup import escape

    from evenflow.crosscheck.gate import condensed
    from evenflow.crosscheck.tables import target_table
    from evenflow.crosscheck.targets import find_target

    console = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=not sys.stdout.isatty())
    for arch in dict.fromkeys(compiled.target for compiled in results):
        ours = [compiled for compiled in results if compiled.target == arch]
        theirs = [failure for failure in failures if failure.target == arch]
        console.print(target_table(find_target(arch), ours, theirs, budgets, per_specialization))
        console.print()
    for failure in condensed(failures):
        console.print(f"[red]FAIL[/red] {escape(str(failure))}", highlight=False)
    num_failed = len({(failure.target, failure.label) for failure in failures})
    summary = f"{num_failed} of {len(results)} fail" if failures else f"all {len(results)} compiled kernels pass"
    console.print(f"{summary} (triton {budgets.triton})", highlight=False)


def _write_files(
    args: argparse.Namespace, results: "list[Compiled]", failures: "list[Failure]", budgets: "Budgets"
) -> None:
    from evenflow.crosscheck.report import environment, to_html, to_json

    versions = environment(budgets.triton)
    if args.json:
        Path(args.json).write_bytes(to_json(results, failures, versions))
    if args.html:
        Path(args.html).write_text(to_html(results, failures, budgets, versions), encoding="utf-8")
