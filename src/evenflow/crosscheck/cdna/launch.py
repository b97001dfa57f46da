"""Start the waves of some workgroups as the kernel's descriptor asks, and execute them to the end.

Owns the calling convention (which scalar registers hold what) and the order of execution: of all waves that can run,
those at the lowest instruction go together until they meet others, branch, wait at a barrier or end. Every few turns
another group goes first, so that a wave that spins on memory does not keep out the one it waits for.
"""

from dataclasses import dataclass, field

import numpy as np

from evenflow.crosscheck.cdna.arrivals import Arrivals
from evenflow.crosscheck.cdna.control import wait_limits
from evenflow.crosscheck.cdna.errors import SimulationError
from evenflow.crosscheck.cdna.floats import Array
from evenflow.crosscheck.cdna.lds import LocalMemory
from evenflow.crosscheck.cdna.machine import LANES, WAVE, Machine
from evenflow.crosscheck.cdna.memory import GlobalMemory, ScratchMemory
from evenflow.crosscheck.cdna.operation import Step, loads_into_lds
from evenflow.crosscheck.cdna.parser import Kernel
from evenflow.crosscheck.cdna.races import RaceDetector
from evenflow.crosscheck.cdna.vector_memory import SCRATCH_DESCRIPTOR

TURNS_BEFORE_ROTATION = 64
# User scalar registers in the order in which the hardware fills them: (descriptor entry, registers).
USER_REGISTERS = (
    ("user_sgpr_private_segment_buffer", 4),
    ("user_sgpr_dispatch_ptr", 2),
    ("user_sgpr_queue_ptr", 2),
    ("user_sgpr_kernarg_segment_ptr", 2),
    ("user_sgpr_dispatch_id", 2),
    ("user_sgpr_flat_scratch_init", 2),
    ("user_sgpr_private_segment_size", 1),
)


@dataclass(frozen=True)
class RegisterLayout:
    """Where a wave finds what at its start. Positions of scalar registers, -1 for "not there"."""

    scratch_descriptor: int
    arguments: int
    preload: int
    num_preloaded: int
    workgroup: tuple[int, int, int]
    num_defined: int

    @classmethod
    def of(cls, kernel: Kernel) -> "RegisterLayout":
        """Read it from the kernel's descriptor."""
        entries = kernel.descriptor
        position, places = 0, {}
        for name, count in USER_REGISTERS:
            if entries.get(name):
                places[name] = position
                position += count
        num_preloaded = entries.get("user_sgpr_kernarg_preload_length", 0)
        preload = position
        position = max(position + num_preloaded, entries.get("user_sgpr_count", 0))
        workgroup = []
        for axis in "xyz":
            is_there = entries.get(f"system_sgpr_workgroup_id_{axis}", int(axis == "x"))
            workgroup.append(position if is_there else -1)
            position += is_there
        position += entries.get("system_sgpr_private_segment_wavefront_offset", 0)
        position += entries.get("enable_private_segment", 0) and not places.get("user_sgpr_flat_scratch_init", 1)
        return cls(
            places.get("user_sgpr_private_segment_buffer", -1),
            places.get("user_sgpr_kernarg_segment_ptr", -1),
            preload,
            num_preloaded,
            (workgroup[0], workgroup[1], workgroup[2]),
            position,
        )


@dataclass
class Launch:
    """What all workgroups of one run share. `counts` and `segments` grow while they run.

    counts: [instructions], wave instructions executed at each line. segments: (waves, first, end) in the order of
    execution, kept only if `records` is set, with the waves numbered over all workgroups of the run.
    """

    kernel: Kernel
    steps: list[Step]
    memory: GlobalMemory
    arguments_address: int
    num_warps: int
    lds_bytes: int
    entry: int
    finds_races: bool
    records: bool
    max_steps: int
    counts: Array = field(init=False)
    segments: list[tuple[Array, int, int]] = field(default_factory=list)
    num_started: int = 0

    def __post_init__(self) -> None:
        self.counts = np.zeros(len(self.steps), np.int64)
        self.layout = RegisterLayout.of(self.kernel)
        rows = [
            operand.index + operand.count
            for step in self.steps
            for operand in step.instruction.operands
            if operand.kind == "v"
        ]
        self.num_vector = max(rows, default=1)

    def run(self, groups: Array) -> None:
        """Execute these workgroups together. groups: int [workgroups, 3], their places in the grid."""
        machine = self._machine(groups)
        with np.errstate(all="ignore"):
            _Execution(self, machine).run()
        self.num_started += machine.num_waves

    def _machine(self, groups: Array) -> Machine:
        workgroup = np.repeat(np.arange(len(groups)), self.num_warps)
        machine = Machine(self.kernel.architecture, self.num_vector, workgroup, groups)
        machine.memory = self.memory
        machine.lds = LocalMemory(len(groups), self.lds_bytes, workgroup, None)
        if self.finds_races:
            machine.lds.races = RaceDetector(len(groups), machine.lds.pitch, workgroup)
        scratch_bytes = self.kernel.descriptor.get("private_segment_fixed_size", 0)
        machine.scratch = ScratchMemory(machine.num_waves, scratch_bytes)
        self._set_registers(machine)
        return machine

    def _set_registers(self, machine: Machine) -> None:
        layout, address = self.layout, self.arguments_address
        if layout.scratch_descriptor >= 0:
            machine.scalar[layout.scratch_descriptor + 3] = SCRATCH_DESCRIPTOR
        if layout.arguments >= 0:
            machine.scalar[layout.arguments] = address & 0xFFFFFFFF
            machine.scalar[layout.arguments + 1] = address >> 32
        if layout.num_preloaded and self.entry == self.kernel.entry:
            first = self.kernel.descriptor.get("user_sgpr_kernarg_preload_offset", 0)
            block = next(block for block in self.memory.allocations if block.address == address)
            words = self.memory.contents(block).view(np.uint32)[first : first + layout.num_preloaded]
            machine.scalar[layout.preload : layout.preload + len(words)] = words[:, None]
        for axis, position in enumerate(layout.workgroup):
            if position >= 0:
                machine.scalar[position] = machine.coordinates[machine.workgroup, axis]
        first_wave = np.searchsorted(machine.workgroup, machine.workgroup)
        thread = (np.arange(machine.num_waves) - first_wave)[:, None] * WAVE + LANES
        machine.vector[0] = thread


