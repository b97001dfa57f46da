"""Bugs planted in our own kernels, in their source or in their machine code: `crosscheck run` names each of them.

On one architecture here; `pytest -m full tests/crosscheck` plants them on the others too.
"""

import re
import sys
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernel checks compile")

from evenflow.crosscheck.cases import all_cases
from evenflow.crosscheck.running import run_case

WRONG = "times PyTorch's, 2 are allowed"
MIXED, FP8 = "paged_attention/mixed, heads of 64, bfloat16", "paged_attention/scales by head, {fp8}"
FP8_TYPES = {"gfx942": ("float8_e4m3fnuz", "float8e5b16"), "gfx950": ("float8_e4m3fn", "float8e5")}
ARCHS = ["gfx942", *(pytest.param(arch, marks=pytest.mark.full) for arch in ("gfx90a", "gfx950"))]


@dataclass(frozen=True)
class Bug:
    """label: of the case that sees it. code is replaced by bug in the kernel's source. found: in what is said of it."""

    label: str
    code: str
    bug: str
    found: str


IN_SOURCE = {
    "block id out of bounds": Bug(MIXED, "block * (2 * H_KV", "(block + 5000) * (2 * H_KV", "OutOfBoundsError"),
    "block id beyond the cache": Bug(MIXED, "positions // S).to", "positions // S + 64).to", "OutOfBoundsError"),
    "padding is stored": Bug(
        "rotary_and_store/heads of 64, bfloat16", "if index < 0:", "if index < -9:", "OutOfBounds"
    ),
    "missing mask": Bug(
        "silu_and_mul/3 rows of 2 x 1100, bfloat16", "mask = cols < D", "mask = cols < 8 * D", "OutOfBounds"
    ),
    "a piece beyond the row": Bug(
        "linear/8 x 1192, bfloat16", "mask=cols < K - start", "mask=cols < BLOCK_K", "OutOfBounds"
    ),
    "the first piece twice": Bug("linear/6 x 3072, bfloat16", "weight = next_weight", "weight += next_weight", WRONG),
    "bits the wrong way round": Bug("apply_masks_/4 rows of 5001, float32", "& 1) == 0", "& 1) != 0", WRONG),
    "wrong stride of a row": Bug("rms_norm/4 heads of 128, strided, bfloat16", "* token_stride +", "* D +", WRONG),
    "wrong stride in a page": Bug(
        "paged_attention/mixed, heads of 80, bfloat16", "(positions % S) * D", "(positions % S) * BLOCK_D", WRONG
    ),
    "values of another head": Bug(MIXED, "cache_ptr + H_KV * S * D", "cache_ptr + (H_KV - 1) * S * D", WRONG),
    "no causal mask": Bug(MIXED, "key[None, :] <= position[:, None]", "key[None, :] < end", WRONG),
    "a key too many": Bug(MIXED, "positions[None, :] < last", "positions[None, :] <= last", WRONG),
    "no rescale of the values": Bug(MIXED, "acc * rescale[:, None], input", "acc, input", WRONG),
    "pieces are not weighed": Bug(MIXED, "sums * weights[:, None]", "sums", WRONG),
    "work is left": Bug(MIXED, "num_blocks * H_KV, tl.num", "num_blocks * H_KV - 1, tl.num", WRONG),
    "wrong fp8 kind": Bug(
        FP8, "tl.dot(q, k.to(q.dtype)", "tl.dot(q, k.to(tl.{other}, bitcast=True).to(q.dtype)", WRONG
    ),
    "scale of another head": Bug(FP8, "v_scale_ptr + head // G", "v_scale_ptr + head % G", WRONG),
    "not atomic": Bug(
        "apply_penalties_/5 rows, float32",
        'tl.atomic_add(scratch_ptr + tokens, 1, mask=is_token & ~is_prompt, sem="relaxed")',
        "tl.store(scratch_ptr + tokens, 1 + tl.load(scratch_ptr + tokens, mask=is_token), mask=is_token & ~is_prompt)",
        WRONG,
    ),
    "a token beyond its buffer": Bug("draw/5 rows, float32", "mask=length < L", "mask=length <= L", WRONG),
    "half a seed": Bug("draw/5 rows, float32", "seed_high << 32 | seed_low", "seed_low", WRONG),
    "larger is smaller": Bug("token_logprobs/20 best, float32", "(x > own)", "(x >= own)", WRONG),
    "slot of another row": Bug(
        "expand_rows/5 rows, 150 tokens, int32", "slots_ptr + low)", "slots_ptr + low + 1)", "OutOfBounds"
    ),
    "one too many is kept": Bug(
        "filter_thresholds/7 rows of 900, float32",
        "num1 >= k, num2 >= k, num3 >= k",
        "num1 > k, num2 > k, num3 > k",
        WRONG,
    ),
}
# Lines of machine code that match `code` are replaced.
LOGPROBS, SILU = "token_logprobs/20 best, float32", "silu_and_mul/3 rows of 2 x 1100, bfloat16"
NOTHING = r"\ts_nop 0"
IN_MACHINE_CODE = {
    "dropped barriers": Bug(LOGPROBS, r"^\ts_barrier$", NOTHING, "RaceError: "),
    "dropped waits": Bug(LOGPROBS, r"^\ts_waitcnt .*$", NOTHING, "MissingWaitError: "),
    "dropped waits for LDS": Bug(MIXED, r"^\ts_waitcnt lgkmcnt\(0\)$", NOTHING, "MissingWaitError: "),
    "LDS is not written": Bug(LOGPROBS, r"^\tds_write.*$", NOTHING, "UninitializedReadError: "),
    "LDS is left": Bug(LOGPROBS, r"^(\tds_read_b32 .*?)( offset:\d+)?$", r"\1 offset:65532", "OutOfBoundsError: "),
    "loads are left out": Bug(SILU, r"^\t(buffer|global)_load_.*$", NOTHING, "UninitializedReadError: "),
    "an instruction that is not known": Bug(LOGPROBS, r"^\tv_add_f32_e32 ", r"\tv_ad_f32_e32 ", "AssemblyError: "),
}


