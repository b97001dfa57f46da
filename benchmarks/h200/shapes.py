"""The models and the work that both engines are measured on: shapes with random weights, and ShareGPT's length law."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "initializer_range": 0.02,
    "use_cache": True,
}


def _shape(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, theta: float) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 8192 if vocab > 100000 else 4096,
        "rope_theta": theta,
    }


SHAPES = {
    "llama-2-7b": _shape(4096, 11008, 32, 32, 32, 32000, 10000.0),
    "llama-2-13b": _shape(5120, 13824, 40, 40, 40, 32000, 10000.0),
    "llama-2-70b": _shape(8192, 28672, 80, 64, 8, 32000, 10000.0),
    "llama-3.1-8b": _shape(4096, 14336, 32, 32, 8, 128256, 500000.0),
    "small-1b": _shape(2048, 5632, 22, 32, 8, 32000, 10000.0),
}


def write_config(name: str, folder: Path) -> Path:
    """A directory with config.json of the shape and nothing else."""
    directory = folder / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**COMMON, **SHAPES[name]}))
    return directory


def write_checkpoint(name: str, folder: Path) -> Path:
    """The shape with random weights, in a file for each layer: normal with a deviation of 0.02, norms 1.

    Both engines load them: a card at its power limit is faster where the numbers are, and each engine has its own way
    to make random weights. Kept where they are there already.
    """
    import torch
    from safetensors.torch import save_file

    directory = write_config(name, folder)
    index_file = directory / "model.safetensors.index.json"
    if index_file.exists():
        return directory
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    weight_map: dict[str, str] = {}
    for part, shapes in _parts(SHAPES[name]):
        tensors = {}
        for key, shape in shapes.items():
            values = torch.ones(shape, device=device, dtype=torch.bfloat16)
            tensors[key] = (values if len(shape) == 1 else values.normal_(0.0, 0.02, generator=generator)).cpu()
        save_file(tensors, directory / f"{part}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"{part}.safetensors")
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def _parts(shape: dict[str, int]) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """(file's name, tensors) of what comes before and after the layers, and of each layer."""
    hidden, inner, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    yield (
        "ends",
        {
            "model.embed_tokens.weight": (vocab, hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (vocab, hidden),
        },
    )
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for number in range(shape["num_hidden_layers"]):
        yield f"layer-{number:02}", {f"model.layers.{number}.{key}.weight": size for key, size in layer.items()}


def _with_mean(lengths: np.ndarray, mean: float) -> np.ndarray:
    rounded = lengths
    for _ in range(50):
        lengths = lengths * mean / rounded.mean()
        rounded = np.clip(np.round(lengths), 4, 1024).astype(int)
    return rounded


def request_lengths(count: int = 1000, seed: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """(prompt tokens, output tokens), log-normal, with the seed's own means of 249 and 230, at most 2,048 together."""
    rng = np.random.default_rng(seed)
    prompts = np.clip(rng.lognormal(4.6, 1.25, size=4 * count), 4, 1024)
    outputs = np.clip(rng.lognormal(5.0, 1.0, size=4 * count), 4, 1024)
    fits = prompts + outputs <= 2048
    return _with_mean(prompts[fits][:count], 249), _with_mean(outputs[fits][:count], 230)


def random_prompts(lengths: np.ndarray, vocab_size: int, seed: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab_size, size=n).tolist() for n in lengths]
