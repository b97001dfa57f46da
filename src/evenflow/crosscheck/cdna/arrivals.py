"""Has the data of loads straight into LDS arrived?

Such a load is done when its wave has waited on vmcnt for it, and other waves may use the bytes only after a barrier
that follows that wait. Owns, for each dword of LDS, the wave whose load fills it and that load's number among the
wave's vector memory operations. Only kernels that have such loads are watched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from evenflow.crosscheck.cdna.errors import MissingWaitError
from evenflow.crosscheck.cdna.floats import Array

if TYPE_CHECKING:
    from evenflow.crosscheck.cdna.machine import Machine
    from evenflow.crosscheck.cdna.operation import Run
    from evenflow.crosscheck.cdna.parser import Instruction


class Arrivals:
    """num_bytes: of LDS over all workgroups in flight. workgroup: [waves]."""

    def __init__(self, num_bytes: int, workgroup: Array) -> None:
        self.workgroup = workgroup
        num_waves = len(workgroup)
        self.owner = np.zeros(num_bytes // 4, np.int64)
        self.due = np.zeros(num_bytes // 4, np.int64)
        self.issued = np.zeros(num_waves, np.int64)
        self.arrived = np.zeros(num_waves, np.int64)  # as the wave itself knows
        self.published = np.zeros(num_waves, np.int64)  # as the workgroup knows since its last barrier

    def counting(self, run: Run) -> Run:
        """A vector memory operation that also counts itself."""

        def counted(machine: Machine) -> None:
            self.issued[machine.indices] += 1
            run(machine)

        return counted

    def waiting(self, limit: int) -> Run:
        """An s_waitcnt vmcnt(limit)."""

        def wait(machine: Machine) -> None:
            waves = machine.indices
            self.arrived[waves] = np.maximum(self.arrived[waves], self.issued[waves] - limit)

        return wait

    def pass_barrier(self, workgroup: int) -> None:
        """All waves of this workgroup have passed a barrier."""
        members = self.workgroup == workgroup
        self.published[members] = self.arrived[members]

    def note_load(self, machine: Machine, place: Array, size: int) -> None:
        """A load straight into LDS at these bytes, int64 [n, 64], by the lanes that execute."""
        dwords = (place[:, :, None] + np.arange(0, size, 4)) // 4
        waves = np.broadcast_to(machine.indices[:, None, None], dwords.shape)
        self.owner[dwords[machine.active]] = waves[machine.active]
        self.due[dwords[machine.active]] = self.issued[waves[machine.active]]

    def check(self, machine: Machine, instruction: Instruction, place: Array, size: int) -> None:
        """Raise if an active lane touches bytes, int64 [n, 64], whose data may still be on its way."""
        dwords = (place[:, :, None] + np.arange(0, size, 4)) // 4
        owner, due = self.owner[dwords], self.due[dwords]
        is_own = owner == machine.indices[:, None, None]
        known = np.where(is_own, self.arrived[owner], self.published[owner])
        bad = (due > known).any(2) & machine.active
        if bad.any():
            wave, lane = (int(part) for part in np.argwhere(bad)[0])
            raise MissingWaitError(
                f"{instruction}: touches LDS whose load may still be under way; an s_waitcnt vmcnt(...)"
                " by the loading wave, and a barrier if that is another wave, is missing"
                f" ({machine.describe(wave, lane)})"
            )
