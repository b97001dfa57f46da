"""`crosscheck run`: wrong kernels are caught by what they compute or touch, and launchers run unchanged."""

import json
from collections.abc import Callable
from functools import partial
from importlib import import_module

import pytest
import torch

pytest.importorskip("triton", reason="the kernel checks compile")

import planted_runs

import evenflow.cli.crosscheck as command
from evenflow.cli import main
from evenflow.crosscheck import running
from evenflow.crosscheck.budgets import Budgets
from evenflow.crosscheck.cases import CASES, Case, all_cases
from evenflow.crosscheck.running import ARCHS, Ran, run_all, run_case, select_runs
from evenflow.crosscheck.simulated import SimulatedKernel, simulated, specialize
from evenflow.crosscheck.targets import TARGETS
from evenflow.kernels.specializations import all_specializations, record

FP8 = torch.float8_e4m3fn


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


def sample(arch: str) -> list[str]:
    """The first case of each operation, in one type."""
    first = {label.partition("/")[0]: label for label in reversed(all_cases(arch)) if "float" not in label[-7:]}
    first |= {label.partition("/")[0]: label for label in reversed(all_cases(arch)) if label.endswith("bfloat16")}
    return list(first.values())


def test_our_kernels_compute_what_their_references_do():
    """A sample on one target; `evenflow crosscheck run` runs every case on all three."""
    labels = sample("gfx942")
    seen = []
    runs = run_all({"gfx942": labels}, 2, seen.append)
    assert [ran.label for ran in runs] == labels
    assert sorted(seen, key=lambda ran: labels.index(ran.label)) == runs
    assert {ran.failure for ran in runs} == {""}
    for kernel in (kernel for ran in runs for kernel in ran.kernels):
        assert kernel.launches >= 1
        assert kernel.num_instructions > kernel.waves
        assert kernel.registers > 0


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_of_the_gate_has_a_case(arch):
    """Recorded, not run: each operation launches what it has."""
    launched: set[str] = set()

    def kernels(modules: list[str], launch: Callable[[], object]) -> None:
        """Launch, with the kernels of all the modules recorded."""
        if not modules:
            launch()
            return
        made = record(import_module(modules[0]), "", lambda: kernels(modules[1:], launch))
        launched.update(one.kernel for one in made)

    for case, dtype in all_cases(arch).values():
        arguments = case.inputs(getattr(torch, dtype))
        launch = case.launch_of(import_module(case.module), arch)
        kernels([case.module, *case.others], partial(launch, *arguments))
    assert launched == {made.kernel for made in all_specializations(arch)}


@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_head_sizes_and_caches_of_8_bits_have_cases(size):
    labels = {arch: [label for label in all_cases(arch) if f"heads of {size}," in label] for arch in ARCHS}
    for op in ("paged_attention", "rotary_and_store"):
        dtypes = {
            a: {label.rpartition(", ")[2] for label in found if label.startswith(op)} for a, found in labels.items()
        }
        assert dtypes["gfx90a"] == {"bfloat16", "float16", "float32"}
        assert dtypes["gfx942"] - dtypes["gfx90a"] == {"float8_e4m3fnuz"}
        assert dtypes["gfx950"] - dtypes["gfx90a"] == {"float8_e4m3fn"}


def tensor(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values).to(dtype)


@pytest.mark.parametrize(
    ("found", "eager", "exact", "is_right"),
    [
        (tensor(1.0, -torch.inf), tensor(1.0, -torch.inf), tensor(1.0, -torch.inf), True),
        (tensor(1.0, torch.inf), tensor(1.0, -torch.inf), tensor(1.0, -torch.inf), False),
        (tensor(1.0, torch.nan), tensor(1.0, torch.nan), tensor(1.0, torch.nan), True),
        (tensor(1.0, 2.0), tensor(1.0, 2.0), tensor(1.0, torch.nan), False),
        (tensor(torch.nan, 2.0), tensor(1.0, 2.0), tensor(1.0, 2.0), False),
        (tensor(torch.inf), tensor(torch.inf), tensor(torch.inf), True),
        *(
            (tensor(a, dtype=FP8), tensor(b, dtype=FP8), tensor(c, dtype=FP8), is_right)
            for a, b, c, is_right in (
                (1.125, 1.0, 1.0, True),
                (1.25, 1.0, 1.0, False),
                (1.25, 1.125, 1.0, True),
                (0.015625, -0.0, 0.015625, True),
                (-0.001953125, 0.001953125, 0.001953125, False),
                (0.0, -0.0, -0.001953125, True),
            )
        ),
    ],
)
def test_what_is_right(found, eager, exact, is_right):
    """Infinities and NaN in their places; 8-bit floats one step beside, or twice as many as PyTorch."""
    assert (running._ratio(found, eager, exact) <= 1.0) == is_right


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
    runs = run_all({"x": ["a", "b", "c"]}, 1)
    assert [bool(ran.failure) for ran in runs] == [False, True, False]
    assert runs[1].failure == "the process died (SIGABRT) LLVM ERROR: no"


def test_selection_of_runs():
    assert select_runs() == {arch: list(all_cases(arch)) for arch in ("gfx90a", "gfx942", "gfx950")}
    silu = [label for label in all_cases("gfx942") if label.startswith("silu")]
    assert select_runs(["gfx942"], ["silu*"]) == {"gfx942": silu}
    assert len({label for arch in ARCHS for label in all_cases(arch)}) == sum(len(case.dtypes) for case in CASES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--target", "sm_90"), "target 'sm_90' has no simulator; `run` knows gfx90a, gfx942, gfx950"),
        (("run", "--target", "gfx924"), "did you mean gfx942?"),
        (("run", "--kernel", "rms"), "kernel 'rms' has no case to run; there are cases of expand_rows, "),
        (("run", "--update-budgets"), "`run` has no use for them"),
        (("walk",), "invalid choice: 'walk'"),
    ],
)
def test_bad_usage(capsys, arguments, message):
    assert main(["crosscheck", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_command_fails_when_a_run_does(capsys, monkeypatch, tmp_path):
    def fake(labels, num_processes, on_result):
        return [Ran(arch, x, "", 1.2 if arch == "gfx950" else 0.5, 0.1) for arch, part in labels.items() for x in part]

    monkeypatch.setattr(running, "run_all", fake)
    path = tmp_path / "out.json"
    assert main(["crosscheck", "run", "--kernel", "silu_and_mul", "--json", str(path)]) == 1
    out = capsys.readouterr().out
    assert "50%" in out
    assert "120%" in out
    assert "FAIL gfx950 silu_and_mul/3 rows of 2 x 1100, bfloat16: run: its error against float64 is 2.4 times" in out
    assert "3 of 9 runs fail" in out
    assert len(json.loads(path.read_text())["runs"]) == 9
    assert main(["crosscheck", "run", "--kernel", "silu_and_mul", "--target", "gfx942"]) == 0


@pytest.mark.parametrize(("targets", "num_runs"), [(("gfx942", "sm_90"), 3), (("sm_90",), 0)])
def test_all_runs_what_can_be_run_of_what_is_compiled(capsys, monkeypatch, targets, num_runs):
    monkeypatch.setattr(command, "_check_compiled", lambda args, version: ([], [], Budgets(version)))
    monkeypatch.setattr(
        running,
        "run_all",
        lambda labels, n, done: [Ran(a, x, "", 0.5, 0.1) for a, part in labels.items() for x in part],
    )
    assert main(["crosscheck", "all", "--kernel", "silu_and_mul", "--target", *targets]) == 0
    assert capsys.readouterr().out.count("50%") == num_runs
