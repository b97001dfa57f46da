"""Loads and stores outside LDS: s_load, global, buffer and scratch instructions, and loads straight into LDS.

A buffer access beyond its descriptor's size is no error: loads give 0 and stores are dropped, which is how compilers
mask them. Scratch accesses on gfx90a are buffer instructions whose descriptor the launch has marked.
"""

from collections.abc import Callable

import numpy as np

from evenflow.crosscheck.cdna.access import Reader, raw32
from evenflow.crosscheck.cdna.errors import AssemblyError, SimulationError
from evenflow.crosscheck.cdna.floats import Array
from evenflow.crosscheck.cdna.machine import WAVE, Machine, join
from evenflow.crosscheck.cdna.operands import M0, Operand
from evenflow.crosscheck.cdna.operation import Operation, Run, expect, expect_register
from evenflow.crosscheck.cdna.parser import Instruction
from evenflow.crosscheck.cdna.scalar import source32, source64

# The last dword of the descriptor that the launch puts into s[0:3] for scratch; its bits mean nothing else here.
SCRATCH_DESCRIPTOR = 0x5C4A7C00
CACHE_POLICY = frozenset({"glc", "slc", "sc0", "sc1", "nt"})
GLOBAL = CACHE_POLICY | {"offset"}
BUFFER = GLOBAL | {"offen"}
BUFFER_ADDRESS = (-3, -2, -1)
VM = ("vmcnt",)
LGKM = ("lgkmcnt",)
# What a load does with its bytes: (size, sign extension, which half of the destination it fills).
LOADS = {
    "dword": (4, False, ""),
    "dwordx2": (8, False, ""),
    "dwordx3": (12, False, ""),
    "dwordx4": (16, False, ""),
    "ubyte": (1, False, ""),
    "sbyte": (1, True, ""),
    "ushort": (2, False, ""),
    "sshort": (2, True, ""),
    "short_d16": (2, False, "low"),
    "short_d16_hi": (2, False, "high"),
    "ubyte_d16": (1, False, "low"),
    "ubyte_d16_hi": (1, False, "high"),
    "sbyte_d16": (1, True, "low"),
    "sbyte_d16_hi": (1, True, "high"),
}
STORES = {
    "dword": (4, 0),
    "dwordx2": (8, 0),
    "dwordx3": (12, 0),
    "dwordx4": (16, 0),
    "byte": (1, 0),
    "short": (2, 0),
    "byte_d16_hi": (1, 16),
    "short_d16_hi": (2, 16),
}
# Addressing gives (addresses uint64 [n, 64], lanes that access bool [n, 64]).
Addressing = Callable[[Machine], tuple[Array, Array]]


def widen(words: list[Array], size: int, is_signed: bool, half: str, old: Array | None) -> list[Array]:
    """Sign-extend a narrow load, and merge it into one half of the old value where it fills only that."""
    if size >= 4:
        return words
    value = words[0]
    if is_signed:
        shift = np.uint32(32 - 8 * size)
        value = np.ascontiguousarray((value << shift).view(np.int32) >> np.int32(32 - 8 * size)).view(np.uint32)
    if half == "low":
        value = (np.asarray(old) & np.uint32(0xFFFF0000)) | (value & np.uint32(0xFFFF))
    elif half == "high":
        value = (np.asarray(old) & np.uint32(0xFFFF)) | (value << np.uint32(16))
    return [value]


def global_address(instruction: Instruction, address: Operand, base: Operand) -> Addressing:
    """A 64-bit address in two vector registers, or scalar base plus 32-bit vector offset; plus the constant offset."""
    offset = np.uint64(instruction.modifiers.get("offset", 0) & 0xFFFFFFFFFFFFFFFF)
    if base.kind == "off":
        first = expect_register(address, "v", 2)

        def absolute(machine: Machine) -> tuple[Array, Array]:
            return join(machine.read_vector(first), machine.read_vector(first + 1)) + offset, machine.active

        return absolute
    relative, read_base = expect_register(address, "v", 1), source64(base)

    def from_base(machine: Machine) -> tuple[Array, Array]:
        distance = machine.read_vector(relative).astype(np.uint64)
        return read_base(machine)[:, None] + distance + offset, machine.active

    return from_base


