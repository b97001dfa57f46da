"""Scalar instructions against plain Python integers, with SCC."""

import numpy as np
import pytest
from snippets import WAVES, execute, fetch, machine

EDGES = [0, 1, 2, 31, 32, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFE, 0xFFFFFFFF, 0x12345678, 0xDEADBEEF]
M32, M64 = (1 << 32) - 1, (1 << 64) - 1


def s32(value):
    return value - (1 << 32) if value >> 31 else value


def s64(value):
    return value - (1 << 64) if value >> 63 else value


def cases(width=32):
    """Pairs of edge values and random ones, a few waves at a time."""
    generator = np.random.default_rng(1)
    values = [*EDGES, *(int(v) for v in generator.integers(0, 1 << 32, 6))]
    if width == 64:
        values += [value << 32 | other for value, other in zip(values, reversed(values), strict=True)]
    pairs = [(a, b) for a in values for b in values[:: 1 if width == 32 else 3]]
    while len(pairs) % 24:
        pairs.append((0, 0))
    return pairs


def run(text, a, b, scc, a_name="s2", b_name="s4", d_name="s6"):
    """One instruction on many waves, one pair of values in each: (results, SCC)."""
    state = machine(waves=len(a))
    state = execute(
        text,
        {a_name: np.array(a, object).astype(np.uint64), b_name: np.array(b, object).astype(np.uint64), "scc": scc},
        state,
    )
    return [int(v) for v in fetch(state, d_name)], [bool(v) for v in state.scc]


def carry_add(a, b, scc):
    return (a + b + scc) & M32, a + b + scc > M32


def signed_result(value, low, high):
    return value & M32, not low <= value <= high


I32 = (-(1 << 31), (1 << 31) - 1)
# instruction: Python's definition, (a, b, scc) -> (result, scc)
BINARY = {
    "s_add_u32": lambda a, b, c: ((a + b) & M32, a + b > M32),
    "s_addc_u32": carry_add,
    "s_sub_u32": lambda a, b, c: ((a - b) & M32, b > a),
    "s_subb_u32": lambda a, b, c: ((a - b - c) & M32, b + c > a),
    "s_add_i32": lambda a, b, c: signed_result(s32(a) + s32(b), *I32),
    "s_sub_i32": lambda a, b, c: signed_result(s32(a) - s32(b), *I32),
    "s_mul_i32": lambda a, b, c: ((a * b) & M32, c),
    "s_mul_hi_u32": lambda a, b, c: (a * b >> 32, c),
    "s_mul_hi_i32": lambda a, b, c: ((s32(a) * s32(b) >> 32) & M32, c),
    "s_min_i32": lambda a, b, c: (min(a, b, key=s32), s32(a) < s32(b)),
    "s_max_u32": lambda a, b, c: (max(a, b), a > b),
    "s_absdiff_i32": lambda a, b, c: (abs(s32(a) - s32(b)) & M32, a != b),
    "s_and_b32": lambda a, b, c: (a & b, a & b != 0),
    "s_or_b32": lambda a, b, c: (a | b, a | b != 0),
    "s_xor_b32": lambda a, b, c: (a ^ b, a != b),
    "s_andn2_b32": lambda a, b, c: (a & ~b & M32, a & ~b & M32 != 0),
    "s_orn2_b32": lambda a, b, c: ((a | ~b) & M32, (a | ~b) & M32 != 0),
    "s_nand_b32": lambda a, b, c: (~(a & b) & M32, a & b != M32),
    "s_nor_b32": lambda a, b, c: (~(a | b) & M32, a | b != M32),
    "s_xnor_b32": lambda a, b, c: (~(a ^ b) & M32, ~(a ^ b) & M32 != 0),
    "s_lshl_b32": lambda a, b, c: ((a << (b & 31)) & M32, (a << (b & 31)) & M32 != 0),
    "s_lshr_b32": lambda a, b, c: (a >> (b & 31), a >> (b & 31) != 0),
    "s_ashr_i32": lambda a, b, c: ((s32(a) >> (b & 31)) & M32, s32(a) >> (b & 31) != 0),
    "s_lshl1_add_u32": lambda a, b, c: ((2 * a + b) & M32, 2 * a + b > M32),
    "s_lshl4_add_u32": lambda a, b, c: ((16 * a + b) & M32, 16 * a + b > M32),
    "s_cselect_b32": lambda a, b, c: (a if c else b, c),
    "s_pack_ll_b32_b16": lambda a, b, c: (a & 0xFFFF | (b & 0xFFFF) << 16, c),
    "s_pack_lh_b32_b16": lambda a, b, c: (a & 0xFFFF | b & 0xFFFF0000, c),
    "s_pack_hh_b32_b16": lambda a, b, c: (a >> 16 | b & 0xFFFF0000, c),
    "s_bfm_b32": lambda a, b, c: ((((1 << (a & 31)) - 1) << (b & 31)) & M32, c),
    "s_bfe_u32": lambda a, b, c: (lambda r: (r, r != 0))(a >> (b & 31) & (1 << min(b >> 16 & 127, 32)) - 1),
}
BINARY_64 = {
    "s_and_b64": lambda a, b, c: (a & b, a & b != 0),
    "s_or_b64": lambda a, b, c: (a | b, a | b != 0),
    "s_xor_b64": lambda a, b, c: (a ^ b, a != b),
    "s_andn2_b64": lambda a, b, c: (a & ~b & M64, a & ~b & M64 != 0),
    "s_orn2_b64": lambda a, b, c: ((a | ~b) & M64, (a | ~b) & M64 != 0),
    "s_cselect_b64": lambda a, b, c: (a if c else b, c),
}
SHIFTS_64 = {
    "s_lshl_b64": lambda a, b, c: ((a << (b & 63)) & M64, (a << (b & 63)) & M64 != 0),
    "s_lshr_b64": lambda a, b, c: (a >> (b & 63), a >> (b & 63) != 0),
    "s_ashr_i64": lambda a, b, c: ((s64(a) >> (b & 63)) & M64, s64(a) >> (b & 63) != 0),
}


