"""The engine that a benchmark runs in this process, by the public API: of real weights, or of a named shape.

Owns the choice between them and the machine's limits for it. Imports the engine, and so torch, when it is opened.
"""

import dataclasses
import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evenflow.bench.roofline import Machine, Work, find_machine, machine_of, measure_cpu
from evenflow.config import EngineConfig
from evenflow.plan import known_models
from evenflow.platforms import inventory
from evenflow.platforms.cpu import total_memory_bytes
from evenflow.platforms.specs import find_specs

if TYPE_CHECKING:
    from evenflow.config import Settings
    from evenflow.llm import LLM
    from evenflow.model_config import ModelConfig
    from evenflow.request import RequestDelta


def engine_options(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of LLM. A name of plan_models.toml gives that shape with random weights and no tokenizer.

    Raises ValueError for an option that this version's engine does not have.
    """
    known = {field.name for field in dataclasses.fields(EngineConfig)}
    for name, value in list(options.items()):
        if name not in known:
            if name == "tensor_parallel_size" and value == 1:
                del options[name]
                continue
            raise ValueError(f"--{name.replace('_', '-')} {value} is not implemented by this version's engine")
    if model.lower() in known_models():
        return {"load_format": "dummy", "skip_tokenizer_init": True, **options, "model": str(shape_directory(model))}
    return {**options, "model": model}


def shape_directory(name: str) -> Path:
    """A directory with the config.json of a well-known model, made on demand and the same on every call."""
    directory = Path(tempfile.gettempdir()) / f"evenflow-shapes-{_user()}" / name.lower()
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    (directory / "config.json").write_text(json.dumps(known_models()[name.lower()], indent=1))
    return directory


def _user() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else "user"


def open_engine(model: str, options: dict[str, Any]) -> "LLM":
    from evenflow.llm import LLM

    return LLM(**engine_options(model, dict(options)))


def resolved(model: str, options: dict[str, Any]) -> "tuple[ModelConfig, Settings]":
    """What would run, without loading weights. Raises ValueError as LLM does."""
    from evenflow.engine.opening import open_model, resolve_settings

    config = EngineConfig(**engine_options(model, dict(options)))
    model_config = open_model(config).model_config
    return model_config, resolve_settings(config, model_config, is_offline=True).settings


@contextmanager
def watched_steps(llm: "LLM", see: "Callable[[list[RequestDelta]], None]") -> Iterator[None]:
    """Within the block, `see` gets what each step of the engine brought, as soon as it is there."""
    step = llm.engine.step

    def seen_step() -> "list[RequestDelta]":
        deltas = step()
        see(deltas)
        return deltas

    llm.engine.step = seen_step  # type: ignore[method-assign]
    try:
        yield
    finally:
        del llm.engine.step


def release_memory() -> None:
    """Give what closed engines held back to the device, before the next one asks how much is free."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_dummy(model: str) -> bool:
    return model.lower() in known_models()


def work_of(model: "ModelConfig", settings: "Settings") -> Work:
    return Work.of(model, settings.dtype, settings.kv_cache_dtype)


def machine_for(
    model: "ModelConfig", settings: "Settings", gpu: str | None = None, num_devices: int = 1
) -> tuple[Machine | None, str]:
    """(the limits of the machine that runs these settings, why there are none). gpu: named by the user."""
    if gpu is not None:
        return machine_of(find_specs(gpu), num_devices, settings.dtype), ""
    if settings.device == "cpu":
        working_set = work_of(model, settings).read_bytes
        name = inventory.cpu().get("name", "CPU")
        return measure_cpu(settings.dtype, working_set, total_memory_bytes(), name), ""
    names = [entry.get("name", "") for entry in inventory.gpus()] or [_torch_device_name()]
    machine = find_machine(names[0], num_devices, settings.dtype)
    return machine, "" if machine else f"{names[0]!r} is not in platforms/specs.toml; name a GPU with --gpu"


def _torch_device_name() -> str:
    import torch

    return str(torch.cuda.get_device_name(0))


def bounds_of(llm: "LLM") -> dict[str, int]:
    """What bounds the engine's batches, for roofline.offline_limit. The limit gets the same cache as the engine."""
    stats = llm.engine.stats()
    return {
        "max_num_seqs": llm.settings.max_num_seqs,
        "max_num_batched_tokens": llm.settings.max_num_batched_tokens,
        "kv_tokens": stats.num_blocks * stats.block_size,
    }


def described(llm: "LLM", model: str) -> dict[str, Any]:
    """What ran, as JSON."""
    settings = dataclasses.asdict(llm.settings)
    return {"model": model, "has_random_weights": settings["load_format"] == "dummy", "settings": settings}


def lengths_of(requests: Sequence[Any]) -> list[tuple[int, int]]:
    return [(request.num_prompt_tokens, request.num_output_tokens) for request in requests]
