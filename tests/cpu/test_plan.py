"""What fits a GPU and how fast it can be, against numbers worked out by hand."""

import json
import re

import pytest
import torch
from checkpoints import make_checkpoint

from evenflow.cli import main
from evenflow.distributed import TensorParallel
from evenflow.layers.loading import Placement
from evenflow.model_config import ModelConfig
from evenflow.models import make_model
from evenflow.plan import known_models, make_plan, read_model_config
from evenflow.platforms.specs import find_specs


@pytest.mark.parametrize(
    ("name", "parameters", "kv_bytes"),
    [
        ("llama-2-7b", 6_738_415_616, 524_288),
        ("llama-2-13b", 13_015_864_320, 819_200),
        ("llama-2-70b", 68_976_648_192, 327_680),
        ("llama-3.1-8b", 8_030_261_248, 131_072),
        ("llama-3.1-70b", 70_553_706_496, 327_680),
        ("mistral-7b", 7_241_732_096, 131_072),
        ("qwen2.5-7b", 7_615_616_512, 57_344),
        ("qwen3-8b", 8_190_735_360, 147_456),
    ],
)
def test_published_sizes(name, parameters, kv_bytes):
    """Parameter counts as their authors' checkpoints have them."""
    plan = make_plan(name, read_model_config(name), find_specs("b200"))
    assert (plan.num_parameters, plan.kv_bytes_per_token) == (parameters, kv_bytes)
    assert set(known_models()) >= {name}


def test_llama_2_7b_on_an_a100_by_hand():
    plan = make_plan("llama-2-7b", read_model_config("llama-2-7b"), find_specs("A100 80GB"))
    assert plan.weight_bytes == 13_476_831_232
    assert plan.activation_bytes == 8192 * (2 * 4096 + 3 * 11008 + 2 * 3 * 4096) * 2 + 3 * 256 * 32000 * 4
    assert plan.cache_bytes == 72_000_000_000 - 13_476_831_232 - plan.activation_bytes
    assert plan.num_cache_tokens == plan.cache_bytes // 524_288
    assert plan.fits
    # One request: all weights but the input embedding, and 479 tokens of cache, at 2,039 GB/s.
    one = 1 / ((13_476_831_232 - 32000 * 4096 * 2 + 479 * 524_288) / 2.039e12)
    assert plan.limit_one_request == pytest.approx(one)
    batch = plan.num_concurrent
    assert batch == min(plan.num_cache_tokens // 479, 256)
    memory_s = (13_476_831_232 - 32000 * 4096 * 2 + batch * 479 * 524_288) / 2.039e12
    body = 6_738_415_616 - 2 * 32000 * 4096 - 4096
    compute_s = 2 * batch * (body + 32000 * 4096 + 2 * 32 * 4096 * 479) / 312e12
    assert plan.limit_ideal == pytest.approx(batch / max(memory_s, compute_s))
    assert plan.limit_no_overlap == pytest.approx(batch / (memory_s + compute_s))


def test_several_gpus():
    model, specs = read_model_config("llama-2-70b"), find_specs("mi210")
    plans = {n: make_plan("llama-2-70b", model, specs, n) for n in (1, 2, 4, 8)}
    assert [n for n, plan in plans.items() if plan.fits] == [4, 8]
    assert "weights and activations need" in plans[1].reason
    with pytest.raises(ValueError, match="--gpus 3 must divide the model's 64 attention heads and 28672 MLP columns"):
        make_plan("llama-2-70b", model, specs, 3)
    # 8 key heads on 16 GPUs: each is held twice, so a GPU's share does not shrink further.
    sixteen = make_plan("llama-2-70b", model, specs, 16)
    assert sixteen.cache_bytes // sixteen.num_cache_tokens == pytest.approx(327_680 / 8, rel=1e-3)


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3.1-70b", "qwen2.5-7b", "qwen3-8b"])
@pytest.mark.parametrize("num_gpus", [1, 2, 4])
def test_the_weights_of_a_gpu_are_those_of_the_model_that_a_rank_makes(name, num_gpus):
    config = read_model_config(name)
    place = Placement(torch.device("meta"), getattr(torch, config.dtype), TensorParallel(num_gpus - 1, num_gpus))
    parameters = make_model(config, place).parameters()
    plan = make_plan(name, config, find_specs("mi300x"), num_gpus)
    assert plan.weight_bytes == sum(p.numel() * p.element_size() for p in parameters)


def test_sums_between_gpus_by_hand():
    """LLaMA-2 70B on four A100: 161 sums of 8,192 and a gathering of 32,000 numbers for each request, at 300 GB/s."""
    model = read_model_config("llama-2-70b")
    plan = make_plan("m", model, find_specs("a100"), 4)
    links_s = 162 * 6e-6 + 2 * (161 * 2 * 3 / 4 * 8192 + 3 / 4 * 32000) / 300e9
    layer = 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672) // 4 + 2 * 8192
    read_bytes = 2 * (80 * layer + 8000 * 8192 + 8192) + 479 * 327_680 // 4
    assert plan.limit_one_request == pytest.approx(1 / (read_bytes / 2.039e12 + links_s))
    assert plan.link_share_one_request == pytest.approx(links_s * plan.limit_one_request)
    assert plan.link_share_one_request == pytest.approx(0.055, abs=0.001)
    l40 = make_plan("m", model, find_specs("l40"), 8)  # no link: over PCIe, 32 GB/s come in
    links_s = 162 * 6e-6 + l40.num_concurrent * 2 * (161 * 2 * 7 / 8 * 8192 + 7 / 8 * 32000) / 32e9
    assert l40.link_share == pytest.approx(links_s * l40.limit_ideal / l40.num_concurrent)
    assert make_plan("m", model, find_specs("mi300x"), 1).link_share == 0.0


