"""Conversion and packed instructions, over all 2**16 and all 256 codes where a format has so few."""

import numpy as np
import pytest
import torch
from snippets import WAVES, execute, fetch, lanes_of, machine

from evenflow.crosscheck.cdna.floats import f32_to_bf16, f32_to_fp8, fp8_to_f32

ALL_16 = np.arange(1 << 16, dtype=np.uint32).reshape(1024, 64)
KINDS = {"gfx942": ("e4m3fnuz", "e5m2fnuz"), "gfx950": ("e4m3fn", "e5m2")}
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in cast:RuntimeWarning")


def same(a, b):
    return (((a == b) & (np.signbit(a) == np.signbit(b))) | (np.isnan(a) & np.isnan(b))).all()


def run(text, registers, arch="gfx950", waves=1024):
    return execute(text, registers, machine(arch, waves))


def test_every_half_to_float_and_back():
    state = run("v_cvt_f32_f16 v2, v1\nv_cvt_f16_f32 v3, v2", {"v1": ALL_16})
    halves = torch.from_numpy(ALL_16.astype(np.uint16)).view(torch.float16)
    assert same(fetch(state, "v2", np.float32), halves.float().numpy())
    back = fetch(state, "v3").astype(np.uint16).view(np.float16)
    assert same(back, halves.numpy())


def test_every_bfloat_to_float():
    state = run("v_cvt_f32_bf16 v2, v1", {"v1": ALL_16})
    expected = torch.from_numpy(ALL_16.astype(np.uint16)).view(torch.bfloat16).float().numpy()
    assert same(fetch(state, "v2", np.float32), expected)


@pytest.fixture(scope="module")
def floats():
    """Float32 of every exponent, with mantissas on and around ties."""
    return (ALL_16 << 16) | np.resize(np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32), ALL_16.shape)


def test_packing_two_floats(floats):
    other = np.roll(floats, 1)
    text = "v_cvt_pk_bf16_f32 v3, v1, v2\nv_cvt_pk_f16_f32 v4, v1, -v2\nv_cvt_pkrtz_f16_f32 v5, v1, v2"
    state = run(text, {"v1": floats, "v2": other})
    low, high = (torch.from_numpy(bits.copy()).view(torch.float32) for bits in (floats, other))
    packed = fetch(state, "v3")
    assert same((packed << 16).view(np.float32), low.bfloat16().float().numpy())
    assert same((packed & 0xFFFF0000).view(np.float32), high.bfloat16().float().numpy())
    packed = fetch(state, "v4")
    assert same((packed & 0xFFFF).astype(np.uint16).view(np.float16), low.half().numpy())
    assert same((packed >> 16).astype(np.uint16).view(np.float16), (-high).half().numpy())
    toward_zero = (fetch(state, "v5") & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float32)
    finite = np.isfinite(low.numpy())
    assert (np.abs(toward_zero[finite]) <= np.abs(low.numpy()[finite])).all()


@pytest.mark.parametrize("arch", KINDS)
@pytest.mark.parametrize("name", ["fp8", "bf8"])
def test_every_fp8_code_to_float(arch, name):
    kind = KINDS[arch][name == "bf8"]
    codes = np.arange(256, dtype=np.uint32).reshape(4, 64)
    registers = {"v1": codes | np.roll(codes, 1) << 8 | np.roll(codes, 2) << 16 | np.roll(codes, 3) << 24}
    text = (
        f"v_cvt_pk_f32_{name} v[2:3], v1\nv_cvt_pk_f32_{name}_sdwa v[4:5], v1 src0_sel:WORD_1\nv_cvt_f32_{name} v6, v1"
    )
    state = run(text, registers, arch, 4)
    for place, register in enumerate(("v2", "v3", "v4", "v5")):
        assert same(fetch(state, register, np.float32), fp8_to_f32(np.roll(codes, place), kind)), register
    assert same(fetch(state, "v6", np.float32), fp8_to_f32(codes, kind))


@pytest.mark.parametrize("arch", KINDS)
@pytest.mark.parametrize("name", ["fp8", "bf8"])
@pytest.mark.parametrize("saturates", [False, True])
def test_floats_to_fp8(arch, name, saturates, floats):
    kind = KINDS[arch][name == "bf8"]
    mode = "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), 1\n" if saturates else ""
    text = f"{mode}v_cvt_pk_{name}_f32 v3, v1, v2\nv_cvt_pk_{name}_f32 v3, v2, v1 op_sel:[0,0,1]"
    state = run(text, {"v1": floats, "v2": np.roll(floats, 1), "v3": 0xFFFFFFFF}, arch)
    low = f32_to_fp8(floats.view(np.float32), kind, saturate=saturates)
    high = f32_to_fp8(np.roll(floats, 1).view(np.float32), kind, saturate=saturates)
    assert (fetch(state, "v3") == (low | high << 8 | high << 16 | low << 24)).all()


