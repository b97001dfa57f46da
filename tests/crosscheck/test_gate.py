"""Defects that were planted in kernels, each caught by name, and kernels that must pass."""

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="the kernel checks compile")

from planted import SOUND, copy

from evenflow.crosscheck.artefacts import Dot
from evenflow.crosscheck.budgets import Budgets, budget_path, load_budgets, save_budgets, updated
from evenflow.crosscheck.compiling import Compiled, Job, Resources, compile_all, label_of
from evenflow.crosscheck.gate import ACCEPTED_SPILLS, condensed, judge
from evenflow.crosscheck.targets import TARGETS, find_target, occupancy

GOOD = Resources(
    registers=64,
    accumulators=0,
    scalar_registers=20,
    spills=0,
    scratch_bytes=0,
    shared_bytes=16384,
    occupancy=4,
    num_instructions=1000,
    matrix={"v_mfma_f32_16x16x16_f16": 4},
    dots=[Dot("f16", "ieee")],
    argument_loads={"q_ptr": {2: 1}, "k_cache_ptr": {16: 8}},
)
BUDGETS = Budgets("3.9.0", {"gfx942": {"attention/f16": 1000}, "sm_90": {"attention/f16": 1000}})


def result(resources: Resources | None = GOOD, target: str = "gfx942", error: str = "", stderr: str = "") -> Compiled:
    return Compiled("evenflow.kernels.attention:_attention_kernel", "f16", target, error, stderr, 0.5, resources)


def checks(compiled: Compiled, budgets: Budgets = BUDGETS) -> list[str]:
    return [failure.check for failure in judge(compiled, budgets)]


def budgets_of(compiled: dict[tuple[str, str], Compiled]) -> Budgets:
    return updated(Budgets("3.9.0"), "3.9.0", list(compiled.values()), is_complete=True)


@pytest.mark.parametrize("target", ["gfx942", "gfx1100", "sm_90"])
@pytest.mark.parametrize("specialization", SOUND, ids=lambda s: s.kernel.split(":")[1])
def test_sound_kernels_pass(compiled, target, specialization):
    label = label_of(specialization.kernel, specialization.name)
    assert judge(compiled[target, label], budgets_of(compiled)) == []


@pytest.mark.parametrize(
    ("label", "check", "cause"),
    [
        ("big_dot/spills", "spills", "bytes of stack"),
        ("big_dot/too-much-lds", "shared memory", "131,072 bytes of 65,536"),
        ("big_dot/no-matrix", "matrix units", "tl.dot of f16 is computed on vector units"),
        ("paged_dot/narrow", "narrow loads", "k_cache_ptr is read by loads of less than 16 bytes"),
        ("noisy/fp32", "stderr", "loop not unrolled"),
        ("aborting/fp32", "compile", "SIGABRT) LLVM ERROR: Cannot select: intrinsic"),
        ("missing/fp32", "compile", "missing_kernel"),
        ("refused/fp32", "compile", "CompileTimeAssertionFailure: at 2:4: the tile is too large"),
        ("copy/misnamed", "compile", "do not agree on num, out_ptr, y_ptr"),
    ],
)
def test_planted_defects_are_named(compiled, label, check, cause):
    failures = judge(compiled["gfx942", label], budgets_of(compiled))
    assert [failure.check for failure in failures] == [check]
    assert cause in failures[0].cause
    assert str(failures[0]).startswith(f"gfx942 {label}: {check}: ")


def test_a_dead_compiler_costs_one_kernel(compiled):
    """The kernels behind the abort are compiled by the next process, to the same code."""
    after, before = compiled["gfx942", "copy/after-the-abort"], compiled["gfx942", "copy/fp32"]
    assert after.resources is not None
    assert after.resources == before.resources


def test_a_compiler_that_hangs_is_killed(compiled):
    hanging, sound = compile_all([Job("gfx942", [copy("hanging"), copy()])], num_processes=1, timeout_s=6.0)
    assert "more than 6 s" in hanging.error
    assert hanging.resources is None
    assert sound.resources == compiled["gfx942", "copy/fp32"].resources


