"""Scalar arithmetic with SCC, compares, bit fields and EXEC masks. Branches are in `control`, loads in `vector_memory`.

Each entry of a table is a plain function of unsigned numpy arrays [n]; the builders below wrap it with operand access.
"""

from collections.abc import Callable

import numpy as np

from evenflow.crosscheck.cdna.errors import AssemblyError
from evenflow.crosscheck.cdna.floats import Array
from evenflow.crosscheck.cdna.machine import Machine, high, join, low
from evenflow.crosscheck.cdna.operands import EXEC, Operand
from evenflow.crosscheck.cdna.operation import Operation, Run, expect
from evenflow.crosscheck.cdna.parser import Instruction

Source = Callable[[Machine], Array]
U32, U64 = np.uint32, np.uint64
ONE, LOW5, LOW6 = np.uint32(1), np.uint32(31), np.uint64(63)


def source32(operand: Operand) -> Source:
    """uint32 [n]."""
    if operand.kind == "s":
        index = operand.index
        return lambda machine: machine.read_scalar(index)
    if operand.kind == "literal":
        constant = low(operand.constant("u32").astype(np.uint64))
        return lambda machine: np.repeat(constant, machine.count)
    if operand.kind == "scc":
        return lambda machine: machine.scc[machine.waves].astype(np.uint32)
    raise AssemblyError(f"operand {operand.text}: not a scalar")


def source64(operand: Operand) -> Source:
    """uint64 [n]."""
    if operand.kind == "literal":
        constant = operand.constant("u64")
        return lambda machine: np.repeat(constant, machine.count)
    if operand.kind != "s" or operand.count != 2:
        raise AssemblyError(f"operand {operand.text}: not a pair of scalar registers")
    index = operand.index
    return lambda machine: join(machine.read_scalar(index), machine.read_scalar(index + 1))


def _sources(operands: list[Operand], widths: tuple[int, ...]) -> list[Source]:
    return [(source64 if width == 64 else source32)(operand) for operand, width in zip(operands, widths, strict=True)]


def _store(operand: Operand, width: int) -> Callable[[Machine, Array], None]:
    if operand.kind != "s" or operand.count != width // 32:
        raise AssemblyError(f"operand {operand.text}: not {width // 32} scalar registers")
    index = operand.index
    if width == 64:
        return lambda machine, value: machine.write_scalar64(index, value)
    return lambda machine, value: machine.write_scalar(index, value)


def signed(value: Array) -> Array:
    """The same bits as a signed integer."""
    return value.view(np.int32 if value.dtype == np.uint32 else np.int64)


def unsigned(value: Array) -> Array:
    """The same bits as an unsigned integer."""
    return np.ascontiguousarray(value).view(np.uint32 if value.dtype.itemsize == 4 else np.uint64)


def alu(
    compute: Callable[..., Array],
    widths: tuple[int, ...] = (32, 32, 32),
    scc: Callable[..., Array] | bool | None = True,
    updates: bool = False,
) -> Operation:
    """destination = compute(sources). widths: of the destination, then of the sources. scc: a function of (result,
    sources), True for "result is not 0", None to leave it. updates: the destination's old value is the first source."""

    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, len(widths) - updates)
        store = _store(operands[0], widths[0])
        sources = _sources(operands if updates else operands[1:], widths[1:])

        def run(machine: Machine) -> None:
            values = [source(machine) for source in sources]
            result = compute(*values)
            if scc is True:
                machine.scc[machine.waves] = result != 0
            elif callable(scc):
                machine.scc[machine.waves] = scc(result, *values)
            store(machine, result)

        return run

    return Operation(bind, updates=updates)


