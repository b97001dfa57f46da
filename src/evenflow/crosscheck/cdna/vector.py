"""Vector arithmetic: integers, floats, moves, selects, carries, compares. Owns the tables, not how operands are read.

Each table entry is a function of typed numpy arrays (see `access` for the types), rounded once when it is written.
"""

from collections.abc import Callable

import numpy as np

from evenflow.crosscheck.cdna.access import (
    lane_mask,
    lane_move,
    reader,
    select_sources,
    writer,
)
from evenflow.crosscheck.cdna.errors import AssemblyError
from evenflow.crosscheck.cdna.floats import Array, fma_f32
from evenflow.crosscheck.cdna.machine import Machine, join, low
from evenflow.crosscheck.cdna.operands import EXEC, parse_operand
from evenflow.crosscheck.cdna.operation import Operation, Run, expect
from evenflow.crosscheck.cdna.parser import Instruction
from evenflow.crosscheck.cdna.scalar import (
    bit_field,
    count_ones,
    first_one,
    high_product,
    leading_zeros,
    reverse_bits,
    signed,
    unsigned,
)

U32, U64 = np.uint32, np.uint64
ONE, LOW5 = np.uint32(1), np.uint32(31)
SCALED = frozenset({"mul", "div", "clamp", "op_sel"})


def alu(
    result: str,
    sources: str,
    compute: Callable[..., Array],
    saturated: Callable[..., Array] | None = None,
    updates: bool = False,
) -> Operation:
    """destination = compute(sources), lane by lane. saturated: what it computes with `clamp`, for integers.
    updates: the destination's old value is the last source."""
    kinds = sources.split()

    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, 1 + len(kinds) - updates)
        inputs = operands[1:] + operands[:1] * updates
        select_sources(instruction, operands[1:])
        move = lane_move(instruction)
        readers = [
            reader(operand, kind, None if i else move)
            for i, (operand, kind) in enumerate(zip(inputs, kinds, strict=True))
        ]
        write = writer(instruction, operands[0], result, move)
        function = compute
        if result[0] in "ui" and "clamp" in instruction.modifiers:
            if saturated is None:
                raise AssemblyError(f"clamp is not implemented for {instruction.name}")
            function = saturated
        return lambda machine: write(machine, function(*[read(machine) for read in readers]))

    return Operation(bind, updates=updates, modifiers=SCALED)


def compare(kind: str, test: Callable[[Array, Array], Array], writes_exec: bool = False) -> Operation:
    """destination mask = test(a, b) for the lanes that execute, 0 for the others; v_cmpx writes it to EXEC as well."""

    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, 3)
        select_sources(instruction, operands[1:])
        move = lane_move(instruction)
        a, b = reader(operands[1], kind, move), reader(operands[2], kind)
        write = writer(instruction, operands[0], "mask")

        def run(machine: Machine) -> None:
            write(machine, test(a(machine), b(machine)))
            if writes_exec:
                machine.write_exec(join(machine.read_scalar(index), machine.read_scalar(index + 1)))

        index = operands[0].index
        return run

    return Operation(bind, modifiers=frozenset({"op_sel"}), writes=(EXEC, EXEC + 1) if writes_exec else ())


def _carrying(compute: Callable[[Array, Array, Array], Array], takes_carry: bool) -> Operation:
    """(sum, carry mask) = compute(a, b, carry in) in uint64: bits 0 to 31 are the sum, bit 32 the carry or borrow."""

    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, 5 if takes_carry else 4)
        select_sources(instruction, operands[2:4])
        move = lane_move(instruction)
        a, b = reader(operands[2], "u32", move), reader(operands[3], "u32")
        write, write_carry = writer(instruction, operands[0], "u32", move), writer(instruction, operands[1], "mask")
        carry = lane_mask(operands[4]) if takes_carry else None

        def run(machine: Machine) -> None:
            carry_in = carry(machine).astype(np.uint64) if carry else U64(0)
            total = compute(a(machine).astype(np.uint64), b(machine).astype(np.uint64), carry_in)
            write(machine, low(total))
            write_carry(machine, (total >> U64(32)) & U64(1) != 0)

        return run

    return Operation(bind, num_destinations=2)


