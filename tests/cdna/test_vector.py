"""Vector integer and float instructions, EXEC, carries and compares against numpy and Python."""

from fractions import Fraction

import numpy as np
import pytest
from snippets import WAVES, execute, fetch, lanes_of, machine

M32, M64 = (1 << 32) - 1, (1 << 64) - 1
A = lanes_of(0, 1, 2, 31, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x00FFFFFF, 0x01000001, 0x12345678)
B = lanes_of(3, 0xFFFFFFFF, 1, 0x80000000, 5, 0x7FFFFFFF, 0xCAFEBABE)
C = lanes_of(7, 0x55555555, 12, 0, 0xFFFFFFFF)


def s(value, bits=32):
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def each(function, *sources):
    return np.array(
        [[function(*map(int, lane)) for lane in zip(*rows, strict=True)] for rows in zip(*sources, strict=True)], object
    )


INTEGER = {
    "v_add_u32": lambda a, b: a + b,
    "v_sub_u32": lambda a, b: a - b,
    "v_subrev_u32": lambda a, b: b - a,
    "v_and_b32": lambda a, b: a & b,
    "v_or_b32": lambda a, b: a | b,
    "v_xor_b32": lambda a, b: a ^ b,
    "v_xnor_b32": lambda a, b: ~(a ^ b),
    "v_lshlrev_b32": lambda a, b: b << (a & 31),
    "v_lshrrev_b32": lambda a, b: b >> (a & 31),
    "v_ashrrev_i32": lambda a, b: s(b) >> (a & 31),
    "v_min_u32": min,
    "v_max_u32": max,
    "v_min_i32": lambda a, b: min(s(a), s(b)),
    "v_max_i32": lambda a, b: max(s(a), s(b)),
    "v_mul_lo_u32": lambda a, b: a * b,
    "v_mul_hi_u32": lambda a, b: a * b >> 32,
    "v_mul_hi_i32": lambda a, b: s(a) * s(b) >> 32,
    "v_mul_u32_u24": lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "v_mul_i32_i24": lambda a, b: s(a & 0xFFFFFF, 24) * s(b & 0xFFFFFF, 24),
    "v_bcnt_u32_b32": lambda a, b: bin(a).count("1") + b,
    "v_bfm_b32": lambda a, b: ((1 << (a & 31)) - 1) << (b & 31),
    "v_add3_u32": lambda a, b, c: a + b + c,
    "v_lshl_add_u32": lambda a, b, c: (a << (b & 31)) + c,
    "v_add_lshl_u32": lambda a, b, c: (a + b & M32) << (c & 31),
    "v_lshl_or_b32": lambda a, b, c: a << (b & 31) | c,
    "v_and_or_b32": lambda a, b, c: a & b | c,
    "v_or3_b32": lambda a, b, c: a | b | c,
    "v_xad_u32": lambda a, b, c: (a ^ b) + c,
    "v_bfi_b32": lambda a, b, c: a & b | ~a & c,
    "v_bfe_u32": lambda a, b, c: a >> (b & 31) & (1 << (c & 31)) - 1,
    "v_bfe_i32": lambda a, b, c: s(a >> (b & 31) & (1 << (c & 31)) - 1, c & 31) if c & 31 else 0,
    "v_alignbit_b32": lambda a, b, c: (a << 32 | b) >> (c & 31),
    "v_alignbyte_b32": lambda a, b, c: (a << 32 | b) >> 8 * (c & 3),
    "v_mad_u32_u24": lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF) + c,
    "v_min3_u32": min,
    "v_max3_i32": lambda a, b, c: max(s(a), s(b), s(c)),
    "v_max3_i16": lambda a, b, c: max(s(v & 0xFFFF, 16) for v in (a, b, c)) & 0xFFFF,
    "v_min3_u16": lambda a, b, c: min(v & 0xFFFF for v in (a, b, c)),
    "v_med3_i32": lambda a, b, c: sorted((s(a), s(b), s(c)))[1],
    "v_mov_b32": lambda a: a,
    "v_not_b32": lambda a: ~a,
    "v_bfrev_b32": lambda a: int(f"{a:032b}"[::-1], 2),
    "v_ffbh_u32": lambda a: 32 - a.bit_length() if a else -1,
    "v_ffbh_i32": lambda a: (lambda run: 32 - run if run else -1)((a ^ -(a >> 31) & M32).bit_length()),
    "v_ffbl_b32": lambda a: (a & -a).bit_length() - 1,
    "v_add_u16": lambda a, b: a + b & 0xFFFF,
    "v_mul_lo_u16": lambda a, b: a * b & 0xFFFF,
    "v_lshlrev_b16": lambda a, b: b << (a & 15) & 0xFFFF,
    "v_ashrrev_i16": lambda a, b: s(b & 0xFFFF, 16) >> (a & 15) & 0xFFFF,
    "v_max_i16": lambda a, b: max(s(a & 0xFFFF, 16), s(b & 0xFFFF, 16)) & 0xFFFF,
    "v_mad_legacy_u16": lambda a, b, c: a * b + c & 0xFFFF,
    "v_mad_u16": lambda a, b, c: a * b + c & 0xFFFF,
}


