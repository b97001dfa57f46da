"""The self-check at start on a real GPU, of shapes that models have."""

import time

import pytest
import torch

from evenflow import LLM
from evenflow.kernels.self_check import CheckedShape, check_kernels
from evenflow.platforms import detect
from evenflow.runner import start_check

LLAMA = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128,
    "vocab_size": 128256, "block_size": 16, "windows": (0,), "has_head_norm": False,
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
