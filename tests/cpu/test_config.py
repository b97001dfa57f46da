"""EngineConfig, config.json and their resolution: every refusal names the key, the value and the way out."""

import dataclasses
import json
from pathlib import Path

import pytest

from evenflow.config import EngineConfig, Settings, parse_bytes, resolve
from evenflow.model_config import ModelConfig
from evenflow.platforms import Platform, cpu

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
}
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
CACHE_SCALES = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": SCHEME}
QWEN3 = LLAMA | {"model_type": "qwen3", "num_key_value_heads": 8}
GPU = Platform("gpu", "cuda", "any", 32, "float8_e4m3fn", 2**16, True, 2**36, "bfloat16")
FNUZ = dataclasses.replace(GPU, fp8_dtype="float8_e4m3fnuz")
SEVERAL = dataclasses.replace(GPU, num_devices=8, peer_sum_sizes=(2,))
SMALL = dataclasses.replace(GPU, memory_bytes=2**34)
OLD = dataclasses.replace(GPU, name="old GPU", arch="older", fp8_dtype=None)
CPU = cpu.detect()


def test_llama_2_7b_has_its_known_sizes():
    config = ModelConfig.from_hf(LLAMA)
    assert config.num_parameters == 6_738_415_616
    assert config.kv_elements_per_token * 2 == 524_288
    assert (config.num_kv_heads, config.head_dim, config.rope.theta, config.windows) == (32, 128, 10000.0, (None,) * 32)


def test_resolution_is_complete_and_says_why():
    resolution = resolve(EngineConfig(model="m", kv_cache_memory="2GiB"), ModelConfig.from_hf(LLAMA), CPU)
    settings = resolution.settings
    assert {f.name for f in dataclasses.fields(Settings)} == set(resolution.reasons)
    assert all(resolution.reasons.values())
    assert [f.name for f in dataclasses.fields(settings) if getattr(settings, f.name) is None] == ["revision"]
    assert (settings.kv_cache_bytes, settings.max_model_len, settings.dtype) == (2**31, 4096, "float32")
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.block_size = 1


@pytest.mark.parametrize(
    ("options", "platform", "field", "value"),
    [
        ({}, CPU, "max_num_batched_tokens", 2048),
        ({}, GPU, "max_num_batched_tokens", 2048),
        ({"max_num_seqs": 7}, CPU, "max_num_seqs", 7),
        ({"max_model_len": 100}, CPU, "max_model_len", 100),
        ({"max_model_len": 100}, CPU, "fit_max_model_len", False),
        ({}, CPU, "fit_max_model_len", True),
        ({}, GPU, "dtype", "bfloat16"),
        ({"dtype": "float16"}, GPU, "dtype", "float16"),
        ({"dtype": "float16"}, CPU, "kv_cache_dtype", "float16"),
        ({"kv_cache_dtype": "bfloat16"}, CPU, "kv_cache_dtype", "bfloat16"),
        ({"kv_cache_dtype": "fp8"}, GPU, "kv_cache_dtype", "float8_e4m3fn"),
        ({"kv_cache_dtype": "fp8", "dtype": "float16"}, FNUZ, "kv_cache_dtype", "float8_e4m3fnuz"),
        ({"kv_cache_dtype": "auto"}, FNUZ, "kv_cache_dtype", "bfloat16"),
        ({"enable_chunked_prefill": False}, CPU, "max_num_batched_tokens", 4096),
        ({"load_format": "dummy"}, CPU, "load_format", "dummy"),
        ({}, CPU, "load_format", "safetensors"),
        ({}, SEVERAL, "enable_custom_all_reduce", False),
        ({"tensor_parallel_size": 2}, SEVERAL, "enable_custom_all_reduce", True),
        ({"tensor_parallel_size": 4}, SEVERAL, "enable_custom_all_reduce", False),
        ({"tensor_parallel_size": 4, "enable_custom_all_reduce": True}, SEVERAL, "enable_custom_all_reduce", True),
        ({"tensor_parallel_size": 2, "enable_custom_all_reduce": False}, SEVERAL, "enable_custom_all_reduce", False),
        ({"enable_custom_all_reduce": True}, SEVERAL, "enable_custom_all_reduce", False),
        ({"tensor_parallel_size": 2}, CPU, "enable_custom_all_reduce", False),
        ({"tensor_parallel_size": 2, "enable_custom_all_reduce": True}, CPU, "enable_custom_all_reduce", False),
    ],
)
def test_resolution(options, platform, field, value):
    config = EngineConfig(model="m", **options)
    assert getattr(resolve(config, ModelConfig.from_hf(LLAMA), platform).settings, field) == value


