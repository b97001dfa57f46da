"""Reading machine code, against what the compilers say of it themselves."""

import re
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="the kernel checks compile")


from evenflow.crosscheck.artefacts import (
    UNTRACED,
    Dot,
    loads_per_argument,
    ptxas_complaints,
    read_amdgcn,
    read_dots,
    read_sass,
)
from evenflow.crosscheck.targets import TARGETS, occupancy

AMD = ("gfx942", "gfx1100")
NVIDIA = ("sm_80", "sm_90")
LABELS = ("copy/fp32", "paged_dot/bf16", "big_dot/64x64")


def comment(assembly: str, name: str) -> int:
    """LLVM's own summary behind the code: '; Occupancy: 5'."""
    found = re.search(rf"^; {name}: (\d+)", assembly, re.MULTILINE)
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("arch", AMD)
def test_amd_resources_are_those_that_llvm_prints(dumps, arch, label):
    assembly = dumps(arch)[label]["texts"]["amdgcn"]
    code = read_amdgcn(assembly)
    total = "TotalNumVgprs" if "TotalNumVgprs" in assembly else "NumVgprs"
    assert code.registers == comment(assembly, total)
    assert code.scratch_bytes == comment(assembly, "ScratchSize")
    # LLVM knows neither the dynamic shared memory nor that a workgroup starts as a whole.
    assert occupancy(TARGETS[arch], code.registers, 0, num_warps=1) == comment(assembly, "Occupancy")


@pytest.mark.parametrize("arch", AMD)
def test_amd_instructions_fill_the_code(dumps, arch):
    """Of 4, 8 or 12 bytes each (wave-64 code), so their number is bounded by the length of the code."""
    assembly = dumps(arch)["big_dot/64x64"]["texts"]["amdgcn"]
    num_bytes = int(re.search(r"^; codeLenInByte = (\d+)", assembly, re.MULTILINE)[1])
    code = read_amdgcn(assembly)
    assert num_bytes / 12 < code.num_instructions <= num_bytes / 4
    assert code.num_instructions == sum(code.mnemonics.values())
    assert code.mnemonics["s_endpgm"] == assembly.count("\ts_endpgm\n")


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("arch", NVIDIA)
def test_nvidia_resources_are_those_that_ptxas_prints(dumps, arch, label):
    found = dumps(arch)[label]
    log = found["texts"]["ptxas"]
    assert found["read"]["registers"] == int(re.search(r"Used (\d+) registers", log)[1])
    assert found["read"]["scratch_bytes"] == int(re.search(r"(\d+) bytes stack frame", log)[1])
    assert (found["read"]["spills"] > 0) == ("0 bytes spill stores" not in log)


@pytest.mark.parametrize("arch", AMD + NVIDIA)
def test_every_pointer_that_is_read_has_its_widths(dumps, arch):
    found = dumps(arch)["paged_dot/bf16"]["read"]["argument_loads"]
    assert set(found) == {"q_ptr", "k_cache_ptr", "block_table_ptr"}  # out_ptr is written only
    assert set(found["k_cache_ptr"]) == {"16"}
    assert set(found["block_table_ptr"]) == {"4"}


@pytest.mark.parametrize("arch", AMD + NVIDIA)
def test_loads_of_the_machine_code_are_those_of_the_ir(dumps, arch):
    """Of a kernel without a loop that the assembler could unroll."""
    found = dumps(arch)["copy/fp32"]["read"]
    assert found["loads"] == found["argument_loads"]["x_ptr"]
    assert sum(int(width) * count for width, count in found["loads"].items()) == 1024 * 4 // (4 * warp_size(arch))


def warp_size(arch: str) -> int:
    return TARGETS[arch].warp_size


@pytest.mark.parametrize("arch", AMD + NVIDIA)
def test_dots_and_their_instructions(dumps, arch):
    found = dumps(arch)
    assert read_dots(found["copy/fp32"]["texts"]["ttir"]) == []
    assert [dot.dtype for dot in read_dots(found["big_dot/64x64"]["texts"]["ttir"])] == ["f16"]
    assert found["copy/fp32"]["read"]["matrix"] == {}
    assert sum(found["big_dot/64x64"]["read"]["matrix"].values()) > 0


def test_dots_say_their_precision():
    ttir = """
      %p = tt.dot %q, %k, %c, inputPrecision = tf32x3 : tensor<16x8xf32> * tensor<8x16xf32> -> tensor<16x16xf32>
      %r = tt.dot %q, %k, %c : tensor<16x128xf8E4M3FN> * tensor<128x16xf8E4M3FN> -> tensor<16x16xf32>
    """
    assert read_dots(ttir) == [Dot("f32", "tf32x3"), Dot("f8E4M3FN", "ieee")]


