"""The results as files: JSON with every number, and one HTML page that needs nothing else.

The page is made by report.html.jinja, which escapes what it is given. Owns no rule: failures come from `gate`.
"""

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files

import msgspec
from jinja2 import Environment, StrictUndefined

from evenflow import __version__
from evenflow.crosscheck.budgets import Budgets
from evenflow.crosscheck.compiling import Compiled, function_of
from evenflow.crosscheck.gate import Failure, condensed
from evenflow.crosscheck.running import Ran
from evenflow.crosscheck.tables import widths_text
from evenflow.crosscheck.targets import TARGETS, Target


@dataclass(frozen=True, slots=True)
class Results:
    """What the checks of one call found: what was compiled, the rules that were broken, what was run."""

    compiled: list[Compiled]
    failures: list[Failure]
    budgets: Budgets
    runs: list[Ran]

    @property
    def num_failed(self) -> int:
        """Compiled kernels with a failure and runs with one."""
        broken = {(failure.target, failure.label) for failure in self.failures}
        return len(broken) + sum(1 for ran in self.runs if ran.failure)

    @property
    def summary(self) -> str:
        """ "all 96 compiled kernels pass", "2 of 96 compiled kernels and 30 runs fail"."""
        counts = ((len(self.compiled), "compiled kernels"), (len(self.runs), "runs"))
        total = " and ".join(f"{number} {name}" for number, name in counts if number)
        return f"{self.num_failed} of {total} fail" if self.num_failed else f"all {total} pass"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One specialization on one target, judged."""

    compiled: Compiled
    failures: list[Failure]
    budget: int | None

    @property
    def state(self) -> str:
        """pass or fail."""
        return "fail" if self.failures else "pass"


def environment(triton_version: str) -> dict[str, str]:
    """What the results depend on, and when they were made."""
    return {
        "evenflow": __version__,
        "triton": triton_version,
        "torch": _version_of("torch"),
        "Python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def to_json(results: Results, versions: Mapping[str, str]) -> bytes:
    """{"environment", "failures", "results", "runs"}: msgspec's rendering of the dataclasses, indented."""
    values = {
        "environment": versions,
        "failures": results.failures,
        "results": results.compiled,
        "runs": results.runs,
    }
    return msgspec.json.format(msgspec.json.encode(values), indent=1) + b"\n"


def to_html(results: Results, versions: Mapping[str, str]) -> str:
    """A page: what fails, a matrix of specializations and targets, and one of what was run and targets."""
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(files("evenflow.crosscheck").joinpath("report.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        results=results,
        failures=condensed(results.failures),
        kernels=_by_kernel(results),
        targets=_targets(compiled.target for compiled in results.compiled),
        runs=_by_op(results.runs),
        run_targets=_targets(ran.target for ran in results.runs),
        versions=versions,
        compile_s=sum(compiled.compile_s for compiled in results.compiled),
        run_s=sum(ran.seconds for ran in results.runs),
        widths_text=widths_text,
    )


def _targets(archs: Iterable[str]) -> list[Target]:
    return [TARGETS[arch] for arch in dict.fromkeys(archs)]


def _by_kernel(results: Results) -> dict[str, dict[str, dict[str, Outcome]]]:
    """Kernel, specialization, target."""
    broken: dict[tuple[str, str], list[Failure]] = {}
    for failure in results.failures:
        broken.setdefault((failure.target, failure.label), []).append(failure)
    kernels: dict[str, dict[str, dict[str, Outcome]]] = {}
    for compiled in results.compiled:
        outcome = Outcome(compiled, broken.get((compiled.target, compiled.label), []), results.budgets.of(compiled))
        kernels.setdefault(function_of(compiled.kernel), {}).setdefault(compiled.name, {})[compiled.target] = outcome
    return kernels


def _by_op(runs: list[Ran]) -> dict[str, dict[str, dict[str, dict[str, Ran]]]]:
    """Operation, case, target, type."""
    ops: dict[str, dict[str, dict[str, dict[str, Ran]]]] = {}
    for ran in runs:
        op, _, rest = ran.label.partition("/")
        what, _, dtype = rest.rpartition(", ")
        ops.setdefault(op, {}).setdefault(what, {}).setdefault(ran.target, {})[dtype] = ran
    return ops
