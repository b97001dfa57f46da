"""Assembly text: what is understood, and that everything else is an error which names the thing and its line."""

import numpy as np
import pytest

from evenflow.crosscheck.cdna.decode import OPERATIONS, decode
from evenflow.crosscheck.cdna.errors import AssemblyError
from evenflow.crosscheck.cdna.launch import RegisterLayout
from evenflow.crosscheck.cdna.operands import parse_operand, parse_operands
from evenflow.crosscheck.cdna.parser import parse
from evenflow.crosscheck.cdna.run import run_kernel

ADD_ONE = """
	.amdgcn_target "amdgcn-amd-amdhsa--gfx942"
	.text
	.globl	add_one
	.p2align	8
add_one:                                ; @add_one
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	s_load_dword s4, s[0:1], 0x8           ; the number to add
	s_waitcnt lgkmcnt(0)
	v_lshlrev_b32_e32 v1, 2, v0
	global_load_dword v2, v1, s[2:3]
	s_cmp_eq_u32 s4, 0
	s_cbranch_scc1 .LBB0_2
	s_waitcnt vmcnt(0)
	v_add_u32_e32 v2, s4, v2
	global_store_dword v1, v2, s[2:3]
.LBB0_2:
	s_endpgm
	.section	.rodata,"a",@progbits
	.amdhsa_kernel add_one
		.amdhsa_kernarg_size 12
		.amdhsa_user_sgpr_kernarg_segment_ptr 1
		.amdhsa_user_sgpr_count 2
		.amdhsa_system_sgpr_workgroup_id_x 1
		.amdhsa_float_denorm_mode_32 3
		.amdhsa_next_free_vgpr 3
	.end_amdhsa_kernel
	.text
	.amdgpu_metadata
---
amdhsa.kernels:
  - .agpr_count:     0
    .args:
      - .address_space:  global
        .offset:         0
        .size:           8
        .value_kind:     global_buffer
      - .offset:         8
        .size:           4
        .value_kind:     by_value
    .name:           add_one
...
	.end_amdgpu_metadata
	.section	.debug_info,"",@progbits
	.long	whatever
"""


def test_a_whole_kernel():
    kernel = parse(ADD_ONE, "gfx942")
    assert kernel.name == "add_one"
    assert [(item.offset, item.size, item.is_pointer) for item in kernel.arguments] == [(0, 8, True), (8, 4, False)]
    assert kernel.instructions[6].target == 10
    assert str(kernel.instructions[0]) == "line 7: s_load_dwordx2 s[2:3], s[0:1], 0x0"
    data = np.arange(64, dtype=np.int32)
    run_kernel(ADD_ONE, "gfx942", (1, 1, 1), [data, 5], num_warps=1)
    assert (data == np.arange(64) + 5).all()


BARRIER = """
	v_readfirstlane_b32 s4, v0
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	v_mov_b32 v1, 0
	v_lshlrev_b32 v3, 2, v0
	s_cmp_eq_u32 s4, 0
	s_cbranch_scc1 .LBB0_2
.LBB0_1:
	s_waitcnt lgkmcnt(0)
	s_barrier
	ds_read_b32 v2, v1
	s_waitcnt lgkmcnt(0)
	global_store_dword v3, v2, s[2:3]
	s_endpgm
.LBB0_2:
	v_mov_b32 v2, 42
	ds_write_b32 v1, v2
	s_branch .LBB0_1
"""


def test_waves_wait_at_a_barrier():
    """Wave 0 writes behind all other code, so that only the barrier keeps the other waves from reading first."""
    text = BARRIER + ADD_ONE[ADD_ONE.index("\t.section\t.rodata") :]
    data = np.zeros(256, np.int32)
    report = run_kernel(text, "gfx942", (1, 1, 1), [data, 0], num_warps=4, shared_bytes=4)
    assert (data == 42).all()
    assert report.counts["s_barrier"] == 4