def test_scaled_conversions_multiply_and_divide_by_a_power_of_two():
    values = np.random.default_rng(0).standard_normal((2, WAVES, 64)).astype(np.float32)
    text = """
        v_cvt_scalef32_pk_fp8_f32 v3, v1, v2, 4.0
        v_cvt_scalef32_pk_f32_fp8 v[4:5], v3, 4.0
        v_cvt_scalef32_pk_bf16_fp8 v6, v3, 2.0
    """
    state = execute(text, {"v1": values[0], "v2": values[1], "v3": 0}, arch="gfx950")
    codes = f32_to_fp8(values / 4, "e4m3fn")
    assert (fetch(state, "v3") & 0xFFFF == (codes[0] | codes[1] << 8)).all()
    assert (fetch(state, "v5", np.float32) == fp8_to_f32(codes[1], "e4m3fn") * 4).all()
    assert (fetch(state, "v6") & 0xFFFF == f32_to_bf16(fp8_to_f32(codes[0], "e4m3fn") * 2)).all()


def test_overflow_of_halves_follows_the_mode():
    values = lanes_of(1e6, -1e6, np.inf, -np.inf, 1.0).astype(np.float32)
    state = execute("v_cvt_f16_f32 v2, v1", {"v1": values})
    assert fetch(state, "v2")[0, :5].tolist() == [0x7C00, 0xFC00, 0x7C00, 0xFC00, 0x3C00]
    state = execute("s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), 1\nv_cvt_f16_f32 v2, v1", {"v1": values})
    assert fetch(state, "v2")[0, :5].tolist() == [0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x3C00]


def test_integers_and_floats():
    ints = lanes_of(0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 16777217)
    text = "v_cvt_f32_i32 v2, v1\nv_cvt_f32_u32 v3, v1\nv_cvt_f32_ubyte2 v4, v1\nv_cvt_f64_i32 v[6:7], v1"
    state = execute(text, {"v1": ints})
    unsigned = ints.astype(np.uint32)
    assert (fetch(state, "v2", np.float32) == unsigned.view(np.int32).astype(np.float32)).all()
    assert (fetch(state, "v3", np.float32) == unsigned.astype(np.float32)).all()
    assert (fetch(state, "v4", np.float32) == (unsigned >> 16 & 255)).all()
    assert (fetch(state, "v[6:7]", np.float64) == unsigned.view(np.int32)).all()


def test_floats_to_integers_clamp():
    floats = lanes_of(0.0, -1.9, 1.9, 3e9, -3e9, 5e9, np.nan, np.inf, -np.inf).astype(np.float32)
    state = execute("v_cvt_i32_f32 v2, v1\nv_cvt_u32_f32 v3, v1", {"v1": floats})
    assert fetch(state, "v2", np.int32)[0, :9].tolist() == [
        0,
        -1,
        1,
        2**31 - 1,
        -(2**31),
        2**31 - 1,
        0,
        2**31 - 1,
        -(2**31),
    ]
    assert fetch(state, "v3")[0, :9].tolist() == [0, 0, 1, 3000000000, 0, 2**32 - 1, 0, 2**32 - 1, 0]


PAIRS = {
    "v_pk_add_f16": (np.float16, lambda a, b: a + b),
    "v_pk_mul_f16": (np.float16, lambda a, b: a * b),
    "v_pk_max_f16": (np.float16, np.fmax),
    "v_pk_min_f16": (np.float16, np.fmin),
    "v_pk_add_u16": (np.uint16, lambda a, b: a + b),
    "v_pk_sub_i16": (np.uint16, lambda a, b: a - b),
    "v_pk_mul_lo_u16": (np.uint16, lambda a, b: a * b),
    "v_pk_max_i16": (np.int16, np.maximum),
    "v_pk_min_u16": (np.uint16, np.minimum),
    "v_pk_lshlrev_b16": (np.uint16, lambda a, b: b << (a & 15)),
    "v_pk_lshrrev_b16": (np.uint16, lambda a, b: b >> (a & 15)),
    "v_pk_ashrrev_i16": (np.int16, lambda a, b: b >> (a & 15)),
}