@pytest.mark.parametrize("name", INTEGER)
def test_integer(name):
    function = INTEGER[name]
    count = 1 if name in ("v_mov_b32", "v_not_b32", "v_bfrev_b32", "v_ffbh_u32", "v_ffbh_i32", "v_ffbl_b32") else None
    count = count or function.__code__.co_argcount if hasattr(function, "__code__") else (3 if "3_" in name else 2)
    sources = (A, B, C)[:count]
    state = execute(f"{name} v9, {', '.join(('v1', 'v2', 'v3')[:count])}", {"v1": A, "v2": B, "v3": C})
    expected = (each(function, *sources) & M32).astype(np.uint32)
    assert (fetch(state, "v9") == expected).all()


def test_sources_from_scalars_and_constants():
    state = execute(
        "v_add_u32 v9, s3, v1\nv_mul_lo_u32 v8, v1, -3\nv_xor_b32 v7, 0x12345, v1", {"v1": A, "s3": np.arange(WAVES)}
    )
    assert (fetch(state, "v9") == (A + np.arange(WAVES)[:, None] & M32)).all()
    assert (fetch(state, "v8") == (A.astype(np.int64) * -3 & M32)).all()
    assert (fetch(state, "v7") == A ^ 0x12345).all()


def test_accumulation_registers_are_separate():
    state = execute("v_accvgpr_write_b32 a3, v3\nv_mov_b32 v3, 0\nv_accvgpr_read_b32 v4, a3", {"v3": A})
    assert (fetch(state, "v4") == A).all()
    assert (fetch(state, "v3") == 0).all()


