"""Division: the three steps between which a compiler puts its Newton iterations, for float32 and float64.

`v_div_scale` brings the operands into a range where the iterations neither overflow nor lose denormal bits,
`v_div_fmas` is the last iteration and undoes the scale, `v_div_fixup` decides the special cases.
"""

from dataclasses import dataclass

import numpy as np

from evenflow.crosscheck.cdna.access import lane_mask, reader, writer
from evenflow.crosscheck.cdna.floats import Array, fma_f32
from evenflow.crosscheck.cdna.machine import Machine
from evenflow.crosscheck.cdna.operands import VCC, parse_operand
from evenflow.crosscheck.cdna.operation import Operation, Run, expect
from evenflow.crosscheck.cdna.parser import Instruction


@dataclass(frozen=True)
class _Format:
    kind: str
    mantissa_bits: int
    exponent_mask: int
    scale: int  # the power of two by which operands are scaled
    far: int  # exponents so far apart give a quotient near the largest number
    tiny: int  # a numerator with a biased exponent up to this loses bits
    underflow: int
    overflow: int


SINGLE = _Format("f32", 23, 0xFF, 64, 96, 23, -150, 128)
# Half precision is divided in float32; only its special cases are looked at, and those have no limits of exponents.
HALF = _Format("f16", 23, 0xFF, 0, 0, 0, -1000, 1000)
DOUBLE = _Format("f64", 52, 0x7FF, 128, 768, 53, -1075, 1024)


def _exponent(value: Array, form: _Format) -> Array:
    """The biased exponent, int64."""
    bits = np.ascontiguousarray(value).view(np.uint64 if form is DOUBLE else np.uint32)
    return (bits >> bits.dtype.type(form.mantissa_bits)).astype(np.int64) & form.exponent_mask


def _is_denormal(value: Array) -> Array:
    return (value != 0) & (np.abs(value) < np.finfo(value.dtype).tiny)


def scale_operand(form: _Format, value: Array, denominator: Array, numerator: Array) -> tuple[Array, Array]:
    """(value scaled, whether the quotient must be scaled back). value is one of the other two, with the same bits."""
    distance = _exponent(numerator, form) - _exponent(denominator, form)
    inverse_denormal, quotient_denormal = _is_denormal(1 / denominator), _is_denormal(numerator / denominator)
    is_denominator, is_numerator = value == denominator, value == numerator
    cases = [
        (numerator == 0) | (denominator == 0),
        distance >= form.far,
        _is_denormal(denominator),
        inverse_denormal & quotient_denormal,
        inverse_denormal,
        quotient_denormal,
        _exponent(numerator, form) <= form.tiny,
    ]
    up = np.full(cases[0].shape, form.scale)
    # Scaling a denominator up whose inverse is denormal would overflow: the fourth case must mean down.
    powers = [0, up * is_denominator, up, -up * is_denominator, -up, up * is_numerator, up]
    scaled = np.ldexp(value, np.select(cases, powers, 0).astype(np.int32))
    scaled = np.where(cases[0], np.array(np.nan, value.dtype), scaled)
    return scaled, np.select(cases, [False, True, False, True, False, True, False], False)


def fix_up(form: _Format, quotient: Array, denominator: Array, numerator: Array) -> Array:
    """The quotient with its sign, or what the special case asks for."""
    dtype = quotient.dtype.type
    sign = np.where(np.signbit(numerator) ^ np.signbit(denominator), dtype(-1), dtype(1))
    distance = _exponent(numerator, form) - _exponent(denominator, form)
    zero, infinite = sign * dtype(0), sign * dtype(np.inf)
    cases = {
        "nan numerator": (np.isnan(numerator), numerator),
        "nan denominator": (np.isnan(denominator), denominator),
        "0 / 0": ((numerator == 0) & (denominator == 0), np.full(1, -np.nan, dtype)),
        "inf / inf": (np.isinf(numerator) & np.isinf(denominator), np.full(1, -np.nan, dtype)),
        "large": ((denominator == 0) | np.isinf(numerator), infinite),
        "small": (np.isinf(denominator) | (numerator == 0), zero),
        "underflow": (distance < form.underflow, zero),
        # Not in the manuals' list; here the iterations before give NaN, and IEEE asks for infinity.
        "overflow": (distance > form.overflow, infinite),
    }
    conditions, values = zip(*cases.values(), strict=True)
    return np.select(conditions, values, sign * np.abs(quotient)).astype(quotient.dtype)


def _div_scale(form: _Format) -> Operation:
    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, 5)
        value, denominator, numerator = (reader(operand, form.kind) for operand in operands[2:])
        write, write_mask = writer(instruction, operands[0], form.kind), writer(instruction, operands[1], "mask")

        def run(machine: Machine) -> None:
            arrays = (machine.broadcast(read(machine)) for read in (value, denominator, numerator))
            scaled, is_scaled = scale_operand(form, *arrays)
            write(machine, scaled)
            write_mask(machine, is_scaled)

        return run

    return Operation(bind, num_destinations=2)


def _div_fmas(form: _Format) -> Operation:
    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, 4)
        a, b, c = (reader(operand, form.kind) for operand in operands[1:])
        write, is_scaled = writer(instruction, operands[0], form.kind), lane_mask(parse_operand("vcc"))
        middle = form.exponent_mask // 2

        def run(machine: Machine) -> None:
            addend = c(machine)
            power = np.where(_exponent(addend, form) > middle, form.scale, -form.scale)
            power = np.where(is_scaled(machine), power, 0).astype(np.int32)
            if form is SINGLE:
                write(machine, fma_f32(a(machine), b(machine), addend, power))
            else:
                write(machine, np.ldexp(a(machine) * b(machine) + addend, power))

        return run

    return Operation(bind, reads=(VCC, VCC + 1))


def _div_fixup(form: _Format) -> Operation:
    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, 4)
        readers = [reader(operand, form.kind) for operand in operands[1:]]
        write = writer(instruction, operands[0], form.kind)
        return lambda machine: write(machine, fix_up(form, *[machine.broadcast(read(machine)) for read in readers]))

    return Operation(bind)


DIVIDE: dict[str, Operation] = {
    "v_div_scale_f32": _div_scale(SINGLE),
    "v_div_fmas_f32": _div_fmas(SINGLE),
    "v_div_fixup_f32": _div_fixup(SINGLE),
    "v_div_fixup_f16": _div_fixup(HALF),
    "v_div_scale_f64": _div_scale(DOUBLE),
    "v_div_fmas_f64": _div_fmas(DOUBLE),
    "v_div_fixup_f64": _div_fixup(DOUBLE),
}
