"""Small inputs for every kernel that is run on the simulator, and what is right for them.

Owns the inputs and their references; `running` executes and compares. Imports torch, so nothing else here imports this
before something is to be run.
"""

from evenflow.crosscheck.cases import attention, layers, sampling, steps
from evenflow.crosscheck.cases.case import Case
from evenflow.crosscheck.targets import find_target

__all__ = ["CASES", "Case", "all_cases"]
CASES: tuple[Case, ...] = (*steps.CASES, *layers.CASES, *attention.CASES, *sampling.CASES)


def all_cases(arch: str) -> dict[str, tuple[Case, str]]:
    """(case, dtype) by label, of an architecture: its own 8-bit float and no other."""
    return {case.label(dtype): (case, dtype) for case in CASES for dtype in case.dtypes if _has(arch, dtype)}


def _has(arch: str, dtype: str) -> bool:
    if not dtype.startswith("float8_"):
        return True
    return find_target(arch).fp8_dtype == "f8" + dtype.removeprefix("float8_").upper()