@pytest.mark.parametrize(
    ("options", "platform", "is_offline", "tokens"),
    [
        ({}, GPU, True, 16384),
        ({}, GPU, False, 2048),
        ({}, SMALL, True, 2048),
        ({}, CPU, True, 2048),
        ({"max_num_batched_tokens": 512}, GPU, True, 512),
        ({"gpu_memory_utilization": 0.3}, GPU, True, 2048),
        ({"kv_cache_memory": "1GiB"}, GPU, True, 2048),
    ],
)
def test_steps_are_large_where_nobody_waits_for_a_token(options, platform, is_offline, tokens):
    config = EngineConfig(model="m", **options)
    resolution = resolve(config, ModelConfig.from_hf(LLAMA), platform, is_offline=is_offline)
    assert resolution.settings.max_num_batched_tokens == tokens


@pytest.mark.parametrize(("size", "tokens"), [(1, 2048), (2, 16384)])
def test_steps_are_large_where_weights_leave_room(size, tokens):
    """13 billion parameters in float32 take 52 of 68 GB, or 26 of each of two."""
    model = ModelConfig.from_hf(LLAMA | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40})
    config = EngineConfig(model="m", dtype="float32", tensor_parallel_size=size)
    assert resolve(config, model, SEVERAL, is_offline=True).settings.max_num_batched_tokens == tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 0}, "max_model_len=0 must be an integer of at least 1"),
        ({"max_model_len": 2.5}, "max_model_len=2.5 must be"),
        ({"block_size": True}, "block_size=True must be"),
        ({"max_num_seqs": -1}, "max_num_seqs=-1"),
        ({"dtype": "int8"}, "dtype='int8' must be one of auto, float32"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization=nan must be in"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization=0.0"),
        ({"kv_cache_memory": "lots"}, "kv_cache_memory='lots' must be a size such as 4GiB"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype='int8' must be one of auto, float32, bfloat16, float16, fp8"),
        ({"load_format": "pt"}, "load_format='pt' must be one of"),
    ],
)
def test_engine_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(model="m", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 5000}, "max_model_len=5000 exceeds the model's context of 4096 tokens; lower it"),
        (
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 100},
            "max_num_batched_tokens=100 is below max_model_len=4096",
        ),
    ],
)
def test_resolution_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        resolve(EngineConfig(model="m", **options), ModelConfig.from_hf(LLAMA), CPU)


@pytest.mark.parametrize(("platform", "name"), [(OLD, r"old GPU \(older\)"), (CPU, r"CPU \(cpu\)")])
def test_a_cache_of_8_bits_needs_a_gpu_that_has_them(platform, name):
    message = f"kv_cache_dtype='fp8' needs a GPU that converts 8-bit floats, and {name} does not; use 'auto'"
    with pytest.raises(ValueError, match=message):
        resolve(EngineConfig(model="m", kv_cache_dtype="fp8"), ModelConfig.from_hf(LLAMA), platform)