def planted(bug: Bug, arch: str, folder: Path, monkeypatch) -> str:
    """Import a copy of the kernel's module with the bug, for this test; returns its name."""
    case, _ = all_cases(arch)[bug.label]
    source = Path(str(import_module(case.module).__file__)).read_text()
    assert source.count(bug.code) >= 1, "the kernel has changed; the bug must, too"
    path = folder / f"planted_{case.module.rpartition('.')[2]}.py"
    path.write_text(source.replace(bug.code, bug.bug))
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return path.stem


@pytest.fixture(autouse=True)
def compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("what", IN_SOURCE)
def test_bugs_in_the_source_are_named(what, arch, tmp_path, monkeypatch):
    bug = IN_SOURCE[what]
    if "{fp8}" in bug.label:
        if arch not in FP8_TYPES:
            pytest.skip("no cache of 8 bits")
        fp8, other = FP8_TYPES[arch]
        bug = replace(bug, label=bug.label.format(fp8=fp8), bug=bug.bug.format(other=other))
    case, dtype = all_cases(arch)[bug.label]
    ran = run_case(replace(case, module=planted(bug, arch, tmp_path, monkeypatch)), dtype, arch)
    assert bug.found in ran.failure


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("what", IN_MACHINE_CODE)
def test_bugs_in_the_machine_code_are_named(what, arch):
    bug = IN_MACHINE_CODE[what]
    num_replaced = 0

    def damage(assembly: str) -> str:
        nonlocal num_replaced
        text, number = re.subn(bug.code, bug.bug, assembly, flags=re.MULTILINE)
        num_replaced += number
        return text

    ran = run_case(*all_cases(arch)[bug.label], arch, damage)
    assert num_replaced
    assert bug.found in ran.failure
