"""The self-check at start on a real GPU, of shapes that models have."""

import time
from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch

import evenflow.kernels
from evenflow import LLM, SamplingParams
from evenflow.kernels.self_check import CheckedShape, check_kernels
from evenflow.platforms import detect
from evenflow.runner import start_check

LLAMA = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128,
    "vocab_size": 128256, "block_size": 16, "windows": (0,), "has_head_norm": False,
    "products": (
        (6144, 4096, False), (4096, 4096, False), (28672, 4096, True), (4096, 14336, False), (128256, 4096, False),
    ),
}  # fmt: skip
SHAPES = [
    LLAMA,
    LLAMA | {"num_kv_heads": 32, "windows": (0, 4096), "has_head_norm": True},
    LLAMA | {"head_dim": 64, "hidden_size": 896, "num_heads": 14, "num_kv_heads": 2, "vocab_size": 151936},
    LLAMA | {"head_dim": 80, "hidden_size": 2560},
    LLAMA | {"head_dim": 256, "num_heads": 8, "num_kv_heads": 4},
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("sizes", SHAPES, ids=lambda sizes: f"heads of {sizes['head_dim']}")
def test_every_kernel_is_right(gpu, sizes, dtype):
    for cache_dtype in dict.fromkeys((dtype, detect().fp8_dtype or dtype)):
        start_s = time.perf_counter()
        found = check_kernels(CheckedShape(dtype=dtype, cache_dtype=cache_dtype, **sizes), gpu)
        worst = max(found, key=lambda comparison: comparison.error / (comparison.bound or 1.0))
        print(f"{dtype}, cache {cache_dtype}: {time.perf_counter() - start_s:.2f} s, worst {worst}")
        assert [comparison for comparison in found if not comparison.is_right] == []


def test_the_engine_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = {"device": "cuda", "max_model_len": 128, "max_num_seqs": 4, "kv_cache_memory": "64MiB"}
    first, second = (LLM("demo", **options).kernel_account for _ in range(2))
    assert torch.cuda.get_device_properties(0).name in first
    assert second.endswith("(cached)")


def test_a_wrong_kernel_ends_the_start(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("evenflow.kernels.self_check.launch_silu_and_mul", lambda x: x[:, : x.shape[1] // 2] * 1.03)
    with pytest.raises(start_check.KernelError, match="kernel silu_and_mul computes something else than"):
        LLM("demo", device="cuda", max_model_len=128, max_num_seqs=4, kv_cache_memory="64MiB")


def num_compiled():
    """Of all kernels, in this process."""
    modules = [import_module(f"evenflow.kernels.{found.name}") for found in iter_modules(evenflow.kernels.__path__)]
    kernels = [kernel for module in modules for name, kernel in vars(module).items() if name.endswith("_kernel")]
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


def test_steps_compile_nothing_more(tmp_path, monkeypatch):
    """But for log-probabilities. Of many models, without a GPU: tests/crosscheck/test_compiled_at_start.py."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # so that the check runs, in this process
    llm = LLM("demo", device="cuda", dtype="bfloat16", max_model_len=256, max_num_seqs=100, kv_cache_memory="256MiB")
    before = num_compiled()
    assert before > 20
    for number in (1, 3, 20, 40, 100, 150):
        for params in ({"temperature": 0.0}, {"top_p": 0.9}, {"repetition_penalty": 1.1}):
            llm.generate(["Once upon a time"] * number, SamplingParams(max_tokens=9, **params), use_tqdm=False)
    assert num_compiled() == before
