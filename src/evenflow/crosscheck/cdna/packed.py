"""Instructions on two values at once (v_pk_*), and those that mix float32 with halves (v_fma_mix*).

op_sel names the half of each source that the low result takes, op_sel_hi the half that the high result takes.
"""

from collections.abc import Callable

import numpy as np

from evenflow.crosscheck.cdna.access import Reader, raw32, reader, round_to_f16, writer
from evenflow.crosscheck.cdna.errors import AssemblyError
from evenflow.crosscheck.cdna.floats import Array, bf16_to_f32, f16_to_f32, f32_to_bf16, fma_f32
from evenflow.crosscheck.cdna.machine import Machine
from evenflow.crosscheck.cdna.operands import Operand
from evenflow.crosscheck.cdna.operation import Operation, Run, expect
from evenflow.crosscheck.cdna.parser import Instruction

MODIFIERS = frozenset({"op_sel", "op_sel_hi", "neg_lo", "neg_hi", "clamp"})
U32 = np.uint32
HALF = np.uint32(0xFFFF)


def _choices(instruction: Instruction, count: int) -> list[tuple[list[int], list[int]]]:
    """For the low and the high result: which half of each source, and which sources are negated."""
    modifiers = instruction.modifiers
    low = modifiers.get("op_sel", [0] * count), modifiers.get("neg_lo", [0] * count)
    high = modifiers.get("op_sel_hi", [1] * count), modifiers.get("neg_hi", [0] * count)
    return [low, high]


def read_words(instruction: Instruction, num_sources: int) -> list[set[int]]:
    """Of each source that is a pair of registers: those that are read. Empty: all of them."""
    low, high = (instruction.modifiers.get(name) for name in ("op_sel", "op_sel_hi"))
    if instruction.name == "v_pk_mov_b32":
        return [{word} for word in low or [0, 1]]
    if instruction.name.startswith("v_pk_") and instruction.name.endswith("_f32"):
        return [set(words) for words in zip(low or [0] * num_sources, high or [1] * num_sources, strict=True)]
    return [set()] * num_sources


def _to_signed(bits: Array) -> Array:
    return np.ascontiguousarray(bits << U32(16)).view(np.int32) >> np.int32(16)


_DECODE: dict[str, Callable[[Array], Array]] = {
    "f16": f16_to_f32,
    "bf16": bf16_to_f32,
    "u16": lambda bits: bits,
    "i16": _to_signed,
}


def _half_reader(operand: Operand, kind: str, is_high: int, negate: int) -> Reader:
    read, shift, decode = raw32(operand, "f16" if kind == "f16" else "u32"), U32(16 * is_high), _DECODE[kind]
    sign = U32(0x8000 if negate else 0)
    return lambda machine: decode(((read(machine) >> shift) & HALF) ^ sign)


def _encode_half(kind: str) -> Callable[[Machine, Array], Array]:
    if kind == "f16":
        return round_to_f16
    if kind == "bf16":
        return lambda machine, value: f32_to_bf16(value)
    return lambda machine, value: value.astype(np.uint32) & HALF


def pair16(
    kind: str, count: int, compute: Callable[..., Array], saturated: Callable[..., Array] | None = None
) -> Operation:
    """Two 16-bit results in one register. saturated: what an integer instruction computes with `clamp`."""

    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, 1 + count)
        function = compute
        if "clamp" in instruction.modifiers:
            if saturated is None:
                raise AssemblyError(f"clamp is not implemented for {instruction.name}")
            function = saturated
        halves = [
            [_half_reader(*quad) for quad in zip(operands[1:], [kind] * count, selection, negated, strict=True)]
            for selection, negated in _choices(instruction, count)
        ]
        encode, write = _encode_half(kind), _register_writer(instruction)

        def run(machine: Machine) -> None:
            low, high = (encode(machine, function(*[read(machine) for read in half])) for half in halves)
            write(machine, low | (high << U32(16)))

        return run

    return Operation(bind, modifiers=MODIFIERS)


def _register_writer(instruction: Instruction) -> Callable[[Machine, Array], None]:
    """Without the float meaning of `clamp`, which the functions of this file have dealt with."""
    plain = Instruction(instruction.mnemonic, instruction.name, "", [], {}, instruction.line, instruction.text)
    return writer(plain, instruction.operands[0], "u32")


def pair32(count: int, compute: Callable[..., Array]) -> Operation:
    """Two float32 results in two registers."""

    def source(operand: Operand, is_high: int, negate: int) -> Reader:
        read = raw32(operand, "f32", 0 if operand.kind == "literal" else is_high)
        sign = U32(0x80000000 if negate else 0)
        return lambda machine: np.ascontiguousarray(read(machine) ^ sign).view(np.float32)

    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, 1 + count)
        if "clamp" in instruction.modifiers:
            raise AssemblyError(f"clamp is not implemented for {instruction.name}")
        halves = [
            [source(*triple) for triple in zip(operands[1:], selection, negated, strict=True)]
            for selection, negated in _choices(instruction, count)
        ]
        index = operands[0].index

        def run(machine: Machine) -> None:
            results = [compute(*[read(machine) for read in half]) for half in halves]
            for word, result in enumerate(results):
                machine.write_vector(index + word, result.view(np.uint32))

        return run

    return Operation(bind, modifiers=MODIFIERS - {"clamp"})