def test_a_strided_view_shares_its_storage():
    data = np.arange(256, dtype=np.int32)
    run_kernel(ADD_ONE, "gfx942", (1, 1, 1), [data[128:192], 1], num_warps=1)
    assert (data == np.arange(256) + ((np.arange(256) >= 128) & (np.arange(256) < 192))).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("v_add_u32_e32 v2", "v_add_u128_e32 v2"), "line 15: .*instruction v_add_u128_e32 is not implemented"),
        (("s[2:3]\n\ts_cmp", "s[2:3] th:3\n\ts_cmp"), "line 11: .*modifier th:3: not implemented"),
        (("s[2:3]\n\ts_cmp", "s[2:3] offen\n\ts_cmp"), "line 11: .*modifier offen is not implemented for global_load"),
        (("v1, 2, v0", "v1, 2, ttmp3"), "line 10: .*operand ttmp3: cannot be understood"),
        (("v1, 2, v0", "v1, 2, v256"), "line 10: .*operand v256: no such registers"),
        (("v1, 2, v0", "v1, 2"), "line 10: .*v_lshlrev_b32 takes 3 operands"),
        (("v2, v1, s[2:3]\n\ts_cmp", "v[2:3], v1, s[2:3]\n\ts_cmp"), "line 11: .*1 registers of kind v are needed"),
        (("scc1 .LBB0_2", "scc1 .LBB0_3"), "line 13: .*label .LBB0_3 is not defined"),
        ((".globl", ".warp"), "line 4: directive .warp is not implemented"),
        (("_next_free_vgpr 3", "_shared_vgpr_count 3"), "line 26: kernel descriptor entry shared_vgpr_count"),
        (("denorm_mode_32 3", "denorm_mode_32 0"), "line 25: kernel descriptor entry float_denorm_mode_32 0"),
        (("by_value", "image"), "argument at offset 8: value kind image"),
        (("--gfx942", "--gfx950"), "line 2: the text is for gfx950, not for gfx942"),
        (("vmcnt(0)", "vscnt(0)"), r"line 14: .*operand vscnt\(0\)"),
    ],
)
def test_what_is_not_understood_is_named(change, message):
    assert change[0] in ADD_ONE
    with pytest.raises(AssemblyError, match=message):
        decode(parse(ADD_ONE.replace(*change), "gfx942"))


def test_unknown_architecture():
    with pytest.raises(AssemblyError, match="gfx1100: not one of gfx90a, gfx942, gfx950"):
        parse(ADD_ONE, "gfx1100")


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ([np.zeros(4), 1, 2], {}, "takes 2 arguments, 3 were given"),
        ([np.zeros(4)], {}, "takes 2 arguments, 1 were given"),
        ([5, 1], {}, "must be a numpy array or a CPU tensor, not int"),
        ([np.zeros(4), 1 << 32], {}, "4294967296 does not fit 4 bytes"),
        ([np.zeros(4), "x"], {}, "offset 8 is a number, not str"),
        ([np.zeros(4), 1], {"num_warps": 17}, "num_warps 17"),
        ([np.zeros(4), 1], {"grid": (1, 0, 1)}, "grid"),
    ],
)
def test_bad_arguments(args, options, message):
    grid = options.pop("grid", (1, 1, 1)) if options else (1, 1, 1)
    with pytest.raises((ValueError, TypeError), match=message):
        run_kernel(ADD_ONE, "gfx942", grid, args, **{"num_warps": 1, **options})


def test_operands():
    assert (parse_operand("v[4:7]").index, parse_operand("v[4:7]").count) == (4, 4)
    assert (parse_operand("a3").kind, parse_operand("a3").index) == ("v", 259)
    assert (parse_operand("vcc_hi").index, parse_operand("m0").index) == (107, 124)
    both = parse_operand("-|v3|")
    assert (both.negate, both.absolute, both.index) == (True, True, 3)
    assert parse_operand("-1.5").constant("f32")[0] == np.float32(-1.5).view(np.uint32)
    assert parse_operand("1.0").constant("f16")[0] == 0x3C00
    assert parse_operand("1.0").constant("u16")[0] == 0x3F800000
    assert parse_operand("-1").constant("u64")[0] == (1 << 64) - 1
    assert parse_operand("0xffffffff").constant("u64")[0] == 0xFFFFFFFF
    assert parse_operand("1e-05").value == 1e-5
    with pytest.raises(AssemblyError, match="a 32-bit literal as a double"):
        parse_operand("0x3ff00000").constant("f64")


def test_modifiers():
    operands, modifiers = parse_operands("v1, v2, -v3 op_sel:[0,1] quad_perm:[1,0,3,2] offset:0x10 clamp")
    assert [operand.text for operand in operands] == ["v1", "v2", "-v3"]
    assert modifiers == {"op_sel": [0, 1], "quad_perm": [1, 0, 3, 2], "offset": 16, "clamp": True}


def test_registers_at_the_start_follow_the_descriptor():
    kernel = parse(ADD_ONE, "gfx942")
    assert RegisterLayout.of(kernel).workgroup == (2, -1, -1)
    kernel.descriptor.update(
        user_sgpr_private_segment_buffer=1,
        user_sgpr_dispatch_ptr=1,
        user_sgpr_flat_scratch_init=1,
        user_sgpr_count=10,
        system_sgpr_workgroup_id_z=1,
        system_sgpr_private_segment_wavefront_offset=1,
    )
    layout = RegisterLayout.of(kernel)
    assert (layout.scratch_descriptor, layout.arguments) == (0, 6)
    assert (layout.workgroup, layout.num_defined) == ((10, -1, 11), 13)


def test_no_table_is_empty_of_names():
    assert len(OPERATIONS) > 800
