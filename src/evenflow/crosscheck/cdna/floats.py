"""Bit-exact number formats: fp16, bf16, four kinds of fp8 and fp4, to and from float32. Owns no instruction.

Every conversion to a narrower format rounds to nearest, ties to even. Codes travel in uint32 arrays, low bits first
used.
"""

from functools import lru_cache
from typing import Any

import numpy as np

# A numpy array. Its type says no more, because numpy's operators lose the dtype under a type checker.
Array = Any

# kind: (exponent bits, mantissa bits, bias, has infinities, has negative zero)
FORMATS = {
    "e4m3fn": (4, 3, 7, False, True),
    "e5m2": (5, 2, 15, True, True),
    "e4m3fnuz": (4, 3, 8, False, False),
    "e5m2fnuz": (5, 2, 16, False, False),
}
FP8_KINDS = tuple(FORMATS)
FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
FP4_VALUES.setflags(write=False)


def _decode_fp8(code: int, kind: str) -> float:
    exponent_bits, mantissa_bits, bias, has_infinity, has_negative_zero = FORMATS[kind]
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = code & ((1 << mantissa_bits) - 1)
    sign = -1.0 if code & 0x80 else 1.0
    if not has_negative_zero and code == 0x80:
        return float("nan")
    if has_infinity and exponent == (1 << exponent_bits) - 1:
        return sign * float("inf") if mantissa == 0 else float("nan")
    if kind == "e4m3fn" and code & 0x7F == 0x7F:
        return float("nan")
    fraction = mantissa / (1 << mantissa_bits)
    if exponent == 0:
        return float(sign * fraction * 2.0 ** (1 - bias))
    return float(sign * (1 + fraction) * 2.0 ** (exponent - bias))


@lru_cache
def fp8_values(kind: str) -> Array:
    """float32 [256]: what each code of this fp8 kind means."""
    values = np.array([_decode_fp8(code, kind) for code in range(256)], np.float32)
    values.setflags(write=False)
    return values


@lru_cache
def _finite_magnitudes(kind: str) -> Array:
    """float64, ascending: the finite values of codes 0 to 127, at the position of their code."""
    values = fp8_values(kind)[:128].astype(np.float64)
    return values[np.isfinite(values)]


def fp8_to_f32(code: Array, kind: str) -> Array:
    """The value of each code; only the low 8 bits of a code count."""
    return fp8_values(kind)[code & np.uint32(0xFF)]


def f32_to_fp8(value: Array, kind: str, saturate: bool = True) -> Array:
    """Codes (uint32) of the nearest representable values; what is too large, infinity included, becomes the largest
    finite value if `saturate`, else infinity (or NaN where the kind has no infinity)."""
    magnitudes = _finite_magnitudes(kind)
    largest = magnitudes[-1]
    value = np.asarray(value, np.float32)
    size = np.abs(value).astype(np.float64)
    # Beyond half a step over the largest value the rounded result is too large to be represented.
    limit = largest + (largest - magnitudes[-2]) / 2
    is_tie_upward = (len(magnitudes) - 1) & 1  # a tie rounds away from an odd code
    is_large = (size >= limit) if is_tie_upward else (size > limit)
    clipped = np.minimum(np.where(np.isnan(size), 0, size), largest)
    above = np.clip(np.searchsorted(magnitudes, clipped), 1, len(magnitudes) - 1)
    below_distance, above_distance = clipped - magnitudes[above - 1], magnitudes[above] - clipped
    rounds_up = (below_distance > above_distance) | ((below_distance == above_distance) & (above % 2 == 0))
    code = np.where(rounds_up, above, above - 1).astype(np.uint32)
    has_infinity, has_negative_zero = FORMATS[kind][3:]
    nan = np.uint32(0x7F if has_negative_zero else 0x80)
    if not saturate:
        code = np.where(is_large, np.uint32(0x7C) if has_infinity else nan, code)
    negative = np.signbit(value) & (has_negative_zero | (code != 0)) & (code != 0x80)
    code = np.where(negative, code | np.uint32(0x80), code)
    return np.where(np.isnan(value), nan | (np.signbit(value) * np.uint32(0x80)), code).astype(np.uint32)


def bf16_to_f32(code: Array) -> Array:
    """bf16 is the upper half of a float32."""
    return np.ascontiguousarray(np.asarray(code, np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(value: Array) -> Array:
    """Codes (uint32); a NaN keeps its sign and becomes quiet."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), (bits >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint32)


def f16_to_f32(code: Array) -> Array:
    """Exact; only the low 16 bits of a code count."""
    halves = np.ascontiguousarray(np.asarray(code, np.uint32).astype(np.uint16))
    return halves.view(np.float16).astype(np.float32)


def f32_to_f16(value: Array) -> Array:
    """Codes (uint32); numpy's cast rounds to nearest even and overflows to infinity. Takes float64 too (one
    rounding)."""
    return np.ascontiguousarray(value).astype(np.float16).view(np.uint16).astype(np.uint32)


def f32_to_f16_toward_zero(value: Array) -> Array:
    """Codes (uint32) of the nearest fp16 value not larger in magnitude; infinity only from infinity."""
    code = f32_to_f16(value)
    too_large = np.abs(f16_to_f32(code)) > np.abs(np.asarray(value, np.float32))
    return np.where(too_large, code - np.uint32(1), code).astype(np.uint32)


def fma_f32(a: Array, b: Array, c: Array, power: Array | None = None) -> Array:
    """(a * b + c) * 2**power rounded once to float32.

    The product is exact in float64 and the sum nearly so. Rounding the sum again to float32 goes wrong only where it
    looks like a tie and is not: there it is rounded to odd first (the last bit remembers that something was lost).
    """
    product = np.asarray(a, np.float32).astype(np.float64) * np.asarray(b, np.float32)
    addend = np.asarray(c, np.float32).astype(np.float64)
    total = np.atleast_1d(product + addend)
    bits = total.view(np.int64)
    result = total if power is None else np.ldexp(total, power)
    looks_like_tie = (bits & 0x1FFFFFFF) == 0x10000000
    is_denormal = (np.abs(result) < np.finfo(np.float32).tiny) & (result != 0)
    if not (looks_like_tie | is_denormal).any():
        return result.astype(np.float32)
    part = total - product
    error = (product - (total - part)) + (addend - part)  # Knuth's two-sum: total + error is exact
    inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    inward = (error > 0) == (total > 0)
    odd = np.where(inexact, bits + np.where(inward, 1, -1), bits).view(np.float64)
    return (odd if power is None else np.ldexp(odd, power)).astype(np.float32)
