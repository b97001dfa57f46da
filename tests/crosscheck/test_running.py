"""`crosscheck run`: wrong kernels are caught by what they compute or touch, and launchers run unchanged."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="the kernel checks compile")

import planted_runs

import evenflow.cli.crosscheck as command
from evenflow.cli import main
from evenflow.crosscheck import running
from evenflow.crosscheck.budgets import Budgets
from evenflow.crosscheck.cases import CASES, Case
from evenflow.crosscheck.running import Ran, all_cases, run_all, run_case, select_runs
from evenflow.crosscheck.simulated import SimulatedKernel, simulated, specialize
from evenflow.crosscheck.targets import TARGETS


@pytest.fixture(autouse=True)
def compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


def inputs(dtype):
    return (torch.randn(300, generator=torch.Generator().manual_seed(0)).to(dtype),)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_right_kernel_passes(dtype):
    ran = run_case(Case("planted_runs", "scale", "300", inputs), dtype, "gfx942")
    assert (ran.error, ran.failure) == ("", "")
    assert ran.error_ratio is not None
    assert ran.error_ratio < 1
    assert ran.num_instructions > 3 * 5


@pytest.mark.parametrize(
    ("op", "failure"),
    [
        ("inexact", "times PyTorch's, 2 are allowed"),
        ("dropped", "times PyTorch's, 2 are allowed"),
        ("unmasked", "OutOfBoundsError"),
        ("no_such_op", "AttributeError"),
    ],
)
def test_wrong_kernels_fail(op, failure):
    ran = run_case(Case("planted_runs", op, "300", inputs), "bfloat16", "gfx942")
    assert failure in ran.failure


def test_what_is_written_in_place_is_compared(monkeypatch):
    case = Case(
        "planted_runs", "add_in_place", "100", lambda dtype: (torch.ones(100).to(dtype), inputs(dtype)[0][:100])
    )
    assert run_case(case, "float16", "gfx942").failure == ""
    monkeypatch.setattr(planted_runs, "launch_add_in_place", lambda x, y: None)
    assert "times PyTorch's" in run_case(case, "float16", "gfx942").failure


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_nan_is_no_small_error(monkeypatch, wrong):
    monkeypatch.setattr(planted_runs, "launch_scale", lambda x: x * wrong)
    ran = run_case(Case("planted_runs", "scale", "300", inputs), "bfloat16", "gfx942")
    assert ran.error_ratio == float("inf")
    assert ran.failure


def test_the_module_gets_its_kernels_back():
    kernel = planted_runs._scale_kernel
    with simulated(planted_runs, TARGETS["gfx942"]):
        assert isinstance(planted_runs._scale_kernel, SimulatedKernel)
    assert planted_runs._scale_kernel is kernel


def test_specialization_is_that_of_tritons_launcher():
    """1 becomes a constant, multiples of 16 are noted, as are pointers that start at one."""
    x = torch.zeros(64, dtype=torch.bfloat16)
    arguments = {"x_ptr": x[1:], "out_ptr": x[8:], "num": 32, "factor": 2.0, "MASKED": True, "BLOCK": 128}
    found = specialize(planted_runs._scale_kernel, arguments, 2, 1)
    assert found.signature == {"x_ptr": "*bf16", "out_ptr": "*bf16", "num": "i32", "factor": "fp32"}
    assert found.aligned == ("out_ptr", "num")
    assert found.constexprs == {"MASKED": True, "BLOCK": 128}
    assert (found.num_warps, found.num_stages) == (2, 1)
    one = specialize(planted_runs._scale_kernel, arguments | {"num": 1}, 2, 1)
    assert one.constexprs == {"num": 1, "MASKED": True, "BLOCK": 128}
    assert specialize(planted_runs._scale_kernel, arguments | {"num": 1 << 31}, 2, 1).signature["num"] == "i64"


def test_our_kernels_compute_what_their_references_do():
    """The machine code of every kernel that has a case, on one target; `evenflow crosscheck run` takes all three."""
    labels = [label for label in all_cases() if label.endswith("bfloat16")]
    seen = []
    runs = run_all(["gfx942"], labels, 1, seen.append)
    assert [ran.label for ran in runs] == labels
    assert seen == runs
    assert {ran.failure for ran in runs} == {""}


def test_a_child_that_dies_costs_one_case(monkeypatch, tmp_path):
    """The stand-in for the child dies at the second case."""
    script = tmp_path / "evenflow_child.py"
    script.write_text(
        "import os, sys\n"
        "for label in sys.argv[2:]:\n"
        "    if label == 'b': os.write(2, b'LLVM ERROR: no'); os.abort()\n"
        '    print(\'{"target": "x", "label": "%s", "error": "", "error_ratio": 0.5,\'\n'
        '          \'"num_instructions": 1, "seconds": 1.0}\' % label, flush=True)\n'
    )
    monkeypatch.setattr(running, "CHILD", "evenflow_child")
    monkeypatch.syspath_prepend(tmp_path)
    runs = run_all(["x"], ["a", "b", "c"], 1)
    assert [bool(ran.failure) for ran in runs] == [False, True, False]
    assert runs[1].failure == "the process died (SIGABRT) LLVM ERROR: no"


def test_selection_of_runs():
    assert select_runs() == (["gfx90a", "gfx942", "gfx950"], list(all_cases()))
    assert select_runs(["gfx942"], ["silu*"])[1] == [label for label in all_cases() if label.startswith("silu")]
    assert len(all_cases()) == sum(len(case.dtypes) for case in CASES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--target", "sm_90"), "target 'sm_90' has no simulator; `run` knows gfx90a, gfx942, gfx950"),
        (("run", "--target", "gfx924"), "did you mean gfx942?"),
        (("run", "--kernel", "rms"), "kernel 'rms' has no case to run; there are cases of rms_norm, "),
        (("run", "--update-budgets"), "`run` has no use for them"),
        (("walk",), "invalid choice: 'walk'"),
    ],
)
def test_bad_usage(capsys, arguments, message):
    assert main(["crosscheck", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_command_fails_when_a_run_does(capsys, monkeypatch, tmp_path):
    def fake(archs, labels, num_processes, on_result):
        return [Ran(arch, label, "", 1.2 if arch == "gfx950" else 0.5, 10, 0.1) for arch in archs for label in labels]

    monkeypatch.setattr(running, "run_all", fake)
    path = tmp_path / "out.json"
    assert main(["crosscheck", "run", "--kernel", "silu_and_mul", "--json", str(path)]) == 1
    out = capsys.readouterr().out
    assert "50%" in out
    assert "120%" in out
    assert "FAIL gfx950 silu_and_mul/3 rows of 2 x 1100, bfloat16: run: its error against float64 is 2.4 times" in out
    assert "2 of 6 runs fail" in out
    assert len(json.loads(path.read_text())["runs"]) == 6
    assert main(["crosscheck", "run", "--kernel", "silu_and_mul", "--target", "gfx942"]) == 0


@pytest.mark.parametrize(("targets", "num_runs"), [(("gfx942", "sm_90"), 2), (("sm_90",), 0)])
def test_all_runs_what_can_be_run_of_what_is_compiled(capsys, monkeypatch, targets, num_runs):
    monkeypatch.setattr(command, "_check_compiled", lambda args, version: ([], [], Budgets(version)))
    monkeypatch.setattr(
        running, "run_all", lambda archs, labels, n, done: [Ran(a, x, "", 0.5, 1, 0.1) for a in archs for x in labels]
    )
    assert main(["crosscheck", "all", "--kernel", "silu_and_mul", "--target", *targets]) == 0
    assert capsys.readouterr().out.count("50%") == num_runs