def test_a_triton_that_cannot_be_imported_is_said_once_per_kernel(monkeypatch, tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libLLVM is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    results = compile_all([Job("gfx942", SOUND)], num_processes=1)
    assert len(results) == len(SOUND)
    assert all("did not start (exit code 1)" in found.error and "libLLVM" in found.stderr for found in results)


def test_what_the_developer_has_set_does_not_reach_the_compiler(monkeypatch, compiled):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    found = compile_all([Job("sm_90", SOUND[:1])], num_processes=3)
    assert found[0].resources == compiled["sm_90", "copy/fp32"].resources


@pytest.mark.parametrize(
    ("fields", "target", "expected"),
    [
        ({}, "gfx942", []),
        ({"num_instructions": 1100}, "gfx942", []),
        ({"num_instructions": 1101}, "gfx942", ["budget"]),
        ({"num_instructions": 300}, "gfx942", []),
        ({"spills": 3}, "gfx942", []),  # to accumulators or other lanes: no memory is touched
        ({"spills": 3, "scratch_bytes": 12}, "gfx942", ["spills"]),
        ({"spills": 3, "scratch_bytes": 16, "registers": 128, "matrix": {"HMMA": 1}}, "sm_90", []),
        ({"spills": 3, "scratch_bytes": 16, "registers": 255, "matrix": {"HMMA": 1}}, "sm_90", ["spills"]),
        ({"spills": 3, "scratch_bytes": 24, "registers": 128, "matrix": {"HMMA": 1}}, "sm_90", ["spills"]),
        ({"shared_bytes": 65536}, "gfx942", []),
        ({"shared_bytes": 65537, "occupancy": 0}, "gfx942", ["shared memory"]),
        ({"registers": 512, "occupancy": 0}, "gfx942", ["occupancy"]),
        ({"matrix": {}}, "gfx942", ["matrix units"]),
        ({"matrix": {}, "dots": []}, "gfx942", []),
        ({"matrix": {}, "dots": [Dot("f32", "ieee")]}, "gfx942", ["matrix units"]),
        ({"matrix": {}, "dots": [Dot("f32", "ieee")]}, "sm_90", []),
        ({"matrix": {}, "dots": [Dot("f32", "tf32x3")]}, "sm_90", ["matrix units"]),
        ({"argument_loads": {"v_cache_ptr": {8: 1, 16: 9}}}, "gfx942", ["narrow loads"]),
        ({"argument_loads": {"v_cache_ptr": {32: 1}}}, "gfx942", []),
        ({"argument_loads": {"?": {32: 1}}}, "gfx942", []),
        ({"argument_loads": {"?": {4: 1}}}, "gfx942", ["narrow loads"]),
    ],
)
def test_rules(fields, target, expected):
    assert checks(result(replace(GOOD, **fields), target)) == expected


def test_accepted_spills_and_no_more(monkeypatch):
    spilling = result(replace(GOOD, scratch_bytes=40, registers=255), "sm_90")
    assert checks(spilling) == ["spills"]
    monkeypatch.setitem(ACCEPTED_SPILLS, ("sm_90", "attention/f*"), 40)
    assert checks(spilling) == []
    assert checks(result(replace(GOOD, scratch_bytes=41, registers=255), "sm_90")) == ["spills"]


def test_the_point_of_a_long_error_is_found():
    """ptxas's complaint stands between triton's heading and the command that shows it again."""
    error = "PTXASError: Internal error\n`ptxas` stderr:\nptxas k.ptx, line 5; fatal   : no .version\nRepro command: x"
    (failure,) = judge(result(None, error=error), BUDGETS)
    assert failure.cause == "PTXASError: Internal error ptxas k.ptx, line 5; fatal   : no .version"


def test_a_kernel_without_budget_fails():
    failures = judge(result(target="gfx950"), BUDGETS)
    assert [failure.check for failure in failures] == ["no budget"]
    assert "--update-budgets" in failures[0].fix


def test_a_new_triton_is_one_line():
    broken = judge(result(replace(GOOD, matrix={})), BUDGETS)
    missing = [failure for _ in range(9) for failure in judge(result(target="gfx950"), BUDGETS)]
    assert condensed(broken + missing[:8]) == broken + missing[:8]
    few = condensed(missing + broken)
    assert few[:1] == broken
    assert str(few[1]).startswith("gfx950 9 compiled kernels: no budget: none was recorded. Record them with --update")


def test_budgets_go_to_a_file_and_back(tmp_path):
    path = save_budgets(BUDGETS, tmp_path)
    assert path.name == "triton-3.9.json"
    assert load_budgets("3.9.1", tmp_path) == BUDGETS
    assert load_budgets("3.8.0", tmp_path) == Budgets("3.8.0")
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"triton-3.9.json is no budget file .* delete it"):
        load_budgets("3.9.0", tmp_path)
    assert budget_path("3.10.0+git1", tmp_path).name == "triton-3.10.json"