def test_a_cache_of_8_bits_takes_half_the_memory():
    model = ModelConfig.from_hf(LLAMA)
    whole, half = (
        resolve(EngineConfig(model="m", kv_cache_dtype=kind), model, GPU).settings for kind in ("auto", "fp8")
    )
    assert half.kv_bytes_per_token(model) * 2 == whole.kv_bytes_per_token(model) == 524_288


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("4GiB", 2**32), ("1.5g", 3 * 2**29), ("512 MB", 512_000_000), ("1e9", 10**9), ("77", 77), ("2KiB", 2048)],
)
def test_sizes(text, num_bytes):
    assert parse_bytes("kv_cache_memory", text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1XB", "0", "nan", "inf", "1 2"])
def test_sizes_refused(text):
    with pytest.raises(ValueError, match="kv_cache_memory="):
        parse_bytes("kv_cache_memory", text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not implemented; implemented are llama"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not implemented for llama"),
        ({"logits_scaling": 8.0}, "logits_scaling=8.0 is not implemented for llama; if it does not change"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not implemented"),
        ({"quantization_config": CACHE_SCALES | {"config_groups": {"group_0": {}}}}, "quantization_config=.* is not"),
        ({"quantization_config": CACHE_SCALES | {"sparsity_config": {"format": "x"}}}, "quantization_config=.* is not"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quantization_config=.* is not implemented"),
        (
            {"quantization_config": CACHE_SCALES | {"kv_cache_scheme": SCHEME | {"dynamic": True}}},
            "quantization_config=.* is not implemented",
        ),
        (
            {"quantization_config": CACHE_SCALES | {"kv_cache_scheme": SCHEME | {"type": "int"}}},
            "quantization_config=.* is not implemented",
        ),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope' is not implemented"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope type 'linear' needs a factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "factor=-1 must be a positive number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "x": 1}}, "rope parameter 'x' is not implemented"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not implemented"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=32"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be a positive integer"),
        ({"hidden_size": "big"}, "hidden_size='big' must be a positive integer"),
        ({"vocab_size": None}, "vocab_size=None must be a positive integer"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a positive number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no' must be true or false"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not implemented"),
        ({"hidden_size": 4100}, "hidden_size=4100 is no multiple"),
        ({"head_dim": 33}, "head_dim=33 must be even"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id=.* must be a token id or a list of them"),
    ],
)
def test_config_json_is_read_strictly(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(LLAMA | changes)


def test_no_model_type():
    with pytest.raises(ValueError, match="no model_type"):
        ModelConfig.from_hf({"hidden_size": 1})


def test_checkpoints_that_bring_scales_of_the_cache_alone_are_read():
    assert ModelConfig.from_hf(LLAMA | {"quantization_config": CACHE_SCALES}) == ModelConfig.from_hf(LLAMA)


def test_keys_without_effect_are_accepted():
    harmless = {"architectures": ["X"], "pretraining_tp": 1, "use_cache": True, "new_key": None, "other": False}
    assert ModelConfig.from_hf(LLAMA | harmless) == ModelConfig.from_hf(LLAMA)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "mistral", "num_key_value_heads": 8}, (4096,) * 32),
        ({"model_type": "mistral", "num_key_value_heads": 8, "sliding_window": None}, (None,) * 32),
        ({"model_type": "mistral", "num_key_value_heads": 8, "sliding_window": 7}, (7,) * 32),
        ({"model_type": "qwen2", "num_key_value_heads": 8, "sliding_window": 7}, (None,) * 32),
        (
            {
                "model_type": "qwen2",
                "num_key_value_heads": 8,
                "sliding_window": 7,
                "use_sliding_window": True,
                "max_window_layers": 30,
            },
            (None,) * 30 + (7,) * 2,
        ),
    ],
)
def test_windows(changes, windows):
    assert ModelConfig.from_hf(LLAMA | changes).windows == windows


def test_config_survives_json():
    assert ModelConfig.from_hf(json.loads(json.dumps(QWEN3))).head_dim == 128


@pytest.mark.parametrize(
    ("name", "parameters", "context"),
    [
        ("Llama-2-7b-hf", 6_738_415_616, 4096),
        ("Llama-3.2-1B", 1_235_814_400, 131072),
        ("Mistral-7B-v0.1", 7_241_732_096, 32768),
        ("Mistral-Nemo-Base-2407", 12_247_782_400, 1024000),
        ("Qwen2.5-7B-Instruct", 7_615_616_512, 32768),
        ("Qwen3-0.6B", 596_049_920, 40960),
        ("SmolLM-135M", 134_515_008, 8192),
        ("DeepSeek-R1-Distill-Qwen-1.5B", 1_777_088_000, 131072),
        ("TinyLlama-1.1B", 1_100_048_384, 2048),
        ("vicuna-7b-v1.5-16k", 6_738_415_616, 16384),
    ],
)
def test_published_configs_are_read(name, parameters, context):
    """Their parameter counts are those of the checkpoints that their authors published."""
    published = json.loads((Path(__file__).parent / "published_configs.json").read_text())
    config = ModelConfig.from_hf(published[name])
    assert (config.num_parameters, config.max_context) == (parameters, context)
