"""The interpreter against exact arithmetic: casts of every bfloat16 and 8-bit float, arithmetic, compare, fma, dot."""

from fractions import Fraction

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the interpreter is Triton's")

import triton
import triton.language as tl
from interpreter import interpreted
from triton.runtime.errors import InterpreterError

FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
ALL_BFLOAT16 = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@triton.jit
def _double(x):
    return x + x


@triton.jit
def _cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, z_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y, z = tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(z_ptr + i)
    tl.store(out_ptr + i, x + y)
    tl.store(out_ptr + N + i, x - y)
    tl.store(out_ptr + 2 * N + i, x * y)
    tl.store(out_ptr + 3 * N + i, x / y)
    tl.store(out_ptr + 4 * N + i, -x)
    tl.store(out_ptr + 5 * N + i, tl.abs(x))
    tl.store(out_ptr + 6 * N + i, tl.where(x < y, x, y))
    tl.store(out_ptr + 7 * N + i, tl.maximum(x, y).to(x.dtype))
    tl.store(out_ptr + 8 * N + i, _double(x))
    tl.store(out_ptr + 9 * N + i, tl.fma(x, y, z))


@triton.jit
def _compare_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, (x < y).to(tl.int32) + 2 * (x <= y).to(tl.int32) + 4 * (x == y).to(tl.int32))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr, tl.max(x, 0))
    tl.store(out_ptr + 1, tl.sum(x.to(tl.float32), 0))
    tl.store(out_ptr + 2, tl.argmax(x, 0))


@triton.jit
def _low_sum_kernel(x_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, N)), 0))


@triton.jit
def _add_kernel(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr + tl.arange(0, N), x + x)


@triton.jit
def _loop_kernel(out_ptr, num):
    """Counters, early return, comparison of scalars, a loop to a run-time bound, a function of triton's."""
    if tl.program_id(0) > 1:
        return
    total = 0
    for i in range(num):
        total += i
    tl.store(out_ptr + tl.program_id(0), total + tl.cdiv(num, 4))


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(x.numel(), dtype=dtype)
    _cast_kernel[(1,)](x, out, N=x.numel())
    return out


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, but for the payload of NaN."""
    assert found.dtype == expected.dtype
    assert torch.equal(found.float().isnan(), expected.float().isnan())
    is_number = ~expected.float().isnan()
    assert torch.equal(bits(found)[is_number], bits(expected)[is_number])


def nearest(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The finite code of an 8-bit type whose value is nearest, by comparison with all; of two the even one."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    numbers = codes.double()
    finite = codes[numbers.isfinite()]
    order = finite.double()
    distance = (torch.from_numpy(values).double()[:, None] - order[None, :]).abs()
    is_odd = bits(finite).int() & 1
    is_negative = torch.from_numpy(np.signbit(values))
    is_other_zero = (order == 0)[None, :] & (torch.signbit(order)[None, :] != is_negative[:, None])
    if int((order == 0).sum()) == 1:  # one zero for both signs
        is_other_zero = torch.zeros_like(is_other_zero)
    best = distance.min(1, keepdim=True).values
    is_best = (distance == best) & ~is_other_zero
    score = torch.where(is_best, is_odd, 9)
    return finite.view(torch.uint8)[score.argmin(1)].view(dtype)


def random_floats(num: int) -> torch.Tensor:
    """float32 of every magnitude, with the halfway cases of bfloat16 and their neighbours, infinities and NaN."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (num,), generator=generator, dtype=torch.int64).to(torch.int32)
    patterns[::4] = patterns[::4] & ~0xFFFF | 0x8000
    patterns[1::8] = patterns[1::8] & ~0xFFFF | 0x7FFF
    patterns[2::8] = patterns[2::8] & ~0xFFFF | 0x8001
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.4e38, 1e-45, -1e-40])
    return torch.cat([patterns.view(torch.float32), special, torch.zeros(num - len(special))])


def test_bfloat16_widens_exactly():
    assert_same(cast(ALL_BFLOAT16, torch.float32), ALL_BFLOAT16.float())
    assert torch.equal(cast(ALL_BFLOAT16, torch.float64).nan_to_num(), ALL_BFLOAT16.double().nan_to_num())


def test_float32_rounds_to_the_nearest_bfloat16():
    x = random_floats(1 << 16)
    assert_same(cast(x, torch.bfloat16), x.to(torch.bfloat16))