AMD_LINES = """
\t.type\tk,@function
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
\tglobal_load_short_d16_hi v5, v4, s[0:1]
\tglobal_load_d16_hi_b16 v5, v4, s[0:1]
\tglobal_load_tr_b128_w32 v[0:3], v4, s[0:1]
\tbuffer_load_ubyte v5, v4, s[0:3], 0 offen
\tbuffer_load_dword off, s[0:3], 0 offen lds
\tglobal_load_lds_dwordx4 v[0:1], off
\tglobal_store_dwordx2 v4, v[0:1], s[0:1]\t; a remark v_mfma_fake
\tglobal_store_b8 v4, v0, s[0:1]
\tbuffer_gl0_inv
\tv_mfma_f32_16x16x16_f16 a[0:3], v[0:1], v[2:3], a[0:3]
    .agpr_count:     4
    .group_segment_fixed_size: 0
    .private_segment_fixed_size: 12
    .sgpr_count:     7
    .sgpr_spill_count: 1
    .vgpr_count:     12
    .vgpr_spill_count: 2
"""


def test_widths_of_amd_accesses():
    code = read_amdgcn(AMD_LINES)
    assert code.loads == {16: 3, 2: 2, 1: 1, 4: 1}
    assert code.stores == {8: 1, 1: 1}
    assert (code.accumulators, code.spills, code.scratch_bytes, code.num_instructions) == (4, 3, 12, 11)


def test_debug_information_does_not_change_the_hash():
    moved = AMD_LINES.replace("\tglobal_store_b8", "\t.loc\t1 5 9 ; /home/somebody/k.py:5:9\n\tglobal_store_b8")
    assert read_amdgcn(moved) == read_amdgcn(AMD_LINES)
    other = read_amdgcn(AMD_LINES.replace("v[2:3], a[0:3]", "v[2:3], a[4:7]"))
    assert other.code_hash != read_amdgcn(AMD_LINES).code_hash
    assert replace(other, code_hash="") == replace(read_amdgcn(AMD_LINES), code_hash="")


def test_widths_of_nvidia_accesses():
    lines = """
        /*0000*/                   LDG.E.128 R4, [R16.64] ;
        /*0010*/              @!P4 LDG.E R18, desc[UR4][R12.64] ;
        /*0020*/                   LDG.E.U16.CONSTANT R18, [R12.64] ;
        /*0030*/              @UP0 LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2.64] ;
        /*0040*/                   LDGDEPBAR ;
        /*0050*/                   STG.E.64 [R2.64], R8 ;
        /*0060*/                   STL [R1], R8 ;
        /*0070*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8], R24, gsb0 ;
        /*0080*/                   EXIT ;
        /*0090*/                   NOP;
    """
    code = read_sass(lines, "Function k:\n  REG:56 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:408")
    assert code.loads == {16: 2, 4: 1, 2: 1}
    assert code.stores == {8: 1}
    assert (code.registers, code.spills, code.scratch_bytes, code.num_instructions) == (56, 1, 8, 9)
    assert "HGMMA.64x64x16.F32" in code.mnemonics


def test_an_address_through_memory_has_no_origin():
    llir = """
define ptx_kernel void @k(ptr addrspace(1) nofree captures(none) %0, ptr addrspace(1) %1, i32 %2) local_unnamed_addr {
  %4 = load i32, ptr addrspace(1) %0, align 4, !dbg !5
  %5 = getelementptr i8, ptr addrspace(1) %1, i32 %4
  br label %6
6:
  %7 = phi ptr addrspace(1) [ %5, %3 ], [ %9, %6 ]
  %8 = load <4 x half>, ptr addrspace(1) %7, align 8
  %9 = getelementptr i8, ptr addrspace(1) %7, i32 %2
  br i1 true, label %6, label %10
10:
  ret void
}
"""
    assert loads_per_argument(llir, ["table", "cache", "num"]) == {"table": {4: 1}, "cache": {8: 1}}


@pytest.mark.parametrize("before", ["mov.u32 $0, 0x0;\\0A\\09", "mov.u32 $0, 0x0;\\0A\\09@$2 "])
def test_what_inline_assembly_loads_has_no_origin(before):
    llir = f"""
define ptx_kernel void @k(ptr addrspace(1) %0, ptr addrspace(1) %1) {{
  %3 = tail call i32 asm sideeffect "{before}ld.global.b32 {{ $0 }}, [ $1 + 0 ];", "=r,l"(ptr addrspace(1) %0) #8
  %4 = getelementptr i8, ptr addrspace(1) %1, i32 %3
  %5 = load i32, ptr addrspace(1) %4, align 4
  ret void
}}
"""
    assert loads_per_argument(llir, ["lens", "cache"]) == {"lens": {4: 1}, "cache": {4: 1}}


