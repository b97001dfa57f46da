"""Conversions between number formats. Owns the instructions; the formats themselves are in `floats`."""

from collections.abc import Callable

import numpy as np

from evenflow.crosscheck.cdna.access import raw32, reader, round_to_f16, select_sources, writer
from evenflow.crosscheck.cdna.floats import (
    Array,
    f32_to_bf16,
    f32_to_f16_toward_zero,
    f32_to_fp8,
    fp8_to_f32,
)
from evenflow.crosscheck.cdna.machine import Machine
from evenflow.crosscheck.cdna.operation import Operation, Run, expect
from evenflow.crosscheck.cdna.parser import Instruction
from evenflow.crosscheck.cdna.vector import alu

HALF, SHIFT16 = np.uint32(0xFFFF), np.uint32(16)
# The two 8-bit formats that each architecture's instructions mean; gfx90a has none of these instructions.
FP8_NAMES = {
    "gfx942": {"fp8": "e4m3fnuz", "bf8": "e5m2fnuz"},
    "gfx950": {"fp8": "e4m3fn", "bf8": "e5m2"},
}


def fp8_kind(architecture: str, name: str) -> str:
    """The format that `fp8` or `bf8` means in this architecture's mnemonics."""
    return FP8_NAMES.get(architecture, FP8_NAMES["gfx950"])[name]


def _to_integer(dtype: type, low_limit: float, high_limit: float) -> Callable[[Array], Array]:
    """Truncates; what does not fit becomes the limit, NaN becomes 0."""

    def convert(value: Array) -> Array:
        whole = np.trunc(value.astype(np.float64))
        clipped = np.clip(np.where(np.isnan(whole), 0, whole), low_limit, high_limit)
        return clipped.astype(np.int64).astype(dtype)

    return convert


def _byte_to_float(place: int) -> Callable[[Array], Array]:
    return lambda bits: ((bits >> np.uint32(8 * place)) & np.uint32(0xFF)).astype(np.float32)


def _pack(low_half: Array, high_half: Array) -> Array:
    return low_half | (high_half << SHIFT16)


def _exponent_scale(bits: Array) -> Array:
    """The power of two in a float32's exponent field, which is all that a scale operand's bits mean."""
    return np.ldexp(np.float32(1), (bits >> np.uint32(23)).astype(np.int32) % 256 - 127)


def _encode(kind: str) -> Callable[[Machine, Array], Array]:
    """How two float32 become 16-bit codes or 8-bit codes of this kind; overflow follows the wave's mode."""
    if kind == "f16":
        return round_to_f16
    if kind == "bf16":
        return lambda machine, value: f32_to_bf16(value)

    def encode(machine: Machine, value: Array) -> Array:
        clamps = machine.clamps_overflow[machine.waves]
        saturated = f32_to_fp8(value, fp8_kind(machine.architecture, kind))
        if clamps.all():
            return saturated
        return np.where(
            clamps[:, None], saturated, f32_to_fp8(value, fp8_kind(machine.architecture, kind), saturate=False)
        )

    return encode


def _pack_16(kind: str) -> Operation:
    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, 3)
        a, b = reader(operands[1], "f32"), reader(operands[2], "f32")
        write, encode = writer(instruction, operands[0], "u32"), _encode(kind)
        return lambda machine: write(machine, _pack(encode(machine, a(machine)), encode(machine, b(machine))))

    return Operation(bind)


def _pack_8(name: str, is_scaled: bool) -> Operation:
    """Two float32 to two 8-bit codes in one half of the destination (op_sel's last bit); the other half stays."""

    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, 4 if is_scaled else 3)
        a, b, old = reader(operands[1], "f32"), reader(operands[2], "f32"), raw32(operands[0])
        scale = raw32(operands[3], "f32") if is_scaled else None
        write, encode = writer(instruction, operands[0], "u32"), _encode(name)
        is_high = bool(instruction.modifiers.get("op_sel", [0])[-1])

        def run(machine: Machine) -> None:
            divisor = _exponent_scale(scale(machine)) if scale else np.float32(1)
            codes = encode(machine, a(machine) / divisor) | (encode(machine, b(machine) / divisor) << np.uint32(8))
            kept = old(machine)
            write(machine, _pack(kept & HALF, codes) if is_high else (kept & ~HALF) | codes)

        return run

    return Operation(bind, merges=True, modifiers=frozenset({"op_sel"}))