def test_float64_rounds_once():
    """1 + 2^-8 is halfway between two bfloat16; a little more or less is not, though float32 cannot tell."""
    tie = 1 + 2.0**-8
    little = 2.0**-40
    values = [tie, tie + little, tie - little, -tie - little, 1e300, 0.0, 2.0**-134 * (1 + little), 0.0]
    x = torch.tensor(values, dtype=torch.float64)
    up = 1 + 2.0**-7
    expected = torch.tensor([1.0, up, 1.0, -up, float("inf"), 0.0, 2.0**-133, 0.0], dtype=torch.bfloat16)
    assert_same(cast(x, torch.bfloat16), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
def test_bfloat16_to_and_from_others(dtype):
    x = ALL_BFLOAT16[ALL_BFLOAT16.float().abs() < 30000]
    x = torch.nn.functional.pad(x, (0, 65536 - len(x)))
    assert_same(cast(x, dtype), x.to(dtype))
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(-30000, 30000, (4096,), generator=generator).to(dtype)
    assert_same(cast(y, torch.bfloat16), y.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("wide", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_eight_bit_floats_widen_exactly(dtype, wide):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    assert_same(cast(codes, wide), codes.float().to(wide))


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_eight_bit_floats_are_the_nearest(dtype, source):
    """Also of all ties; what is too large becomes the largest."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    values = values[values.isfinite()].unique()
    ties = (values[1:] + values[:-1]) / 2
    near = torch.cat([ties.nextafter(torch.tensor(1e9)), ties.nextafter(torch.tensor(-1e9))])
    x = torch.cat([values, ties, near, values * 1.01, torch.tensor([1e6, -1e6, -1e-30])])
    x = torch.nn.functional.pad(x, (0, 2048 - len(x))).to(source)
    x = x.where(x.isfinite(), 0)
    assert_same(cast(x, dtype), nearest(x.double().numpy(), dtype))
    assert cast(torch.full((16,), float("nan"), dtype=source), dtype).float().isnan().all()


def test_bfloat16_arithmetic_rounds_once():
    """Against exact rationals rounded once, by way of torch for the plain ones."""
    x, y, z = (random_floats(2048)[:2048].roll(i * 7).to(torch.bfloat16) for i in range(3))
    out = torch.empty(10, 2048, dtype=torch.bfloat16)
    _arithmetic_kernel[(1,)](x, y, z, out, N=2048)
    larger = torch.fmax(x.float(), y.float()).to(torch.bfloat16)
    expected = [x + y, x - y, x * y, x / y, -x, x.abs(), torch.where(x < y, x, y), larger, x + x]
    for found, wanted in zip(out, expected, strict=False):
        assert_same(found + 0, wanted + 0)  # of fmax(-0, 0) either zero will do
    for a, b, c, found in zip(x.tolist(), y.tolist(), z.tolist(), out[9].tolist(), strict=True):
        if all(np.isfinite([a, b, c])):
            assert found == rounded(Fraction(a) * Fraction(b) + Fraction(c))


def rounded(exact: Fraction) -> float:
    """To bfloat16, by the definition: 8 bits of mantissa, at least 2^-133 apart, ties to even."""
    if exact == 0:
        return 0.0
    exponent = max(_exponent(abs(exact)), -126)
    unit = Fraction(2) ** (exponent - 7)
    value = round(exact / unit) * unit  # Python rounds ties to even
    return float(value) if abs(value) < 2**128 else float("inf") * (1 if exact > 0 else -1)


def _exponent(value: Fraction) -> int:
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= value else exponent - 1


def test_fma_rounds_once_where_float64_would_not():
    """1.0 * (1 + 2^-8) is a tie for bfloat16: the smallest addend decides, though float64 cannot hold the sum."""
    x = torch.tensor([1 + 2.0**-4] * 16, dtype=torch.bfloat16)
    y = torch.tensor([1 + 2.0**-4 - 2.0**-7] * 16, dtype=torch.bfloat16)
    z = torch.tensor([2.0**-100, -(2.0**-100)] * 8, dtype=torch.bfloat16)
    out = torch.empty(10, 16, dtype=torch.bfloat16)
    _arithmetic_kernel[(1,)](x, y, z, out, N=16)
    for a, b, c, found in zip(x.tolist(), y.tolist(), z.tolist(), out[9].tolist(), strict=True):
        assert found == rounded(Fraction(a) * Fraction(b) + Fraction(c))


def test_bfloat16_compares_by_value():
    x, y = random_floats(2048)[:2048].to(torch.bfloat16), random_floats(2048)[:2048].roll(5).to(torch.bfloat16)
    y[::3] = x[::3]
    out = torch.empty(2048, dtype=torch.int32)
    _compare_kernel[(1,)](x, y, out, N=2048)
    assert torch.equal(out, (x < y).int() + 2 * (x <= y).int() + 4 * (x == y).int())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *FP8[:3]], ids=str)
def test_dot_accumulates_exact_products(dtype):
    """Integers and eighths: every partial sum is exact in float32, in any order."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (32, 32), generator=generator).float().div(8).to(dtype) for _ in range(2))
    out = torch.empty(32, 32)
    _dot_kernel[(1,)](a, b, out, N=32)
    assert torch.equal(out.double(), a.double() @ b.double())


def test_reductions_of_bfloat16():
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    out = torch.empty(3)
    _reduce_kernel[(1,)](x, out, N=64)
    assert out[0] == x.float().max()
    assert abs(out[1].double() - x.double().sum()) < 1e-5
    assert out[2] == (x == x.max()).nonzero()[0]  # the first of equals


@pytest.mark.parametrize(
    ("kernel", "dtype", "message"),
    [
        (_low_sum_kernel, torch.bfloat16, "sum in float32"),
        (_low_sum_kernel, torch.float8_e4m3fn, "sum in float32"),
        (_add_kernel, torch.float8_e4m3fn, "convert first"),
    ],
)
def test_what_has_no_exact_meaning_is_refused(kernel, dtype, message):
    with pytest.raises(InterpreterError, match=message):
        kernel[(1,)](torch.ones(16).to(dtype), torch.ones(16).to(dtype), N=16)


def test_control_flow():
    out = torch.zeros(4, dtype=torch.int32)
    _loop_kernel[(4,)](out, 10)
    assert out.tolist() == [48, 48, 0, 0]


def test_nothing_stays_behind():
    """Outside, the same function compiles or fails for want of a GPU, and triton.language is as it was."""
    before = {name: value for name, value in vars(tl).items() if callable(value)}
    core = dict(vars(tl.core))
    with interpreted():
        _loop_kernel[(1,)](torch.zeros(4, dtype=torch.int32), 3)
    assert {name: value for name, value in vars(tl).items() if callable(value)} == before
    assert dict(vars(tl.core)) == core
