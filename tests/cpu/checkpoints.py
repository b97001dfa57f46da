"""Tiny random checkpoints in Hugging Face layout, made by transformers: the files that tests load, and their oracle."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

VOCAB = 160

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # far enough from zero that layers and positions matter
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

# name -> (model type, changes to COMMON)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 24}),
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-yarn": ("llama", {"rope_parameters": YARN_ROPE}),
    "llama-yarn-betas": ("llama", {"rope_parameters": {**YARN_ROPE, "beta_fast": 16.0, "beta_slow": 2.0}}),
    "llama-yarn-factor": ("llama", {"rope_parameters": {**YARN_ROPE, "attention_factor": 1.3}}),
    "llama-yarn-mscale": ("llama", {"rope_parameters": {**YARN_ROPE, "mscale": 1.0, "mscale_all_dim": 0.5}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 24}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN_ROPE, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-bias": ("qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
}


@dataclass
class Checkpoint:
    """A saved model, and the same model in transformers, float32."""

    directory: Path
    oracle: Any

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """[len(token_ids), vocab]"""
        with torch.inference_mode():
            return self.oracle(torch.tensor([token_ids])).logits[0]

    def greedy(self, token_ids: list[int], num_tokens: int) -> list[int]:
        out = list(token_ids)
        for _ in range(num_tokens):
            out.append(int(self.logits(out)[-1].argmax()))
        return out[len(token_ids) :]


def make_checkpoint(directory: Path, case: str = "llama", seed: int = 0, **changes: Any) -> Checkpoint:
    """Save a random model of `case` (see CASES), its norms and biases random too, so that none can be left out."""
    model_type, options = CASES[case]
    config = transformers.AutoConfig.for_model(model_type, **{**COMMON, **options, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return Checkpoint(directory, model)


def edit_config(directory: Path, **changes: Any) -> None:
    """Set keys of config.json; a value of ... removes the key."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