def test_a_short_cache_does_not_fit():
    model = read_model_config("llama-3.1-8b")
    plan = make_plan("m", model, find_specs("rtx-4090"))
    assert not plan.fits
    assert "less than one request of 131072; lower --max-model-len" in plan.reason
    assert make_plan("m", model, find_specs("rtx-4090"), max_model_len=8192).fits


@pytest.mark.parametrize(
    ("gpu", "dtype"), [("mi300x", "float8_e4m3fnuz"), ("h100", "float8_e4m3fn"), ("l4", "float8_e4m3fn")]
)
def test_a_cache_of_8_bits_takes_half_the_memory(gpu, dtype):
    model = read_model_config("llama-3.1-8b")
    whole = make_plan("m", model, find_specs(gpu), max_model_len=8192)
    half = make_plan("m", model, find_specs(gpu), kv_cache_dtype="fp8", max_model_len=8192)
    assert (half.kv_cache_dtype, half.fits) == (dtype, whole.fits)
    assert half.kv_bytes_per_token == whole.kv_bytes_per_token // 2 == 65_536
    assert half.num_cache_tokens == half.cache_bytes // 65_536
    assert half.limit_ideal > whole.limit_ideal


def test_a_gpu_without_8_bits_has_no_such_cache(capsys):
    assert main(["plan", "llama-3.1-8b", "--gpu", "mi210", "--kv-cache-dtype", "fp8"]) == 3
    assert "it has no 8-bit floats; leave --kv-cache-dtype at auto" in capsys.readouterr().out
    assert main(["plan", "llama-3.1-8b", "--gpus", "1", "--kv-cache-dtype", "fp8", "--max-model-len", "8192"]) == 0
    assert "65,536 KV bytes per token in float8_e4m3fn or float8_e4m3fnuz" in capsys.readouterr().out


def test_the_command(capsys):
    assert main(["plan", "llama-2-70b", "--gpu", "mi210", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert [(plan["num_gpus"], plan["fits"]) for plan in plans] == [(1, False), (2, False), (4, True), (8, True)]
    assert main(["plan", "llama-2-70b", "--gpu", "mi210", "--gpus", "1"]) == 3
    out = capsys.readouterr().out
    assert "68.98 G parameters in float16, 327,680 KV bytes per token" in out
    assert "weights and activations need" in out
    assert main(["plan", "llama-2-70b", "--gpu", "a100", "--gpus", "4"]) == 0
    assert re.search(r" 6%, [0-9]+% *$", capsys.readouterr().out, re.MULTILINE)


def test_a_directory(tmp_path, capsys):
    directory = make_checkpoint(tmp_path).directory
    assert main(["plan", str(directory), "--gpu", "l4"]) == 0
    assert "1 x l4" in capsys.readouterr().out


def test_known_models_are_whole():
    for name, hf in known_models().items():
        assert ModelConfig.from_hf(hf).num_parameters > 10**9, name