def _with_carry(compute: Callable[[Array, Array, Array], Array]) -> Operation:
    """compute(a, b, SCC) in uint64; bits 0 to 31 are the result and bit 32 the carry or borrow."""

    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, 3)
        store, sources = _store(operands[0], 32), _sources(operands[1:], (32, 32))

        def run(machine: Machine) -> None:
            a, b = (source(machine).astype(np.uint64) for source in sources)
            total = compute(a, b, machine.scc[machine.waves].astype(np.uint64))
            machine.scc[machine.waves] = (total >> np.uint64(32)) & np.uint64(1)
            store(machine, low(total))

        return run

    return Operation(bind)


def _select(width: int) -> Operation:
    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, 3)
        store, sources = _store(operands[0], width), _sources(operands[1:], (width, width))

        def run(machine: Machine) -> None:
            a, b = (source(machine) for source in sources)
            store(machine, np.where(machine.scc[machine.waves], a, b))

        return run

    return Operation(bind)


def _conditional_move(width: int) -> Operation:
    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, 2)
        store, (old, new) = _store(operands[0], width), _sources(operands, (width, width))
        return lambda machine: store(machine, np.where(machine.scc[machine.waves], new(machine), old(machine)))

    return Operation(bind, updates=True)


def _compare(compute: Callable[[Array, Array], Array], width: int = 32, is_signed: bool = False) -> Operation:
    def bind(instruction: Instruction) -> Run:
        sources = _sources(expect(instruction, 2), (width, width))

        def run(machine: Machine) -> None:
            a, b = (source(machine) for source in sources)
            machine.scc[machine.waves] = compute(signed(a), signed(b)) if is_signed else compute(a, b)

        return run

    return Operation(bind, num_destinations=0)


def _immediate16(operand: Operand, is_signed: bool) -> Array:
    if operand.kind != "literal":
        raise AssemblyError(f"operand {operand.text}: a constant is needed here")
    value = operand.value & 0xFFFF
    if is_signed and value & 0x8000:
        value |= 0xFFFF0000
    return np.array([value], np.uint32)


def _with_immediate(
    compute: Callable[[Array, Array], Array], scc: Callable[[Array, Array, Array], Array] | None, updates: bool
) -> Operation:
    """destination = compute(destination, the sign-extended 16-bit constant)."""

    def bind(instruction: Instruction) -> Run:
        destination, operand = expect(instruction, 2)
        store, old, constant = _store(destination, 32), source32(destination), _immediate16(operand, is_signed=True)

        def run(machine: Machine) -> None:
            before = old(machine).copy()
            result = np.broadcast_to(compute(before, constant), machine.count)
            if scc is not None:
                machine.scc[machine.waves] = scc(result, before, constant)
            store(machine, result)

        return run

    return Operation(bind, updates=updates)


def _compare_immediate(compute: Callable[[Array, Array], Array], is_signed: bool) -> Operation:
    def bind(instruction: Instruction) -> Run:
        register, operand = expect(instruction, 2)
        source, constant = source32(register), _immediate16(operand, is_signed)

        def run(machine: Machine) -> None:
            value = source(machine)
            a, b = (signed(value), signed(constant)) if is_signed else (value, constant)
            machine.scc[machine.waves] = compute(a, b)

        return run

    return Operation(bind, num_destinations=0)


def _save_exec(combine: Callable[[Array, Array], Array]) -> Operation:
    """destination = EXEC; EXEC = combine(source, EXEC); SCC = EXEC is not 0."""

    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, 2)
        store, source = _store(operands[0], 64), source64(operands[1])

        def run(machine: Machine) -> None:
            before = machine.read_exec()
            after = combine(source(machine), before)
            store(machine, before)
            machine.write_exec(after)
            machine.scc[machine.waves] = after != 0

        return run

    return Operation(bind, reads=(EXEC, EXEC + 1), writes=(EXEC, EXEC + 1))


def _bit_test(expected: int, width: int) -> Operation:
    def bind(instruction: Instruction) -> Run:
        value, position = _sources(expect(instruction, 2), (width, 32))

        def run(machine: Machine) -> None:
            bits = value(machine)
            shift = (position(machine) & U32(width - 1)).astype(bits.dtype)
            machine.scc[machine.waves] = ((bits >> shift) & bits.dtype.type(1)) == expected

        return run

    return Operation(bind, num_destinations=0)


