"""Branches, barriers, the end of a wave, and what has no effect on values: waits, priorities, cache maintenance."""

from collections.abc import Callable

import numpy as np

from evenflow.crosscheck.cdna.errors import AssemblyError
from evenflow.crosscheck.cdna.floats import Array
from evenflow.crosscheck.cdna.machine import Machine
from evenflow.crosscheck.cdna.operands import EXEC, VCC
from evenflow.crosscheck.cdna.operation import Operation, Run, expect
from evenflow.crosscheck.cdna.parser import Instruction

COUNTER_LIMITS = {"vmcnt": 63, "expcnt": 7, "lgkmcnt": 15}
# The bits of the mode register that a kernel may set: (first bit, width) and what they mean.
_OVERFLOW_CLAMP = ("HW_REG_MODE", 23, 1)


def _branch(taken: Callable[[Machine], Array], reads: tuple[int, ...] = ()) -> Operation:
    def bind(instruction: Instruction) -> Run:
        (operand,) = expect(instruction, 1)
        if operand.kind != "label":
            raise AssemblyError(f"operand {operand.text}: a label is needed here")
        return taken

    return Operation(bind, num_destinations=0, reads=reads, flow="branch")


def _vcc_is_zero(machine: Machine) -> Array:
    return (machine.read_scalar(VCC) | machine.read_scalar(VCC + 1)) == 0


def _nothing(flow: str = "", modifiers: str = "", operands: int | None = 0) -> Operation:
    """An instruction without effect on values. operands: how many constants it takes, None for "any"."""

    def bind(instruction: Instruction) -> Run:
        if operands is not None:
            expect(instruction, operands)
        return lambda machine: None

    return Operation(bind, num_destinations=0, modifiers=frozenset(modifiers.split()), flow=flow)


def wait_limits(instruction: Instruction) -> dict[str, int]:
    """Which counters an s_waitcnt waits for, and down to what."""
    limits = {}
    for operand in instruction.operands:
        if operand.kind != "function" or operand.value[0] not in COUNTER_LIMITS:
            raise AssemblyError(f"operand {operand.text}: not a wait counter")
        limits[operand.value[0]] = int(operand.value[1][0], 0)
    return limits


def _bind_wait(instruction: Instruction) -> Run:
    wait_limits(instruction)
    return lambda machine: None


def _bind_setreg(instruction: Instruction) -> Run:
    register, value = expect(instruction, 2)
    if register.kind != "function" or register.value[0] != "hwreg":
        raise AssemblyError(f"operand {register.text}: a hardware register is needed here")
    name, *place = register.value[1]
    if (name, *map(int, place)) != _OVERFLOW_CLAMP:
        raise AssemblyError(f"operand {register.text}: only bit 23 of the mode register (FP16_OVFL) is implemented")
    is_set = bool(value.value)

    def run(machine: Machine) -> None:
        machine.clamps_overflow[machine.waves] = is_set

    return run


CONTROL: dict[str, Operation] = {
    "s_branch": _branch(lambda machine: np.ones(machine.count, bool)),
    "s_cbranch_scc0": _branch(lambda machine: ~machine.scc[machine.waves]),
    "s_cbranch_scc1": _branch(lambda machine: machine.scc[machine.waves]),
    "s_cbranch_vccz": _branch(_vcc_is_zero, (VCC, VCC + 1)),
    "s_cbranch_vccnz": _branch(lambda machine: ~_vcc_is_zero(machine), (VCC, VCC + 1)),
    "s_cbranch_execz": _branch(lambda machine: ~machine.active.any(1), (EXEC, EXEC + 1)),
    "s_cbranch_execnz": _branch(lambda machine: machine.active.any(1), (EXEC, EXEC + 1)),
    "s_barrier": _nothing("barrier"),
    "s_endpgm": _nothing("end"),
    "s_waitcnt": Operation(_bind_wait, num_destinations=0),
    "s_setreg_imm32_b32": Operation(_bind_setreg, num_destinations=0),
    "s_nop": _nothing(operands=1),
    "s_sleep": _nothing(operands=1),
    "s_setprio": _nothing(operands=1),
    "s_sendmsg": _nothing(operands=None),
    "s_icache_inv": _nothing(),
    "s_dcache_inv": _nothing(),
    "s_dcache_wb": _nothing(),
    "s_code_end": _nothing(),
    "buffer_inv": _nothing(modifiers="sc0 sc1"),
    "buffer_wbl2": _nothing(modifiers="sc0 sc1"),
    "buffer_invl2": _nothing(),
    "buffer_wbinvl1": _nothing(),
    "buffer_wbinvl1_vol": _nothing(),
}