def buffer_address(
    instruction: Instruction, offset: Operand, descriptor: Operand, base: Operand, size: int
) -> Addressing:
    """Descriptor base plus offsets; lanes beyond the descriptor's size do not access."""
    first = expect_register(descriptor, "s", 4)
    constant = np.uint64(instruction.modifiers.get("offset", 0))
    vector = raw32(offset) if instruction.modifiers.get("offen") else None
    scalar = source32(base)

    def run(machine: Machine) -> tuple[Array, Array]:
        lower, upper, limit, flags = (machine.read_scalar(first + word) for word in range(4))
        if ((upper >> np.uint32(16)) & np.uint32(0x3FFF)).any() or (flags == 0).any():
            raise SimulationError(f"{instruction}: only raw buffer descriptors are implemented")
        start = join(lower, upper & np.uint32(0xFFFF))
        place = scalar(machine).astype(np.uint64)[:, None] + constant
        if vector is not None:
            place = place + vector(machine).astype(np.uint64)
        place = machine.broadcast(place)
        inside = place + np.uint64(size) <= limit.astype(np.uint64)[:, None]
        straddles = machine.active & ~inside & (place < limit.astype(np.uint64)[:, None])
        if straddles.any():
            raise SimulationError(f"{instruction}: an access straddles the end of its buffer descriptor")
        return start[:, None] + place, machine.active & inside

    return run


