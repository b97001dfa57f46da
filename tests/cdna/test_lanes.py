"""Moves between lanes and parts of registers: DPP, SDWA, permutes, swaps, readlane."""

import numpy as np
import pytest
from snippets import WAVES, execute, fetch

LANE = np.arange(64)
VALUES = LANE + 100 * np.arange(1, WAVES + 1)[:, None]
M64 = (1 << 64) - 1


def shifted(control, count):
    """Source lane of each lane by looping over lanes, -1 for none."""
    rows = [list(range(row, row + 16)) for row in range(0, 64, 16)]
    result = []
    for lane in range(64):
        row, place = rows[lane // 16], lane % 16
        source = {
            "row_shl": row[place + count] if place + count < 16 else -1,
            "row_shr": row[place - count] if place >= count else -1,
            "row_ror": row[(place - count) % 16],
            "row_newbcast": row[count],
        }[control]
        result.append(source)
    return result


@pytest.mark.parametrize("control", ["row_shl", "row_shr", "row_ror", "row_newbcast"])
@pytest.mark.parametrize("count", [1, 4, 8, 15])
def test_row_moves(control, count):
    sources = shifted(control, count)
    text = f"v_mov_b32_dpp v2, v1 {control}:{count} row_mask:0xf bank_mask:0xf"
    state = execute(f"{text} bound_ctrl:1\n{text.replace('v2', 'v3')}", {"v1": VALUES, "v2": 7, "v3": 7})
    for lane, source in enumerate(sources):
        assert fetch(state, "v2")[1, lane] == (VALUES[1, source] if source >= 0 else 0)
        assert fetch(state, "v3")[1, lane] == (VALUES[1, source] if source >= 0 else 7)


NAMED = {
    "quad_perm:[1,0,3,2]": LANE ^ 1,
    "quad_perm:[2,3,0,1]": LANE ^ 2,
    "quad_perm:[0,0,0,0]": LANE & ~3,
    "row_mirror": LANE ^ 15,
    "row_half_mirror": LANE ^ 7,
    "wave_ror:1": (LANE - 1) % 64,
    "wave_rol:1": (LANE + 1) % 64,
}


@pytest.mark.parametrize("control", NAMED)
def test_lane_patterns(control):
    state = execute(f"v_add_u32_dpp v2, v1, v3 {control} row_mask:0xf bank_mask:0xf", {"v1": VALUES, "v3": 1000})
    assert (fetch(state, "v2") == VALUES[:, NAMED[control]] + 1000).all()


def test_row_broadcasts_reduce_a_wave():
    """The steps by which a compiler adds all 64 lanes: the sum ends in lane 63."""
    text = "".join(
        f"v_add_u32_dpp v1, v1, v1 {step} bank_mask:0xf bound_ctrl:1\n"
        for step in (
            "row_shr:1 row_mask:0xf",
            "row_shr:2 row_mask:0xf",
            "row_shr:4 row_mask:0xf",
            "row_shr:8 row_mask:0xf",
        )
    )
    text += "v_mov_b32 v2, 0\nv_mov_b32_dpp v2, v1 row_bcast:15 row_mask:0xa bank_mask:0xf\nv_add_u32 v1, v1, v2\n"
    text += "v_mov_b32 v2, 0\nv_mov_b32_dpp v2, v1 row_bcast:31 row_mask:0xc bank_mask:0xf\nv_add_u32 v1, v1, v2\n"
    state = execute(text, {"v1": VALUES})
    assert (fetch(state, "v1")[:, 63] == VALUES.sum(1)).all()


def test_masked_rows_and_banks_are_not_written():
    state = execute("v_mov_b32_dpp v2, v1 row_newbcast:3 row_mask:0x5 bank_mask:0x2", {"v1": VALUES, "v2": 7})
    changed = (fetch(state, "v2")[0] != 7).nonzero()[0].tolist()
    assert changed == [4, 5, 6, 7, 36, 37, 38, 39]
    # bound_ctrl fills lanes without a source, and leaves the masked ones alone.
    state = execute("v_mov_b32_dpp v2, v1 row_shr:6 row_mask:0x5 bank_mask:0x2 bound_ctrl:1", {"v1": VALUES, "v2": 7})
    assert fetch(state, "v2")[0, :10].tolist() == [7, 7, 7, 7, 0, 0, VALUES[0, 0], VALUES[0, 1], 7, 7]


def test_a_source_lane_that_is_idle():
    registers = {"v1": VALUES, "v2": 7, "v3": 7, "exec": np.full(WAVES, M64 ^ 1, np.uint64)}
    text = "v_mov_b32_dpp v2, v1 quad_perm:[0,0,2,3] row_mask:0xf bank_mask:0xf"
    state = execute(f"{text}\n{text.replace('v2', 'v3')} bound_ctrl:1", registers)
    assert fetch(state, "v2")[0, :4].tolist() == [7, 7, VALUES[0, 2], VALUES[0, 3]]
    assert fetch(state, "v3")[0, :4].tolist() == [7, 0, VALUES[0, 2], VALUES[0, 3]]


def test_sub_dword_operands():
    text = """
        v_and_b32_sdwa v3, v1, v2 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1 src1_sel:DWORD
        v_or_b32_sdwa v4, v1, v2 dst_sel:BYTE_1 dst_unused:UNUSED_PAD src0_sel:BYTE_0 src1_sel:BYTE_3
        v_add_u32_sdwa v5, v1, v2 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:BYTE_2 src1_sel:WORD_0
        v_add_u32_sdwa v6, sext(v1), v2 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:BYTE_3 src1_sel:WORD_0
        v_cvt_f32_f16_sdwa v7, v1 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1
        v_cmp_eq_u16_sdwa s[4:5], v1, v2 src0_sel:BYTE_0 src1_sel:DWORD
    """
    state = execute(text, {"v1": 0xC4123444, "v2": 0x8899AA44, "v5": 0x11112222})
    assert fetch(state, "v3")[0, 0] == 0xC412 & 0x8899AA44
    assert fetch(state, "v4")[0, 0] == (0x44 | 0x88) << 8
    assert fetch(state, "v5")[0, 0] == (0x12 + 0xAA44) << 16 | 0x2222
    assert fetch(state, "v6")[0, 0] == 0xAA44 + 0xC4 - 0x100
    assert fetch(state, "v7", np.float32)[0, 0] == np.uint16(0xC412).view(np.float16)
    assert fetch(state, "s[4:5]")[0] == 0  # 0x44 and 0xAA44


def test_read_and_write_lanes():
    state = execute(
        "v_readlane_b32 s4, v1, 63\nv_readlane_b32 s5, v1, s2\nv_writelane_b32 v1, s5, 3",
        {"v1": VALUES, "s2": np.array([5, 6, 64 + 7])},
    )
    assert fetch(state, "s4").tolist() == VALUES[:, 63].tolist()
    assert fetch(state, "s5").tolist() == [VALUES[0, 5], VALUES[1, 6], VALUES[2, 7]]
    assert fetch(state, "v1")[:, 3].tolist() == [VALUES[0, 5], VALUES[1, 6], VALUES[2, 7]]


def test_the_first_lane_that_executes():
    state = execute("v_readfirstlane_b32 s4, v1", {"v1": VALUES, "exec": np.array([M64, 0xF00, 0], np.uint64)})
    assert fetch(state, "s4").tolist() == [VALUES[0, 0], VALUES[1, 8], VALUES[2, 0]]


def test_lane_numbers():
    state = execute("v_mbcnt_lo_u32_b32 v1, -1, 0\nv_mbcnt_hi_u32_b32 v1, -1, v1", {})
    assert (fetch(state, "v1") == LANE).all()
    state = execute("v_mbcnt_lo_u32_b32 v1, s2, 5\nv_mbcnt_hi_u32_b32 v1, s3, v1", {"s2": 0x80000001, "s3": 0x2})
    mask = 0x2_80000001
    assert (fetch(state, "v1")[0] == [5 + bin(mask & (1 << lane) - 1).count("1") for lane in range(64)]).all()


@pytest.mark.parametrize("width", [16, 32])
def test_permlane_swaps(width):
    state = execute(f"v_permlane{width}_swap_b32 v1, v2", {"v1": VALUES, "v2": VALUES + 5000}, arch="gfx950")
    first, second = VALUES.copy(), VALUES + 5000
    for row in range(width, 64, 2 * width):
        for lane in range(row, row + width):
            first[:, lane], second[:, lane - width] = VALUES[:, lane - width] + 5000, VALUES[:, lane]
    assert (fetch(state, "v1") == first).all()
    assert (fetch(state, "v2") == second).all()


def test_pull_and_push():
    address = (LANE * 7 % 64) * 4
    state = execute(
        "ds_bpermute_b32 v3, v2, v1\nds_permute_b32 v4, v2, v1\nds_bpermute_b32 v5, v2, v1 offset:4",
        {"v1": VALUES, "v2": address},
    )
    assert (fetch(state, "v3") == VALUES[:, LANE * 7 % 64]).all()
    pushed = np.empty_like(VALUES)
    pushed[:, LANE * 7 % 64] = VALUES
    assert (fetch(state, "v4") == pushed).all()
    assert (fetch(state, "v5") == VALUES[:, (LANE * 7 + 1) % 64]).all()


SWIZZLES = {
    "offset:swizzle(SWAP,16)": LANE ^ 16,
    "offset:swizzle(REVERSE,8)": LANE ^ 7,
    "offset:swizzle(BROADCAST,4,1)": (LANE & ~3) + 1,
    "offset:swizzle(QUAD_PERM,3,2,1,0)": LANE ^ 3,
    'offset:swizzle(BITMASK_PERM,"00ppi")': (LANE & 32) + (LANE & 7 ^ 1),
    f"offset:{0x1F | 5 << 10}": LANE ^ 5,
    f"offset:{0x1C | 1 << 5 | 14 << 10}": (LANE & 32) + (((LANE & 0x1C) | 1) ^ 14),
    f"offset:{0x8000 | 0b00011011}": LANE ^ 3,
}


@pytest.mark.parametrize("offset", SWIZZLES)
def test_swizzles(offset):
    assert (
        fetch(execute(f"ds_swizzle_b32 v2, v1 {offset}", {"v1": VALUES}), "v2") == VALUES[:, SWIZZLES[offset]]
    ).all()
