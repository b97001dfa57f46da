"""Atomic operations on global memory, through buffers and on LDS, lane after lane in the order of waves.

Owns the table of operations on one value; addresses come from `vector_memory` and `lds`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from evenflow.crosscheck.cdna.errors import SimulationError
from evenflow.crosscheck.cdna.floats import Array, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16
from evenflow.crosscheck.cdna.lds import OFFSET, lds_address
from evenflow.crosscheck.cdna.machine import Machine
from evenflow.crosscheck.cdna.memory import ByteStore
from evenflow.crosscheck.cdna.operands import Operand
from evenflow.crosscheck.cdna.operation import Operation, Run, expect, expect_register, num_destinations
from evenflow.crosscheck.cdna.parser import Instruction
from evenflow.crosscheck.cdna.vector_memory import (
    BUFFER,
    BUFFER_ADDRESS,
    GLOBAL,
    LGKM,
    VM,
    buffer_address,
    global_address,
)

RETURNS_IF_TOLD = -1  # the text's glc or sc0 says whether the old value is returned


@dataclass(frozen=True)
class Atomic:
    """new = compute(old, operand) on unsigned integers of `size` bytes; `compares` takes (old, new value, expected)."""

    size: int
    compute: Callable[..., int]
    compares: bool = False

    @property
    def num_data(self) -> int:
        """Registers of operand data."""
        return self.size // 4 * (2 if self.compares else 1)


def _signed(value: int, size: int) -> int:
    bits = 8 * size
    return value - (1 << bits) if value >> (bits - 1) else value


def _integer(size: int) -> dict[str, Atomic]:
    """The integer operations on this many bytes, by the name in global and buffer mnemonics."""

    def by_sign(pick: Callable[..., int]) -> Callable[[int, int], int]:
        return lambda old, value: pick(old, value, key=lambda number: _signed(number, size))

    functions: dict[str, Callable[[int, int], int]] = {
        "swap": lambda old, value: value,
        "add": lambda old, value: old + value,
        "sub": lambda old, value: old - value,
        "smin": by_sign(min),
        "umin": min,
        "smax": by_sign(max),
        "umax": max,
        "and": lambda old, value: old & value,
        "or": lambda old, value: old | value,
        "xor": lambda old, value: old ^ value,
        "inc": lambda old, value: 0 if old >= value else old + 1,
        "dec": lambda old, value: value if old == 0 or old > value else old - 1,
    }
    table = {name: Atomic(size, function) for name, function in functions.items()}
    exchange = Atomic(size, lambda old, value, expected: value if old == expected else old, compares=True)
    return {**table, "cmpswap": exchange}


def _float(dtype: type, unsigned: type, compute: Callable[..., Array]) -> Atomic:
    def apply(old: int, value: int) -> int:
        pair: Array = np.array([old, value], unsigned).view(dtype)
        return int(np.asarray(compute(pair[:1], pair[1:]), dtype).view(unsigned)[0])

    return Atomic(np.dtype(dtype).itemsize, apply)


def _packed_add(decode: Callable[[Array], Array], encode: Callable[[Array], Array]) -> Atomic:
    def apply(old: int, value: int) -> int:
        codes = np.array([[old & 0xFFFF, old >> 16], [value & 0xFFFF, value >> 16]], np.uint32)
        low, high = encode(decode(codes).sum(0, dtype=np.float32))
        return int(low) | int(high) << 16

    return Atomic(4, apply)


_FLOATS = {
    "add_f32": _float(np.float32, np.uint32, np.add),
    "add_f64": _float(np.float64, np.uint64, np.add),
    "min_f64": _float(np.float64, np.uint64, np.fmin),
    "max_f64": _float(np.float64, np.uint64, np.fmax),
    "pk_add_f16": _packed_add(f16_to_f32, f32_to_f16),
    "pk_add_bf16": _packed_add(bf16_to_f32, f32_to_bf16),
}
MEMORY_ATOMICS = {**_integer(4), **{f"{name}_x2": atomic for name, atomic in _integer(8).items()}, **_FLOATS}
# LDS mnemonics name the type as well.
_LDS_NAMES = {
    "add_u": "add",
    "sub_u": "sub",
    "min_i": "smin",
    "min_u": "umin",
    "max_i": "smax",
    "max_u": "umax",
    "and_b": "and",
    "or_b": "or",
    "xor_b": "xor",
    "inc_u": "inc",
    "dec_u": "dec",
}


def _to_int(words: list[Array], position: tuple[int, int]) -> int:
    return sum(int(word[position]) << (32 * place) for place, word in enumerate(words))


def apply_atomic(
    atomic: Atomic, store: ByteStore, place: Array, lanes: Array, data: list[Array], expected: list[Array] | None = None
) -> list[Array]:
    """Do it lane by lane; gives the old values, dwords [n, 64], 0 for idle lanes. data: dwords [n, 64]."""
    num_words = atomic.size // 4
    old_words = [np.zeros(lanes.shape, np.uint32) for _ in range(num_words)]
    mask = (1 << 8 * atomic.size) - 1
    for wave, lane in np.argwhere(lanes):
        position = (int(wave), int(lane))
        first = int(place[position]) >> 2
        old = sum(int(store.words[first + word]) << (32 * word) for word in range(num_words))
        operands = [_to_int(data, position)] + ([_to_int(expected, position)] if expected else [])
        new = atomic.compute(old, *operands) & mask
        for word in range(num_words):
            store.words[first + word] = new >> (32 * word) & 0xFFFFFFFF
            old_words[word][position] = old >> (32 * word) & 0xFFFFFFFF
    return old_words


def _data(machine: Machine, operand: Operand, first: int, count: int) -> list[Array]:
    return [machine.read_vector(operand.index + first + word) for word in range(count)]


def _split(machine: Machine, operand: Operand, atomic: Atomic) -> tuple[list[Array], list[Array] | None]:
    """(new value, expected value): a compare-and-swap has both in one run of registers, the new value first."""
    words = atomic.size // 4
    return _data(machine, operand, 0, words), _data(machine, operand, words, words) if atomic.compares else None


def _check_aligned(place: Array, instruction: Instruction, size: int) -> None:
    if (place % size).any():
        raise SimulationError(f"{instruction}: an atomic operation on an address that is not a multiple of {size}")


def _memory_atomic(name: str, is_buffer: bool) -> Operation:
    atomic = MEMORY_ATOMICS[name]

    def bind(instruction: Instruction) -> Run:
        returns = num_destinations(instruction, operation)
        if is_buffer:
            data, offset, descriptor, base = expect(instruction, 4)
            result = data
            addressing = buffer_address(instruction, offset, descriptor, base, atomic.size)
        else:
            *head, address, data, base = expect(instruction, 3 + returns)
            result = head[0] if head else data
            addressing = global_address(instruction, address, base)
        expect_register(data, "v", atomic.num_data)

        def run(machine: Machine) -> None:
            address, lanes = addressing(machine)
            place = machine.memory.locate(machine, instruction, address, atomic.size, lanes)
            _check_aligned(place, instruction, atomic.size)
            machine.memory.count(address, atomic.size, lanes, is_store=True)
            value, expected = _split(machine, data, atomic)
            old = apply_atomic(atomic, machine.memory.store, place, lanes, value, expected)
            for word, bits in enumerate(old if returns else []):
                machine.write_vector(result.index + word, bits)

        return run

    operation = Operation(
        bind,
        num_destinations=RETURNS_IF_TOLD,
        updates=is_buffer,
        address=BUFFER_ADDRESS if is_buffer else (-3, -1),
        modifiers=BUFFER if is_buffer else GLOBAL,
        counters=VM,
    )
    return operation


def _lds_atomic(atomic: Atomic, returns: bool) -> Operation:
    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, (3 if atomic.compares else 2) + returns)
        words = atomic.size // 4
        pointer, *data = operands[int(returns) :]
        for operand in data:
            expect_register(operand, "v", words)
        address = lds_address(pointer, instruction.modifiers.get("offset", 0))

        def run(machine: Machine) -> None:
            place = machine.lds.locate(machine, instruction, address(machine), atomic.size)
            _check_aligned(place, instruction, atomic.size)
            machine.lds.before_atomic(machine, instruction, place, atomic.size)
            values = [_data(machine, operand, 0, words) for operand in data]
            # A compare-and-swap on LDS has the expected value first.
            value, expected = (values[1], values[0]) if atomic.compares else (values[0], None)
            old = apply_atomic(atomic, machine.lds.store, place, machine.active, value, expected)
            for word, bits in enumerate(old if returns else []):
                machine.write_vector(operands[0].index + word, bits)

        return run

    return Operation(bind, num_destinations=int(returns), modifiers=OFFSET, counters=LGKM)


def _lds_atomics() -> dict[str, Operation]:
    named: dict[str, Atomic] = {}
    for bits in (32, 64):
        table = _integer(bits // 8)
        named.update({f"{lds_name}{bits}": table[name] for lds_name, name in _LDS_NAMES.items()})
        named[f"cmpst_b{bits}"] = table["cmpswap"]
    named["add_f32"] = _FLOATS["add_f32"]
    named["max_f32"] = _float(np.float32, np.uint32, np.fmax)
    named["min_f32"] = _float(np.float32, np.uint32, np.fmin)
    named["add_f64"] = _FLOATS["add_f64"]
    operations = {f"ds_{name}": _lds_atomic(atomic, False) for name, atomic in named.items()}
    for name, atomic in named.items():
        operation, kind = name.rsplit("_", 1)
        operations[f"ds_{operation}_rtn_{kind}"] = _lds_atomic(atomic, True)
    for bits in (32, 64):
        operations[f"ds_wrxchg_rtn_b{bits}"] = _lds_atomic(_integer(bits // 8)["swap"], True)
    return operations


ATOMICS: dict[str, Operation] = {
    **{f"global_atomic_{name}": _memory_atomic(name, is_buffer=False) for name in MEMORY_ATOMICS},
    **{f"buffer_atomic_{name}": _memory_atomic(name, is_buffer=True) for name in MEMORY_ATOMICS},
    **_lds_atomics(),
}
