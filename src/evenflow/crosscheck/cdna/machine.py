"""The registers of many waves at once, and the group of waves that executes now. Owns no instruction and no memory.

Every register is an array over all waves of all workgroups in flight: vector registers uint32 [registers, waves, 64],
scalar registers uint32 [128, waves]. Waves that stand at the same instruction execute it together; `waves` selects
them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from evenflow.crosscheck.cdna.floats import Array
from evenflow.crosscheck.cdna.operands import EXEC

if TYPE_CHECKING:
    from evenflow.crosscheck.cdna.lds import LocalMemory
    from evenflow.crosscheck.cdna.memory import GlobalMemory, ScratchMemory

WAVE = 64
LANES = np.arange(WAVE)
POISON = 0xFFA5A5A5  # a NaN: what an unwritten vector register holds
NUM_SCALARS = 128


def low(value: Array) -> Array:
    """The lower 32 bits of uint64."""
    return (value & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def high(value: Array) -> Array:
    """The upper 32 bits of uint64."""
    return (value >> np.uint64(32)).astype(np.uint32)


def join(lower: Array, upper: Array) -> Array:
    """uint64 of two uint32."""
    return np.asarray(lower, np.uint64) | (np.asarray(upper, np.uint64) << np.uint64(32))


def to_lanes(mask: Array) -> Array:
    """uint64 [n] to bool [n, 64], bit i to lane i."""
    raw = np.ascontiguousarray(mask, "<u8").view(np.uint8).reshape(-1, 8)
    return np.unpackbits(raw, axis=1, bitorder="little").astype(bool)


def to_mask(lanes: Array) -> Array:
    """bool [n, 64] to uint64 [n], lane i to bit i."""
    return np.ascontiguousarray(np.packbits(lanes, axis=1, bitorder="little")).view("<u8")[:, 0]


class Machine:
    """State of all waves in flight. workgroup: [waves], the position of each wave's workgroup; coordinates:
    [workgroups, 3], the place in the grid."""

    def __init__(self, architecture: str, num_vector: int, workgroup: Array, coordinates: Array) -> None:
        self.architecture = architecture
        self.num_waves = num_waves = len(workgroup)
        self.workgroup = workgroup
        self.coordinates = coordinates
        self.vector = np.full((num_vector, num_waves, WAVE), POISON, np.uint32)
        self.scalar = np.zeros((NUM_SCALARS, num_waves), np.uint32)
        self.scc = np.zeros(num_waves, bool)
        self.clamps_overflow = np.zeros(num_waves, bool)  # MODE.FP16_OVFL
        self.exec = np.ones((num_waves, WAVE), bool)
        self.scalar[EXEC : EXEC + 2] = 0xFFFFFFFF
        self.memory: GlobalMemory
        self.lds: LocalMemory
        self.scratch: ScratchMemory
        self.select(np.arange(num_waves))

    def select(self, waves: Array) -> None:
        """Make these waves (ascending indices) the group that executes."""
        self.indices = waves
        self.count = len(waves)
        self.is_whole = self.count == self.num_waves
        # A slice gives views where an index array would copy.
        self.waves = slice(None) if self.is_whole else waves
        self._refresh_active()

    def _refresh_active(self) -> None:
        self.active = self.exec[self.waves]
        self.all_active = bool(self.active.all())

    def read_exec(self) -> Array:
        """uint64 [n]."""
        return join(self.scalar[EXEC][self.waves], self.scalar[EXEC + 1][self.waves])

    def write_exec(self, mask: Array) -> None:
        self.scalar[EXEC][self.waves] = low(mask)
        self.scalar[EXEC + 1][self.waves] = high(mask)
        self.exec[self.waves] = to_lanes(mask)
        self._refresh_active()

    def read_scalar(self, index: int) -> Array:
        """uint32 [n]."""
        return self.scalar[index][self.waves]

    def write_scalar(self, index: int, value: Array) -> None:
        """value: anything that broadcasts to [n]; a write to EXEC takes effect at once."""
        self.scalar[index][self.waves] = value
        if index >= EXEC:
            self.write_exec(self.read_exec())

    def write_scalar64(self, index: int, value: Array) -> None:
        """value: uint64 [n]."""
        if index == EXEC:
            self.write_exec(np.broadcast_to(value, self.count))
            return
        self.scalar[index][self.waves] = low(value)
        self.scalar[index + 1][self.waves] = high(value)

    def read_vector(self, index: int) -> Array:
        """uint32 [n, 64]; may be a view, to be copied before its register is written."""
        return self.vector[index][self.waves]

    def write_vector(self, index: int, value: Array, where: Array | None = None) -> None:
        """Write the lanes that EXEC enables, and of those only `where` if it is given (bool [n, 64])."""
        row = self.vector[index]
        if where is None and self.all_active:
            row[self.waves] = value
            return
        mask = self.active if where is None else self.active & where
        if self.is_whole:
            np.copyto(row, value, where=mask)
        else:
            part = row[self.waves]
            np.copyto(part, value, where=mask)
            row[self.waves] = part

    def describe(self, position: int, lane: int) -> str:
        """Name a lane of the `position`th wave of this group."""
        wave = int(self.indices[position])
        group = int(self.workgroup[wave])
        x, y, z = (int(part) for part in self.coordinates[group])
        first = int(np.argmax(self.workgroup == group))
        return f"workgroup ({x}, {y}, {z}), wave {wave - first}, lane {lane}"

    def broadcast(self, value: Array) -> Array:
        """To [n, 64]: scalars come as [n, 1], constants as [1]."""
        return np.broadcast_to(value, (self.count, WAVE))