def _bind_select(instruction: Instruction) -> Run:
    """v_cndmask: the second source where the mask is set. Sign modifiers work on the bits."""
    operands = expect(instruction, 3, 4)
    select_sources(instruction, operands[1:3])
    move = lane_move(instruction)
    a, b = reader(operands[1], "u32", move), reader(operands[2], "u32")
    mask = lane_mask(operands[3] if len(operands) == 4 else parse_operand("vcc"))
    write = writer(instruction, operands[0], "u32", move)
    return lambda machine: write(machine, np.where(mask(machine), b(machine), a(machine)))


def _multiply_add_64(product: Callable[[Array, Array], Array]) -> Operation:
    """v_mad_u64_u32: (64-bit sum, carry mask) = a * b + c."""

    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, 5)
        a, b, c = reader(operands[2], "u32"), reader(operands[3], "u32"), reader(operands[4], "u64")
        write, write_carry = writer(instruction, operands[0], "u64"), writer(instruction, operands[1], "mask")

        def run(machine: Machine) -> None:
            first = product(a(machine), b(machine))
            total = first + c(machine)
            write(machine, total)
            write_carry(machine, total < first)

        return run

    return Operation(bind, num_destinations=2)


def _literal_multiply_add(compute: Callable[..., Array]) -> Operation:
    """v_fmaak (a * b + K) and v_fmamk (a * K + b): the literal stands where it is multiplied or added."""

    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, 4)
        readers = [reader(operand, "f32") for operand in operands[1:]]
        write = writer(instruction, operands[0], "f32")
        return lambda machine: write(machine, compute(*[read(machine) for read in readers]))

    return Operation(bind)


def _wide_product(a: Array, b: Array) -> Array:
    return a.astype(np.uint64) * b.astype(np.uint64)


def _wide_signed_product(a: Array, b: Array) -> Array:
    return unsigned(signed(a).astype(np.int64) * signed(b).astype(np.int64))


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """v_perm: each byte of the selector picks one of eight bytes (b's are 0 to 3, a's 4 to 7), a sign (8 to 11: of
    bytes 1, 3, 5 and 7), 0 (12) or 0xFF (above)."""
    eight = join(b, a)
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for place in range(4):
        choice = (selector >> U32(8 * place)) & U32(0xFF)
        byte = low(eight >> (np.minimum(choice, U32(7)) * U32(8)).astype(np.uint64)) & U32(0xFF)
        sign_place = np.clip(choice.astype(np.int64) - 8, 0, 3) * 16 + 15
        sign = (low(eight >> sign_place.astype(np.uint64)) & ONE) * U32(0xFF)
        byte = np.select([choice <= 7, choice <= 11, choice == 12], [byte, sign, U32(0)], U32(0xFF))
        result |= byte.astype(np.uint32) << U32(8 * place)
    return result


def truth_table(table: int, a: Array, b: Array, c: Array) -> Array:
    """v_bitop3: bit (4 a + 2 b + c) of the table, for each bit of the operands."""
    result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def _bind_bitop3(instruction: Instruction) -> Run:
    operands = expect(instruction, 4)
    kind = "u16" if instruction.name.endswith("b16") else "u32"
    readers = [reader(operand, kind) for operand in operands[1:]]
    write = writer(instruction, operands[0], kind)
    table = instruction.modifiers.get("bitop3", 0)
    return lambda machine: write(machine, truth_table(table, *[read(machine) for read in readers]))


CLASSES = "signaling_nan quiet_nan -inf -normal -denormal -0 +0 +denormal +normal +inf".split()
_QUIET = {np.dtype(np.float32): (np.uint32, 22), np.dtype(np.float64): (np.uint64, 51)}


def float_class(value: Array) -> Array:
    """uint32 with one bit set, at the place of the value's class in CLASSES."""
    bits_type, quiet_bit = _QUIET[value.dtype]
    quiet = (value.view(bits_type) >> bits_type(quiet_bit)) & bits_type(1) == 1
    nan, infinite, zero = np.isnan(value), np.isinf(value), value == 0
    normal = ~nan & ~infinite & (np.abs(value) >= np.finfo(value.dtype).tiny)
    distance = np.select([infinite, normal, zero], [3, 2, 0], 1)  # from zero: 0, denormal 1, normal 2, infinite 3
    signed_class = np.where(np.signbit(value), 5 - distance, 6 + distance)
    return (U32(1) << np.where(nan, quiet, signed_class).astype(np.uint32)).astype(np.uint32)