def _signed_overflow(is_subtraction: bool) -> Callable[[Array, Array, Array], Array]:
    def overflow(result: Array, a: Array, b: Array) -> Array:
        sign_differs = (a ^ b) if is_subtraction else ~(a ^ b)
        return ((sign_differs & (a ^ result)) >> U32(31)).astype(bool)

    return overflow


def first_one(bits: Array) -> Array:
    """uint32: the lowest set bit's position, all ones if there is none."""
    lowest = bits & (~bits + bits.dtype.type(1))
    position = count_ones(lowest - bits.dtype.type(1))
    return np.where(bits == 0, U32(0xFFFFFFFF), position)


def leading_zeros(bits: Array) -> Array:
    """uint32: how many zeros stand above the highest set bit, all ones if there is none."""
    width = bits.dtype.itemsize * 8
    filled = bits.copy()
    for shift in (1, 2, 4, 8, 16, 32)[: width.bit_length() - 1]:
        filled |= filled >> bits.dtype.type(shift)
    return np.where(bits == 0, U32(0xFFFFFFFF), U32(width) - count_ones(filled))


def reverse_bits(bits: Array) -> Array:
    """uint32 with bit i at place 31 - i."""
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF)):
        bits = ((bits >> U32(shift)) & U32(mask)) | ((bits & U32(mask)) << U32(shift))
    return (bits >> U32(16)) | (bits << U32(16))


def count_ones(bits: Array) -> Array:
    """uint32: how many bits are set."""
    if bits.dtype == np.uint64:
        return count_ones(low(bits)) + count_ones(high(bits))
    pairs = bits - ((bits >> U32(1)) & U32(0x55555555))
    nibbles = (pairs & U32(0x33333333)) + ((pairs >> U32(2)) & U32(0x33333333))
    return (((nibbles + (nibbles >> U32(4))) & U32(0x0F0F0F0F)) * U32(0x01010101)) >> U32(24)


def bit_field(bits: Array, offset: Array, width: Array, is_signed: bool) -> Array:
    """`width` bits from `offset`, zero- or sign-extended. Same dtype for all three; a width beyond the top is cut."""
    dtype = bits.dtype.type
    size = bits.dtype.itemsize * 8
    width = np.minimum(width, dtype(size))
    shifted = bits >> offset
    all_ones = dtype((1 << size) - 1)
    mask = np.where(width >= size, all_ones, (dtype(1) << (width & dtype(size - 1))) - dtype(1))
    field = shifted & mask
    if not is_signed:
        return field
    sign = np.where(width > 0, (field >> ((width - dtype(1)) & dtype(size - 1))) & dtype(1), dtype(0))
    return np.where(sign == 1, field | ~mask, field)


def _scalar_bit_field(bits: Array, control: Array, is_signed: bool) -> Array:
    """control: the offset in bits 0 to 5, the width from bit 16."""
    size = bits.dtype.itemsize * 8
    offset = (control & U32(size - 1)).astype(bits.dtype)
    width = ((control >> U32(16)) & U32(127)).astype(bits.dtype)
    return bit_field(bits, offset, width, is_signed)


def high_product(a: Array, b: Array, is_signed: bool) -> Array:
    """The upper 32 bits of a 32 by 32 bit product."""
    if is_signed:
        return high((signed(a).astype(np.int64) * signed(b).astype(np.int64)).view(np.uint64))
    return high(a.astype(np.uint64) * b.astype(np.uint64))


def _minmax(pick: Callable[[Array, Array], Array], is_signed: bool) -> Operation:
    def compute(a: Array, b: Array) -> Array:
        return unsigned(pick(signed(a), signed(b))) if is_signed else pick(a, b)

    # SCC says that the first source was picked, a tie excluded.
    return alu(compute, scc=lambda result, a, b: (result == a) & (a != b))


