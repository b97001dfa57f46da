"""Results as tables for a terminal. Compiled: one per target, a row per kernel, or per specialization when few were
asked for. Run: one table.
"""

from collections import Counter
from collections.abc import Iterable

from rich.table import Table

from evenflow.crosscheck.budgets import Budgets
from evenflow.crosscheck.compiling import Compiled, Resources, function_of
from evenflow.crosscheck.gate import Failure
from evenflow.crosscheck.running import Ran
from evenflow.crosscheck.targets import Target

COLUMNS = (
    "registers",
    "spills",
    "shared KiB",
    "warps/SIMD",
    "matrix",
    "loads, bytes",
    "instructions",
    "of budget",
    "s",
)


def target_table(
    target: Target, results: list[Compiled], failures: list[Failure], budgets: Budgets, per_specialization: bool
) -> Table:
    """The worst of each kernel's specializations on one target, or each of them."""
    rows: dict[str, list[Compiled]] = {}
    for compiled in results:
        rows.setdefault(compiled.label if per_specialization else function_of(compiled.kernel), []).append(compiled)
    checks: dict[str, set[str]] = {}
    for failure in failures:
        checks.setdefault(failure.label, set()).add(failure.check)
    table = Table(title=f"{target.arch} ({target.gpus})", title_justify="left", box=None, header_style="bold")
    table.add_column("specialization" if per_specialization else "kernel (specializations)")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    table.add_column("fails")
    for name, members in rows.items():
        broken = sorted({check for compiled in members for check in checks.get(compiled.label, ())})
        title = name if per_specialization else f"{name} ({len(members)})"
        table.add_row(title, *_cells(target, members, budgets), f"[red]{', '.join(broken)}[/red]" if broken else "")
    return table


def runs_table(runs: list[Ran]) -> Table:
    """A row per case, a column per target: the error over what is allowed."""
    archs = list(dict.fromkeys(ran.target for ran in runs))
    table = Table(title="error over what is allowed", title_justify="left", box=None, header_style="bold")
    table.add_column("case")
    for arch in archs:
        table.add_column(arch, justify="right")
    found = {(ran.label, ran.target): ran for ran in runs}
    for label in dict.fromkeys(ran.label for ran in runs):
        table.add_row(label, *(_run_cell(found.get((label, arch))) for arch in archs))
    return table


def _run_cell(ran: Ran | None) -> str:
    """Empty where the target has no such case."""
    if ran is None:
        return ""
    text = "fails" if ran.error_ratio is None else f"{ran.error_ratio:.0%}"
    return f"[red]{text}[/red]" if ran.failure else text


def _cells(target: Target, members: list[Compiled], budgets: Budgets) -> list[str]:
    seconds = f"{sum(compiled.compile_s for compiled in members):.1f}"
    made = [compiled.resources for compiled in members if compiled.resources is not None]
    if not made:
        return [""] * (len(COLUMNS) - 1) + [seconds]
    return [
        str(max(resources.registers for resources in made)),
        str(max(resources.spills for resources in made)),
        f"{max(resources.shared_bytes for resources in made) / 1024:.1f}",
        f"{min(resources.occupancy for resources in made)}/{target.max_warps}",
        _range(sum(resources.matrix.values()) for resources in made),
        widths_text(_sum_of_loads(made)),
        _range(resources.num_instructions for resources in made),
        _worst_share(members, budgets),
        seconds,
    ]


def _sum_of_loads(made: list[Resources]) -> dict[int, int]:
    total: Counter[int] = Counter()
    for resources in made:
        total.update(resources.loads)
    return dict(total)


def widths_text(widths: dict[int, int]) -> str:
    """{16: 4, 2: 1} as "16x4 2x1": bytes per lane x how many."""
    return " ".join(f"{width}x{count}" for width, count in sorted(widths.items(), reverse=True))


def _range(numbers: Iterable[int]) -> str:
    found = sorted(numbers)
    return f"{found[0]:,}" if found[0] == found[-1] else f"{found[0]:,}-{found[-1]:,}"


def _worst_share(members: list[Compiled], budgets: Budgets) -> str:
    shares = []
    for compiled in members:
        budget = budgets.of(compiled)
        if compiled.resources is not None and budget:
            shares.append(compiled.resources.num_instructions / budget)
    return f"{max(shares):.0%}" if shares else "none"
