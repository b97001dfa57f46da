"""The models and the work that both engines are measured on: shapes with random weights, and ShareGPT's length law."""

import json
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
    """The shape with transformers' random weights, in bfloat16: normal with initializer_range, norms 1.

    Both engines load them: how fast a card is at its power limit depends on the numbers that it multiplies, and each
    engine makes its own kind. A directory that is there already is taken as it is.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = folder / name
    if directory.exists():
        return directory
    unfinished = write_config(name, folder / "unfinished")
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(unfinished), dtype=torch.bfloat16)
    model.save_pretrained(unfinished)
    del model
    torch.cuda.empty_cache()
    write_config(name, folder / "unfinished")  # as both engines read it without weights
    return unfinished.rename(directory)


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