def check(pairs, results, flags, definition, scc):
    for (a, b), result, flag in zip(pairs, results, flags, strict=True):
        assert (result, flag) == definition(a, b, scc), (hex(a), hex(b), hex(result), flag)


@pytest.mark.parametrize("scc", [False, True])
@pytest.mark.parametrize("name", BINARY)
def test_two_sources(name, scc):
    pairs = cases()
    check(pairs, *run(f"{name} s6, s2, s4", *zip(*pairs, strict=True), scc), BINARY[name], scc)


@pytest.mark.parametrize("name", BINARY_64)
def test_two_wide_sources(name):
    pairs = cases(64)
    outcome = run(f"{name} s[6:7], s[2:3], s[4:5]", *zip(*pairs, strict=True), True, "s[2:3]", "s[4:5]", "s[6:7]")
    check(pairs, *outcome, BINARY_64[name], True)


@pytest.mark.parametrize("name", SHIFTS_64)
def test_wide_shifts(name):
    pairs = [(a, b & 0xFF) for a, b in cases(64)]
    outcome = run(f"{name} s[6:7], s[2:3], s4", *zip(*pairs, strict=True), True, "s[2:3]", "s4", "s[6:7]")
    check(pairs, *outcome, SHIFTS_64[name], True)


def test_signed_bit_field():
    for value, offset, width in [(0xF0, 4, 4), (0x70, 4, 4), (0x80000000, 31, 1), (0xFFFF, 0, 0), (0x1234, 4, 8)]:
        field = value >> offset & (1 << width) - 1
        expected = (field - (1 << width) if width and field >> (width - 1) else field) & M32
        state = execute(f"s_bfe_i32 s6, s2, {offset | width << 16:#x}", {"s2": np.full(WAVES, value)})
        assert fetch(state, "s6")[0] == expected
        assert state.scc[0] == (expected != 0)


UNARY = {
    "s_not_b32": lambda a: (~a & M32, ~a & M32 != 0),
    "s_brev_b32": lambda a: (int(f"{a:032b}"[::-1], 2), None),
    "s_abs_i32": lambda a: (abs(s32(a)), a != 0),
    "s_sext_i32_i8": lambda a: (((a & 0xFF ^ 0x80) - 0x80) & M32, None),
    "s_sext_i32_i16": lambda a: (((a & 0xFFFF ^ 0x8000) - 0x8000) & M32, None),
    "s_ff1_i32_b32": lambda a: ((a & -a).bit_length() - 1 & M32, None),
    "s_flbit_i32_b32": lambda a: (32 - a.bit_length() if a else M32, None),
    "s_bcnt1_i32_b32": lambda a: (bin(a).count("1"), a != 0),
    "s_bcnt0_i32_b32": lambda a: (32 - bin(a).count("1"), a != M32),
    "s_mov_b32": lambda a: (a, None),
}


