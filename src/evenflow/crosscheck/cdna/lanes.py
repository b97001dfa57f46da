"""Instructions that move values between lanes: readlane, permutes, swaps, lane counts. DPP is in `access`."""

from collections.abc import Callable

import numpy as np

from evenflow.crosscheck.cdna.access import raw32, reader, writer
from evenflow.crosscheck.cdna.errors import AssemblyError
from evenflow.crosscheck.cdna.floats import Array
from evenflow.crosscheck.cdna.machine import LANES, Machine
from evenflow.crosscheck.cdna.operands import EXEC
from evenflow.crosscheck.cdna.operation import Operation, Run, expect, expect_register
from evenflow.crosscheck.cdna.parser import Instruction
from evenflow.crosscheck.cdna.scalar import count_ones, source32

U32 = np.uint32
LGKM = ("lgkmcnt",)


def _bind_read_first_lane(instruction: Instruction) -> Run:
    """The value of the first lane that executes, of lane 0 if none does."""
    operands = expect(instruction, 2)
    index, read = expect_register(operands[0], "s", 1), reader(operands[1], "u32")

    def run(machine: Machine) -> None:
        lane = machine.active.argmax(1)
        machine.write_scalar(index, machine.broadcast(read(machine))[np.arange(machine.count), lane])

    return run


def _bind_read_lane(instruction: Instruction) -> Run:
    operands = expect(instruction, 3)
    index, read, lane = expect_register(operands[0], "s", 1), raw32(operands[1]), source32(operands[2])

    def run(machine: Machine) -> None:
        lanes = (lane(machine) & U32(63)).astype(np.int64)
        machine.write_scalar(index, machine.broadcast(read(machine))[np.arange(machine.count), lanes])

    return run


def _bind_write_lane(instruction: Instruction) -> Run:
    """Ignores EXEC."""
    operands = expect(instruction, 3)
    index, value, lane = expect_register(operands[0], "v", 1), source32(operands[1]), source32(operands[2])

    def run(machine: Machine) -> None:
        lanes = (lane(machine) & U32(63)).astype(np.int64)
        machine.vector[index][machine.indices, lanes] = value(machine)

    return run


def _lane_count(first: int) -> Operation:
    """v_mbcnt: how many bits of the mask belong to lower lanes; the mask's bit 0 is lane `first`."""
    below = np.clip(LANES - first, 0, 32).astype(np.uint64)
    lower_lanes = ((np.uint64(1) << below) - np.uint64(1)).astype(np.uint32)

    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, 3)
        mask, addend = reader(operands[1], "u32"), reader(operands[2], "u32")
        write = writer(instruction, operands[0], "u32")
        return lambda machine: write(machine, count_ones(mask(machine) & lower_lanes) + addend(machine))

    return Operation(bind)