def test_an_address_that_changes_lanes_through_shared_memory_keeps_its_origin():
    """As triton 3.9 does to spread the addresses of a small tile; q and cache do so on two lines of the source."""
    llir = """
define ptx_kernel void @k(ptr addrspace(1) %0, ptr addrspace(1) %1, ptr addrspace(1) %2, ptr addrspace(3) %3) {
  %5 = ptrtoint ptr addrspace(1) %0 to i64, !dbg !7
  store i64 %5, ptr addrspace(3) %3, align 8, !dbg !7
  %6 = load i64, ptr addrspace(3) %3, align 8, !dbg !7
  %7 = inttoptr i64 %6 to ptr addrspace(1), !dbg !7
  %8 = load <2 x half>, ptr addrspace(1) %7, align 4, !dbg !7
  %9 = ptrtoint ptr addrspace(1) %1 to i64, !dbg !8
  %10 = insertelement <1 x i64> poison, i64 %9, i64 0, !dbg !8
  store <1 x i64> %10, ptr addrspace(3) %3, align 8, !dbg !8
  %11 = load i64, ptr addrspace(3) %3, align 8, !dbg !8
  %12 = inttoptr i64 %11 to ptr addrspace(1), !dbg !8
  %13 = load <8 x half>, ptr addrspace(1) %12, align 16, !dbg !8
  %14 = load i64, ptr addrspace(3) %3, align 8, !dbg !9
  %15 = inttoptr i64 %14 to ptr addrspace(1), !dbg !9
  %16 = load half, ptr addrspace(1) %15, align 2, !dbg !9
  ret void
}
"""
    assert loads_per_argument(llir, ["q", "cache"]) == {"q": {4: 1}, "cache": {16: 1}, UNTRACED: {2: 1}}


@pytest.mark.parametrize(
    ("line", "num_bytes"),
    [
        ('call { i32, i32 } asm sideeffect "ld.global.v2.b32 { $0, $1 }, [ $2 + 0 ];", "=r,=r,l"(ptr %0)', 8),
        ('call i16 asm sideeffect "@$2 ld.global.L1::evict_last.b16 { $0 }, [ $1 + 0 ];", "=h,l,b"(ptr %0, i1 %2)', 2),
        ('call void asm sideeffect "cp.async.ca.shared.global [ $0 + 0 ], [ $1 + 0 ], 0x8, $2;", "r,l"(ptr %0)', 8),
        ("tail call <4 x i32> @llvm.amdgcn.raw.ptr.buffer.load.v4i32(ptr addrspace(8) %0, i32 %2, i32 0, i32 0)", 16),
        (
            "call void @llvm.amdgcn.raw.ptr.buffer.load.lds(ptr addrspace(8) %0, ptr addrspace(3) @s, i32 16, i32 %2)",
            16,
        ),
        ("call void @llvm.amdgcn.global.load.lds(ptr addrspace(1) %0, ptr addrspace(3) @s, i32 4, i32 0)", 4),
        ("load <1 x i32>, ptr addrspace(1) %0, align 4", 4),
        ("load volatile bfloat, ptr addrspace(1) %0, align 2", 2),
    ],
)
def test_each_form_of_a_load(line, num_bytes):
    llir = f"define void @k(ptr addrspace(1) %0, i32 %2) {{\n  %9 = {line}\n  ret void\n}}\n"
    assert loads_per_argument(llir, ["x"]) == {"x": {num_bytes: 1}}


def test_missing_metadata_is_an_error():
    with pytest.raises(ValueError, match="lacks .vgpr_count"):
        read_amdgcn("\ts_endpgm\n")
    with pytest.raises(ValueError, match="does not say REG"):
        read_sass("", "cuobjdump info: nothing")
    with pytest.raises(ValueError, match="no function"):
        loads_per_argument("declare void @k()", [])


def test_complaints_of_ptxas():
    log = """ptxas-blackwell info    : 0 bytes gmem
ptxas info    : Function properties for k
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas warning : Too big maxrregcount value specified

"""
    assert ptxas_complaints(log).splitlines() == [
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized",
        "ptxas warning : Too big maxrregcount value specified",
    ]
