"""What the simulator knows of one mnemonic, and the builders that the instruction tables use. Owns no table.

`bind` is called once for each line of code and returns the function that executes it, so that operands are looked up
and checked before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evenflow.crosscheck.cdna.errors import AssemblyError
from evenflow.crosscheck.cdna.machine import Machine
from evenflow.crosscheck.cdna.operands import Operand
from evenflow.crosscheck.cdna.parser import Instruction

Run = Callable[[Machine], Any]
Bind = Callable[[Instruction], Run]

DPP_CONTROLS = frozenset(
    "quad_perm row_shl row_shr row_ror row_mirror row_half_mirror row_newbcast row_bcast wave_shl wave_shr wave_rol"
    " wave_ror".split()
)
DPP = DPP_CONTROLS | {"row_mask", "bank_mask", "bound_ctrl"}
SDWA = frozenset({"dst_sel", "dst_unused", "src0_sel", "src1_sel"})


@dataclass(frozen=True)
class Operation:
    """One mnemonic. The first `num_destinations` operands are written, all others are read.

    updates: the destinations' old values are operands too. merges: only a part of a destination is written.
    reads, writes: scalar registers that the text does not name. address: the operands, counted from the last (-1), that
    make up a memory address.
    counters: the wait counters that tell when it is done (none when it is done at once).
    flow: "branch" (its function gives the waves that jump, bool [n]), "barrier" or "end"; "" goes to the next line.
    """

    bind: Bind
    num_destinations: int = 1
    updates: bool = False
    merges: bool = False
    modifiers: frozenset[str] = frozenset()
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    address: tuple[int, ...] = ()
    counters: tuple[str, ...] = ()
    flow: str = ""


@dataclass
class Step:
    """A bound instruction: what executes, and which registers it touches (for the checkers)."""

    instruction: Instruction
    operation: Operation
    run: Run
    destinations: list[Operand]
    sources: list[Operand]
    merges: bool


def num_destinations(instruction: Instruction, operation: Operation) -> int:
    """An atomic operation returns the old value only if its text says so; a load into LDS writes no register."""
    if "lds" in instruction.modifiers:
        return 0
    if operation.num_destinations >= 0:
        return operation.num_destinations
    return int(bool(instruction.modifiers.get("glc") or instruction.modifiers.get("sc0")))


def loads_into_lds(step: Step) -> bool:
    """Whether it is a load from memory straight into LDS."""
    return "_lds_" in step.instruction.name or "lds" in step.instruction.modifiers


def _check_modifiers(instruction: Instruction, operation: Operation) -> None:
    allowed = operation.modifiers
    if instruction.encoding == "dpp":
        allowed = allowed | DPP
    elif instruction.encoding == "sdwa":
        allowed = allowed | SDWA
    for name in instruction.modifiers:
        if name not in allowed:
            raise AssemblyError(f"{instruction}: modifier {name} is not implemented for {instruction.name}")


def bind(instruction: Instruction, operation: Operation) -> Step:
    """Check the instruction against its operation and make it executable."""
    _check_modifiers(instruction, operation)
    count = num_destinations(instruction, operation)
    if len(instruction.operands) < count:
        raise AssemblyError(f"{instruction}: {instruction.name} needs more operands")
    try:
        run = operation.bind(instruction)
    except AssemblyError as error:
        raise AssemblyError(f"{instruction}: {error}") from None
    preserves = instruction.modifiers.get("dst_unused") == "UNUSED_PRESERVE"
    preserves |= instruction.encoding == "dpp" and "bound_ctrl" not in instruction.modifiers
    destinations, sources = instruction.operands[:count], instruction.operands[count:]
    return Step(instruction, operation, run, destinations, sources, operation.merges or preserves)


def expect(instruction: Instruction, *counts: int) -> list[Operand]:
    """The operands, if there are as many as one of `counts`."""
    if len(instruction.operands) not in counts:
        raise AssemblyError(f"{instruction.name} takes {' or '.join(map(str, counts))} operands")
    return instruction.operands


def expect_register(operand: Operand, kind: str, count: int) -> int:
    """The operand's first register, if it is `count` registers of this kind ("v" or "s")."""
    if operand.kind != kind or operand.count != count:
        raise AssemblyError(f"operand {operand.text}: {count} registers of kind {kind} are needed here")
    return operand.index
