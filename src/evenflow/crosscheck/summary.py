"""The kept result as the two tables of docs/crosscheck.md, which a test holds to them.

`python -m evenflow.crosscheck.summary docs/crosscheck/triton-3.9.json` prints them.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evenflow.crosscheck.compiling import function_of

Row = dict[str, Any]


def compiled_table(results: list[Row]) -> str:
    """A row per target: the worst of all its kernels."""
    lines = ["| target | kernels | registers | bytes of stack | shared KiB | warps a SIMD | with matrix units |"]
    lines.append("|---|---|---|---|---|---|---|")
    for target, rows in _groups(results, "target").items():
        made = [row["resources"] for row in rows]
        cells = (
            f"{len(made)}",
            f"{max(r['registers'] for r in made)}",
            f"{max(r['scratch_bytes'] for r in made)}",
            f"{max(r['shared_bytes'] for r in made) / 1024:.0f}",
            f"{min(r['occupancy'] for r in made)}",
            f"{sum(1 for r in made if r['matrix'])} of {sum(1 for r in made if r['dots'])}",
        )
        lines.append(f"| {target} | {' | '.join(cells)} |")
    return "\n".join(lines)


def runs_table(runs: list[Row]) -> str:
    """A row per kernel: its cases on each target, executed instructions, and the worst error of the operation."""
    targets = list(_groups(runs, "target"))
    lines = [f"| operation | types | {' | '.join(targets)} | kernels |", "|---" * (len(targets) + 3) + "|"]
    for op, rows in _groups(runs, "label").items():
        dtypes = dict.fromkeys(row["label"].rpartition(", ")[2] for row in rows)
        kernels = dict.fromkeys(kernel["kernel"] for row in rows for kernel in row["kernels"])
        cells = [_of_target([row for row in rows if row["target"] == target]) for target in targets]
        lines.append(f"| {op} | {', '.join(dtypes)} | {' | '.join(cells)} | {', '.join(kernels)} |")
    return "\n".join(lines)


def _of_target(rows: list[Row]) -> str:
    executed = sum(kernel["num_instructions"] for row in rows for kernel in row["kernels"])
    return f"{len(rows)} cases, {max(row['error_ratio'] for row in rows):.0%}, {executed:,}"


def _groups(rows: Iterable[Row], key: str) -> dict[str, list[Row]]:
    """By the value of a key, up to its first slash."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row[key].partition("/")[0], []).append(row)
    return found


def kernels_of(results: list[Row]) -> set[str]:
    """ "rms_norm" and the like."""
    return {function_of(row["kernel"]) for row in results}


def main(path: str) -> None:
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    print(f"{compiled_table(values['results'])}\n\n{runs_table(values['runs'])}")


if __name__ == "__main__":
    main(sys.argv[1])