@pytest.mark.parametrize("name", UNARY)
def test_one_source(name):
    values = [value for value, _ in cases()[:24]] + EDGES
    results, flags = run(f"{name} s6, s2", values, values, True)
    for value, result, flag in zip(values, results, flags, strict=True):
        expected, scc = UNARY[name](value)
        assert (result, flag) == (expected, True if scc is None else scc), hex(value)


COMPARES = {
    "eq": lambda a, b: a == b,
    "lg": lambda a, b: a != b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
}


@pytest.mark.parametrize("kind", ["u32", "i32"])
@pytest.mark.parametrize("name", COMPARES)
def test_compares(name, kind):
    pairs = cases()
    _, flags = run(f"s_cmp_{name}_{kind} s2, s4", *zip(*pairs, strict=True), False)
    view = s32 if kind == "i32" else int
    assert flags == [COMPARES[name](view(a), view(b)) for a, b in pairs]


def test_compare_with_a_constant():
    values = [0, 5, 0xFFFFFFFB, 0xFFFB, 0x7FFFFFFF]
    _, flags = run("s_cmpk_eq_i32 s2, 0xfffb", values, values, False)
    assert flags == [False, False, True, False, False]  # the constant is -5
    _, flags = run("s_cmpk_eq_u32 s2, 0xfffb", values, values, False)
    assert flags == [False, False, False, True, False]


def test_constants_of_16_bits():
    state = execute("s_movk_i32 s6, 0x8000\ns_movk_i32 s7, 0x7fff", {})
    assert fetch(state, "s6")[0] == 0xFFFF8000
    assert fetch(state, "s7")[0] == 0x7FFF
    state = execute("s_addk_i32 s6, 0x7f", {"s6": np.array([1, 0x7FFFFFFF, 0xFFFFFFFF])})
    assert fetch(state, "s6").tolist() == [0x80, 0x8000007E, 0x7E]
    assert state.scc.tolist() == [False, True, False]  # signed overflow
    state = execute("s_mulk_i32 s6, 0xffff", {"s6": np.array([1, 2, 3])})
    assert fetch(state, "s6").tolist() == [M32, M32 - 1, M32 - 2]


def test_bits():
    state = execute("s_bitset1_b32 s6, s2\ns_bitset0_b32 s7, s2", {"s2": np.array([0, 5, 37]), "s6": 0, "s7": M32})
    assert fetch(state, "s6").tolist() == [1, 32, 32]
    assert fetch(state, "s7").tolist() == [M32 - 1, M32 - 32, M32 - 32]
    assert execute("s_bitcmp1_b32 s6, 5", {"s6": np.array([32, 31, 33])}).scc.tolist() == [True, False, True]
    assert execute("s_bitcmp0_b32 s6, 5", {"s6": np.array([32, 31, 33])}).scc.tolist() == [False, True, False]


def test_conditional_move_keeps_the_old_value():
    state = execute("s_cmov_b32 s6, s2", {"s6": 1, "s2": 2, "scc": np.array([True, False, True])})
    assert fetch(state, "s6").tolist() == [2, 1, 2]


@pytest.mark.parametrize(
    ("name", "combine"),
    [
        ("and", lambda s, e: s & e),
        ("or", lambda s, e: s | e),
        ("andn2", lambda s, e: s & ~e & M64),
        ("xor", lambda s, e: s ^ e),
    ],
)
def test_saveexec(name, combine):
    masks, before = [0, 0xFF00FF, M64], [M64, 0xFFFF, 0xF0]
    text = f"s_{name}_saveexec_b64 s[6:7], s[2:3]"
    state = execute(text, {"exec": np.array(before, np.uint64), "s[2:3]": np.array(masks, np.uint64)})
    expected = [combine(s, e) for s, e in zip(masks, before, strict=True)]
    assert fetch(state, "s[6:7]").tolist() == before
    assert fetch(state, "exec").tolist() == expected
    assert state.scc.tolist() == [value != 0 for value in expected]
    assert [int(row.sum()) for row in state.exec] == [bin(value).count("1") for value in expected]


def test_a_write_to_half_of_exec_takes_effect():
    state = execute("s_mov_b32 exec_lo, 3", {})
    assert state.exec[0].nonzero()[0].tolist() == [0, 1, *range(32, 64)]