def _swap(width: int) -> Operation:
    """v_permlane16_swap, v_permlane32_swap: the first register's odd rows of `width` lanes trade places with the second
    register's even rows."""
    is_odd = (LANES // width) % 2 == 1

    def bind(instruction: Instruction) -> Run:
        first, second = (expect_register(operand, "v", 1) for operand in expect(instruction, 2))

        def run(machine: Machine) -> None:
            a, b = machine.read_vector(first).copy(), machine.read_vector(second).copy()
            new_a, new_b = a.copy(), b.copy()
            new_a[:, is_odd] = b[:, ~is_odd]
            new_b[:, ~is_odd] = a[:, is_odd]
            machine.write_vector(first, new_a)
            machine.write_vector(second, new_b)

        return run

    return Operation(bind, num_destinations=2, updates=True)


def _bind_swap_registers(instruction: Instruction) -> Run:
    first, second = (expect_register(operand, "v", 1) for operand in expect(instruction, 2))

    def run(machine: Machine) -> None:
        a, b = machine.read_vector(first).copy(), machine.read_vector(second).copy()
        machine.write_vector(first, b)
        machine.write_vector(second, a)

    return run


def _target_lanes(instruction: Instruction) -> Callable[[Machine], Array]:
    address, offset = raw32(instruction.operands[1]), U32(instruction.modifiers.get("offset", 0))
    return lambda machine: (((machine.broadcast(address(machine)) + offset) >> U32(2)) & U32(63)).astype(np.int64)


def _bind_pull(instruction: Instruction) -> Run:
    """ds_bpermute: each lane reads another lane's value; a lane that does not execute gives 0."""
    operands = expect(instruction, 3)
    lanes, value = _target_lanes(instruction), raw32(operands[2])
    index = expect_register(operands[0], "v", 1)

    def run(machine: Machine) -> None:
        source, wave = lanes(machine), np.arange(machine.count)[:, None]
        pulled = machine.broadcast(value(machine))[wave, source]
        machine.write_vector(index, np.where(machine.active[wave, source], pulled, U32(0)))

    return run


def _bind_push(instruction: Instruction) -> Run:
    """ds_permute: each lane sends its value to another lane; the highest sender wins, lanes without one get 0."""
    operands = expect(instruction, 3)
    lanes, value = _target_lanes(instruction), raw32(operands[2])
    index = expect_register(operands[0], "v", 1)

    def run(machine: Machine) -> None:
        target, values = lanes(machine), machine.broadcast(value(machine))
        result = np.zeros((machine.count, 64), np.uint32)
        for lane in range(64):
            waves = np.nonzero(machine.active[:, lane])[0]
            result[waves, target[waves, lane]] = values[waves, lane]
        machine.write_vector(index, result)

    return run


def _swizzle_lanes(offset: int | str) -> Array:
    """ds_swizzle: the source lane of each lane. Bit 15 chooses four-lane permutation, else (and, or, xor) of 5 bits."""
    if isinstance(offset, str):
        return _named_swizzle(offset)
    if offset & 0x8000:
        return (LANES & ~3) + np.array([(offset >> (2 * place)) & 3 for place in range(4)])[LANES & 3]
    and_mask, or_mask, xor_mask = offset & 31, (offset >> 5) & 31, (offset >> 10) & 31
    return (LANES & 32) + ((((LANES & 31) & and_mask) | or_mask) ^ xor_mask)


def _named_swizzle(text: str) -> Array:
    name, *rest = [part.strip() for part in text.removeprefix("swizzle(").removesuffix(")").split(",")]
    if name == "BITMASK_PERM":
        return _mask_swizzle(rest[0].strip("\"'"))
    numbers = [int(part, 0) for part in rest]
    if name == "SWAP":
        return LANES ^ numbers[0]
    if name == "REVERSE":
        return LANES ^ (numbers[0] - 1)
    if name == "BROADCAST":
        return (LANES & ~(numbers[0] - 1)) + numbers[1]
    if name == "QUAD_PERM":
        return (LANES & ~3) + np.array(numbers)[LANES & 3]
    raise AssemblyError(f"offset:{text}: this swizzle is not implemented")


def _mask_swizzle(mask: str) -> Array:
    """Five letters, the highest bit first: 0, 1, p (preserve), i (invert)."""
    bits = {"0": (0, 0, 0), "1": (0, 1, 0), "p": (1, 0, 0), "i": (1, 0, 1)}
    parts = [0, 0, 0]
    for letter in mask:
        parts = [2 * total + bit for total, bit in zip(parts, bits[letter], strict=True)]
    return _swizzle_lanes(parts[0] | parts[1] << 5 | parts[2] << 10)


def _bind_swizzle(instruction: Instruction) -> Run:
    operands = expect(instruction, 2)
    lanes, value = _swizzle_lanes(instruction.modifiers.get("offset", 0)), raw32(operands[1])
    index = expect_register(operands[0], "v", 1)

    def run(machine: Machine) -> None:
        moved = machine.broadcast(value(machine))[:, lanes]
        machine.write_vector(index, np.where(machine.active[:, lanes], moved, U32(0)))

    return run


_OFFSET = frozenset({"offset"})
LANE_MOVES: dict[str, Operation] = {
    "v_readfirstlane_b32": Operation(_bind_read_first_lane, reads=(EXEC, EXEC + 1)),
    "v_readlane_b32": Operation(_bind_read_lane),
    "v_writelane_b32": Operation(_bind_write_lane, merges=True),
    "v_mbcnt_lo_u32_b32": _lane_count(0),
    "v_mbcnt_hi_u32_b32": _lane_count(32),
    "v_permlane16_swap_b32": _swap(16),
    "v_permlane32_swap_b32": _swap(32),
    "v_swap_b32": Operation(_bind_swap_registers, num_destinations=2, updates=True),
    "ds_bpermute_b32": Operation(_bind_pull, modifiers=_OFFSET, counters=LGKM),
    "ds_permute_b32": Operation(_bind_push, modifiers=_OFFSET, counters=LGKM),
    "ds_swizzle_b32": Operation(_bind_swizzle, modifiers=_OFFSET, counters=LGKM),
}
