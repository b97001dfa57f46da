"""Which kernels are compiled for which targets: everything, or what was asked for."""

import difflib
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from evenflow.crosscheck.compiling import Job, function_of, label_of
from evenflow.crosscheck.targets import TARGETS, find_target

if TYPE_CHECKING:
    from evenflow.kernels.specializations import Specialization

    Specializations = Callable[[str], list[Specialization]]


def select(
    specializations: "Specializations",
    targets: list[str] | None = None,
    kernels: list[str] | None = None,
    sample: int | None = None,
) -> list[Job]:
    """A job per target with the specializations that it has.

    specializations: those of an architecture. kernels: names ("rms_norm"), labels ("rms_norm/bf16-4096") or patterns of
    either. sample: at most so many of each kernel, evenly spread. Raises ValueError for what is not known.
    """
    archs = list(dict.fromkeys(find_target(arch).arch for arch in targets or TARGETS))
    everything = {arch: specializations(arch) for arch in archs}
    for pattern in kernels or ():
        _check_known(pattern, [s for found in everything.values() for s in found])
    return [
        Job(arch, _sample([s for s in found if _matches(s, kernels)], sample)) for arch, found in everything.items()
    ]


def _matches(specialization: "Specialization", patterns: list[str] | None) -> bool:
    names = (function_of(specialization.kernel), label_of(specialization.kernel, specialization.name))
    return not patterns or any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _check_known(pattern: str, specializations: "list[Specialization]") -> None:
    if any(_matches(specialization, [pattern]) for specialization in specializations):
        return
    functions = list(dict.fromkeys(function_of(s.kernel) for s in specializations))
    labels = list(dict.fromkeys(label_of(s.kernel, s.name) for s in specializations))
    near = difflib.get_close_matches(pattern, labels if "/" in pattern else functions, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"kernel {pattern!r} is not known; {hint}Kernels are {', '.join(functions)}")


def _sample(specializations: "list[Specialization]", limit: int | None) -> "list[Specialization]":
    if limit is None:
        return specializations
    by_kernel: dict[str, list[Specialization]] = {}
    for specialization in specializations:
        by_kernel.setdefault(specialization.kernel, []).append(specialization)
    return [s for found in by_kernel.values() for s in found[:: -(-len(found) // limit)]]
