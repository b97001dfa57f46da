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
    """Everything about a model but its weights. default_params: what a request gets that names none."""

    directory: Path
    model_config: ModelConfig
    tokenizer: Tokenizer | None
    generation_config: dict[str, Any]
    default_params: SamplingParams


def open_model(config: EngineConfig) -> OpenedModel:
    """Raises ValueError that names the file or key at fault."""
    directory = find_model(config.model, config.revision, with_weights=config.load_format != "dummy")
    model_config = ModelConfig.from_hf(read_json(directory / "config.json"))
    tokenizer = None
    if not config.skip_tokenizer_init:
        tokenizer = Tokenizer.from_dir(
            directory if config.tokenizer is None else find_model(config.tokenizer, with_weights=False)
        )
    generation_config = read_generation_config(directory)
    uses_defaults = config.generation_config != "none"
    return OpenedModel(
        directory,
        model_config,
        tokenizer,
        generation_config,
        _default_params(directory, generation_config) if uses_defaults else SamplingParams(),
    )


def resolve_settings(config: EngineConfig, model_config: ModelConfig, *, is_offline: bool = False) -> Resolution:
    """What will run on this machine. Raises ValueError that names the setting at fault."""
    return resolve(config, model_config, detect(config.device), is_offline=is_offline)


def _default_params(directory: Path, generation_config: dict[str, Any]) -> SamplingParams:
    """The model's own generation_config.json over our defaults."""
    known = {name: generation_config.get(name) for name in SAMPLING_DEFAULTS}
    if generation_config.get("do_sample") is False:
        known["temperature"] = 0.0
    if (max_new_tokens := generation_config.get("max_new_tokens")) is not None:
        known["max_tokens"] = max_new_tokens
    try:
        return SamplingParams(**{name: value for name, value in known.items() if value is not None})
    except ValueError as error:
        path = directory / "generation_config.json"
        raise ValueError(f"{path}: {error}; correct it, or use generation_config='none'") from None