def _class_test(kind: str) -> Operation:
    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, 3)
        select_sources(instruction, operands[1:])
        value, classes = reader(operands[1], kind), reader(operands[2], "u32")
        write = writer(instruction, operands[0], "mask")
        return lambda machine: write(machine, float_class(value(machine)) & classes(machine) != 0)

    return Operation(bind)


def _ldexp(value: Array, exponent: Array) -> Array:
    # Twice float32's range is enough, and keeps numpy's C int.
    return np.ldexp(value, np.clip(exponent, -400, 400).astype(np.int32))


def median(a: Array, b: Array, c: Array) -> Array:
    """The middle one of three; with a NaN among them, the least of the others."""
    middle = np.fmax(np.fmin(a, b), np.fmin(np.fmax(a, b), c))
    nan = np.isnan(a) | np.isnan(b) | np.isnan(c)
    return np.where(nan, np.fmin(np.fmin(a, b), c), middle)


def _sub_saturated(a: Array, b: Array) -> Array:
    return np.where(b > a, U32(0), a - b)


def _add_saturated(a: Array, b: Array) -> Array:
    return np.where(a + b < a, U32(0xFFFFFFFF), a + b)


def _shift64(a: Array, b: Array) -> Array:
    return (a & U32(63)).astype(b.dtype)


def _flushed(value: Array) -> Array:
    """Denormals become 0."""
    return np.where(np.abs(value) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), value), value)


def multiply_add_flushed(a: Array, b: Array, c: Array) -> Array:
    """v_mad: rounds twice and knows no denormals, whatever the mode."""
    return _flushed(_flushed(_flushed(a) * _flushed(b)) + _flushed(c))


def _multiply_legacy(a: Array, b: Array) -> Array:
    return np.where((a == 0) | (b == 0), np.float32(0), a * b)


def _sign_run(bits: Array) -> Array:
    """How many of the highest bits equal the sign, all ones if all do."""
    return leading_zeros(bits ^ unsigned(signed(bits) >> np.int32(31)))


def _multiply_24(a: Array, b: Array) -> Array:
    return unsigned((a.astype(np.int64) * b.astype(np.int64)).astype(np.int32))


def _reciprocal_root(value: Array) -> Array:
    return (1 / np.sqrt(value.astype(np.float64))).astype(value.dtype)