def _bind_move(instruction: Instruction) -> Run:
    """v_pk_mov: one register of each source."""
    operands = expect(instruction, 3)
    selection = instruction.modifiers.get("op_sel", [0, 1])
    reads = [raw32(operand, "u32", word) for operand, word in zip(operands[1:], selection, strict=True)]
    index = operands[0].index

    def run(machine: Machine) -> None:
        first, second = (np.array(machine.broadcast(read(machine))) for read in reads)
        machine.write_vector(index, first)
        machine.write_vector(index + 1, second)

    return run


def _mixed(place: str) -> Operation:
    """v_fma_mix: each source is a float32, or with op_sel_hi one half of a register. place: of the result, "" for
    float32."""

    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, 4)
        is_half = instruction.modifiers.get("op_sel_hi", [0, 0, 0])
        half = instruction.modifiers.get("op_sel", [0, 0, 0])
        readers = []
        for operand, narrow, is_high in zip(operands[1:], is_half, half, strict=True):
            if narrow:
                operand.select = (16 * is_high, 0xFFFF)
            readers.append(reader(operand, "f16" if narrow else "f32"))
        write = writer(instruction, operands[0], "f32" if place == "" else "u32")
        old = raw32(operands[0])

        def run(machine: Machine) -> None:
            total = fma_f32(*[read(machine) for read in readers])
            if place == "":
                write(machine, total)
            elif place == "low":
                write(machine, (old(machine) & ~HALF) | round_to_f16(machine, total))
            else:
                write(machine, (old(machine) & HALF) | (round_to_f16(machine, total) << U32(16)))

        return run

    modifiers = frozenset({"op_sel", "op_sel_hi"}) | ({"clamp"} if place == "" else set())
    return Operation(bind, merges=place != "", modifiers=modifiers)


def _bind_pack(instruction: Instruction) -> Run:
    """v_pack_b32_f16: two halves, as bits."""
    operands = expect(instruction, 3)
    halves = instruction.modifiers.get("op_sel", [0, 0])
    low, high = (raw32(operand, "f16") for operand in operands[1:])
    low_shift, high_shift = U32(16 * halves[0]), U32(16 * halves[1])
    write = _register_writer(instruction)

    def run(machine: Machine) -> None:
        lower, upper = (low(machine) >> low_shift) & HALF, (high(machine) >> high_shift) & HALF
        write(machine, lower | (upper << U32(16)))

    return run


def _clip(low: int, high: int, compute: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, b: np.clip(compute(a.astype(np.int64), b.astype(np.int64)), low, high)


PACKED: dict[str, Operation] = {
    "v_pk_add_f32": pair32(2, np.add),
    "v_pk_mul_f32": pair32(2, np.multiply),
    "v_pk_fma_f32": pair32(3, fma_f32),
    "v_pk_mov_b32": Operation(_bind_move, modifiers=frozenset({"op_sel", "op_sel_hi"})),
    "v_pk_add_f16": pair16("f16", 2, np.add),
    "v_pk_mul_f16": pair16("f16", 2, np.multiply),
    "v_pk_fma_f16": pair16("f16", 3, lambda a, b, c: a.astype(np.float64) * b + c),
    "v_pk_max_f16": pair16("f16", 2, np.fmax),
    "v_pk_min_f16": pair16("f16", 2, np.fmin),
    "v_pk_minimum3_f16": pair16("f16", 3, lambda a, b, c: np.minimum(np.minimum(a, b), c)),
    "v_pk_maximum3_f16": pair16("f16", 3, lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    "v_pk_lshlrev_b16": pair16("u16", 2, lambda a, b: b << (a & U32(15))),
    "v_pk_lshrrev_b16": pair16("u16", 2, lambda a, b: b >> (a & U32(15))),
    "v_pk_ashrrev_i16": pair16("i16", 2, lambda a, b: b >> (a & np.int32(15))),
    "v_pk_mul_lo_u16": pair16("u16", 2, lambda a, b: a * b),
    "v_pk_mad_u16": pair16("u16", 3, lambda a, b, c: a * b + c),
    "v_pk_mad_i16": pair16("i16", 3, lambda a, b, c: a * b + c),
    "v_pk_add_u16": pair16("u16", 2, lambda a, b: a + b, _clip(0, 0xFFFF, np.add)),
    "v_pk_sub_u16": pair16("u16", 2, lambda a, b: a - b, _clip(0, 0xFFFF, np.subtract)),
    "v_pk_add_i16": pair16("i16", 2, lambda a, b: a + b, _clip(-0x8000, 0x7FFF, np.add)),
    "v_pk_sub_i16": pair16("i16", 2, lambda a, b: a - b, _clip(-0x8000, 0x7FFF, np.subtract)),
    "v_pk_min_u16": pair16("u16", 2, np.minimum),
    "v_pk_max_u16": pair16("u16", 2, np.maximum),
    "v_pk_min_i16": pair16("i16", 2, np.minimum),
    "v_pk_max_i16": pair16("i16", 2, np.maximum),
    "v_pack_b32_f16": Operation(_bind_pack, modifiers=frozenset({"op_sel"})),
    "v_fma_mix_f32": _mixed(""),
    "v_fma_mixlo_f16": _mixed("low"),
    "v_fma_mixhi_f16": _mixed("high"),
}
