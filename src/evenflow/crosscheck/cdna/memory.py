"""Memory as bytes: what global memory, LDS and scratch share, the arena of allocations, and each lane's scratch.

The arena gives every allocation guard gaps and remembers its argument, so that a stray access can be named. It owns no
instruction: `vector_memory`, `lds` and `atomics` compute addresses and call it.
"""

from dataclasses import dataclass, field

import numpy as np

from evenflow.crosscheck.cdna.errors import OutOfBoundsError, ProvenanceError
from evenflow.crosscheck.cdna.floats import Array
from evenflow.crosscheck.cdna.machine import LANES, Machine
from evenflow.crosscheck.cdna.parser import Instruction

BASE_ADDRESS = 0x7F2000000000
GUARD_BYTES = 1024
ALIGNMENT = 256
CACHE_LINE_BYTES = 128


class ByteStore:
    """Bytes with aligned 16- and 32-bit views. Values travel as lists of uint32 arrays, one an access's dword."""

    def __init__(self, num_bytes: int, fill: int = 0) -> None:
        self.bytes = np.full((num_bytes + 15) // 16 * 16, fill, np.uint8)
        self.halves = self.bytes.view(np.uint16)
        self.words = self.bytes.view(np.uint32)

    def load(self, index: Array, size: int) -> list[Array]:
        """Dwords at these byte indices; 1 or 2 bytes come zero-extended."""
        if size == 1:
            return [self.bytes[index].astype(np.uint32)]
        if size == 2 and not (index & 1).any():
            return [self.halves[index >> 1].astype(np.uint32)]
        if size >= 4 and not (index & 3).any():
            first = index >> 2
            return [self.words[first + word] for word in range(size // 4)]
        return [self._load_unaligned(index + start, min(size, 4)) for start in range(0, size, 4)]

    def _load_unaligned(self, index: Array, size: int) -> Array:
        parts = (self.bytes[index + byte].astype(np.uint32) << np.uint32(8 * byte) for byte in range(size))
        return np.bitwise_or.reduce(list(parts))

    def store(self, index: Array, size: int, words: list[Array]) -> None:
        """The reverse of `load`; where two indices are equal the later one wins."""
        if size == 1:
            self.bytes[index] = words[0].astype(np.uint8)
        elif size == 2 and not (index & 1).any():
            self.halves[index >> 1] = words[0].astype(np.uint16)
        elif size >= 4 and not (index & 3).any():
            for word, value in enumerate(words):
                self.words[(index >> 2) + word] = value
        else:
            for byte in range(size):
                self.bytes[index + byte] = (words[byte // 4] >> np.uint32(8 * (byte % 4))).astype(np.uint8)


@dataclass(frozen=True)
class Allocation:
    """One block of global memory. `arguments` are the positions of the kernel arguments that point to it; the
    block of arguments itself has -1."""

    name: str
    address: int
    num_bytes: int
    arguments: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.address + self.num_bytes


@dataclass
class Traffic:
    """What the kernel moved. `lines` counts the cache lines of 128 bytes that each wave instruction touched."""

    bytes_loaded: int = 0
    bytes_stored: int = 0
    lines: int = 0
    unattributed: int = 0  # accesses through pointers whose argument is not known
    lds_bytes: int = 0
    scratch_bytes: int = 0


@dataclass
class GlobalMemory:
    """The arena. Addresses are uint64 [n, 64]; an index is an address less BASE_ADDRESS."""

    capacity: int
    allocations: list[Allocation] = field(default_factory=list)
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        self.store = ByteStore(self.capacity)
        self.top = GUARD_BYTES
        self._starts = np.zeros(0, np.uint64)
        self._ends = np.zeros(0, np.uint64)

    def allocate(self, data: Array, name: str, arguments: tuple[int, ...]) -> Allocation:
        """Copy these bytes (uint8) into a new allocation, with a guard gap behind it."""
        start = -(-self.top // ALIGNMENT) * ALIGNMENT
        self.top = start + data.size + GUARD_BYTES
        if self.top > self.capacity:
            raise MemoryError(f"the arena of {self.capacity} bytes is too small for {name}")
        self.store.bytes[start : start + data.size] = data
        allocation = Allocation(name, BASE_ADDRESS + start, data.size, arguments)
        self.allocations.append(allocation)
        self._starts = np.array([block.address for block in self.allocations], np.uint64)
        self._ends = np.array([block.end for block in self.allocations], np.uint64)
        return allocation

    def contents(self, allocation: Allocation) -> Array:
        """uint8 view of an allocation."""
        start = allocation.address - BASE_ADDRESS
        return self.store.bytes[start : start + allocation.num_bytes]

    def locate(self, machine: Machine, instruction: Instruction, address: Array, size: int, active: Array) -> Array:
        """int64 indices; raises unless every active lane stays inside an allocation that its pointer may touch. Lanes
        that are not active get an index of the guard gap at the start."""
        allowed = instruction.provenance
        if allowed and len(allowed) == 1 and (block := self._of_argument(allowed[0])) is not None:
            bad = (address < np.uint64(block.address)) | (address > np.uint64(max(block.end - size, 0)))
        else:
            slot = np.searchsorted(self._starts, address, side="right") - 1
            bad = (slot < 0) | (address + np.uint64(size) > self._ends[slot])
            if allowed:
                permitted = np.array([not set(allowed).isdisjoint(block.arguments) for block in self.allocations])
                bad |= ~permitted[slot]
            else:
                self.traffic.unattributed += 1
        bad = bad & active
        if bad.any():
            self._report(machine, instruction, address, size, bad)
        return np.where(active, (address - np.uint64(BASE_ADDRESS)).astype(np.int64), 0)

    def _of_argument(self, argument: int) -> Allocation | None:
        return next((block for block in self.allocations if argument in block.arguments), None)

    def _report(self, machine: Machine, instruction: Instruction, address: Array, size: int, bad: Array) -> None:
        """Raise for the first lane that lands in another argument's memory, else for the first that lands nowhere."""
        allowed = set(instruction.provenance or ())
        pointers = [block for block in self.allocations if allowed.intersection(block.arguments)]
        through = f" through a pointer derived from {' or '.join(block.name for block in pointers)}" if pointers else ""
        targets = np.broadcast_to(address, bad.shape)
        for block in self.allocations:
            lands = bad & (targets >= np.uint64(block.address)) & (targets < np.uint64(block.end))
            if pointers and block not in pointers and lands.any():
                wave, lane = (int(part) for part in np.argwhere(lands)[0])
                raise ProvenanceError(
                    f"{instruction}: access of {size} bytes{through} lands in {block.name}, at byte"
                    f" {int(targets[wave, lane]) - block.address} of {block.num_bytes}"
                    f" ({machine.describe(wave, lane)}, {int(lands.sum())} lanes in all)"
                )
        wave, lane = (int(part) for part in np.argwhere(bad)[0])
        target = int(targets[wave, lane])
        blocks = pointers or self.allocations
        nearest = min(blocks, key=lambda block: min(abs(target - block.address), abs(target - block.end)))
        raise OutOfBoundsError(
            f"{instruction}: access of {size} bytes{through} at 0x{target:x}, byte {target - nearest.address} of"
            f" {nearest.name}, which has {nearest.num_bytes}"
            f" ({machine.describe(wave, lane)}, {int(bad.sum())} lanes in all)"
        )

    def count(self, address: Array, size: int, active: Array, is_store: bool) -> None:
        """Add one wave instruction's access to the traffic."""
        num_bytes = int(np.count_nonzero(active)) * size
        if is_store:
            self.traffic.bytes_stored += num_bytes
        else:
            self.traffic.bytes_loaded += num_bytes
        self.traffic.lines += count_lines(address, active)


def count_lines(address: Array, active: Array) -> int:
    """How many different cache lines each wave's active lanes touch, summed over the waves."""
    if not active.any():
        return 0
    # An idle lane stands in for its wave's first active lane, so that it adds no line.
    first = active.argmax(1)
    lines = address // np.uint64(CACHE_LINE_BYTES)
    lines = np.where(active, lines, lines[np.arange(len(lines)), first][:, None])
    if (lines[:, 1:] < lines[:, :-1]).any():
        lines = np.sort(lines, axis=1)
    return int(np.count_nonzero(lines[:, 1:] != lines[:, :-1])) + int(np.count_nonzero(active.any(1)))


class ScratchMemory:
    """Each lane's private bytes, where registers are spilled."""

    def __init__(self, num_waves: int, bytes_per_lane: int) -> None:
        self.bytes_per_lane = -(-bytes_per_lane // 4) * 4
        self.store = ByteStore(max(num_waves * len(LANES) * self.bytes_per_lane, 16), fill=0xA5)

    def locate(self, machine: Machine, instruction: Instruction, address: Array, size: int) -> Array:
        """int64 indices of each lane's own bytes; raises unless every active lane stays within its share."""
        bad = machine.active & ((address < 0) | (address + size > self.bytes_per_lane))
        if bad.any():
            wave, lane = (int(part) for part in np.argwhere(bad)[0])
            raise OutOfBoundsError(
                f"{instruction}: scratch access of {size} bytes at {int(address[wave, lane])} of {self.bytes_per_lane}"
                f" ({machine.describe(wave, lane)})"
            )
        lanes = machine.indices[:, None] * len(LANES) + LANES
        return np.where(machine.active, lanes * self.bytes_per_lane + address, 0)