def _data_registers(operand: Operand, size: int) -> int:
    return expect_register(operand, "v", max(size // 4, 1))


def _load_into(instruction: Instruction, data: Operand, kind: str, addressing: Addressing, zero_fill: bool) -> Run:
    size, is_signed, half = LOADS[kind]
    index = _data_registers(data, size)

    def run(machine: Machine) -> None:
        address, lanes = addressing(machine)
        place = machine.memory.locate(machine, instruction, address, size, lanes)
        machine.memory.count(address, size, lanes, is_store=False)
        old = machine.read_vector(index) if half else None
        for word, value in enumerate(widen(machine.memory.store.load(place, size), size, is_signed, half, old)):
            if zero_fill:
                machine.write_vector(index + word, np.where(lanes, value, np.uint32(0)))
            else:
                machine.write_vector(index + word, value)

    return run


def _store_from(instruction: Instruction, data: Operand, kind: str, addressing: Addressing) -> Run:
    size, shift = STORES[kind]
    index = _data_registers(data, size)

    def run(machine: Machine) -> None:
        address, lanes = addressing(machine)
        place = machine.memory.locate(machine, instruction, address, size, lanes)
        machine.memory.count(address, size, lanes, is_store=True)
        words = [machine.read_vector(index + word)[lanes] >> np.uint32(shift) for word in range(max(size // 4, 1))]
        machine.memory.store.store(place[lanes], size, words)

    return run


def _global_load(kind: str) -> Operation:
    def bind(instruction: Instruction) -> Run:
        data, address, base = expect(instruction, 3)
        return _load_into(instruction, data, kind, global_address(instruction, address, base), zero_fill=False)

    return Operation(bind, merges=bool(LOADS[kind][2]), modifiers=GLOBAL, address=(-2, -1), counters=VM)


def _global_store(kind: str) -> Operation:
    def bind(instruction: Instruction) -> Run:
        address, data, base = expect(instruction, 3)
        return _store_from(instruction, data, kind, global_address(instruction, address, base))

    return Operation(bind, num_destinations=0, modifiers=GLOBAL, address=(-3, -1), counters=VM)


def _is_scratch(machine: Machine, descriptor: int) -> bool:
    return bool((machine.read_scalar(descriptor + 3) == SCRATCH_DESCRIPTOR).all())


def _buffer_load(kind: str) -> Operation:
    def bind(instruction: Instruction) -> Run:
        data, offset, descriptor, base = expect(instruction, 4)
        addressing = buffer_address(instruction, offset, descriptor, base, LOADS[kind][0])
        in_memory = _load_into(instruction, data, kind, addressing, zero_fill=True)
        address = _scratch_address(instruction, offset if instruction.modifiers.get("offen") else None, base)
        in_scratch = _scratch_load(instruction, data, kind, address)
        first = descriptor.index
        return lambda machine: (in_scratch if _is_scratch(machine, first) else in_memory)(machine)

    return Operation(bind, merges=bool(LOADS[kind][2]), modifiers=BUFFER, address=BUFFER_ADDRESS, counters=VM)


def _buffer_store(kind: str) -> Operation:
    def bind(instruction: Instruction) -> Run:
        data, offset, descriptor, base = expect(instruction, 4)
        addressing = buffer_address(instruction, offset, descriptor, base, STORES[kind][0])
        in_memory = _store_from(instruction, data, kind, addressing)
        address = _scratch_address(instruction, offset if instruction.modifiers.get("offen") else None, base)
        in_scratch = _scratch_store(instruction, data, kind, address)
        first = descriptor.index
        return lambda machine: (in_scratch if _is_scratch(machine, first) else in_memory)(machine)

    return Operation(bind, num_destinations=0, modifiers=BUFFER, address=BUFFER_ADDRESS, counters=VM)


def _scratch_address(instruction: Instruction, vector: Operand | None, scalar: Operand) -> Reader:
    """int64 [n, 64]: the byte within each lane's scratch."""
    constant = np.int64(instruction.modifiers.get("offset", 0))
    lane_part = raw32(vector) if vector is not None and vector.kind != "off" else None
    wave_part = source32(scalar) if scalar.kind != "off" else None

    def run(machine: Machine) -> Array:
        address = np.full((machine.count, WAVE), constant)
        if lane_part is not None:
            address = address + lane_part(machine).astype(np.int64)
        if wave_part is not None:
            address = address + wave_part(machine).astype(np.int64)[:, None]
        return address

    return run


def _scratch_load(instruction: Instruction, data: Operand, kind: str, address: Reader) -> Run:
    size, is_signed, half = LOADS[kind]
    index = _data_registers(data, size)

    def run(machine: Machine) -> None:
        place = machine.scratch.locate(machine, instruction, address(machine), size)
        machine.memory.traffic.scratch_bytes += int(np.count_nonzero(machine.active)) * size
        old = machine.read_vector(index) if half else None
        for word, value in enumerate(widen(machine.scratch.store.load(place, size), size, is_signed, half, old)):
            machine.write_vector(index + word, value)

    return run


def _scratch_store(instruction: Instruction, data: Operand, kind: str, address: Reader) -> Run:
    size, shift = STORES[kind]
    index = _data_registers(data, size)

    def run(machine: Machine) -> None:
        lanes = machine.active
        place = machine.scratch.locate(machine, instruction, address(machine), size)
        machine.memory.traffic.scratch_bytes += int(np.count_nonzero(lanes)) * size
        words = [machine.read_vector(index + word)[lanes] >> np.uint32(shift) for word in range(max(size // 4, 1))]
        machine.scratch.store.store(place[lanes], size, words)

    return run


def _scratch(kind: str, is_load: bool) -> Operation:
    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, 3)
        data, vector = (operands[0], operands[1]) if is_load else (operands[1], operands[0])
        address = _scratch_address(instruction, vector, operands[2])
        return (_scratch_load if is_load else _scratch_store)(instruction, data, kind, address)

    return Operation(bind, num_destinations=int(is_load), modifiers=GLOBAL, counters=VM)


def _scalar_load(num_words: int) -> Operation:
    def bind(instruction: Instruction) -> Run:
        data, base, offset = expect(instruction, 3)
        index, start, distance = expect_register(data, "s", num_words), source64(base), source32(offset)
        constant = np.uint64(instruction.modifiers.get("offset", 0))
        size = 4 * num_words

        def run(machine: Machine) -> None:
            address = (start(machine) + distance(machine).astype(np.uint64) + constant)[:, None]
            lanes = np.ones(address.shape, bool)
            place = machine.memory.locate(machine, instruction, address, size, lanes)
            machine.memory.count(address, size, lanes, is_store=False)
            for word, value in enumerate(machine.memory.store.load(place[:, 0], size)):
                machine.write_scalar(index + word, value)

        return run

    return Operation(bind, modifiers=frozenset({"glc", "offset"}), address=(-2, -1), counters=LGKM)


def _load_to_lds(kind: str, is_buffer: bool) -> Operation:
    """Each lane's bytes go to LDS at M0 + offset + lane * size; no register is written."""

    def bind(instruction: Instruction) -> Run:
        size = LOADS[kind][0]
        if size not in (4, 12, 16):
            raise AssemblyError(f"{instruction.name}: only whole dwords straight into LDS are implemented")
        if is_buffer:
            offset, descriptor, base = expect(instruction, 3)
            addressing = buffer_address(instruction, offset, descriptor, base, size)
        else:
            address, base = expect(instruction, 2)
            addressing = global_address(instruction, address, base)
        constant = instruction.modifiers.get("offset", 0)

        def run(machine: Machine) -> None:
            source, lanes = addressing(machine)
            place = machine.memory.locate(machine, instruction, source, size, lanes)
            machine.memory.count(source, size, lanes, is_store=False)
            words = [np.where(lanes, word, np.uint32(0)) for word in machine.memory.store.load(place, size)]
            start = (machine.read_scalar(M0) & np.uint32(0x3FFFF)).astype(np.int64)[:, None] + constant
            machine.lds.write(machine, instruction, start + np.arange(WAVE) * size, size, words, arrives_later=True)

        return run

    modifiers = BUFFER | {"lds"} if is_buffer else GLOBAL
    address = BUFFER_ADDRESS if is_buffer else (-2, -1)
    return Operation(bind, num_destinations=0, modifiers=modifiers, reads=(M0,), address=address, counters=VM)


def _either_buffer_load(kind: str) -> Operation:
    """A buffer load goes to registers, or with the modifier `lds` straight into LDS."""
    to_registers, to_lds = _buffer_load(kind), _load_to_lds(kind, is_buffer=True)

    def bind(instruction: Instruction) -> Run:
        return (to_lds if "lds" in instruction.modifiers else to_registers).bind(instruction)

    return Operation(bind, merges=to_registers.merges, modifiers=BUFFER | {"lds"}, address=BUFFER_ADDRESS, counters=VM)


VECTOR_MEMORY: dict[str, Operation] = {
    **{f"global_load_{kind}": _global_load(kind) for kind in LOADS},
    **{f"global_store_{kind}": _global_store(kind) for kind in STORES},
    **{f"buffer_load_{kind}": _either_buffer_load(kind) for kind in LOADS},
    **{f"buffer_store_{kind}": _buffer_store(kind) for kind in STORES},
    **{f"scratch_load_{kind}": _scratch(kind, is_load=True) for kind in LOADS if not LOADS[kind][2]},
    **{f"scratch_store_{kind}": _scratch(kind, is_load=False) for kind in STORES},
    **{f"global_load_lds_{kind}": _load_to_lds(kind, is_buffer=False) for kind in ("dword", "dwordx3", "dwordx4")},
    "s_load_dword": _scalar_load(1),
    **{f"s_load_dwordx{count}": _scalar_load(count) for count in (2, 4, 8, 16)},
}
