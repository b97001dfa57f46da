"""One file per model_type, each read from top to bottom."""

from evenflow.layers.loading import Placement
from evenflow.model_config import ModelConfig
from evenflow.models.llama import LlamaForCausalLM
from evenflow.models.mistral import MistralForCausalLM
from evenflow.models.qwen2 import Qwen2ForCausalLM
from evenflow.models.qwen3 import Qwen3ForCausalLM

CausalLM = LlamaForCausalLM | MistralForCausalLM | Qwen2ForCausalLM | Qwen3ForCausalLM
MODELS: dict[str, type[CausalLM]] = {
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
}


def make_model(config: ModelConfig, place: Placement) -> CausalLM:
    """The model of `config`, its parameters not filled yet."""
    return MODELS[config.model_type](config, place)
