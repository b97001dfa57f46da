"""Wait-count checker: on the instructions that a wave executed, is every result of a memory operation waited for?

A register that a load writes must be neither read nor written before an `s_waitcnt` that covers the load. Operations of
one counter finish in order, except that scalar loads finish in any order, among themselves and beside LDS operations.
Sources of stores need no wait on these architectures: they are read when the instruction issues. A barrier must not be
passed while writes to LDS are under way. Owns no execution; it reads the segments that `launch` recorded.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from evenflow.crosscheck.cdna.control import wait_limits
from evenflow.crosscheck.cdna.dataflow import read_registers, register_name, registers
from evenflow.crosscheck.cdna.errors import MissingWaitError
from evenflow.crosscheck.cdna.floats import Array
from evenflow.crosscheck.cdna.operation import Step
from evenflow.crosscheck.cdna.parser import Instruction

Segment = tuple[Array, int, int]


@dataclass(frozen=True)
class _Facts:
    """What the checker needs of one line of code, found once. read, written: registers, a bit each."""

    instruction: Instruction
    read: int
    written: int
    counter: str
    in_order: bool
    writes_lds: bool
    limits: dict[str, int]
    is_barrier: bool


def _bits(numbers: Iterable[int]) -> int:
    total = 0
    for number in numbers:
        total |= 1 << number
    return total


def _facts(step: Step) -> _Facts:
    instruction, operation = step.instruction, step.operation
    written = _bits(register for operand in step.destinations for register in registers(operand))
    return _Facts(
        instruction,
        _bits(read_registers(step)),
        written | _bits(operation.writes),
        operation.counters[0] if operation.counters else "",
        in_order=not instruction.name.startswith("s_load"),
        writes_lds=_writes_lds(step),
        limits=wait_limits(instruction) if instruction.name == "s_waitcnt" else {},
        is_barrier=operation.flow == "barrier",
    )


def _writes_lds(step: Step) -> bool:
    name = step.instruction.name
    moves_lanes = name in ("ds_bpermute_b32", "ds_permute_b32", "ds_swizzle_b32")
    return name.startswith("ds_") and not name.startswith("ds_read") and not moves_lanes


@dataclass
class _Pending:
    """Operations under way, oldest first, for each counter; and the registers that they will write."""

    queues: dict[str, list[_Facts]] = field(default_factory=lambda: {"vmcnt": [], "lgkmcnt": []})
    registers: int = 0

    def issue(self, facts: _Facts) -> None:
        self.queues[facts.counter].append(facts)
        self.registers |= facts.written

    def wait(self, limits: dict[str, int]) -> None:
        for counter, limit in limits.items():
            queue = self.queues.get(counter, [])
            # With one that finishes out of order among them, only waiting for all says which are done.
            if limit == 0 or all(facts.in_order for facts in queue):
                del queue[: max(len(queue) - limit, 0)]
        self.registers = 0
        for queue in self.queues.values():
            for facts in queue:
                self.registers |= facts.written

    def _overtaking(self, facts: _Facts) -> int:
        """Registers that must not be written now: a later operation of the same counter cannot arrive before."""
        total = 0
        for queue in self.queues.values():
            for pending in queue:
                if pending.counter != facts.counter or not (pending.in_order and facts.in_order):
                    total |= pending.written
        return total

    def writer(self, conflict: int) -> _Facts:
        return next(facts for queue in self.queues.values() for facts in queue if facts.written & conflict)

    def check(self, facts: _Facts) -> None:
        conflict = facts.read & self.registers | facts.written & self._overtaking(facts)
        if conflict:
            writer = self.writer(conflict)
            register = register_name((conflict & -conflict).bit_length() - 1)
            raise MissingWaitError(
                f"{facts.instruction}: uses {register} while {writer.instruction} may still be under way; an s_waitcnt"
                f" {writer.counter}(...) is missing between them"
            )
        if facts.is_barrier:
            self._check_barrier(facts)

    def _check_barrier(self, barrier: _Facts) -> None:
        for counter, queue in self.queues.items():
            for facts in queue:
                if facts.writes_lds:
                    raise MissingWaitError(
                        f"{barrier.instruction}: passed while {facts.instruction} may still be under way; an s_waitcnt"
                        f" {counter}(...) is missing between them"
                    )


def check_trace(facts: Sequence[_Facts], trace: Iterable[tuple[int, int]]) -> None:
    """Check what one wave executed. trace: (first, end) of runs of consecutive instructions. Raises
    MissingWaitError."""
    pending = _Pending()
    for first, end in trace:
        for place in range(first, end):
            here = facts[place]
            if here.limits:
                pending.wait(here.limits)
                continue
            if pending.registers & (here.read | here.written) or here.is_barrier:
                pending.check(here)
            if here.counter:
                pending.issue(here)


def check_waits(steps: Sequence[Step], segments: Sequence[Segment]) -> None:
    """Check every different path that a wave took. Raises MissingWaitError, naming both instructions."""
    facts = [_facts(step) for step in steps]
    for trace in set(_traces(segments)):
        check_trace(facts, trace)


def _traces(segments: Sequence[Segment]) -> list[tuple[tuple[int, int], ...]]:
    """For each wave the runs that it executed, neighbours joined, so that equal paths compare equal."""
    num_waves = 1 + max((int(waves.max()) for waves, _, _ in segments), default=-1)
    paths: list[list[tuple[int, int]]] = [[] for _ in range(num_waves)]
    for waves, first, end in segments:
        for wave in np.asarray(waves).tolist():
            path = paths[wave]
            if path and path[-1][1] == first:
                path[-1] = (path[-1][0], end)
            else:
                path.append((first, end))
    return [tuple(path) for path in paths]