def test_an_update_of_some_keeps_the_rest_and_an_update_of_all_forgets():
    longer = result(replace(GOOD, num_instructions=2000))
    old = Budgets("3.9.0", {"gfx942": {"attention/f16": 1000, "gone/f16": 5}, "sm_90": {"attention/f16": 900}})
    some = updated(old, "3.9.1", [longer], is_complete=False)
    assert some.instructions["gfx942"] == {"attention/f16": 2000, "gone/f16": 5}
    everything = updated(old, "3.9.1", [longer], is_complete=True)
    assert everything.instructions == {"gfx942": {"attention/f16": 2000}, "sm_90": {"attention/f16": 900}}
    failed = updated(old, "3.9.1", [result(None, error="no")], is_complete=False)
    assert failed.instructions == old.instructions


def test_occupancy():
    """Against the tables of the CUDA occupancy calculator (compute capability 8.0 and 9.0) and hand counts."""
    a100, mi300, mi355 = (find_target(arch) for arch in ("sm_80", "gfx942", "gfx950"))
    # warps of an SM are four times those of a sub-partition
    assert occupancy(a100, 32, 0, 8) * 4 == 64
    assert occupancy(a100, 64, 0, 8) * 4 == 32
    assert occupancy(a100, 128, 0, 8) * 4 == 16
    assert occupancy(a100, 255, 0, 8) * 4 == 8
    assert occupancy(a100, 32, 48 * 1024, 8) * 4 == 24  # three blocks of 49 KiB in 164
    assert occupancy(a100, 32, 163 * 1024, 8) * 4 == 8
    assert occupancy(a100, 32, 163 * 1024 + 1, 8) == 0
    assert occupancy(mi300, 128, 0, 4) == 4
    assert occupancy(mi300, 129, 0, 4) == 3
    assert occupancy(mi300, 64, 33 * 1024, 4) == 1
    assert occupancy(mi355, 64, 33 * 1024, 4) == 4
    assert occupancy(mi300, 512, 0, 8) == 0  # four waves fit a compute unit, the workgroup has eight


def test_the_fp8_types_are_the_platforms():
    """One fact in two spellings: torch's for the engine, MLIR's here."""
    from evenflow.platforms.gpu import FP8_DTYPES, LDS_BYTES

    for arch, target in TARGETS.items():
        prefix = max((p for p in FP8_DTYPES if arch.startswith(p)), key=len, default=None)
        theirs = FP8_DTYPES[prefix].replace("float8_e4m3", "f8E4M3").upper() if prefix else None
        assert theirs == (target.fp8_dtype.upper() if target.fp8_dtype else None)
        assert LDS_BYTES[max((p for p in LDS_BYTES if arch.startswith(p)), key=len)] == target.shared_bytes
