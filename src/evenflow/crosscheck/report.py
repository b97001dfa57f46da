"""The results as files: JSON with every number, and one HTML page that needs nothing else.

The page is made by report.html.jinja, which escapes what it is given. Owns no rule: failures come from `gate`.
"""

import platform
from collections.abc import Mapping
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
from evenflow.crosscheck.tables import widths_text
from evenflow.crosscheck.targets import TARGETS


@dataclass(frozen=True, slots=True)
class Outcome:
    """One specialization on one target, judged. error_ratio: the simulated code's error over what is allowed."""

    compiled: Compiled
    failures: list[Failure]
    budget: int | None
    error_ratio: float | None

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


def to_json(results: list[Compiled], failures: list[Failure], versions: Mapping[str, str]) -> bytes:
    """{"environment", "failures", "results"}: msgspec's rendering of the dataclasses, indented."""
    values = {"environment": versions, "failures": failures, "results": results}
    return msgspec.json.format(msgspec.json.encode(values), indent=1) + b"\n"


def to_html(
    results: list[Compiled],
    failures: list[Failure],
    budgets: Budgets,
    versions: Mapping[str, str],
    error_ratios: Mapping[tuple[str, str], float] | None = None,
) -> str:
    """A page with a matrix of specializations and targets. error_ratios: by (target, label), of `crosscheck run`."""
    by_key: dict[tuple[str, str], list[Failure]] = {}
    for failure in failures:
        by_key.setdefault((failure.target, failure.label), []).append(failure)
    targets = [TARGETS[arch] for arch in dict.fromkeys(compiled.target for compiled in results)]
    kernels: dict[str, dict[str, dict[str, Outcome]]] = {}
    for compiled in results:
        key = (compiled.target, compiled.label)
        outcome = Outcome(compiled, by_key.get(key, []), budgets.of(compiled), (error_ratios or {}).get(key))
        kernels.setdefault(function_of(compiled.kernel), {}).setdefault(compiled.name, {})[compiled.target] = outcome
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(files("evenflow.crosscheck").joinpath("report.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        kernels=kernels,
        targets=targets,
        failures=condensed(failures),
        versions=versions,
        num_results=len(results),
        num_failed=len(by_key),
        compile_s=sum(compiled.compile_s for compiled in results),
        has_errors=bool(error_ratios),
        widths_text=widths_text,
    )
