"""From what the user asked to what runs: finds the model's files, reads them strictly, resolves the settings.

Loads no weights, so `--explain` and the server's front use it too.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evenflow.config import EngineConfig, Resolution, resolve
from evenflow.model_config import ModelConfig
from evenflow.model_files import find_model, read_generation_config, read_json
from evenflow.platforms import detect
from evenflow.sampling_params import SamplingParams
from evenflow.tokenizer import Tokenizer

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """Everything about a model but its weights."""

    directory: Path
    model_config: ModelConfig
    resolution: Resolution
    tokenizer: Tokenizer | None
    generation_config: dict[str, Any]

    def default_sampling_params(self) -> SamplingParams:
        """The model's own generation_config.json over our defaults; ours alone if generation_config="none"."""
        if self.resolution.settings.generation_config == "none":
            return SamplingParams()
        known = {name: self.generation_config.get(name) for name in SAMPLING_DEFAULTS}
        if self.generation_config.get("do_sample") is False:
            known["temperature"] = 0.0
        if (max_new_tokens := self.generation_config.get("max_new_tokens")) is not None:
            known["max_tokens"] = max_new_tokens
        try:
            return SamplingParams(**{name: value for name, value in known.items() if value is not None})
        except ValueError as error:
            path = self.directory / "generation_config.json"
            raise ValueError(f"{path}: {error}; correct it, or use generation_config='none'") from None


def open_model(config: EngineConfig) -> OpenedModel:
    """Raises ValueError that names the file, key or setting at fault."""
    directory = find_model(config.model, config.revision, with_weights=config.load_format != "dummy")
    model_config = ModelConfig.from_hf(read_json(directory / "config.json"))
    # Steps on a GPU need kernels that this version does not have yet; a GPU machine runs on its CPU.
    platform = detect("cpu" if config.device == "auto" else config.device)
    if platform.device != "cpu":
        raise ValueError(f"device={config.device!r}: this version runs on CPUs only; use device='cpu'")
    tokenizer = None
    if not config.skip_tokenizer_init:
        tokenizer = Tokenizer.from_dir(
            directory if config.tokenizer is None else find_model(config.tokenizer, with_weights=False)
        )
    return OpenedModel(
        directory, model_config, resolve(config, model_config, platform), tokenizer, read_generation_config(directory)
    )
