"""What can be known of a kernel before it runs: from which argument each address comes, and which reads have no writer.

A forward analysis over the control flow graph. At every instruction it knows, for each register, the set of kernel
arguments from whose pointers its value may derive, and whether any path has written it. Values loaded from memory
derive from no pointer, so an index from a table does not count; a value that went through LDS may derive from all that
did.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from evenflow.crosscheck.cdna.errors import UninitializedReadError
from evenflow.crosscheck.cdna.launch import RegisterLayout
from evenflow.crosscheck.cdna.machine import NUM_SCALARS, Machine
from evenflow.crosscheck.cdna.operands import EXEC, Operand
from evenflow.crosscheck.cdna.operation import Run, Step
from evenflow.crosscheck.cdna.packed import read_words
from evenflow.crosscheck.cdna.parser import Instruction, Kernel

# Two more sources than the kernel's arguments: the block of arguments itself, and the descriptor of scratch.
ARGUMENTS, SCRATCH = -1, -2
Tags = frozenset[int]
NOTHING: Tags = frozenset()
# Sums of 64 bits that compilers use for their lower half too: then the addend's upper half need not be written, and
# the sum's upper half and the carry mean nothing.
WIDE_SUMS = frozenset({"v_mad_u64_u32", "v_mad_i64_i32"})
Place = int | tuple[str, int, int]  # a register, or a spill slot: (kind, register, lane) or (kind, offset, dword)


def registers(operand: Operand) -> range:
    """An operand's registers in one numbering: scalar registers first, then vector registers."""
    if operand.kind == "s":
        return range(operand.index, operand.index + operand.count)
    if operand.kind == "v":
        return range(NUM_SCALARS + operand.index, NUM_SCALARS + operand.index + operand.count)
    return range(0)


def register_name(register: int) -> str:
    """As the assembler writes it."""
    if register < NUM_SCALARS:
        names = {106: "vcc_lo", 107: "vcc_hi", 124: "m0", 126: "exec_lo", 127: "exec_hi"}
        return names.get(register, f"s{register}")
    row = register - NUM_SCALARS
    return f"v{row}" if row < 256 else f"a{row - 256}"


@dataclass
class _State:
    """Before an instruction: the tags of what has any, and the registers that some path has written (a bit each)."""

    tags: dict[Place, Tags] = field(default_factory=dict)
    written: int = 0

    def copy(self) -> "_State":
        return _State(dict(self.tags), self.written)

    def merge(self, other: "_State") -> bool:
        """Take in what another path brings; whether that changed anything."""
        changed = other.written & ~self.written != 0
        self.written |= other.written
        for place, tags in other.tags.items():
            known = self.tags.get(place, NOTHING)
            if not tags <= known:
                self.tags[place] = known | tags
                changed = True
        return changed

    def of(self, places: Iterable[Place]) -> Tags:
        return frozenset().union(*(self.tags.get(place, NOTHING) for place in places))

    def write(self, register: int, tags: Tags) -> None:
        self.written |= 1 << register
        self.put(register, tags)

    def put(self, place: Place, tags: Tags) -> None:
        if tags:
            self.tags[place] = tags
        else:
            self.tags.pop(place, None)