class _Execution:
    """The waves of one `Launch.run`: where each stands, and whether it waits or is done."""

    def __init__(self, launch: Launch, machine: Machine) -> None:
        self.launch, self.machine = launch, machine
        self.pc = np.full(machine.num_waves, launch.entry, np.int64)
        self.is_done = np.zeros(machine.num_waves, bool)
        self.is_waiting = np.zeros(machine.num_waves, bool)
        self.runs = [step.run for step in launch.steps]
        if launch.records and any(map(loads_into_lds, launch.steps)):
            self._watch_arrivals()
        self.flows = [step.operation.flow for step in launch.steps]
        self.num_steps = 0

    def _watch_arrivals(self) -> None:
        lds = self.machine.lds
        lds.arrivals = Arrivals(lds.store.bytes.size, self.machine.workgroup)
        for place, step in enumerate(self.launch.steps):
            if "vmcnt" in step.operation.counters:
                self.runs[place] = lds.arrivals.counting(step.run)
            elif step.instruction.name == "s_waitcnt" and "vmcnt" in (limits := wait_limits(step.instruction)):
                self.runs[place] = lds.arrivals.waiting(limits["vmcnt"])

    def run(self) -> None:
        turn = 0
        while not self.is_done.all():
            places = self.pc[~self.is_done & ~self.is_waiting]
            # Every arrival opens the barrier that it completes, so that some wave can always run.
            assert places.size, "all waves wait"
            waiting_places = np.unique(places)
            turn += 1
            if turn % TURNS_BEFORE_ROTATION == 0:
                start, stop = int(waiting_places[turn // TURNS_BEFORE_ROTATION % len(waiting_places)]), -1
            else:
                start, stop = int(waiting_places[0]), int(waiting_places[1]) if len(waiting_places) > 1 else -1
            self.machine.select(np.nonzero(~self.is_done & ~self.is_waiting & (self.pc == start))[0])
            self._segment(start, stop)

    def _segment(self, start: int, stop: int) -> None:
        """Execute the selected waves from `start` until `stop`, a branch, a barrier or the end."""
        machine, counts, flows, runs = self.machine, self.launch.counts, self.flows, self.runs
        count, place = machine.count, start
        while place != stop:
            if place >= len(flows):
                raise SimulationError(f"{self.launch.steps[-1].instruction}: execution runs past the end of the kernel")
            counts[place] += count
            if flows[place]:
                self._flow(place)
                place += 1
                break
            runs[place](machine)
            place += 1
        else:
            self.pc[machine.indices] = place
        self.num_steps += place - start
        if self.num_steps > self.launch.max_steps:
            raise SimulationError(f"the kernel did not end within {self.launch.max_steps} steps; does a wave spin?")
        if self.launch.records:
            self.launch.segments.append((machine.indices + self.launch.num_started, start, place))

    def _flow(self, place: int) -> None:
        machine, kind = self.machine, self.flows[place]
        waves = machine.indices
        self.pc[waves] = place + 1
        if kind == "branch":
            taken = self.runs[place](machine)
            self.pc[waves[taken]] = self.launch.steps[place].instruction.target
            return
        if kind == "end":
            self.is_done[waves] = True
        else:
            self.is_waiting[waves] = True
        for group in np.unique(machine.workgroup[waves]):
            self._open_barrier(int(group))

    def _open_barrier(self, group: int) -> None:
        """Let a workgroup's waves go on if all of them have arrived or ended."""
        members = self.machine.workgroup == group
        if not (self.is_waiting[members] | self.is_done[members]).all():
            return
        self.is_waiting[members] = False
        if self.machine.lds.races is not None:
            self.machine.lds.races.open_epoch(group)
        if self.machine.lds.arrivals is not None:
            self.machine.lds.arrivals.pass_barrier(group)