def _turns(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Sine and cosine take turns: 1.0 is a whole circle."""
    return lambda value: function(2 * np.pi * np.fmod(value.astype(np.float64), 1)).astype(np.float32)


def _fract(value: Array) -> Array:
    return np.fmin(value - np.floor(value), np.nextafter(value.dtype.type(1), value.dtype.type(0)))


INTEGER: dict[str, Operation] = {
    "v_mov_b32": alu("u32", "u32", lambda a: a),
    "v_mov_b64": alu("u64", "u64", lambda a: a),
    "v_not_b32": alu("u32", "u32", lambda a: ~a),
    "v_accvgpr_read_b32": alu("u32", "u32", lambda a: a),
    "v_accvgpr_write_b32": alu("u32", "u32", lambda a: a),
    "v_accvgpr_mov_b32": alu("u32", "u32", lambda a: a),
    "v_cndmask_b32": Operation(_bind_select, reads=()),
    "v_add_u32": alu("u32", "u32 u32", lambda a, b: a + b, _add_saturated),
    "v_sub_u32": alu("u32", "u32 u32", lambda a, b: a - b, _sub_saturated),
    "v_subrev_u32": alu("u32", "u32 u32", lambda a, b: b - a, lambda a, b: _sub_saturated(b, a)),
    "v_and_b32": alu("u32", "u32 u32", lambda a, b: a & b),
    "v_or_b32": alu("u32", "u32 u32", lambda a, b: a | b),
    "v_xor_b32": alu("u32", "u32 u32", lambda a, b: a ^ b),
    "v_xnor_b32": alu("u32", "u32 u32", lambda a, b: ~(a ^ b)),
    "v_lshlrev_b32": alu("u32", "u32 u32", lambda a, b: b << (a & LOW5)),
    "v_lshrrev_b32": alu("u32", "u32 u32", lambda a, b: b >> (a & LOW5)),
    "v_ashrrev_i32": alu("i32", "u32 i32", lambda a, b: b >> (a & LOW5).astype(np.int32)),
    "v_lshlrev_b64": alu("u64", "u32 u64", lambda a, b: b << _shift64(a, b)),
    "v_lshrrev_b64": alu("u64", "u32 u64", lambda a, b: b >> _shift64(a, b)),
    "v_ashrrev_i64": alu("i64", "u32 i64", lambda a, b: b >> _shift64(a, b)),
    "v_lshl_add_u64": alu("u64", "u64 u32 u64", lambda a, b, c: (a << (b & U32(7)).astype(np.uint64)) + c),
    "v_min_u32": alu("u32", "u32 u32", np.minimum),
    "v_max_u32": alu("u32", "u32 u32", np.maximum),
    "v_min_i32": alu("i32", "i32 i32", np.minimum),
    "v_max_i32": alu("i32", "i32 i32", np.maximum),
    "v_mul_lo_u32": alu("u32", "u32 u32", lambda a, b: a * b),
    "v_mul_hi_u32": alu("u32", "u32 u32", lambda a, b: high_product(a, b, False)),
    "v_mul_hi_i32": alu("u32", "u32 u32", lambda a, b: high_product(a, b, True)),
    "v_mul_u32_u24": alu("u32", "u24 u24", lambda a, b: a * b),
    "v_mul_i32_i24": alu("u32", "i24 i24", _multiply_24),
    "v_mad_u32_u24": alu("u32", "u24 u24 u32", lambda a, b, c: a * b + c),
    "v_mad_i32_i24": alu("u32", "i24 i24 u32", lambda a, b, c: _multiply_24(a, b) + c),
    "v_mad_u64_u32": _multiply_add_64(_wide_product),
    "v_mad_i64_i32": _multiply_add_64(_wide_signed_product),
    "v_add3_u32": alu("u32", "u32 u32 u32", lambda a, b, c: a + b + c),
    "v_lshl_add_u32": alu("u32", "u32 u32 u32", lambda a, b, c: (a << (b & LOW5)) + c),
    "v_add_lshl_u32": alu("u32", "u32 u32 u32", lambda a, b, c: (a + b) << (c & LOW5)),
    "v_lshl_or_b32": alu("u32", "u32 u32 u32", lambda a, b, c: (a << (b & LOW5)) | c),
    "v_and_or_b32": alu("u32", "u32 u32 u32", lambda a, b, c: (a & b) | c),
    "v_or3_b32": alu("u32", "u32 u32 u32", lambda a, b, c: a | b | c),
    "v_xad_u32": alu("u32", "u32 u32 u32", lambda a, b, c: (a ^ b) + c),
    "v_bfi_b32": alu("u32", "u32 u32 u32", lambda a, b, c: (a & b) | (~a & c)),
    "v_bfe_u32": alu("u32", "u32 u32 u32", lambda a, b, c: bit_field(a, b & LOW5, c & LOW5, False)),
    "v_bfe_i32": alu("u32", "u32 u32 u32", lambda a, b, c: bit_field(a, b & LOW5, c & LOW5, True)),
    "v_bfm_b32": alu("u32", "u32 u32", lambda a, b: ((ONE << (a & LOW5)) - ONE) << (b & LOW5)),
    "v_alignbit_b32": alu("u32", "u32 u32 u32", lambda a, b, c: low(join(b, a) >> (c & LOW5).astype(np.uint64))),
    "v_alignbyte_b32": alu(
        "u32", "u32 u32 u32", lambda a, b, c: low(join(b, a) >> ((c & U32(3)) * U32(8)).astype(np.uint64))
    ),
    "v_perm_b32": alu("u32", "u32 u32 u32", permute_bytes),
    "v_bitop3_b32": Operation(_bind_bitop3, modifiers=frozenset({"bitop3"})),
    "v_bitop3_b16": Operation(_bind_bitop3, modifiers=frozenset({"bitop3"})),
    "v_bcnt_u32_b32": alu("u32", "u32 u32", lambda a, b: count_ones(a) + b),
    "v_bfrev_b32": alu("u32", "u32", reverse_bits),
    "v_ffbh_u32": alu("u32", "u32", leading_zeros),
    "v_ffbh_i32": alu("u32", "u32", _sign_run),
    "v_ffbl_b32": alu("u32", "u32", first_one),
    "v_add_co_u32": _carrying(lambda a, b, carry: a + b, False),
    "v_sub_co_u32": _carrying(lambda a, b, carry: a - b, False),
    "v_subrev_co_u32": _carrying(lambda a, b, carry: b - a, False),
    "v_addc_co_u32": _carrying(lambda a, b, carry: a + b + carry, True),
    "v_subb_co_u32": _carrying(lambda a, b, borrow: a - b - borrow, True),
    "v_subbrev_co_u32": _carrying(lambda a, b, borrow: b - a - borrow, True),
    "v_add_u16": alu("u16", "u16 u16", lambda a, b: a + b),
    "v_sub_u16": alu("u16", "u16 u16", lambda a, b: a - b),
    "v_subrev_u16": alu("u16", "u16 u16", lambda a, b: b - a),
    "v_mul_lo_u16": alu("u16", "u16 u16", lambda a, b: a * b),
    "v_mad_u16": alu("u16", "u16 u16 u16", lambda a, b, c: a * b + c),
    "v_mad_legacy_u16": alu("u16", "u16 u16 u16", lambda a, b, c: a * b + c),
    "v_lshlrev_b16": alu("u16", "u16 u16", lambda a, b: b << (a & U32(15))),
    "v_lshrrev_b16": alu("u16", "u16 u16", lambda a, b: b >> (a & U32(15))),
    "v_ashrrev_i16": alu("i16", "u16 i16", lambda a, b: b >> (a & U32(15)).astype(np.int32)),
    "v_min_u16": alu("u16", "u16 u16", np.minimum),
    "v_max_u16": alu("u16", "u16 u16", np.maximum),
    "v_min_i16": alu("i16", "i16 i16", np.minimum),
    "v_max_i16": alu("i16", "i16 i16", np.maximum),
}

_OF_THREE: dict[str, Callable[[Array, Array, Array], Array]] = {
    "min3": lambda a, b, c: np.minimum(np.minimum(a, b), c),
    "max3": lambda a, b, c: np.maximum(np.maximum(a, b), c),
    "med3": lambda a, b, c: np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c)),
}
for _kind in ("u16", "i16", "u32", "i32"):
    for _name, _function in _OF_THREE.items():
        INTEGER[f"v_{_name}_{_kind}"] = alu(_kind, f"{_kind} {_kind} {_kind}", _function)

FLOAT: dict[str, Operation] = {
    "v_fma_f32": alu("f32", "f32 f32 f32", fma_f32),
    "v_fmac_f32": alu("f32", "f32 f32 f32", fma_f32, updates=True),
    "v_fmaak_f32": _literal_multiply_add(fma_f32),
    "v_fmamk_f32": _literal_multiply_add(fma_f32),
    "v_mad_f32": alu("f32", "f32 f32 f32", multiply_add_flushed),
    "v_mac_f32": alu("f32", "f32 f32 f32", multiply_add_flushed, updates=True),
    "v_madak_f32": _literal_multiply_add(multiply_add_flushed),
    "v_madmk_f32": _literal_multiply_add(multiply_add_flushed),
    "v_mul_legacy_f32": alu("f32", "f32 f32", _multiply_legacy),
    "v_max3_f32": alu("f32", "f32 f32 f32", lambda a, b, c: np.fmax(np.fmax(a, b), c)),
    "v_min3_f32": alu("f32", "f32 f32 f32", lambda a, b, c: np.fmin(np.fmin(a, b), c)),
    "v_med3_f32": alu("f32", "f32 f32 f32", median),
    "v_maximum3_f32": alu("f32", "f32 f32 f32", lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    "v_minimum3_f32": alu("f32", "f32 f32 f32", lambda a, b, c: np.minimum(np.minimum(a, b), c)),
    "v_ldexp_f32": alu("f32", "f32 i32", _ldexp),
    "v_frexp_mant_f32": alu("f32", "f32", lambda a: np.frexp(a)[0]),
    "v_frexp_exp_i32_f32": alu("i32", "f32", lambda a: np.where(np.isfinite(a), np.frexp(a)[1], 0).astype(np.int32)),
    "v_rcp_iflag_f32": alu("f32", "f32", lambda a: 1 / a),
    "v_sin_f32": alu("f32", "f32", _turns(np.sin)),
    "v_cos_f32": alu("f32", "f32", _turns(np.cos)),
    "v_fma_f64": alu("f64", "f64 f64 f64", lambda a, b, c: a * b + c),
    "v_fmac_f64": alu("f64", "f64 f64 f64", lambda a, b, c: a * b + c, updates=True),
    "v_ldexp_f64": alu("f64", "f64 i32", lambda a, b: np.ldexp(a, np.clip(b, -4000, 4000).astype(np.int32))),
    "v_fma_f16": alu("f16", "f16 f16 f16", lambda a, b, c: a.astype(np.float64) * b + c),
    "v_fmac_f16": alu("f16", "f16 f16 f16", lambda a, b, c: a.astype(np.float64) * b + c, updates=True),
    "v_max3_f16": alu("f16", "f16 f16 f16", lambda a, b, c: np.fmax(np.fmax(a, b), c)),
    "v_min3_f16": alu("f16", "f16 f16 f16", lambda a, b, c: np.fmin(np.fmin(a, b), c)),
    "v_ldexp_f16": alu("f16", "f16 i16", _ldexp),
}
_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "subrev": lambda a, b: b - a,
    "mul": np.multiply,
    "max": np.fmax,
    "min": np.fmin,
}
_UNARY: dict[str, Callable[[Array], Array]] = {
    "exp": np.exp2,
    "log": np.log2,
    "rcp": lambda a: 1 / a,
    "rsq": _reciprocal_root,
    "sqrt": np.sqrt,
    "rndne": np.rint,
    "floor": np.floor,
    "ceil": np.ceil,
    "trunc": np.trunc,
    "fract": _fract,
}
for _kind in ("f16", "f32", "f64"):
    for _name, _binary in _BINARY.items():
        FLOAT[f"v_{_name}_{_kind}"] = alu(_kind, f"{_kind} {_kind}", _binary)
    for _name, _unary in _UNARY.items():
        FLOAT[f"v_{_name}_{_kind}"] = alu(_kind, _kind, _unary)
for _absent in ("v_sub_f64", "v_subrev_f64", "v_exp_f64", "v_log_f64"):
    del FLOAT[_absent]

_FLOAT_TESTS: dict[str, Callable[[Array, Array], Array]] = {
    "lt": np.less,
    "eq": np.equal,
    "le": np.less_equal,
    "gt": np.greater,
    "lg": lambda a, b: (a < b) | (a > b),
    "ge": np.greater_equal,
    "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "u": lambda a, b: np.isnan(a) | np.isnan(b),
    "nge": lambda a, b: ~(a >= b),
    "nlg": lambda a, b: ~((a < b) | (a > b)),
    "ngt": lambda a, b: ~(a > b),
    "nle": lambda a, b: ~(a <= b),
    "neq": np.not_equal,
    "nlt": lambda a, b: ~(a < b),
}
_INTEGER_TESTS: dict[str, Callable[[Array, Array], Array]] = {
    "lt": np.less,
    "eq": np.equal,
    "le": np.less_equal,
    "gt": np.greater,
    "ne": np.not_equal,
    "ge": np.greater_equal,
}
COMPARE: dict[str, Operation] = {
    "v_cmp_class_f32": _class_test("f32"),
    "v_cmp_class_f64": _class_test("f64"),
}
for _prefix, _writes_exec in (("v_cmp", False), ("v_cmpx", True)):
    for _kind in ("f16", "f32", "f64"):
        for _name, _test in _FLOAT_TESTS.items():
            COMPARE[f"{_prefix}_{_name}_{_kind}"] = compare(_kind, _test, _writes_exec)
    for _kind in ("u16", "i16", "u32", "i32", "u64", "i64"):
        for _name, _test in _INTEGER_TESTS.items():
            COMPARE[f"{_prefix}_{_name}_{_kind}"] = compare(_kind, _test, _writes_exec)