class _Analysis:
    def __init__(self, kernel: Kernel, steps: list[Step]) -> None:
        self.kernel, self.steps = kernel, steps
        self.through_lds: Tags = NOTHING
        self.before: dict[int, _State] = {}
        branches = [(place, step) for place, step in enumerate(steps) if step.operation.flow == "branch"]
        self.leaders = {
            kernel.entry,
            *(step.instruction.target for _, step in branches),
            *(at + 1 for at, _ in branches),
        }
        self.pointer_words = {
            item.offset + word: position
            for position, item in enumerate(kernel.arguments)
            if item.is_pointer
            for word in (0, 4)
        }

    def start(self, preloads: bool) -> _State:
        layout = RegisterLayout.of(self.kernel)
        state = _State(written=(1 << layout.num_defined) - 1)
        state.written |= 3 << EXEC | 1 << NUM_SCALARS
        if layout.scratch_descriptor >= 0:
            for word in range(4):
                state.put(layout.scratch_descriptor + word, frozenset({SCRATCH}))
        if layout.arguments >= 0:
            for word in range(2):
                state.put(layout.arguments + word, frozenset({ARGUMENTS}))
        first = self.kernel.descriptor.get("user_sgpr_kernarg_preload_offset", 0)
        if not preloads:
            state.written &= ~((1 << layout.num_preloaded) - 1 << layout.preload)
        for word in range(layout.num_preloaded if preloads else 0):
            state.put(layout.preload + word, self._argument_word(4 * (first + word)))
        return state

    def _argument_word(self, offset: int) -> Tags:
        position = self.pointer_words.get(offset)
        return NOTHING if position is None else frozenset({position})

    def solve(self) -> None:
        """Run blocks until nothing changes. What went through LDS may be found late, so that all is done again then."""
        while True:
            before = self.through_lds
            self._pass()
            if self.through_lds == before:
                return

    def _pass(self) -> None:
        self.before = {self.kernel.entry: self.start(True)}
        if self.kernel.entry:
            self.before[0] = self.start(False)
        pending = sorted(self.before)
        while pending:
            place = pending.pop()
            state = self.before[place].copy()
            for following, at_end in self._block(place, state):
                if following not in self.before:
                    self.before[following] = at_end.copy()
                elif not self.before[following].merge(at_end):
                    continue
                pending.append(following)

    def _block(self, place: int, state: _State) -> Iterator[tuple[int, _State]]:
        """Execute from here to a branch, the end, or where another block is known to begin."""
        while place < len(self.steps):
            step = self.steps[place]
            self.transfer(step, state)
            place += 1
            if step.operation.flow == "end":
                return
            if step.operation.flow == "branch":
                yield step.instruction.target, state
                if step.instruction.name == "s_branch":
                    return
            if place in self.leaders:
                yield place, state
                return

    def transfer(self, step: Step, state: _State) -> None:
        """Apply one instruction to the state."""
        results = self._results(step, state)
        meaningless = _meaningless_results(step, state)
        for register, tags in results:
            state.write(register, tags)
        for register in meaningless:
            state.written &= ~(1 << register)
        for register in step.operation.writes:
            state.write(register, NOTHING)
        self._spill(step, state)

    def _results(self, step: Step, state: _State) -> list[tuple[int, Tags]]:
        name, operation = step.instruction.name, step.operation
        if not step.destinations:
            return []
        first = registers(step.destinations[0])
        others = [(register, NOTHING) for operand in step.destinations[1:] for register in registers(operand)]
        if is_exchange(step):
            everything = state.of(register for operand in step.destinations for register in registers(operand))
            return [(register, everything) for operand in step.destinations for register in registers(operand)]
        if operation.address:
            return [(register, self._loaded(step, state, word)) for word, register in enumerate(first)] + others
        if name.startswith("ds_read") or "_rtn_" in name:
            tags = self.through_lds
        elif name.startswith("scratch_load"):
            return [
                (register, state.tags.get(_scratch_slot(step, word), NOTHING)) for word, register in enumerate(first)
            ]
        elif name.startswith("v_cmp"):
            tags = NOTHING
        elif name == "v_readlane_b32" and (slot := _lane_slot(step)) in state.tags:
            tags = state.tags[slot]
        elif name.endswith("_mov_b64") and step.sources[0].kind in ("s", "v"):
            return [(to, state.of([source])) for to, source in zip(first, registers(step.sources[0]), strict=True)]
        else:
            tags = state.of(register for operand in step.sources for register in registers(operand))
            if operation.updates or step.merges:
                tags |= state.of(first)
        return [(register, tags) for register in first] + others

    def _loaded(self, step: Step, state: _State, word: int) -> Tags:
        """Tags of a dword loaded from memory: those of an argument, of a spilled value, or none."""
        source = address_tags(step, state)
        if source == {SCRATCH}:
            return state.tags.get(_scratch_slot(step, word), NOTHING)
        if source != {ARGUMENTS}:
            return NOTHING
        offset = step.instruction.operands[2]
        if offset.kind != "literal":
            return frozenset(self.pointer_words.values())
        return self._argument_word(offset.value + step.instruction.modifiers.get("offset", 0) + 4 * word)

    def _spill(self, step: Step, state: _State) -> None:
        """Keep the tags of what goes to LDS, to scratch, or into a lane of a register that holds spilled scalars."""
        name = step.instruction.name
        if name.startswith("ds_") and not step.destinations:
            data = (register for operand in step.sources[1:] for register in registers(operand))
            self.through_lds |= state.of(data)
        elif name == "v_writelane_b32":
            state.put(_lane_slot(step), state.of(registers(step.sources[0])))
        elif name.startswith("scratch_store"):
            self._store_slots(step, state, step.sources[1])
        elif name.startswith("buffer_store") and address_tags(step, state) == {SCRATCH}:
            self._store_slots(step, state, step.sources[0])

    def _store_slots(self, step: Step, state: _State, data: Operand) -> None:
        for word, register in enumerate(registers(data)):
            slot = _scratch_slot(step, word)
            # Another address register may mean the same place, so that old tags stay.
            state.put(slot, state.of([slot, register]))