def halves(bits, dtype):
    return np.ascontiguousarray(bits).view(np.uint16).reshape(*bits.shape, 2).view(dtype)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    ("selection", "a_low", "a_high"), [("", 0, 1), (" op_sel:[1,0] op_sel_hi:[0,1]", 1, 0), (" op_sel_hi:[0,1]", 0, 0)]
)
def test_two_halves(name, selection, a_low, a_high):
    dtype, function = PAIRS[name]
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 1 << 32, (2, WAVES, 64), dtype=np.uint64).astype(np.uint32)
    if dtype is np.float16:
        bits = generator.standard_normal((2, WAVES, 64, 2)).astype(np.float16).view(np.uint32)[..., 0]
    state = execute(f"{name} v3, v1, v2{selection}", {"v1": bits[0], "v2": bits[1]})
    a, b = halves(bits[0], dtype), halves(bits[1], dtype)
    expected = np.stack([function(a[..., a_low], b[..., 0]), function(a[..., a_high], b[..., 1])], axis=-1)
    assert (halves(fetch(state, "v3"), dtype) == expected.astype(dtype)).all()


def test_saturating_pairs_and_constants():
    state = execute(
        "v_pk_sub_u16 v2, v1, s3 clamp\nv_pk_add_f16 v4, v5, 1.0 op_sel_hi:[1,0]",
        {"v1": 0x00050001, "s3": 0x00020003, "v5": 0x3C004000},
    )
    assert fetch(state, "v2")[0, 0] == 0x00030000
    assert fetch(state, "v4")[0, 0] == 0x40004200


def test_pairs_of_floats():
    values = np.random.default_rng(0).standard_normal((4, WAVES, 64)).astype(np.float32)
    registers = dict(zip(("v2", "v3", "v4", "v5"), values, strict=True))
    text = """
        v_pk_mul_f32 v[8:9], v[2:3], v[4:5] op_sel_hi:[0,1]
        v_pk_add_f32 v[10:11], v[2:3], v[4:5] neg_lo:[0,1] neg_hi:[0,1]
        v_pk_fma_f32 v[12:13], v[2:3], v[4:5], 1.0 op_sel_hi:[1,1,0]
        v_pk_mov_b32 v[14:15], v[2:3], v[4:5] op_sel:[1,0]
    """
    state = execute(text, registers)
    a0, a1, b0, b1 = values
    for register, expected in {
        "v8": a0 * b0,
        "v9": a0 * b1,
        "v10": a0 - b0,
        "v11": a1 - b1,
        "v14": a1,
        "v15": b0,
    }.items():
        assert (fetch(state, register, np.float32) == expected).all(), register
    assert (fetch(state, "v13", np.float32) == (a1.astype(np.float64) * b1 + 1).astype(np.float32)).all()


def test_mixed_precision():
    values = np.random.default_rng(0).standard_normal((3, WAVES, 64)).astype(np.float32)
    half = values[1].astype(np.float16)
    bits = half.view(np.uint16).astype(np.uint32) << 16
    registers = {"v1": values[0], "v2": bits, "v3": values[2], "v5": 0xAAAAAAAA, "v6": 0xAAAAAAAA}
    text = """
        v_fma_mix_f32 v4, v1, v2, v3 op_sel:[0,1,0] op_sel_hi:[0,1,0]
        v_fma_mixlo_f16 v5, v1, v2, -v3 op_sel:[0,1,0] op_sel_hi:[0,1,0]
        v_fma_mixhi_f16 v6, v1, v2, |v3| op_sel:[0,1,0] op_sel_hi:[0,1,0]
    """
    state = execute(text, registers)
    product = values[0].astype(np.float64) * half

    def rounded(value):
        return value.astype(np.float32).astype(np.float16).view(np.uint16).astype(np.uint32)

    assert (fetch(state, "v4", np.float32) == (product + values[2]).astype(np.float32)).all()
    assert (fetch(state, "v5") == (rounded(product - values[2]) | 0xAAAA0000)).all()
    assert (fetch(state, "v6") >> 16 == rounded(product + np.abs(values[2]))).all()
    assert (fetch(state, "v6") & 0xFFFF == 0xAAAA).all()


def test_pack_halves():
    state = execute(
        "v_pack_b32_f16 v3, v1, v2\nv_pack_b32_f16 v4, v1, v2 op_sel:[1,0]", {"v1": 0x11112222, "v2": 0x33334444}
    )
    assert fetch(state, "v3")[0, 0] == 0x44442222
    assert fetch(state, "v4")[0, 0] == 0x44441111