def _unpack_8(name: str, result: str, is_scaled: bool) -> Operation:
    """Two 8-bit codes from one half of the source to two float32, or to two 16-bit floats in one register."""

    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, 3 if is_scaled else 2)
        select_sources(instruction, operands[1:2])
        codes = reader(operands[1], "u32")
        scale = raw32(operands[2], "f32") if is_scaled else None
        write = writer(instruction, operands[0], "u64" if result == "f32" else "u32")

        def run(machine: Machine) -> None:
            kind, bits = fp8_kind(machine.architecture, name), codes(machine)
            factor = _exponent_scale(scale(machine)) if scale else np.float32(1)
            pair = [fp8_to_f32(bits >> np.uint32(shift), kind) * factor for shift in (0, 8)]
            if result == "f32":
                both = np.stack(np.broadcast_arrays(*pair), axis=-1)
                write(machine, np.ascontiguousarray(both).view(np.uint64)[..., 0])
            else:
                write(machine, _pack(*[_encode(result)(machine, value) for value in pair]))

        return run

    return Operation(bind, modifiers=frozenset({"op_sel"}))


def _single_8(name: str) -> Operation:
    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, 2)
        select_sources(instruction, operands[1:])
        codes, write = reader(operands[1], "u32"), writer(instruction, operands[0], "f32")
        return lambda machine: write(machine, fp8_to_f32(codes(machine), fp8_kind(machine.architecture, name)))

    return Operation(bind)


CONVERT: dict[str, Operation] = {
    "v_cvt_f32_i32": alu("f32", "i32", lambda a: a.astype(np.float32)),
    "v_cvt_f32_u32": alu("f32", "u32", lambda a: a.astype(np.float32)),
    "v_cvt_f64_i32": alu("f64", "i32", lambda a: a.astype(np.float64)),
    "v_cvt_f64_u32": alu("f64", "u32", lambda a: a.astype(np.float64)),
    "v_cvt_i32_f32": alu("i32", "f32", _to_integer(np.int32, -(2**31), 2**31 - 1)),
    "v_cvt_u32_f32": alu("u32", "f32", _to_integer(np.uint32, 0, 2**32 - 1)),
    "v_cvt_i32_f64": alu("i32", "f64", _to_integer(np.int32, -(2**31), 2**31 - 1)),
    "v_cvt_u32_f64": alu("u32", "f64", _to_integer(np.uint32, 0, 2**32 - 1)),
    "v_cvt_i16_f16": alu("i16", "f16", _to_integer(np.int32, -(2**15), 2**15 - 1)),
    "v_cvt_u16_f16": alu("u16", "f16", _to_integer(np.uint32, 0, 2**16 - 1)),
    "v_cvt_f16_i16": alu("f16", "i16", lambda a: a.astype(np.float32)),
    "v_cvt_f16_u16": alu("f16", "u16", lambda a: a.astype(np.float32)),
    "v_cvt_f32_f64": alu("f32", "f64", lambda a: a.astype(np.float32)),
    "v_cvt_f64_f32": alu("f64", "f32", lambda a: a.astype(np.float64)),
    "v_cvt_f16_f32": alu("f16", "f32", lambda a: a),
    "v_cvt_f32_f16": alu("f32", "f16", lambda a: a),
    "v_cvt_f32_bf16": alu("f32", "bf16", lambda a: a),
    "v_cvt_pkrtz_f16_f32": alu(
        "u32", "f32 f32", lambda a, b: _pack(f32_to_f16_toward_zero(a), f32_to_f16_toward_zero(b))
    ),
    "v_cvt_pk_f16_f32": _pack_16("f16"),
    "v_cvt_pk_bf16_f32": _pack_16("bf16"),
    **{f"v_cvt_f32_ubyte{place}": alu("f32", "u32", _byte_to_float(place)) for place in range(4)},
}
for _name in ("fp8", "bf8"):
    CONVERT[f"v_cvt_f32_{_name}"] = _single_8(_name)
    CONVERT[f"v_cvt_pk_{_name}_f32"] = _pack_8(_name, is_scaled=False)
    CONVERT[f"v_cvt_scalef32_pk_{_name}_f32"] = _pack_8(_name, is_scaled=True)
    CONVERT[f"v_cvt_pk_f32_{_name}"] = _unpack_8(_name, "f32", is_scaled=False)
    for _result in ("f32", "f16", "bf16"):
        CONVERT[f"v_cvt_scalef32_pk_{_result}_{_name}"] = _unpack_8(_name, _result, is_scaled=True)
