"""evenflow crosscheck: what it prints and writes, its exit codes, and bad usage."""

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

pytest.importorskip("triton", reason="the kernel checks compile")

from planted import SOUND, big_dot, copy

import evenflow.cli.crosscheck as command
from evenflow.cli import main
from evenflow.crosscheck import budgets
from evenflow.crosscheck.budgets import Budgets
from evenflow.crosscheck.compiling import Job, label_of
from evenflow.crosscheck.gate import judge
from evenflow.crosscheck.report import Results, to_html
from evenflow.crosscheck.running import KernelRun, Ran
from evenflow.crosscheck.selection import select


@pytest.fixture(autouse=True)
def planted_kernels(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "_all_specializations", lambda: lambda arch: SOUND)
    monkeypatch.setattr(budgets, "FOLDER", tmp_path)


@pytest.fixture
def no_compiler(monkeypatch, compiled):
    """Results of the session's compiles instead of new ones."""
    monkeypatch.setattr(
        command,
        "_compile",
        lambda jobs, n: [compiled[j.target, label_of(s.kernel, s.name)] for j in jobs for s in j.specializations],
    )


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(["crosscheck", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_budgets_are_recorded_then_kept(capsys, tmp_path):
    arguments = ("compile", "--target", "gfx90a", "--kernel", "paged_dot", "copy/fp32", "--jobs", "1")
    code, out, err = run(capsys, *arguments)
    assert code == 1
    assert out.count("no budget") >= 2
    assert err == "gfx90a: 2 done\n"  # what stands for the bars where there is no terminal
    code, out, _ = run(capsys, *arguments, "--update-budgets")
    assert (code, "all 2 compiled kernels pass" in out) == (0, True)
    (path,) = tmp_path.glob("triton-*.json")
    values = json.loads(path.read_text())
    assert set(values["instructions"]["gfx90a"]) == {"paged_dot/bf16", "copy/fp32"}
    values["instructions"]["gfx90a"]["copy/fp32"] = 10
    path.write_text(json.dumps(values))
    code, out, _ = run(capsys, *arguments)
    assert code == 1
    assert re.search(r"FAIL gfx90a copy/fp32: budget: \d+ instructions, \+\d+% over the 10 of triton", out)
    assert "1 of 2 compiled kernels fail" in out


def test_a_crash_is_reported_beside_what_passes(capsys, no_compiler, monkeypatch):
    monkeypatch.setattr(command, "_all_specializations", lambda: lambda arch: [copy(), copy("aborting")])
    code, out, _ = run(capsys, "compile", "--target", "gfx942", "--update-budgets")
    assert code == 1
    assert "FAIL gfx942 aborting/fp32: compile: the compiler died (SIGABRT) LLVM ERROR: Cannot select" in out
    assert "--target gfx942 --kernel aborting/fp32" in out
    assert "1 of 2 compiled kernels fail" in out


def test_json_and_html(capsys, no_compiler, tmp_path):
    paths = [str(tmp_path / name) for name in ("out.json", "out.html")]
    code, out, _ = run(
        capsys, "compile", "--target", "gfx942", "sm_90", "--update-budgets", "--json", paths[0], "--html", paths[1]
    )
    assert code == 0
    assert "gfx942 (MI300X, MI325X)" in out
    assert "sm_90 (H100, H200)" in out
    values = json.loads((tmp_path / "out.json").read_text())
    assert len(values["results"]) == 2 * len(SOUND)
    assert values["failures"] == []
    assert {"triton", "torch", "Python", "evenflow"} <= set(values["environment"])
    found = {(r["target"], r["kernel"]): r["resources"] for r in values["results"]}
    assert found["gfx942", "planted:paged_dot_kernel"]["argument_loads"]["k_cache_ptr"].keys() == {"16"}
    assert "all 6 compiled kernels pass" in (tmp_path / "out.html").read_text().lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "gfx924"), "target 'gfx924' is not known; did you mean gfx942? Targets are gfx90a, gfx942, "),
        (("--target", "sm90"), "did you mean sm_90?"),
        (("--kernel", "pagd_dot"), "kernel 'pagd_dot' is not known; did you mean paged_dot? Kernels are copy, "),
        (("--kernel", "copy/fp33"), "did you mean copy/fp32?"),
        (("--jobs", "0"), "--jobs 0 must be at least 1"),
        (("--sample", "-1"), "--sample -1 must be at least 1"),
        (("--tagret", "gfx942"), "unknown option --tagret; did you mean --target?"),
    ],
)
def test_bad_usage_names_the_nearest(capsys, no_compiler, arguments, message):
    code, out, err = run(capsys, "compile", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_without_triton_the_error_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    code, _, err = run(capsys, "compile")
    assert code == 2
    assert "pip install 'triton>=3.6,<3.10'" in err


def test_help_has_examples_and_imports_neither_torch_nor_triton(capsys):
    import subprocess

    script = (
        "import sys; from evenflow.cli import main; code = main(['crosscheck', '--help']); "
        "assert not {'torch', 'triton', 'rich'} & set(sys.modules), 'heavy import'; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "evenflow crosscheck compile --target gfx942" in done.stdout


def names(jobs: list[Job]) -> dict[str, list[str]]:
    return {job.target: [label_of(s.kernel, s.name) for s in job.specializations] for job in jobs}


def test_selection():
    many = [copy(name=str(i)) for i in range(10)] + [big_dot("a", 16, 16, 16, 1, 1)]

    def known(arch: str):
        return many if arch == "sm_80" else many[-1:]

    assert list(names(select(known))) == [
        "gfx90a",
        "gfx942",
        "gfx950",
        "gfx1100",
        "gfx1201",
        "sm_80",
        "sm_90",
        "sm_100",
    ]
    assert names(select(known, ["sm_80", "sm_80"], ["copy/[12]"])) == {"sm_80": ["copy/1", "copy/2"]}
    assert names(select(known, ["sm_80"], sample=3)) == {"sm_80": ["copy/0", "copy/4", "copy/8", "big_dot/a"]}
    assert names(select(known, ["sm_90", "sm_80"], ["copy"], 1)) == {"sm_90": [], "sm_80": ["copy/0"]}


class Page(HTMLParser):
    """Collects what would reach outside, and checks that elements nest."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_alone(compiled):
    nasty = replace(compiled["gfx942", "noisy/fp32"], stderr="<script>alert('x')</script>", name="a&b")
    results = [*compiled.values(), nasty]
    recorded = budgets.updated(Budgets("3.9.0"), "3.9.0", list(compiled.values()), is_complete=True)
    failures = [failure for result in results for failure in judge(result, recorded)]
    runs = [
        Ran("gfx942", "rms_norm/2 rows, bfloat16", "", 0.51, 0.2, [KernelRun("rms_norm", 1, 4, 1234, 40, 0, 512)]),
        Ran("gfx942", "rms_norm/3 rows, bfloat16", "", 1.5, 0.2),
        Ran("gfx950", "rms_norm/3 rows, float16", "RaceError: <two> waves", None, 0.2),
    ]
    html = to_html(Results(results, failures, recorded, runs), {"triton": "3.9.0"})
    page = Page()
    page.feed(html)
    page.close()
    text = " ".join(page.text)
    assert page.open == []
    assert page.addresses == []
    assert "http" not in html
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "51%" in text
    assert "its error against float64 is 3 times PyTorch's, 2 are allowed" in text
    assert "RaceError: <two> waves" in text
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    num_failed = len({(failure.target, failure.label) for failure in failures})
    assert f"{num_failed + 2} of {len(results)} compiled kernels and 3 runs fail" in text
    assert html.count('class="fail"') == num_failed + 2
    assert html.count('class="pass"') == len(results) - num_failed + 1
