"""LDS race detector: two waves touch the same byte between two barriers, and at least one of them writes it.

A wave that writes the value which is there already is no race: compilers let several waves store a value that all of
them hold. Neither are two atomic operations. Owns the shadow of LDS: for each byte, the sets of waves that wrote, read
and atomically changed it since the last barrier, one bit a wave.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from evenflow.crosscheck.cdna.errors import RaceError
from evenflow.crosscheck.cdna.floats import Array

if TYPE_CHECKING:
    from evenflow.crosscheck.cdna.machine import Machine
    from evenflow.crosscheck.cdna.memory import ByteStore
    from evenflow.crosscheck.cdna.parser import Instruction

MAX_WAVES = 16  # of a workgroup: 1024 threads
_EACH_BYTE_OF_A_DWORD = 0x0001000100010001


class _Shadow:
    """A set of waves for each byte, as 16 bits; the four sets of a dword are one 64-bit word."""

    def __init__(self, num_bytes: int) -> None:
        self.of_byte = np.zeros(num_bytes, np.uint16)
        self.of_dword = self.of_byte.view(np.uint64)


class RaceDetector:
    """pitch: bytes of shadow for each workgroup, a multiple of 4. workgroup: [waves], ascending."""

    def __init__(self, num_workgroups: int, pitch: int, workgroup: Array) -> None:
        self.pitch = pitch
        self.written, self.read, self.changed = (_Shadow(num_workgroups * pitch) for _ in range(3))
        self.position = np.arange(len(workgroup)) - np.searchsorted(workgroup, workgroup)

    def open_epoch(self, workgroup: int) -> None:
        """All waves of this workgroup have passed a barrier."""
        share = slice(workgroup * self.pitch, (workgroup + 1) * self.pitch)
        for shadow in (self.written, self.read, self.changed):
            shadow.of_byte[share] = 0

    def _waves(self, machine: Machine) -> Iterator[tuple[int, Array]]:
        """(place in the workgroup, active lanes of the waves there). Waves that execute together may collide."""
        positions = self.position[machine.indices]
        for position in np.unique(positions):
            lanes = machine.active & (positions == position)[:, None]
            if lanes.any():
                yield int(position), lanes

    def note_read(self, machine: Machine, instruction: Instruction, place: Array, size: int) -> None:
        """place: int64 [n, 64] indices of the first byte that each lane reads."""
        for position, lanes in self._waves(machine):
            access = _Access(place[lanes], size, position)
            others = access.others(self.written) | access.others(self.changed)
            self._check(machine, instruction, lanes, access, others, "reads", "wrote")
            access.add(self.read)

    def note_write(
        self, machine: Machine, instruction: Instruction, place: Array, size: int, words: list[Array], store: ByteStore
    ) -> None:
        """words: uint32 [n, 64]. Also does the write, wave by wave."""
        for position, lanes in self._waves(machine):
            access = _Access(place[lanes], size, position)
            values = [machine.broadcast(word)[lanes] for word in words]
            self._check(machine, instruction, lanes, access, access.others(self.read), "writes", "read")
            self._check(machine, instruction, lanes, access, access.others(self.changed), "writes", "changed")
            differs = access.differs(store, values)
            self._check(machine, instruction, lanes, access, access.others(self.written) & differs, "writes", "wrote")
            access.add(self.written)
            store.store(place[lanes], size, values)

    def note_atomic(self, machine: Machine, instruction: Instruction, place: Array, size: int) -> None:
        """An atomic operation of the active lanes; the caller does it."""
        for position, lanes in self._waves(machine):
            access = _Access(place[lanes], size, position)
            self._check(machine, instruction, lanes, access, access.others(self.read), "changes", "read")
            self._check(machine, instruction, lanes, access, access.others(self.written), "changes", "wrote")
            access.add(self.changed)

    def _check(
        self,
        machine: Machine,
        instruction: Instruction,
        lanes: Array,
        access: _Access,
        bad: Array,
        verb: str,
        did: str,
    ) -> None:
        if not bad.any():
            return
        which, unit = (int(part) for part in np.argwhere(bad)[0])
        wave, lane = (int(part) for part in np.argwhere(lanes)[which])
        byte = int(access.index[which, unit]) * access.unit % self.pitch
        raise RaceError(
            f"{instruction}: {machine.describe(wave, lane)} {verb} LDS byte {byte}, which another wave {did}"
            " since the last barrier"
        )


class _Access:
    """The units (dwords, or bytes where a lane's bytes are not whole dwords) that one wave's lanes touch."""

    def __init__(self, place: Array, size: int, position: int) -> None:
        is_whole = size >= 4 and not (place & 3).any()
        self.unit = 4 if is_whole else 1
        self.index = (place[:, None] + np.arange(0, size, self.unit)) // self.unit
        mine = 1 << position
        self.mine = np.uint64(mine * _EACH_BYTE_OF_A_DWORD) if is_whole else np.uint16(mine)

    def _cells(self, shadow: _Shadow) -> Array:
        return shadow.of_dword if self.unit == 4 else shadow.of_byte

    def others(self, shadow: _Shadow) -> Array:
        """bool, shaped like the index: whether another wave is in the set."""
        return (self._cells(shadow)[self.index] & ~self.mine) != 0

    def add(self, shadow: _Shadow) -> None:
        cells = self._cells(shadow)
        cells[self.index] |= self.mine

    def differs(self, store: ByteStore, words: list[Array]) -> Array:
        """bool, shaped like the index: whether these values differ from what is there."""
        if self.unit == 4:
            return store.words[self.index] != np.stack(words, axis=-1)
        count = self.index.shape[1]
        values = [(words[byte // 4] >> np.uint32(8 * (byte % 4))).astype(np.uint8) for byte in range(count)]
        return store.bytes[self.index] != np.stack(values, axis=-1)
