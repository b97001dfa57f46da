"""Number formats, bit for bit, against torch's own types."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from evenflow.crosscheck.cdna.floats import (
    FP8_KINDS,
    bf16_to_f32,
    f16_to_f32,
    f32_to_bf16,
    f32_to_f16,
    f32_to_f16_toward_zero,
    f32_to_fp8,
    fma_f32,
    fp8_to_f32,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in cast:RuntimeWarning")
ALL_16 = np.arange(1 << 16, dtype=np.uint32)
TORCH_FP8 = {kind: getattr(torch, f"float8_{kind}") for kind in FP8_KINDS}


def same(a, b):
    """Equal bits, every NaN as good as another."""
    return ((a == b) & (np.signbit(a) == np.signbit(b))) | (np.isnan(a) & np.isnan(b))


@pytest.fixture(scope="module")
def samples():
    """Float32 values of every kind: all upper halves, and values just beside them (ties and their neighbours)."""
    bits = np.concatenate([(ALL_16 << 16) + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    return bits.astype(np.uint32).view(np.float32)


def test_bf16_both_ways(samples):
    codes = torch.from_numpy(ALL_16.astype(np.uint16)).view(torch.bfloat16)
    assert same(bf16_to_f32(ALL_16), codes.float().numpy()).all()
    rounded = torch.from_numpy(samples).bfloat16().float().numpy()
    assert same(bf16_to_f32(f32_to_bf16(samples)), rounded).all()


def test_f16_both_ways(samples):
    codes = torch.from_numpy(ALL_16.astype(np.uint16)).view(torch.float16)
    assert same(f16_to_f32(ALL_16), codes.float().numpy()).all()
    with np.errstate(over="ignore"):
        assert same(f16_to_f32(f32_to_f16(samples)), torch.from_numpy(samples).half().float().numpy()).all()


def test_f16_toward_zero_never_grows(samples):
    with np.errstate(over="ignore", invalid="ignore"):
        result = f16_to_f32(f32_to_f16_toward_zero(samples))
        finite = np.isfinite(samples)
        following = np.nextafter(np.abs(result[finite]).astype(np.float16), np.float16(np.inf)).astype(np.float32)
    assert (np.abs(result[finite]) <= np.abs(samples[finite])).all()
    assert (np.abs(samples[finite]) < following).all()


@pytest.mark.parametrize("kind", FP8_KINDS)
def test_fp8_to_float(kind):
    codes = np.arange(256, dtype=np.uint32)
    expected = torch.arange(256, dtype=torch.uint8).view(TORCH_FP8[kind]).float().numpy()
    assert same(fp8_to_f32(codes, kind), expected).all()


@pytest.mark.parametrize("kind", FP8_KINDS)
def test_float_to_fp8_rounds_like_torch(kind, samples):
    # torch saturates e4m3fn and no other kind; there the boundary is checked against the definition.
    result = f32_to_fp8(samples, kind, saturate=False)
    overflows = np.abs(samples) > 464 if kind == "e4m3fn" else np.zeros(samples.shape, bool)
    assert np.isnan(fp8_to_f32(result[overflows], kind)).all()
    expected = torch.from_numpy(samples).to(TORCH_FP8[kind]).float().numpy()
    assert same(fp8_to_f32(result, kind), expected)[~overflows].all()


@pytest.mark.parametrize("kind", FP8_KINDS)
def test_saturation_gives_the_largest_value(kind, samples):
    largest = torch.finfo(TORCH_FP8[kind]).max
    result = fp8_to_f32(f32_to_fp8(samples, kind), kind)
    expected = torch.from_numpy(samples).clamp(-largest, largest).to(TORCH_FP8[kind]).float().numpy()
    assert same(result, expected).all()


def test_fma_rounds_once():
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 20000)).astype(np.float32)
    c = (-a * b * (1 + generator.standard_normal(20000) * 2.0**-24)).astype(np.float32)
    c[::2] *= np.float32(2.0**24)
    assert (fma_f32(a, b, c) == _exact_fma(a, b, c)).all()


def _exact_fma(a, b, c):
    def nearest(x, y, z):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        guess = np.float32(float(exact))
        around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
        return min(around, key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.uint32)) & 1))

    return np.array([nearest(*triple) for triple in zip(a, b, c, strict=True)], np.float32)


def test_fma_does_not_round_twice():
    # The exact sum, 1 + 2**-11 + 2**-24 + 2**-60, is a hair above a tie of float32; float64 loses the hair.
    factor = np.array([1 + 2.0**-12], np.float32)
    hair = np.array([2.0**-60, -(2.0**-60), 0], np.float32)
    expected = np.array([1 + 2.0**-11 + 2.0**-23, 1 + 2.0**-11, 1 + 2.0**-11], np.float32)
    assert (fma_f32(factor, factor, hair) == expected).all()
