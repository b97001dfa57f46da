"""Model directories as people have them: whole, sharded, tied, and broken in every way that has a name."""

import json
import os

import pytest
import torch
from checkpoints import edit_config, make_checkpoint
from safetensors.torch import load_file, save_file

from evenflow.distributed import TensorParallel
from evenflow.layers.attention import cache_scales, fit_cache_scales
from evenflow.layers.linear import ColumnParallelLinear, RowParallelLinear
from evenflow.layers.loading import Placement
from evenflow.model_config import ModelConfig
from evenflow.model_files import find_model, read_json, weight_files
from evenflow.models import make_model
from evenflow.runner.weights import fill_dummy, load_weights

CPU = torch.device("cpu")


def load(directory):
    config = ModelConfig.from_hf(read_json(directory / "config.json"))
    model = make_model(config, Placement(CPU, torch.float32))
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    load_weights(model, directory, is_tied=config.tie_word_embeddings)
    return model


def rewrite(directory, change) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_every_parameter_is_filled(tmp_path):
    model = load(make_checkpoint(tmp_path, "qwen2").directory)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_sharded_files_equal_one_file(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "one", "qwen3")
    checkpoint.oracle.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(weight_files(tmp_path / "many")) > 3
    one, many = load(tmp_path / "one").state_dict(), load(tmp_path / "many").state_dict()
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


SCALES = {
    f"model.layers.{layer}.self_attn.{name}": torch.tensor(0.25 + layer + (0.5 if name == "v_scale" else 0.0))
    for layer in range(3)
    for name in ("k_scale", "v_scale")
}


@pytest.mark.parametrize("shape", [(), (1,)])
def test_scales_of_the_cache_are_read(tmp_path, shape):
    directory = make_checkpoint(tmp_path).directory
    assert {scale.item() for scale in cache_scales(load(directory)).values()} == {1.0}
    rewrite(directory, lambda tensors: tensors.update({name: x.view(shape).bfloat16() for name, x in SCALES.items()}))
    model = load(directory)
    found = cache_scales(model)
    assert {name: scale.item() for name, scale in found.items()} == {name: x.item() for name, x in SCALES.items()}
    assert all(scale.shape == (1,) and scale.dtype == torch.float32 for scale in found.values())
    fit_cache_scales(model, torch.float8_e4m3fn)
    assert cache_scales(model)["model.layers.1.self_attn.v_scale"].item() == 1.75
    fit_cache_scales(model, torch.float8_e4m3fnuz)
    assert cache_scales(model)["model.layers.1.self_attn.v_scale"].item() == 3.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda scales: scales.popitem(),
            "KV cache for some layers only; 'model.layers.2.self_attn.v_scale' is missing",
        ),
        (
            lambda scales: scales.update({"model.layers.0.self_attn.k_scale": torch.ones(2)}),
            "'model.layers.0.self_attn.k_scale' must be one positive number to scale the KV cache by",
        ),
        (lambda scales: scales.update({"model.layers.0.self_attn.k_scale": torch.tensor(0.0)}), "one positive number"),
        (lambda scales: scales.update({"model.layers.0.self_attn.k_scale": torch.tensor(torch.nan)}), "one positive"),
        (lambda scales: scales.update({"model.layers.7.self_attn.k_scale": torch.ones(1)}), "has no place"),
    ],
)
def test_scales_of_the_cache_that_cannot_be_used(tmp_path, change, message):
    directory, scales = make_checkpoint(tmp_path).directory, dict(SCALES)
    change(scales)
    rewrite(directory, lambda tensors: tensors.update(scales))
    with pytest.raises(ValueError, match=message):
        load(directory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_load_exactly(tmp_path, dtype):
    directory = make_checkpoint(tmp_path).directory
    rewrite(directory, lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))
    stored = load_file(directory / "model.safetensors")
    model = load(directory)
    assert torch.equal(model.model.norm.weight, stored["model.norm.weight"].float())


