"""What the user asked (EngineConfig) and the facts of the model (ModelConfig) become what runs (Settings), once.

Owns the names, defaults, ranges and their resolution, with the reason of every resolved value. Imports no torch, so
that `plan` and `--help` answer at once. How a model's config.json is read is in model_config.py.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from evenflow.model_config import ModelConfig
from evenflow.platforms import Platform

DTYPES = ("float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", *DTYPES, "fp8")
LARGE_MEMORY_BYTES = 60 * 10**9  # a GPU that holds the cache of more than 256 requests
ROOM_FOR_LARGE_STEPS = 0.4  # of a GPU's memory, beside the weights
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e4m3fnuz": 1}


INTEGERS = (
    "tensor_parallel_size",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "max_logprobs",
)


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field of EngineConfig that is also a command-line option."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What the user asked for. Every field is a command-line option; None means "decide for me"."""

    model: str = option("demo", "directory, Hugging Face name, or 'demo' for the built-in model")
    tokenizer: str | None = option(None, "directory or name of the tokenizer, if it is not the model's")
    revision: str | None = option(None, "branch, tag or commit of a Hugging Face model, for every file of it")
    device: str = option("auto", "where to run", ("auto", "cpu", "cuda"))
    dtype: str = option("auto", "type of weights and activations", ("auto", *DTYPES))
    load_format: str = option("auto", "'dummy' makes random weights without a file", ("auto", "safetensors", "dummy"))
    tensor_parallel_size: int = option(1, "GPUs over which the model is split, one process each")
    max_model_len: int | None = option(None, "longest prompt + output in tokens (default: the model's context)")
    max_num_seqs: int | None = option(None, "most requests that run at the same time")
    max_num_batched_tokens: int | None = option(None, "most tokens computed in one step")
    block_size: int | None = option(None, "tokens per block of the KV cache")
    kv_cache_dtype: str = option(
        "auto", "type of keys and values; 'auto': as dtype, 'fp8': the GPU's own 8 bits", KV_CACHE_DTYPES
    )
    kv_cache_memory: str | None = option(
        None, "size of the KV cache of each GPU, for example 4GiB (default: what is free)"
    )
    gpu_memory_utilization: float = option(0.9, "share of the device's memory that the engine may use")
    enable_prefix_caching: bool = option(True, "share the cache of equal prompt beginnings")
    enable_chunked_prefill: bool = option(True, "split long prompts over several steps")
    enable_overlap: bool = option(True, "on a GPU: plan the next step while one runs")
    enable_graphs: bool = option(True, "on a GPU: replay steps of up to 2,048 tokens as graphs")
    enable_custom_all_reduce: bool | None = option(
        None, "with several GPUs: add small sums by our own kernel (default: where that has been measured)"
    )
    max_logprobs: int = option(20, "most log-probabilities that a request may ask for per token")
    generation_config: str = option("auto", "sampling defaults from the model's file, or none", ("auto", "none"))
    skip_tokenizer_init: bool = option(False, "load no tokenizer: prompts and outputs are token ids")
    seed: int = option(0, "seeds the requests that name no seed of their own")

    def __post_init__(self) -> None:
        for config_field in dataclasses.fields(self):
            choices, value = config_field.metadata["choices"], getattr(self, config_field.name)
            if choices and value not in choices:
                raise ValueError(f"{config_field.name}={value!r} must be one of {', '.join(choices)}")
        for name in INTEGERS:
            value = getattr(self, name)
            low = 0 if name == "max_logprobs" else 1
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
                raise ValueError(f"{name}={value!r} must be an integer of at least {low}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:  # also false for NaN
            raise ValueError(f"gpu_memory_utilization={self.gpu_memory_utilization!r} must be in (0, 1]")
        if self.kv_cache_memory is not None:
            parse_bytes("kv_cache_memory", self.kv_cache_memory)


def parse_bytes(name: str, text: str | int) -> int:
    """'4GiB', '512 MB', '1e9' or an integer -> bytes."""
    units = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
    units |= {f"{u}ib": units[u] for u in "kmgt"} | {f"{u}b": 1000**i for i, u in enumerate("kmgt", 1)}
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]{1,2})?)\s*([a-zA-Z]*)\s*", str(text))
    if not match or match[2].lower() not in units or not float(match[1]):
        raise ValueError(f"{name}={text!r} must be a size such as 4GiB, 512MB or a number of bytes")
    return int(float(match[1]) * units[match[2].lower()])


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the engine runs with: nothing left open, never changed. `kv_cache_bytes` 0 means: measure what is free.

    fit_max_model_len: the user left the length to us, so it may shrink to what the KV cache holds.
    """

    model: str
    tokenizer: str
    revision: str | None
    device: str
    dtype: str
    load_format: str
    tensor_parallel_size: int
    max_model_len: int
    fit_max_model_len: bool
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    kv_cache_dtype: str
    kv_cache_bytes: int
    gpu_memory_utilization: float
    enable_prefix_caching: bool
    enable_chunked_prefill: bool
    enable_overlap: bool
    enable_graphs: bool
    enable_custom_all_reduce: bool
    max_logprobs: int
    generation_config: str
    skip_tokenizer_init: bool
    seed: int

    def kv_bytes_per_token(self, model: ModelConfig) -> int:
        return model.kv_elements_per_token * DTYPE_BYTES[self.kv_cache_dtype]


@dataclass(frozen=True, slots=True)
class Resolution:
    """Settings with, for every field, the reason of its value."""

    settings: Settings
    reasons: dict[str, str]


def resolve(config: EngineConfig, model: ModelConfig, platform: Platform, *, is_offline: bool = False) -> Resolution:
    """Decide everything that the user left open. A pure function; raises ValueError that names the setting.

    is_offline: nobody waits for a single token, only for all of them.
    """
    reasons = {
        f.name: "asked for" if getattr(config, f.name) != f.default else "default" for f in dataclasses.fields(config)
    }
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}

    def decide(name: str, value: Any, reason: str) -> None:
        if values.get(name) in (None, "auto"):
            values[name], reasons[name] = value, reason

    decide("tokenizer", config.model, "the model's own")
    values["device"], reasons["device"] = platform.device, f"found {platform.name}"
    check_tensor_parallel_size(config.tensor_parallel_size, model, platform)
    decide("dtype", *_dtype(model, platform))
    decide("kv_cache_dtype", values["dtype"], "as dtype")
    if config.kv_cache_dtype == "fp8":
        values["kv_cache_dtype"], reasons["kv_cache_dtype"] = _fp8(platform), f"the 8 bits of {platform.name}"
    reasons["fit_max_model_len"] = (
        "max_model_len was left open" if config.max_model_len is None else "max_model_len was given"
    )
    decide("max_model_len", model.max_context, "the model's context")
    if values["max_model_len"] > model.max_context:
        raise ValueError(
            f"max_model_len={config.max_model_len} exceeds the model's context of {model.max_context} tokens; lower it"
        )
    on_gpu = platform.device != "cpu"
    is_large = on_gpu and platform.memory_bytes >= LARGE_MEMORY_BYTES
    decide("max_num_seqs", 1024 if is_large else 256, "enough to be bound by memory, not by count")
    values["enable_overlap"] = config.enable_overlap and on_gpu
    values["enable_graphs"] = config.enable_graphs and on_gpu and platform.supports_graphs
    has_run = config.tensor_parallel_size in platform.peer_sum_sizes
    decide("enable_custom_all_reduce", has_run, f"our sums have {'' if has_run else 'not '}run on so many such GPUs")
    values["enable_custom_all_reduce"] &= on_gpu and config.tensor_parallel_size > 1
    if config.tensor_parallel_size == 1:
        reasons["enable_custom_all_reduce"] = "of no use for one GPU"
    if not on_gpu:
        for name in ("enable_overlap", "enable_graphs", "enable_custom_all_reduce"):
            reasons[name] = "of no use on a CPU"
    weight_bytes = model.num_parameters * DTYPE_BYTES[values["dtype"]] // config.tensor_parallel_size
    room_bytes = platform.memory_bytes * config.gpu_memory_utilization - weight_bytes
    has_room = (
        is_large and config.kv_cache_memory is None and room_bytes >= ROOM_FOR_LARGE_STEPS * platform.memory_bytes
    )
    if is_offline and has_room:
        decide("max_num_batched_tokens", 16384, "offline: prompts are computed sooner, and nobody waits for one token")
    decide("max_num_batched_tokens", 2048, "keeps a step short and the matrix units busy")
    if not config.enable_chunked_prefill and values["max_num_batched_tokens"] < values["max_model_len"]:
        if config.max_num_batched_tokens is not None:
            raise ValueError(
                f"max_num_batched_tokens={config.max_num_batched_tokens} is below "
                f"max_model_len={values['max_model_len']}, which needs enable_chunked_prefill"
            )
        values["max_num_batched_tokens"] = values["max_model_len"]
        reasons["max_num_batched_tokens"] = "a whole prompt, since prefill is not chunked"
    decide("block_size", 16, "the kernels' page size")
    memory = config.kv_cache_memory
    values["kv_cache_bytes"] = parse_bytes("kv_cache_memory", memory) if memory is not None else 0
    reasons["kv_cache_bytes"] = "kv_cache_memory" if memory is not None else "measured at start: what is free"
    decide("load_format", "safetensors", "the only format that cannot run code")
    names = {f.name for f in dataclasses.fields(Settings)}
    values["fit_max_model_len"] = config.max_model_len is None
    settings = Settings(**{name: value for name, value in values.items() if name in names})
    return Resolution(settings, {name: reasons[name] for name in sorted(names)})


def _fp8(platform: Platform) -> str:
    if platform.fp8_dtype is None:
        raise ValueError(
            f"kv_cache_dtype='fp8' needs a GPU that converts 8-bit floats, and {platform.name} ({platform.arch}) does "
            "not; use 'auto'"
        )
    return platform.fp8_dtype


def check_tensor_parallel_size(size: int, model: ModelConfig, platform: Platform) -> None:
    """Raises ValueError, with the way out, when the model cannot be split over so many ranks, or they are not there."""
    if not can_be_split(model, size):
        sizes = ", ".join(str(n) for n in range(1, model.num_heads + 1) if can_be_split(model, n))
        raise ValueError(
            f"tensor_parallel_size={size} cannot split this model's {model.num_heads} attention heads, "
            f"{model.num_kv_heads} key heads and {model.intermediate_size} MLP columns evenly; it can be {sizes}"
        )
    if platform.device != "cpu" and size > platform.num_devices:
        raise ValueError(
            f"tensor_parallel_size={size} needs {size} GPUs, and PyTorch sees {platform.num_devices}; lower it"
        )


def can_be_split(model: ModelConfig, size: int) -> bool:
    """Key heads that are fewer than the ranks are held by several of them."""
    has_key_heads = model.num_kv_heads % size == 0 or size % model.num_kv_heads == 0
    return model.num_heads % size == 0 and model.intermediate_size % size == 0 and has_key_heads


def _dtype(model: ModelConfig, platform: Platform) -> tuple[str, str]:
    if platform.default_dtype == "float32":
        return "float32", "exact, and the fastest on most CPUs"
    return (
        (model.dtype, "the checkpoint's")
        if model.dtype != "float32"
        else ("bfloat16", "half of the checkpoint's float32")
    )
