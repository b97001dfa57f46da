"""The self-check at start: right kernels pass, wrong ones do not, and what passed is remembered while it holds."""

import json
import logging
from pathlib import Path

import pytest
import torch
from planted_bug import planted

from evenflow.kernels import (
    attention_plan,
    draw,
    filter,
    linear,
    logprobs,
    many_row_linear,
    masks,
    paged_attention,
    penalties,
    rms_norm,
    rotary,
    self_check,
    silu_and_mul,
    step_inputs,
)
from evenflow.kernels.self_check import CheckedShape, Comparison, KernelError, check_kernels
from evenflow.runner import start_check
from evenflow.runner.start_check import cache_directory, check_at_start, device_facts, sources_hash

CPU = torch.device("cpu")
FACTS = {"gpu": "GPU 9000", "arch": "arch9", "driver": "1.2", "torch": "2.x", "triton": "3.x"}


def shape_of(dtype: str, cache_dtype: str | None = None, **changes: object) -> CheckedShape:
    sizes = {
        "hidden_size": 200, "intermediate_size": 300, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64,
        "vocab_size": 1003, "block_size": 16, "windows": (0,), "has_head_norm": False,
        "products": ((300, 200, False), (200, 320, True), (192, 256, False), (640, 256, True)),
    }  # fmt: skip
    return CheckedShape(dtype=dtype, cache_dtype=cache_dtype or dtype, **sizes | changes)