def test_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path):
    directory = make_checkpoint(tmp_path, "llama-tied").directory
    rewrite(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load(directory)
    rewrite(directory, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match="lm_head.weight differs from the embedding"):
        load(directory)


def test_old_inverse_frequencies_are_skipped(tmp_path):
    directory = make_checkpoint(tmp_path).directory
    rewrite(directory, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load(directory)


BROKEN = {
    "missing": (
        lambda t: t.pop("model.layers.1.self_attn.v_proj.weight"),
        "lacks 1 tensors, first 'model.layers.1.self_attn.v_proj.weight'",
    ),
    "surplus": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
        "tensor 'model.layers.0.self_attn.q_proj.bias' has no place in LlamaForCausalLM",
    ),
    "misshaped": (
        lambda t: t.update({"model.norm.weight": torch.ones(65)}),
        r"tensor 'model.norm.weight' has shape \[65\], config.json asks for \[64\]",
    ),
    "dtype": (
        lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
        "tensor 'model.norm.weight' has dtype I8, which is not implemented",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_tensor_is_refused_by_name(tmp_path, name):
    change, message = BROKEN[name]
    directory = make_checkpoint(tmp_path).directory
    rewrite(directory, change)
    with pytest.raises(ValueError, match=message):
        load(directory)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    directory = make_checkpoint(tmp_path).directory
    save_file({"model.norm.weight": torch.ones(64)}, directory / "other.safetensors")
    with pytest.raises(ValueError, match="tensor 'model.norm.weight' is there twice"):
        load(directory)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, cut):
    directory = make_checkpoint(tmp_path).directory
    path = directory / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    with pytest.raises(ValueError, match=r"model.safetensors is not a valid safetensors file: .*; download it again"):
        load(directory)


def test_a_lying_header_is_refused(tmp_path):
    directory = make_checkpoint(tmp_path).directory
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[:8] = (2**62).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        load(directory)


def test_pickles_are_refused_with_the_way_out(tmp_path):
    directory = make_checkpoint(tmp_path).directory
    os.rename(directory / "model.safetensors", directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pickle weights \(pytorch_model.bin\).*save_pretrained"):
        load(directory)


def test_no_weights_at_all(tmp_path):
    directory = make_checkpoint(tmp_path).directory
    os.remove(directory / "model.safetensors")
    with pytest.raises(ValueError, match="no \\*.safetensors file; use load_format='dummy'"):
        load(directory)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "index.json is not valid JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "names 'gone.safetensors', which is not in"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "names '../../etc/passwd', which is not in"),
    ],
)
def test_a_broken_index_is_refused(tmp_path, index, message):
    directory = make_checkpoint(tmp_path).directory
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        load(directory)


def test_model_names(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.gguf").write_bytes(b"x")
    for model, message in {
        str(tmp_path / "nowhere"): "does not exist",
        "./nowhere": "does not exist",
        "nowhere": "does not exist .a Hugging Face name has the form owner/name",
        str(tmp_path / "empty"): "has no config.json",
        str(tmp_path / "file.gguf"): "is a file; pass the Hugging Face model directory",
        "some one/a model": "neither a directory nor a Hugging Face name",
    }.items():
        with pytest.raises(ValueError, match=message):
            find_model(model)


def test_no_network_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match="'owner/name' is not in the local cache and the Hugging Face hub cannot be reached"
    ):
        find_model("owner/name")


def test_broken_config_json(tmp_path):
    (tmp_path / "config.json").write_text("{'a': 1}")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        read_json(tmp_path / "config.json")


def test_dummy_weights_are_random_and_repeatable(tmp_path):
    config = ModelConfig.from_hf(json.loads((make_checkpoint(tmp_path, "qwen2").directory / "config.json").read_text()))
    first, second, other = (make_model(config, Placement(CPU, torch.bfloat16)) for _ in range(3))
    fill_dummy(first, 0)
    fill_dummy(second, 0)
    fill_dummy(other, 1)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dim() == 1 or not torch.equal(a, c), name
    weights = [p for p in first.parameters() if p.dim() > 1]
    assert len({float(w.flatten()[0]) for w in weights}) == len(weights)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_add_up(tmp_path, size):
    """Every rank reads only its slice; together they compute what one rank does."""
    generator = torch.Generator().manual_seed(0)
    parts = {"q_proj": 16, "k_proj": 8, "v_proj": 8}
    full = {f"{n}.weight": torch.randn(s, 8, generator=generator) for n, s in parts.items()}
    full |= {f"{n}.bias": torch.randn(s, generator=generator) for n, s in parts.items()}
    full |= {
        "o_proj.weight": torch.randn(8, 16, generator=generator),
        "o_proj.bias": torch.randn(8, generator=generator),
    }
    save_file(full, tmp_path / "model.safetensors")
    x = torch.randn(3, 8, generator=generator)
    columns, row_sum = {name: [] for name in parts}, torch.zeros(3, 8)
    for rank in range(size):
        place = Placement(CPU, torch.float32, TensorParallel(rank, size))
        model = torch.nn.Module()
        model.qkv_proj = ColumnParallelLinear(8, parts, True, place)
        model.o_proj = RowParallelLinear("o_proj", 16, 8, True, place)
        load_weights(model, tmp_path, is_tied=False)
        outs = model.qkv_proj(x).split(list(model.qkv_proj.parts.values()), -1)
        for name, out in zip(parts, outs, strict=True):
            columns[name].append(out)
        row_sum += model.o_proj(outs[0])
    q, k, v = (torch.cat(columns[name], -1) for name in parts)
    for name, out in zip("qkv", (q, k, v), strict=True):
        expected = x @ full[f"{name}_proj.weight"].T + full[f"{name}_proj.bias"]
        torch.testing.assert_close(out, expected)
    torch.testing.assert_close(row_sum, q @ full["o_proj.weight"].T + full["o_proj.bias"])


def test_a_split_that_does_not_come_out_even_is_refused():
    with pytest.raises(ValueError, match="k_proj=8 cannot be split over tensor_parallel_size=3"):
        ColumnParallelLinear(8, {"k_proj": 8}, False, Placement(CPU, torch.float32, TensorParallel(0, 3)))


def test_edit_config_changes_what_is_read(tmp_path):
    directory = make_checkpoint(tmp_path).directory
    edit_config(directory, logits_scaling=2.0)
    with pytest.raises(ValueError, match="logits_scaling=2.0 is not implemented for llama"):
        load(directory)
