"""How many instructions each kernel may have: what was measured once, kept as data, one file per triton release.

Another release compiles differently, so its counts say nothing about this one's. Owns the files; `gate` compares.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from evenflow.crosscheck.compiling import Compiled

FOLDER = Path(__file__).parent / "budgets"


@dataclass(frozen=True, slots=True)
class Budgets:
    """Instruction counts by target and label. triton: the exact version that they were measured with."""

    triton: str
    instructions: dict[str, dict[str, int]] = field(default_factory=dict)

    def of(self, compiled: Compiled) -> int | None:
        return self.instructions.get(compiled.target, {}).get(compiled.label)


def budget_path(triton_version: str, folder: Path | None = None) -> Path:
    """3.9.0 and 3.9.1 share triton-3.9.json: a patch release does not change code generation on purpose."""
    return (folder or FOLDER) / "triton-{}.{}.json".format(*triton_version.split(".")[:2])


def load_budgets(triton_version: str, folder: Path | None = None) -> Budgets:
    """The budgets of this release; empty where none were measured. Raises ValueError for a file that is no budget."""
    path = budget_path(triton_version, folder)
    if not path.exists():
        return Budgets(triton_version)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Budgets(values["triton"], values["instructions"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no budget file ({error}); delete it and run --update-budgets") from error


def updated(budgets: Budgets, triton_version: str, results: list[Compiled], is_complete: bool) -> Budgets:
    """With the counts of `results`. is_complete: they are all there is, so what they lack of a target is dropped."""
    instructions = {target: dict(counts) for target, counts in budgets.instructions.items()}
    if is_complete:
        instructions |= {target: {} for target in {compiled.target for compiled in results}}
    for compiled in results:
        if compiled.resources is not None:
            instructions.setdefault(compiled.target, {})[compiled.label] = compiled.resources.num_instructions
    return Budgets(triton_version, instructions)


def save_budgets(budgets: Budgets, folder: Path | None = None) -> Path:
    """Write them, sorted so that a change of one kernel is a change of its lines. Returns where."""
    path = budget_path(budgets.triton, folder)
    sorted_counts = {target: dict(sorted(counts.items())) for target, counts in sorted(budgets.instructions.items())}
    text = json.dumps({"triton": budgets.triton, "instructions": sorted_counts}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    return path