SHAPES = (
    shape_of("float32"),
    shape_of("float16", num_kv_heads=1, head_dim=80, windows=(0, 24)),
    shape_of("bfloat16", num_heads=3, num_kv_heads=3, head_dim=128, has_head_norm=True, vocab_size=5000),
    shape_of("bfloat16", "float8_e4m3fn", windows=(40,)),
    shape_of("float16", "float8_e4m3fnuz", vocab_size=160, block_size=8),
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_right_kernels_pass(shape):
    found = check_kernels(shape, CPU)
    assert [comparison for comparison in found if not comparison.is_right] == []
    kernels = {comparison.kernel for comparison in found}
    checked = {kernel for kernel, _ in self_check.all_checks(shape, "")}
    assert checked | {"add_rms_norm", "scatter_words"} <= kernels
    assert ("linear" in kernels) == (shape.dtype != "float32")
    assert ("rms_norm of heads" in kernels) == shape.has_head_norm


PLANTED = {  # kernel: its module, code, bug
    "rms_norm": (rms_norm, "axis=1) / D", "axis=1) / x.shape[1]"),
    "add_rms_norm": (rms_norm, "sum_ptr + outs, total", "sum_ptr + outs, residual"),
    "silu_and_mul": (silu_and_mul, "tl.exp(-gate32)", "tl.exp(-gate32 * 1.03)"),
    "linear": (linear, "tl.sum(sums,", "tl.sum(1.03 * sums,"),
    "many_row_linear": (many_row_linear, "activated(gates, ups)", "activated(ups, gates)"),
    "rotary_and_store": (rotary, "* S + index % S", "* S + (index + 1) % S"),
    "paged_attention": (paged_attention, "sums * weights[:, None]", "sums"),
    "plan_attention": (attention_plan, "(piece + 1) * piece_len, ", "(piece + 1) * piece_len - 1, "),
    "expand_rows": (step_inputs, ".bit_length()", ".bit_length() - 3"),
    "scatter_words": (step_inputs, "mask = i < count", "mask = i <= count"),
    "draw": (draw, "_log_exponential(w2, ", "_log_exponential(w1, "),
    "filter_thresholds": (filter, "num1 >= k, num2 >= k, num3 >= k", "num1 > k, num2 > k, num3 > k"),
    "apply_penalties": (penalties, "is_prompt = steps < num_prompt_tokens", "is_prompt = steps < 0"),
    "apply_masks": (masks, ">> (tokens % 32)", ">> (31 - tokens % 32)"),
    "token_logprobs": (logprobs, "(x > own)", "(x >= own)"),
}


@pytest.mark.parametrize("kernel", PLANTED)
def test_wrong_kernels_are_named(kernel, tmp_path, monkeypatch):
    module, code, bug = PLANTED[kernel]
    check = {"add_rms_norm": "rms_norm", "scatter_words": "expand_rows"}.get(kernel, kernel)
    with planted(module, code, bug, tmp_path) as copy:
        for name in [name for name in vars(self_check) if name.startswith("launch_") and hasattr(copy, name)]:
            monkeypatch.setattr(self_check, name, getattr(copy, name))
        found = check_kernels(shape_of("float16"), CPU, {check})
    wrong = {comparison.kernel for comparison in found if not comparison.is_right}
    assert kernel in wrong
    assert wrong <= {name for name, (other, *_) in PLANTED.items() if other is module}


@pytest.mark.parametrize(
    ("code", "bug"),
    [
        ("positions[None, :] < last", "positions[None, :] < last + BLOCK_N"),
        ("key[None, :] <= position[:, None]", "key[None, :] < end"),
        ("position[:, None] - WINDOW", "position[:, None] - WINDOW + 1"),
        ("scale_log2 *= tl.load", "tl.load"),
        ("tl.minimum((piece + 1) * piece_len, ", "tl.minimum((piece + 1) * piece_len - 1, "),
    ],
)
def test_wrong_attention_is_seen_with_windows_and_8_bits(code, bug, tmp_path, monkeypatch):
    module = attention_plan if "piece_len" in code else paged_attention
    with planted(module, code, bug, tmp_path) as copy:
        for name in {"launch_paged_attention", "launch_plan_attention"} & vars(copy).keys():
            monkeypatch.setattr(self_check, name, getattr(copy, name))
        found = [
            comparison.is_right
            for windows in ((0,), (40,))
            for comparison in check_kernels(
                shape_of("float16", "float8_e4m3fn", windows=windows), CPU, {"paged_attention"}
            )
        ]
    assert not all(found)


@pytest.mark.parametrize(
    ("code", "bug"),
    [
        ("(split + 1) * num_steps // SPLITS", "(split + 1) * (num_steps - 1) // SPLITS"),
        ("total += tl.load(tile_ptrs + part * SIZE", "total = tl.load(tile_ptrs + part * SIZE"),
        ("rows // HALF * D", "rows // HALF * (D - 1)"),
        ("activated(gate, up)", "activated(up, gate)"),
    ],
)
def test_wrong_products_of_few_rows_are_seen(code, bug, tmp_path, monkeypatch):
    shape = shape_of("float16", products=((128, 1024, False), (128, 1024, True)))
    checks = [
        check for kernel, check in self_check.all_checks(shape, "sm_90") if kernel == "linear"
    ]  # K is split there

    def are_right() -> bool:
        return all(comparison.is_right for check in checks for comparison in check(self_check._Inputs(shape, CPU)))

    assert are_right()
    with planted(linear, code, bug, tmp_path) as copy:
        monkeypatch.setattr(self_check, "launch_few_row_linear", copy.launch_few_row_linear)
        assert not are_right()


def test_not_a_number_is_wrong():
    expected = torch.ones(3)
    assert not self_check._floats("k", torch.tensor([1.0, torch.nan, 1.0]), expected).is_right
    assert not self_check._floats("k", torch.tensor([1.0, torch.inf, 1.0]), expected).is_right
    assert self_check._floats("k", torch.tensor([1.0, 1.0, torch.inf]), torch.tensor([1.0, 1.0, torch.inf])).is_right
    assert not Comparison("k", float("nan"), 1.0).is_right


def test_kernels_that_do_not_run_are_named(monkeypatch):
    def launch(*_):
        raise OSError("out of registers")

    monkeypatch.setattr(self_check, "launch_silu_and_mul", launch)
    with pytest.raises(KernelError, match="kernel silu_and_mul does not run: OSError: out of registers"):
        check_kernels(shape_of("float16"), CPU, {"silu_and_mul"})


class FakeGpu:
    """check_kernels and its device, as start_check sees them."""

    def __init__(self, monkeypatch, tmp_path) -> None:
        self.num_checks, self.facts, self.sources = 0, dict(FACTS), tmp_path / "kernels"
        self.found = [Comparison("draw", 0.0, 0.0), Comparison("paged_attention", 0.004, 0.016)]
        self.sources.mkdir()
        (self.sources / "op.py").write_text("x = 1\n")
        monkeypatch.setattr(start_check, "check_kernels", self._check)
        monkeypatch.setattr(start_check, "device_facts", lambda _: dict(self.facts))
        monkeypatch.setattr(start_check.evenflow.kernels, "__path__", [str(self.sources)])

    def _check(self, *_: object) -> list[Comparison]:
        self.num_checks += 1
        return self.found


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    return FakeGpu(monkeypatch, tmp_path)


def start(directory: Path, shape: CheckedShape = SHAPES[0]) -> str:
    return check_at_start(shape, CPU, directory)


def test_what_passed_is_remembered(gpu, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "evenflow"):
        first, second = start(tmp_path), start(tmp_path)
    assert gpu.num_checks == 1
    said = (
        "kernels: 2 comparisons with their references are right on GPU 9000, "
        "the worst is paged_attention with 25% of the allowed error"
    )
    assert first.startswith(said)
    assert first.endswith(" s)")
    assert second == f"{said} (cached)"
    assert caplog.messages == [first, second]


def test_whatever_changes_is_checked_again(gpu, tmp_path):
    start(tmp_path)
    (gpu.sources / "op.py").write_text("x = 2\n")
    start(tmp_path)
    (gpu.sources / "new.py").write_text("")
    start(tmp_path)
    start(tmp_path, SHAPES[1])
    assert gpu.num_checks == 4
    for number, name in enumerate(FACTS):
        gpu.facts[name] += "'"
        assert "cached" not in start(tmp_path)
        assert gpu.num_checks == 5 + number
    assert "cached" in start(tmp_path)
    gpu.facts = dict(FACTS)
    assert "cached" in start(tmp_path)  # what was known before is still known
    assert gpu.num_checks == 4 + len(FACTS)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 1}', b'{"a": {"facts": {}}}', b"\xff\x00", b"null"])
