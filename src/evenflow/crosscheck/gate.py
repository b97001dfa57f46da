"""What a compiled kernel must not do. Each rule reads the result of one compile and says cause and way out.

A compiler rarely refuses: it spills, emulates, or takes more shared memory than there is, and only the launch or the
clock would tell.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from evenflow.crosscheck.artefacts import UNTRACED, Dot
from evenflow.crosscheck.budgets import Budgets
from evenflow.crosscheck.compiling import Compiled, Resources, is_kv_cache
from evenflow.crosscheck.targets import Target, find_target

GROWTH_LIMIT = 1.10
WIDE_LOAD_BYTES = 16
MAX_ALIKE = 8
# With registers to spare, ptxas still puts aside a word or two, so that one workgroup more fits.
FEW_STACK_BYTES = 16
# What may spill, and how many bytes of stack a lane: (target, pattern of labels). Not more than these.
ACCEPTED_SPILLS = {
    ("sm_90", "prefill_attention/*"): 296,  # tiles that the clock chose on the GPU, among some that do not spill
    ("gfx1100", "prefill_attention/heads-of-80-fp32"): 36,  # no matrix units for float32, and no tile without a spill
}


@dataclass(frozen=True, slots=True)
class Failure:
    """One rule that one kernel broke. check: the rule's name. cause and fix: for people."""

    target: str
    label: str
    check: str
    cause: str
    fix: str

    def __str__(self) -> str:
        return f"{self.target} {self.label}: {self.check}: {self.cause}. {self.fix}"


def judge(compiled: Compiled, budgets: Budgets) -> list[Failure]:
    """Every rule that this result breaks, worst first; empty when it may ship."""
    return [Failure(compiled.target, compiled.label, *found) for found in _broken_rules(compiled, budgets)]


def condensed(failures: list[Failure]) -> list[Failure]:
    """For people: many kernels without a budget, as after a new triton, are one line and one thing to do."""
    without = [failure for failure in failures if failure.check == "no budget"]
    if len(without) <= MAX_ALIKE:
        return failures
    targets = ", ".join(dict.fromkeys(failure.target for failure in without))
    first = without[0]
    line = Failure(targets, f"{len(without)} compiled kernels", first.check, "none was recorded", first.fix)
    return [failure for failure in failures if failure.check != "no budget"] + [line]


Finding = tuple[str, str, str]  # check, cause, fix


def _broken_rules(compiled: Compiled, budgets: Budgets) -> Iterator[Finding]:
    if compiled.resources is None:
        cause = " ".join(filter(None, (_brief(compiled.error), _last_line(compiled.stderr))))
        yield "compile", cause, f"To see it alone: --target {compiled.target} --kernel {compiled.label}"
        return
    target = find_target(compiled.target)
    if compiled.stderr:
        yield "stderr", f"the compiler wrote {_last_line(compiled.stderr)!r}", "Its code may be garbage; mend the cause"
    yield from _memory(compiled.resources, target)
    yield from _spills(compiled, compiled.resources, target)
    yield from _speed(compiled.resources, target)
    yield from _length(compiled, compiled.resources, budgets)


def _memory(resources: Resources, target: Target) -> Iterator[Finding]:
    if resources.shared_bytes > target.shared_bytes:
        cause = f"{resources.shared_bytes:,} bytes of {target.shared_bytes:,}; it compiles, but the launch would fail"
        yield "shared memory", cause, "Take fewer stages (num_stages) or a smaller tile"
    elif resources.occupancy == 0:
        yield "occupancy", f"{resources.registers} registers a lane: no workgroup fits", "Take fewer warps"


def _spills(compiled: Compiled, resources: Resources, target: Target) -> Iterator[Finding]:
    accepted_bytes = max(
        number if target.arch == arch and fnmatchcase(compiled.label, pattern) else 0
        for (arch, pattern), number in ACCEPTED_SPILLS.items()
    )
    if not target.is_amd and resources.registers < target.max_registers:
        accepted_bytes = max(accepted_bytes, FEW_STACK_BYTES)
    if resources.scratch_bytes > accepted_bytes:
        what = "registers do not fit" if target.is_amd else "accesses of local memory"
        cause = f"{resources.spills:,} {what}, {resources.scratch_bytes:,} bytes of stack a lane"
        yield "spills", cause, "Take a smaller tile or more warps (num_warps)"


def _speed(resources: Resources, target: Target) -> Iterator[Finding]:
    dots = sorted({dot.dtype for dot in resources.dots if _belongs_on_matrix_units(dot, target)})
    if dots and not resources.matrix:
        cause = f"tl.dot of {', '.join(dots)} is computed on vector units"
        yield "matrix units", cause, "Tiles must be at least 16 in each dimension, of a type that the target knows"
    for argument, widths in resources.argument_loads.items():
        narrow = {width: count for width, count in sorted(widths.items()) if width < WIDE_LOAD_BYTES}
        if narrow and (is_kv_cache(argument) or argument == UNTRACED):
            loads = ", ".join(f"{count} of {width} bytes" for width, count in narrow.items())
            what = "something that cannot be traced to an argument" if argument == UNTRACED else argument
            fix = "Name the argument and its strides in `aligned`; a lane should read 16 neighbouring bytes"
            yield "narrow loads", f"{what} is read by loads of less than {WIDE_LOAD_BYTES} bytes: {loads}", fix


def _belongs_on_matrix_units(dot: Dot, target: Target) -> bool:
    """Products of reduced precision always; exact float32 where the matrix units have it."""
    return dot.dtype in target.matrix_dtypes or (dot.dtype == "f32" and dot.precision != "ieee")


def _length(compiled: Compiled, resources: Resources, budgets: Budgets) -> Iterator[Finding]:
    budget = budgets.of(compiled)
    count = resources.num_instructions
    if budget is None:
        cause = f"{count:,} instructions, and none were recorded for triton {budgets.triton}"
        yield "no budget", cause, "Record them with --update-budgets"
    elif count > budget * GROWTH_LIMIT:
        cause = f"{count:,} instructions, {count / budget - 1:+.0%} over the {budget:,} of triton {budgets.triton}"
        yield "budget", cause, "Find out why, or accept it with --update-budgets"


def _brief(error: str) -> str:
    """The kind of an error and its point: triton quotes the source in between, and ptxas a command behind."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    points = [line for line in lines[1:] if re.search(r"\b(error|fatal) *:", line)]
    return " ".join(dict.fromkeys([*lines[:1], *(points[:1] or lines[-1:])]))


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip()[:300] if lines else ""