def test_idle_lanes_keep_their_values():
    mask = np.array([0, 0xF0F0, M64], np.uint64)
    state = execute("v_mov_b32 v1, 7", {"v1": 1, "exec": mask})
    active = (mask[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert (fetch(state, "v1") == np.where(active, 7, 1)).all()


def test_carry_chain_adds_64_bits():
    wide = np.random.default_rng(0).integers(0, 1 << 63, (2, WAVES, 64), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    text = "v_add_co_u32 v8, vcc, v2, v4\nv_addc_co_u32 v9, vcc, v3, v5, vcc"
    state = execute(text, {"v[2:3]": wide[0], "v[4:5]": wide[1]})
    assert (fetch(state, "v[8:9]") == wide[0] + wide[1]).all()
    carries = wide[0] > wide[0] + wide[1]
    assert [bool(int(m) >> lane & 1) for m in fetch(state, "vcc") for lane in range(64)] == carries.ravel().tolist()
    text = "v_sub_co_u32 v8, s[4:5], v2, v4\nv_subb_co_u32 v9, s[4:5], v3, v5, s[4:5]"
    state = execute(text, {"v[2:3]": wide[0], "v[4:5]": wide[1]})
    assert (fetch(state, "v[8:9]") == wide[0] - wide[1]).all()


def test_carry_of_idle_lanes_is_0():
    state = execute("v_add_co_u32 v8, vcc, -1, v2", {"v2": 5, "exec": np.full(WAVES, 0xFF00, np.uint64)})
    assert (fetch(state, "vcc") == 0xFF00).all()


def test_wide_integers():
    wide = np.random.default_rng(0).integers(0, 1 << 63, (WAVES, 64), dtype=np.uint64) * np.uint64(2)
    registers = {"v[2:3]": wide, "v4": A, "v5": B}
    state = execute("v_lshlrev_b64 v[8:9], v4, v[2:3]", registers)
    assert (fetch(state, "v[8:9]") == (each(lambda a, b: a << (b & 63) & M64, wide, A)).astype(np.uint64)).all()
    state = execute("v_ashrrev_i64 v[8:9], v4, v[2:3]", registers)
    assert (fetch(state, "v[8:9]") == (each(lambda a, b: s(a, 64) >> (b & 63) & M64, wide, A)).astype(np.uint64)).all()
    state = execute("v_lshl_add_u64 v[8:9], v[2:3], 3, v[4:5]", registers)
    expected = each(lambda a, b, c: (a << 3) + (b | c << 32) & M64, wide, A, B).astype(np.uint64)
    assert (fetch(state, "v[8:9]") == expected).all()
    state = execute("v_mad_u64_u32 v[8:9], vcc, v4, v5, v[2:3]", registers)
    assert (fetch(state, "v[8:9]") == each(lambda a, b, c: a * b + c & M64, A, B, wide).astype(np.uint64)).all()
    state = execute("v_mad_i64_i32 v[8:9], vcc, v4, v5, -1", registers)
    assert (fetch(state, "v[8:9]") == each(lambda a, b: s(a) * s(b) - 1 & M64, A, B).astype(np.uint64)).all()


def test_saturating_subtraction():
    state = execute("v_sub_u32 v9, v1, v2 clamp\nv_add_u32 v8, v1, v2 clamp", {"v1": A, "v2": B})
    assert (fetch(state, "v9") == each(lambda a, b: max(a - b, 0), A, B).astype(np.uint32)).all()
    assert (fetch(state, "v8") == each(lambda a, b: min(a + b, M32), A, B).astype(np.uint32)).all()


def test_byte_permutation():
    a, b = 0x88776655, 0x4433A211
    expected = {
        0x03020100: b,
        0x07060504: a,
        0x0C0D0C0D: 0x00FF00FF,
        0x00040105: 0x1155A266,
        0x0B0A0908: 0xFF0000FF,  # signs of bytes 7, 5, 3, 1
        0xFF800C00: 0xFFFF0011,
    }
    for selector, result in expected.items():
        state = execute("v_perm_b32 v9, v1, v2, s3", {"v1": a, "v2": b, "s3": selector})
        assert fetch(state, "v9")[0, 0] == result, hex(selector)


@pytest.mark.parametrize("table", [0x00, 0x80, 0xFE, 0x96, 0xCA, 0xE4, 0xFF, 0x1B])
def test_truth_table(table):
    state = execute(f"v_bitop3_b32 v9, v1, v2, v3 bitop3:{table:#x}", {"v1": A, "v2": B, "v3": C}, arch="gfx950")

    def bits(a, b, c):
        return sum((table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))

    assert (fetch(state, "v9") == each(bits, A, B, C).astype(np.uint32)).all()


def test_select():
    mask = np.array([0, 0xFFFF0000FFFF, M64], np.uint64)
    state = execute(
        "v_cndmask_b32 v9, v1, v2, s[4:5]\nv_cndmask_b32 v8, 0, -v2, vcc",
        {"v1": A, "v2": B, "s[4:5]": mask, "vcc": mask},
    )
    chosen = (mask[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1) == 1
    assert (fetch(state, "v9") == np.where(chosen, B, A)).all()
    assert (fetch(state, "v8") == np.where(chosen, B ^ 0x80000000, 0)).all()


FLOATS = lanes_of(0.0, -0.0, 1.0, -1.5, 3e38, -3e38, 1e-40, np.inf, -np.inf, np.nan, 0.1, -7.25).astype(np.float32)
OTHERS = lanes_of(1.0, 2.5, -0.0, 3e38, np.nan, -np.inf, 0.3).astype(np.float32)
FLOAT = {
    "v_add_f32": np.add,
    "v_sub_f32": np.subtract,
    "v_subrev_f32": lambda a, b: b - a,
    "v_mul_f32": np.multiply,
    "v_max_f32": np.fmax,
    "v_min_f32": np.fmin,
}


def same(a, b):
    return ((a == b) | (np.isnan(a) & np.isnan(b))).all()


@pytest.mark.parametrize("name", FLOAT)
def test_float(name):
    state = execute(f"{name} v9, v1, v2\n{name} v8, |v1|, -v2", {"v1": FLOATS, "v2": OTHERS})
    with np.errstate(all="ignore"):
        assert same(fetch(state, "v9", np.float32), FLOAT[name](FLOATS, OTHERS))
        assert same(fetch(state, "v8", np.float32), FLOAT[name](np.abs(FLOATS), -OTHERS))


def test_half_precision_rounds_once():
    values = np.random.default_rng(0).standard_normal((3, WAVES, 64)).astype(np.float16)
    bits = values.view(np.uint16).astype(np.uint32)
    state = execute("v_mul_f16 v9, v1, v2\nv_fma_f16 v8, v1, v2, v3", {"v1": bits[0], "v2": bits[1], "v3": bits[2]})
    assert (fetch(state, "v9") == (values[0] * values[1]).view(np.uint16)).all()
    exact = values[0].astype(np.float64) * values[1] + values[2]
    assert (fetch(state, "v8") == exact.astype(np.float16).view(np.uint16)).all()


def test_double_precision():
    values = np.random.default_rng(0).standard_normal((2, WAVES, 64))
    state = execute(
        "v_add_f64 v[8:9], v[2:3], -v[4:5]\nv_mul_f64 v[6:7], v[2:3], 0.5", {"v[2:3]": values[0], "v[4:5]": values[1]}
    )
    assert (fetch(state, "v[8:9]", np.float64) == values[0] - values[1]).all()
    assert (fetch(state, "v[6:7]", np.float64) == values[0] / 2).all()


def test_output_modifiers():
    state = execute(
        "v_add_f32 v9, v1, v1 clamp\nv_mul_f32 v8, 1.0, v1 mul:4\nv_mul_f32 v7, 1.0, v1 div:2", {"v1": OTHERS}
    )
    with np.errstate(all="ignore"):
        assert same(fetch(state, "v9", np.float32), np.nan_to_num(np.clip(OTHERS + OTHERS, 0, 1), nan=0))
        assert same(fetch(state, "v8", np.float32), OTHERS * np.float32(4))
        assert same(fetch(state, "v7", np.float32), OTHERS / np.float32(2))


UNARY = {
    "exp": np.exp2,
    "log": np.log2,
    "rcp": lambda x: 1 / x,
    "rsq": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "rndne": np.rint,
    "floor": np.floor,
    "ceil": np.ceil,
    "trunc": np.trunc,
}


@pytest.mark.parametrize("name", UNARY)
def test_float_functions(name):
    values = np.random.default_rng(0).uniform(0.01, 100, (WAVES, 64)).astype(np.float32)
    state = execute(f"v_{name}_f32 v9, v1", {"v1": values})
    expected = UNARY[name](values.astype(np.float64))
    assert (np.abs(fetch(state, "v9", np.float32) - expected) <= np.abs(expected) * 2.0**-23 + 1e-12).all()


def test_sine_takes_turns():
    state = execute(
        "v_sin_f32 v9, v1\nv_cos_f32 v8, v1", {"v1": lanes_of(0.0, 0.25, 0.5, 0.75, 1.0, 1.25).astype(np.float32)}
    )
    assert np.allclose(fetch(state, "v9", np.float32)[0, :6], [0, 1, 0, -1, 0, 1], atol=1e-6)
    assert np.allclose(fetch(state, "v8", np.float32)[0, :6], [1, 0, -1, 0, 1, 0], atol=1e-6)


def test_frexp_and_ldexp_are_inverse():
    text = "v_frexp_mant_f32 v2, v1\nv_frexp_exp_i32_f32 v3, v1\nv_ldexp_f32 v4, v2, v3"
    state = execute(text, {"v1": FLOATS})
    finite = np.isfinite(FLOATS)
    assert (fetch(state, "v4", np.float32)[finite] == FLOATS[finite]).all()


def test_multiply_add_forms():
    values = np.random.default_rng(0).standard_normal((3, WAVES, 64)).astype(np.float32)
    registers = {"v1": values[0], "v2": values[1], "v3": values[2]}
    text = """
        v_fma_f32 v9, v1, -v2, v3
        v_fmac_f32 v3, v1, v2
        v_fmaak_f32 v8, v1, v2, 0x40000000
        v_fmamk_f32 v7, v1, 0x40000000, v2
    """
    state = execute(text, registers)

    def exact(a, b, c):
        return np.float32(float(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))))

    place = (1, 17)
    a, b, c = (value[place] for value in values)
    assert fetch(state, "v9", np.float32)[place] == exact(a, -b, c)
    assert fetch(state, "v3", np.float32)[place] == exact(a, b, c)
    assert fetch(state, "v8", np.float32)[place] == exact(a, b, 2)
    assert fetch(state, "v7", np.float32)[place] == exact(a, 2, b)


def test_unfused_multiply_add_rounds_twice_and_flushes():
    a, b, c = np.float32([1 + 2**-12, 1e-30, 1e-39]), np.float32([1 + 2**-12, 1e-10, 2]), np.float32([-1, 0, 1])
    registers = {name: np.resize(part, (WAVES, 64)) for name, part in zip(("v1", "v2", "v3"), (a, b, c), strict=True)}
    state = execute("v_mad_f32 v9, v1, v2, v3\nv_mac_f32 v3, v1, v2\nv_madmk_f32 v8, v1, 0x40000000, v2", registers)
    expected = np.float32([np.float32(a[0] * b[0]) - 1, 0, 1])
    assert (fetch(state, "v9", np.float32)[0, :3] == expected).all()
    assert (fetch(state, "v3", np.float32)[0, :3] == expected).all()
    assert fetch(state, "v8", np.float32)[0, 0] == a[0] * 2 + b[0]


def test_dot_products():
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 1 << 32, (3, WAVES, 64), dtype=np.uint64).astype(np.uint32)
    text = "v_dot4_i32_i8 v9, v1, v2, v3\nv_dot4_u32_u8 v8, v1, v2, v3\nv_dot4c_i32_i8 v3, v1, v2"
    state = execute(text, {"v1": bits[0], "v2": bits[1], "v3": bits[2]})
    a, b = (part.view(np.int8).reshape(WAVES, 64, 4).astype(np.int64) for part in bits[:2])
    assert (fetch(state, "v9") == ((a * b).sum(-1) + bits[2] & M32)).all()
    assert (fetch(state, "v3") == fetch(state, "v9")).all()
    assert (fetch(state, "v8") == (((a & 255) * (b & 255)).sum(-1) + bits[2] & M32)).all()
    halves = generator.standard_normal((2, WAVES, 64, 2)).astype(np.float16)
    packed = halves.view(np.uint32)[..., 0]
    total = generator.standard_normal((WAVES, 64)).astype(np.float32)
    state = execute(
        "v_dot2_f32_f16 v9, v1, v2, v3\nv_dot2c_f32_f16 v3, v1, v2", {"v1": packed[0], "v2": packed[1], "v3": total}
    )
    expected = ((halves[0].astype(np.float64) * halves[1]).sum(-1) + total).astype(np.float32)
    assert (fetch(state, "v9", np.float32) == expected).all()
    assert (fetch(state, "v3", np.float32) == expected).all()
    bfloats = (halves.astype(np.float32).view(np.uint32) >> 16).astype(np.uint32)
    packed = bfloats[..., 0] | bfloats[..., 1] << 16
    exact = (bfloats << 16).view(np.float32).astype(np.float64)
    state = execute("v_dot2_f32_bf16 v9, v1, v2, 0", {"v1": packed[0], "v2": packed[1]}, arch="gfx950")
    assert (fetch(state, "v9", np.float32) == (exact[0] * exact[1]).sum(-1).astype(np.float32)).all()


def test_special_cases_of_half_division():
    a, b = lanes_of(0x3C00, 0x0000, 0x7C00, 0x3C00, 0x7E00), lanes_of(0xC000, 0x0000, 0xFC00, 0x8000, 0x3C00)
    state = execute("v_div_fixup_f16 v9, v3, v2, v1", {"v1": a, "v2": b, "v3": 0x3800})
    assert fetch(state, "v9")[0, [0, 3]].tolist() == [0xB800, 0xFC00]
    assert ((fetch(state, "v9")[0, [1, 2, 4]] & 0x7FFF) > 0x7C00).all()


def test_division_sequence_is_correctly_rounded():
    """The sequence that LLVM emits for an IEEE division, over all exponents and special values."""
    text = """
        v_div_scale_f32 v3, s[4:5], v2, v2, v1
        v_div_scale_f32 v4, vcc, v1, v2, v1
        v_rcp_f32 v5, v3
        v_fma_f32 v6, -v3, v5, 1.0
        v_fmac_f32 v5, v6, v5
        v_mul_f32 v6, v4, v5
        v_fma_f32 v7, -v3, v6, v4
        v_fmac_f32 v6, v7, v5
        v_fma_f32 v3, -v3, v6, v4
        v_div_fmas_f32 v3, v3, v5, v6
        v_div_fixup_f32 v9, v3, v2, v1
    """
    bits = np.random.default_rng(0).integers(0, 1 << 32, (2, 64, 64), dtype=np.uint64).astype(np.uint32)
    special = np.array([0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 1, 0x7FFFFF, 0x7F7FFFFF], np.uint32)
    bits[0, 0], bits[1, 0] = np.repeat(special, 8), np.tile(special, 8)
    a, b = bits.view(np.float32)
    state = execute(text, {"v1": bits[0], "v2": bits[1]}, machine(waves=64))
    with np.errstate(all="ignore"):
        assert same(fetch(state, "v9", np.float32), a / b)


TESTS = {
    "lt": np.less,
    "eq": np.equal,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@pytest.mark.parametrize("name", [*TESTS, "ne"])
@pytest.mark.parametrize("kind", ["u32", "i32", "u16", "i16", "u64", "i64"])
def test_integer_compares(name, kind):
    bits = int(kind[1:])
    wide = A.astype(np.uint64) << np.uint64(32) | B.astype(np.uint64)
    a, b = (wide, np.roll(wide, 1)) if bits == 64 else (A, B)
    names = ("v[2:3]", "v[4:5]") if bits == 64 else ("v2", "v4")
    state = execute(f"v_cmp_{name}_{kind} vcc, {names[0]}, {names[1]}", {names[0]: a, names[1]: b})

    def test(x, y):
        x, y = (s(v & (1 << bits) - 1, bits) if kind[0] == "i" else v & (1 << bits) - 1 for v in (x, y))
        return x != y if name == "ne" else bool(TESTS[name](x, y))

    assert lanes(fetch(state, "vcc")) == each(test, a, b).ravel().tolist()


def lanes(masks):
    return [bool(int(mask) >> lane & 1) for mask in masks for lane in range(64)]


@pytest.mark.parametrize("name", [*TESTS, "o", "u", "lg", "nlt", "neq", "nle", "ngt", "nge", "nlg"])
def test_float_compares(name):
    state = execute(f"v_cmp_{name}_f32 s[4:5], v1, v2", {"v1": FLOATS, "v2": OTHERS})
    nan = np.isnan(FLOATS) | np.isnan(OTHERS)
    plain = {**TESTS, "lg": lambda a, b: (a != b) & ~nan, "o": lambda a, b: ~nan, "u": lambda a, b: nan}
    expected = plain[name](FLOATS, OTHERS) if name in plain else ~plain[name[1:]](FLOATS, OTHERS)
    assert lanes(fetch(state, "s[4:5]")) == expected.ravel().tolist()


def test_cmpx_narrows_exec():
    state = execute(
        "v_cmpx_gt_u32 vcc, 8, v0\nv_mov_b32 v1, 1",
        {"v0": np.arange(64), "v1": 0, "exec": np.full(WAVES, 0xFFF0, np.uint64)},
    )
    assert (fetch(state, "exec") == 0xF0).all()
    assert fetch(state, "v1")[0].nonzero()[0].tolist() == [4, 5, 6, 7]


def test_float_classes():
    values = np.array([np.nan, -np.inf, -1, -1e-40, -0.0, 0.0, 1e-40, 1, np.inf], np.float32)
    for place, value in enumerate(values, 1):
        state = execute(f"v_cmp_class_f32 vcc, v1, {1 << place:#x}", {"v1": np.full((WAVES, 64), value, np.float32)})
        assert fetch(state, "vcc")[0] == M64, value
        state = execute(
            f"v_cmp_class_f32 vcc, v1, {0x3FF ^ 1 << place:#x}", {"v1": np.full((WAVES, 64), value, np.float32)}
        )
        assert fetch(state, "vcc")[0] == 0, value
