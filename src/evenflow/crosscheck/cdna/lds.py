"""LDS, the memory that a workgroup's waves share, and the ds_ loads and stores. ds_ atomics are in `atomics`.

Every byte remembers whether it was ever written, and `races` remembers who touched it since the last barrier.
"""

from __future__ import annotations

import numpy as np

from evenflow.crosscheck.cdna.access import Reader, raw32
from evenflow.crosscheck.cdna.arrivals import Arrivals
from evenflow.crosscheck.cdna.errors import OutOfBoundsError, SimulationError, UninitializedReadError
from evenflow.crosscheck.cdna.floats import Array
from evenflow.crosscheck.cdna.machine import Machine
from evenflow.crosscheck.cdna.memory import ByteStore
from evenflow.crosscheck.cdna.operands import Operand
from evenflow.crosscheck.cdna.operation import Operation, Run, expect, expect_register
from evenflow.crosscheck.cdna.parser import Instruction
from evenflow.crosscheck.cdna.races import RaceDetector
from evenflow.crosscheck.cdna.vector_memory import LGKM, widen

POISON_BYTE = 0xA5
OFFSET = frozenset({"offset"})
OFFSETS = frozenset({"offset0", "offset1"})


class LocalMemory:
    """`size` bytes of LDS for each workgroup in flight. races: None to look for none."""

    def __init__(self, num_workgroups: int, size: int, workgroup: Array, races: RaceDetector | None) -> None:
        self.size = size
        self.pitch = -(-max(size, 1) // 16) * 16
        self.store = ByteStore(num_workgroups * self.pitch, POISON_BYTE)
        self.is_written = ByteStore(num_workgroups * self.pitch)
        self.base = (workgroup * self.pitch).astype(np.int64)
        self.races = races
        self.arrivals: Arrivals | None = None

    def locate(self, machine: Machine, instruction: Instruction, address: Array, size: int) -> Array:
        """int64 [n, 64] byte indices, the first byte for idle lanes; raises if an active lane leaves them."""
        address = machine.broadcast(address)
        bad = machine.active & ((address < 0) | (address + size > self.size))
        if bad.any():
            wave, lane = (int(part) for part in np.argwhere(bad)[0])
            raise OutOfBoundsError(
                f"{instruction}: LDS access of {size} bytes at {int(address[wave, lane])} of {self.size}"
                f" ({machine.describe(wave, lane)})"
            )
        return self.base[machine.waves][:, None] + np.where(machine.active, address, 0)

    def read(self, machine: Machine, instruction: Instruction, address: Array, size: int) -> list[Array]:
        """Dwords [n, 64] at these addresses (int64, bytes within the workgroup's LDS)."""
        place = self.locate(machine, instruction, address, size)
        machine.memory.traffic.lds_bytes += int(np.count_nonzero(machine.active)) * size
        self._check_ready(machine, instruction, place, size)
        if self.races is not None:
            self.races.note_read(machine, instruction, place, size)
        return self.store.load(place, size)

    def write(
        self,
        machine: Machine,
        instruction: Instruction,
        address: Array,
        size: int,
        words: list[Array],
        arrives_later: bool = False,
    ) -> None:
        """The active lanes' dwords [n, 64]; of two lanes that write the same byte the higher one wins. arrives_later:
        the data comes straight from memory, and is there when the wave has waited for it."""
        lanes = machine.active
        place = self.locate(machine, instruction, address, size)
        if self.arrivals is not None and arrives_later:
            self.arrivals.note_load(machine, place, size)
        elif self.arrivals is not None:
            self.arrivals.check(machine, instruction, place, size)
        machine.memory.traffic.lds_bytes += int(np.count_nonzero(lanes)) * size
        self.mark_written(place[lanes], size)
        if self.races is not None:
            self.races.note_write(machine, instruction, place, size, words, self.store)
        else:
            self.store.store(place[lanes], size, [machine.broadcast(word)[lanes] for word in words])

    def mark_written(self, place: Array, size: int) -> None:
        self.is_written.store(place, size, [np.full(place.shape, 0x01010101, np.uint32)] * max(size // 4, 1))

    def before_atomic(self, machine: Machine, instruction: Instruction, place: Array, size: int) -> None:
        """Check an atomic operation at these places; the caller does it on `store`."""
        self._check_ready(machine, instruction, place, size)
        machine.memory.traffic.lds_bytes += int(np.count_nonzero(machine.active)) * size
        if self.races is not None:
            self.races.note_atomic(machine, instruction, place, size)

    def _check_ready(self, machine: Machine, instruction: Instruction, place: Array, size: int) -> None:
        self._check_written(machine, instruction, place, size)
        if self.arrivals is not None:
            self.arrivals.check(machine, instruction, place, size)

    def _check_written(self, machine: Machine, instruction: Instruction, place: Array, size: int) -> None:
        full = np.uint32(0x01010101 if size >= 4 else (1 << 8 * size) - 1 & 0x0101)
        for word, state in enumerate(self.is_written.load(place, size)):
            bad = machine.active & (state != full)
            if bad.any():
                wave, lane = (int(part) for part in np.argwhere(bad)[0])
                address = int(place[wave, lane] - self.base[machine.indices[wave]]) + 4 * word
                raise UninitializedReadError(
                    f"{instruction}: LDS byte {address} is read, but nothing has been written there"
                    f" ({machine.describe(wave, lane)}, {int(bad.sum())} lanes in all)"
                )


def lds_address(operand: Operand, offset: int) -> Reader:
    """int64 [n, 64] or [n, 1]. The sum wraps at 32 bits: compilers use a negative base with a larger offset."""
    read, distance = raw32(operand), np.uint32(offset)
    return lambda machine: (read(machine) + distance).astype(np.int64)


def _read(size: int, is_signed: bool = False, half: str = "") -> Operation:
    def bind(instruction: Instruction) -> Run:
        data, pointer = expect(instruction, 2)
        index = expect_register(data, "v", max(size // 4, 1))
        address = lds_address(pointer, instruction.modifiers.get("offset", 0))

        def run(machine: Machine) -> None:
            words = machine.lds.read(machine, instruction, address(machine), size)
            old = machine.read_vector(index) if half else None
            for word, value in enumerate(widen(words, size, is_signed, half, old)):
                machine.write_vector(index + word, value)

        return run

    return Operation(bind, merges=bool(half), modifiers=OFFSET, counters=LGKM)


def _write(size: int, shift: int = 0) -> Operation:
    def bind(instruction: Instruction) -> Run:
        pointer, data = expect(instruction, 2)
        index = expect_register(data, "v", max(size // 4, 1))
        address = lds_address(pointer, instruction.modifiers.get("offset", 0))

        def run(machine: Machine) -> None:
            words = [machine.read_vector(index + word) >> np.uint32(shift) for word in range(max(size // 4, 1))]
            machine.lds.write(machine, instruction, address(machine), size, words)

        return run

    return Operation(bind, num_destinations=0, modifiers=OFFSET, counters=LGKM)


def _pair_addresses(instruction: Instruction, pointer: Operand, unit: int) -> list[Reader]:
    modifiers = instruction.modifiers
    return [lds_address(pointer, modifiers.get(name, 0) * unit) for name in ("offset0", "offset1")]


def _read_pair(size: int, stride: int) -> Operation:
    """Two places, `stride` elements of `size` bytes for each unit of the offsets."""

    def bind(instruction: Instruction) -> Run:
        data, pointer = expect(instruction, 2)
        index = expect_register(data, "v", size // 2)
        addresses = _pair_addresses(instruction, pointer, size * stride)

        def run(machine: Machine) -> None:
            places = [address(machine) for address in addresses]
            words = [word for place in places for word in machine.lds.read(machine, instruction, place, size)]
            for word, value in enumerate(words):
                machine.write_vector(index + word, value)

        return run

    return Operation(bind, modifiers=OFFSETS, counters=LGKM)


def _write_pair(size: int, stride: int) -> Operation:
    def bind(instruction: Instruction) -> Run:
        pointer, *data = expect(instruction, 3)
        indices = [expect_register(operand, "v", size // 4) for operand in data]
        addresses = _pair_addresses(instruction, pointer, size * stride)

        def run(machine: Machine) -> None:
            for address, index in zip(addresses, indices, strict=True):
                words = [machine.read_vector(index + word) for word in range(size // 4)]
                machine.lds.write(machine, instruction, address(machine), size, words)

        return run

    return Operation(bind, num_destinations=0, modifiers=OFFSETS, counters=LGKM)


def transpose_lanes(bits: int) -> tuple[Array, Array]:
    """ds_read_b64_tr: (source lane, source element) [64, 64 // bits] of each lane's elements.

    Sixteen lanes read a tile, each a run of `64 // bits` elements along the tile's rows; every lane gets one column.
    This was inferred from compilers' use of the instruction, it is not taken from a manual.
    """
    elements = 64 // bits
    lanes_per_row = 16 // elements
    lane, element = np.arange(64)[:, None], np.arange(elements)[None]
    column = lane & 15
    return (lane & ~15) + element * lanes_per_row + column // elements, np.broadcast_to(
        column % elements, (64, elements)
    )


def _read_transposed(bits: int) -> Operation:
    lanes, elements = transpose_lanes(bits)
    dtype = np.uint16 if bits == 16 else np.uint8

    def bind(instruction: Instruction) -> Run:
        data, pointer = expect(instruction, 2)
        index = expect_register(data, "v", 2)
        address = lds_address(pointer, instruction.modifiers.get("offset", 0))

        def run(machine: Machine) -> None:
            if not machine.all_active:
                raise SimulationError(f"{instruction}: a transposed read with idle lanes is not implemented")
            words = machine.lds.read(machine, instruction, address(machine), 8)
            rows = np.ascontiguousarray(np.stack(words, axis=-1)).view(dtype)
            columns = np.ascontiguousarray(rows[:, lanes, elements]).view(np.uint32)
            for word in range(2):
                machine.write_vector(index + word, columns[:, :, word])

        return run

    return Operation(bind, modifiers=OFFSET, counters=LGKM)


LDS: dict[str, Operation] = {
    "ds_read_u8": _read(1),
    "ds_read_i8": _read(1, is_signed=True),
    "ds_read_u16": _read(2),
    "ds_read_i16": _read(2, is_signed=True),
    "ds_read_u8_d16": _read(1, half="low"),
    "ds_read_u8_d16_hi": _read(1, half="high"),
    "ds_read_i8_d16": _read(1, is_signed=True, half="low"),
    "ds_read_i8_d16_hi": _read(1, is_signed=True, half="high"),
    "ds_read_u16_d16": _read(2, half="low"),
    "ds_read_u16_d16_hi": _read(2, half="high"),
    "ds_write_b8": _write(1),
    "ds_write_b16": _write(2),
    "ds_write_b8_d16_hi": _write(1, shift=16),
    "ds_write_b16_d16_hi": _write(2, shift=16),
    "ds_read_b64_tr_b16": _read_transposed(16),
    "ds_read_b64_tr_b8": _read_transposed(8),
}
for _bits in (32, 64, 96, 128):
    LDS[f"ds_read_b{_bits}"] = _read(_bits // 8)
    LDS[f"ds_write_b{_bits}"] = _write(_bits // 8)
for _bits in (32, 64):
    LDS[f"ds_read2_b{_bits}"] = _read_pair(_bits // 8, 1)
    LDS[f"ds_read2st64_b{_bits}"] = _read_pair(_bits // 8, 64)
    LDS[f"ds_write2_b{_bits}"] = _write_pair(_bits // 8, 1)
    LDS[f"ds_write2st64_b{_bits}"] = _write_pair(_bits // 8, 64)