def is_exchange(step: Step) -> bool:
    """Whether the instruction has two results of the same kind, each from both sources."""
    return "swap" in step.instruction.name and step.operation.num_destinations == 2


def _lane_slot(step: Step) -> Place:
    operands = step.instruction.operands
    register = operands[0] if step.instruction.name == "v_writelane_b32" else operands[1]
    lane = operands[2].value if operands[2].kind == "literal" else -1
    return ("lane", register.index, lane)


def _scratch_slot(step: Step, word: int) -> Place:
    return ("scratch", step.instruction.modifiers.get("offset", 0) + 4 * word, 0)


def address_tags(step: Step, state: _State) -> Tags:
    """The arguments that an access's address may derive from."""
    operands = step.instruction.operands
    return state.of(register for place in step.operation.address for register in _address_registers(operands[place]))


def _address_registers(operand: Operand) -> Iterable[int]:
    # Of a buffer descriptor only the first half is an address.
    found = registers(operand)
    return found[:2] if len(found) == 4 else found


def read_registers(step: Step) -> Iterator[int]:
    """Registers whose value matters: sources, and old values of destinations that are operands too."""
    for operand, words in zip(step.sources, read_words(step.instruction, len(step.sources)), strict=True):
        found = registers(operand)
        yield from (found[word] for word in words) if words and len(found) == 2 else found
    for operand in step.destinations if step.operation.updates else ():
        yield from registers(operand)
    yield from step.operation.reads


def _upper_addend(step: Step) -> int | None:
    """The register that only the upper half of a wide sum depends on."""
    addend = registers(step.sources[-1]) if step.instruction.name in WIDE_SUMS else ()
    return addend[1] if len(addend) == 2 else None


def _meaningless_results(step: Step, state: _State) -> list[int]:
    """What a wide sum computes from an upper half that nothing has written: as good as not written itself."""
    upper = _upper_addend(step)
    if upper is None or state.written >> upper & 1:
        return []
    total, carry = step.destinations
    return [registers(total)[1], *registers(carry)]


def _is_spill(step: Step, state: _State) -> bool:
    """Whether it only puts a value aside: compilers spill whole tuples, of which a part may never have been written."""
    name = step.instruction.name
    to_scratch = name.startswith("buffer_store") and address_tags(step, state) == {SCRATCH}
    return to_scratch or name == "v_writelane_b32" or name.startswith("scratch_store")


def _refuse(instruction: Instruction, unwritten: list[int]) -> Run:
    names = ", ".join(map(register_name, unwritten))

    def run(machine: Machine) -> None:
        raise UninitializedReadError(f"{instruction}: reads {names}, which nothing has written on any path to here")

    return run


def analyse(kernel: Kernel, steps: list[Step]) -> None:
    """Note where each address comes from, and make an instruction that reads what nobody wrote fail when it runs."""
    analysis = _Analysis(kernel, steps)
    analysis.solve()
    for start in sorted(analysis.before):
        state = analysis.before[start].copy()
        for place in range(start, len(steps)):
            step = steps[place]
            if place != start and place in analysis.before:
                break
            if step.operation.address:
                tags = address_tags(step, state) - {SCRATCH}
                step.instruction.provenance = tuple(sorted(tags)) or None
            needed = (register for register in read_registers(step) if register != _upper_addend(step))
            unwritten = [register for register in needed if not state.written >> register & 1]
            if unwritten and not _is_spill(step, state):
                step.run = _refuse(step.instruction, unwritten)
            analysis.transfer(step, state)