def test_a_broken_memory_is_ignored_and_replaced(gpu, tmp_path, caplog, content):
    path = tmp_path / "kernel_checks.json"
    path.write_bytes(content)
    assert "cached" not in start(tmp_path)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{path} is ignored: " in caplog.text
    assert "cached" in start(tmp_path)
    assert [path.name for path in tmp_path.glob("kernel_checks*")] == ["kernel_checks.json"]


def test_a_memory_that_cannot_be_written_costs_a_check(gpu, tmp_path, caplog):
    (tmp_path / "file").touch()
    for number in (1, 2):
        assert "cached" not in start(tmp_path / "file")
        assert gpu.num_checks == number
    assert "cannot be written, so the kernels are checked at every start" in caplog.text


def test_the_memory_does_not_grow_for_ever(gpu, tmp_path):
    for number in range(start_check.MAX_ENTRIES + 5):
        gpu.facts["driver"] = str(number)
        start(tmp_path)
    entries = json.loads((tmp_path / "kernel_checks.json").read_text())
    assert [entry["facts"]["driver"] for entry in entries.values()] == [
        str(number) for number in range(5, start_check.MAX_ENTRIES + 5)
    ]


def test_what_is_wrong_ends_the_start_and_is_not_remembered(gpu, tmp_path):
    gpu.found.append(Comparison("rotary_and_store", 0.5, 0.0157))
    message = (
        r"kernel rotary_and_store computes something else than its reference on GPU 9000 \(arch9, Triton 3.x\), for "
        r"4/2 heads of 64 in float32: its error is 0.5, 0.0157 is allowed. The text would be wrong. Use another version"
    )
    for number in (1, 2):
        with pytest.raises(RuntimeError, match=message):
            start(tmp_path)
        assert gpu.num_checks == number
    assert not list(tmp_path.glob("kernel_checks*"))


def test_what_does_not_run_is_told_with_the_device(gpu, tmp_path, monkeypatch):
    def failing(*_):
        raise KernelError("kernel draw does not run: ValueError: no") from ValueError("no")

    monkeypatch.setattr(start_check, "check_kernels", failing)
    with pytest.raises(
        RuntimeError, match=r"kernel draw does not run: ValueError: no on GPU 9000 \(arch9, Triton 3.x\)"
    ):
        start(tmp_path)


def test_a_cpu_has_nothing_to_check(tmp_path):
    assert device_facts(CPU) is None
    assert start(tmp_path) == ""


def test_where_the_memory_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/somebody")
    for value, expected in (
        (str(tmp_path), tmp_path / "evenflow"),
        ("", Path("/home/somebody/.cache/evenflow")),
        ("relative", Path("/home/somebody/.cache/evenflow")),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_directory() == expected
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path("/home/somebody/.cache/evenflow")


def test_the_hash_sees_names_and_contents(tmp_path):
    (tmp_path / "a.py").write_text("1")
    one = sources_hash(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    two = sources_hash(tmp_path)
    (tmp_path / "b.py").write_text("2")
    assert len({one, two, sources_hash(tmp_path)}) == 3
    (tmp_path / "b.txt").write_text("2")
    assert sources_hash(tmp_path) == sources_hash(tmp_path)