def _shift_add(count: int) -> Operation:
    def wide(a: Array, b: Array) -> Array:
        return (a.astype(np.uint64) << U64(count)) + b.astype(np.uint64)

    return alu(lambda a, b: low(wide(a, b)), scc=lambda result, a, b: wide(a, b) >> U64(32) != 0)


def _absolute_difference(a: Array, b: Array) -> Array:
    return np.abs(signed(a).astype(np.int64) - signed(b).astype(np.int64)).astype(np.uint32)


LOGICAL: dict[str, Callable[[Array, Array], Array]] = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "andn2": lambda a, b: a & ~b,
    "orn2": lambda a, b: a | ~b,
    "nand": lambda a, b: ~(a & b),
    "nor": lambda a, b: ~(a | b),
    "xnor": lambda a, b: ~(a ^ b),
}
COMPARES: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "lg": np.not_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lt": np.less,
    "le": np.less_equal,
}

SCALAR: dict[str, Operation] = {
    "s_add_u32": alu(lambda a, b: a + b, scc=lambda result, a, b: result < a),
    "s_sub_u32": alu(lambda a, b: a - b, scc=lambda result, a, b: b > a),
    "s_add_i32": alu(lambda a, b: a + b, scc=_signed_overflow(False)),
    "s_sub_i32": alu(lambda a, b: a - b, scc=_signed_overflow(True)),
    "s_addc_u32": _with_carry(lambda a, b, carry: a + b + carry),
    "s_subb_u32": _with_carry(lambda a, b, borrow: a - b - borrow),
    "s_mul_i32": alu(lambda a, b: a * b, scc=None),
    "s_mul_hi_u32": alu(lambda a, b: high_product(a, b, False), scc=None),
    "s_mul_hi_i32": alu(lambda a, b: high_product(a, b, True), scc=None),
    "s_min_u32": _minmax(np.minimum, False),
    "s_max_u32": _minmax(np.maximum, False),
    "s_min_i32": _minmax(np.minimum, True),
    "s_max_i32": _minmax(np.maximum, True),
    "s_absdiff_i32": alu(_absolute_difference),
    "s_lshl1_add_u32": _shift_add(1),
    "s_lshl2_add_u32": _shift_add(2),
    "s_lshl3_add_u32": _shift_add(3),
    "s_lshl4_add_u32": _shift_add(4),
    "s_lshl_b32": alu(lambda a, b: a << (b & LOW5)),
    "s_lshr_b32": alu(lambda a, b: a >> (b & LOW5)),
    "s_ashr_i32": alu(lambda a, b: unsigned(signed(a) >> signed(b & LOW5))),
    "s_lshl_b64": alu(lambda a, b: a << (b & LOW6), (64, 64, 32)),
    "s_lshr_b64": alu(lambda a, b: a >> (b & LOW6), (64, 64, 32)),
    "s_ashr_i64": alu(lambda a, b: unsigned(signed(a) >> (b & LOW6).astype(np.int64)), (64, 64, 32)),
    "s_bfe_u32": alu(lambda a, b: _scalar_bit_field(a, b, False)),
    "s_bfe_i32": alu(lambda a, b: _scalar_bit_field(a, b, True)),
    "s_bfe_u64": alu(lambda a, b: _scalar_bit_field(a, b, False), (64, 64, 32)),
    "s_bfe_i64": alu(lambda a, b: _scalar_bit_field(a, b, True), (64, 64, 32)),
    "s_bfm_b32": alu(lambda a, b: ((ONE << (a & LOW5)) - ONE) << (b & LOW5), scc=None),
    "s_bfm_b64": alu(lambda a, b: ((U64(1) << (a & LOW6)) - U64(1)) << (b & LOW6), (64, 32, 32), scc=None),
    "s_pack_ll_b32_b16": alu(lambda a, b: (a & U32(0xFFFF)) | (b << U32(16)), scc=None),
    "s_pack_lh_b32_b16": alu(lambda a, b: (a & U32(0xFFFF)) | (b & U32(0xFFFF0000)), scc=None),
    "s_pack_hh_b32_b16": alu(lambda a, b: (a >> U32(16)) | (b & U32(0xFFFF0000)), scc=None),
    "s_cselect_b32": _select(32),
    "s_cselect_b64": _select(64),
    "s_cmov_b32": _conditional_move(32),
    "s_cmov_b64": _conditional_move(64),
    "s_mov_b32": alu(lambda a: a, (32, 32), scc=None),
    "s_mov_b64": alu(lambda a: a, (64, 64), scc=None),
    "s_movk_i32": _with_immediate(lambda old, constant: constant, None, updates=False),
    "s_addk_i32": _with_immediate(lambda old, constant: old + constant, _signed_overflow(False), updates=True),
    "s_mulk_i32": _with_immediate(lambda old, constant: old * constant, None, updates=True),
    "s_not_b32": alu(lambda a: ~a, (32, 32)),
    "s_not_b64": alu(lambda a: ~a, (64, 64)),
    "s_brev_b32": alu(reverse_bits, (32, 32), scc=None),
    "s_abs_i32": alu(lambda a: unsigned(np.abs(signed(a))), (32, 32)),
    "s_sext_i32_i8": alu(lambda a: unsigned(signed(a << U32(24)) >> np.int32(24)), (32, 32), scc=None),
    "s_sext_i32_i16": alu(lambda a: unsigned(signed(a << U32(16)) >> np.int32(16)), (32, 32), scc=None),
    "s_ff1_i32_b32": alu(first_one, (32, 32), scc=None),
    "s_ff1_i32_b64": alu(first_one, (32, 64), scc=None),
    "s_flbit_i32_b32": alu(leading_zeros, (32, 32), scc=None),
    "s_flbit_i32_b64": alu(leading_zeros, (32, 64), scc=None),
    "s_bcnt1_i32_b32": alu(count_ones, (32, 32)),
    "s_bcnt1_i32_b64": alu(count_ones, (32, 64)),
    "s_bcnt0_i32_b32": alu(lambda a: count_ones(~a), (32, 32)),
    "s_bcnt0_i32_b64": alu(lambda a: count_ones(~a), (32, 64)),
    "s_bitset1_b32": alu(lambda old, a: old | (ONE << (a & LOW5)), scc=None, updates=True),
    "s_bitset0_b32": alu(lambda old, a: old & ~(ONE << (a & LOW5)), scc=None, updates=True),
    "s_bitcmp1_b32": _bit_test(1, 32),
    "s_bitcmp0_b32": _bit_test(0, 32),
    "s_bitcmp1_b64": _bit_test(1, 64),
    "s_bitcmp0_b64": _bit_test(0, 64),
    "s_cmp_eq_u64": _compare(np.equal, 64),
    "s_cmp_lg_u64": _compare(np.not_equal, 64),
    **{f"s_{name}_b32": alu(compute) for name, compute in LOGICAL.items()},
    **{f"s_{name}_b64": alu(compute, (64, 64, 64)) for name, compute in LOGICAL.items()},
    **{f"s_{name}_saveexec_b64": _save_exec(compute) for name, compute in LOGICAL.items()},
    **{f"s_cmp_{name}_u32": _compare(compute) for name, compute in COMPARES.items()},
    **{f"s_cmp_{name}_i32": _compare(compute, is_signed=True) for name, compute in COMPARES.items()},
    **{f"s_cmpk_{name}_u32": _compare_immediate(compute, False) for name, compute in COMPARES.items()},
    **{f"s_cmpk_{name}_i32": _compare_immediate(compute, True) for name, compute in COMPARES.items()},
}
