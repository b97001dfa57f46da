"""The memory of keys and values: how many blocks fit, the account of it in one line, and the tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from evenflow.config import DTYPE_BYTES, Settings
from evenflow.distributed import TensorParallel
from evenflow.model_config import ModelConfig
from evenflow.platforms import cpu
from evenflow.runner.graphs import MAX_GRAPH_TOKENS

MAX_CPU_SHARE = 0.5  # of the free memory: a CPU's memory is the whole machine's
GRAPH_BYTES = 512 * 2**20  # what the driver keeps of some fifty graphs


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What the engine's memory goes to, in bytes, and what fits into it."""

    weight_bytes: int
    activation_bytes: int
    cache_bytes: int
    num_blocks: int
    block_size: int
    max_model_len: int
    graph_bytes: int = 0

    def __str__(self) -> str:
        num_tokens = self.num_blocks * self.block_size
        graphs = f"graphs {_size(self.graph_bytes)}, " if self.graph_bytes else ""
        return (
            f"memory: weights {_size(self.weight_bytes)}, activations {_size(self.activation_bytes)}, {graphs}"
            f"KV cache {_size(self.cache_bytes)} = {num_tokens:,} tokens in {self.num_blocks:,} blocks, "
            f"{num_tokens / self.max_model_len:.1f} requests of {self.max_model_len:,} tokens"
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.1f} MiB"


def check_room_for_weights(settings: Settings, model: ModelConfig, num_ranks: int) -> None:
    """Raises ValueError, before anything is allocated, where a rank's part of the weights cannot fit."""
    num_bytes = model.num_parameters * DTYPE_BYTES[settings.dtype] // num_ranks
    if settings.device == "cpu":
        free_bytes, where = cpu.available_memory_bytes(), "memory"
    else:
        free_bytes, where = torch.cuda.mem_get_info()[0], "the GPU's memory"
    if num_bytes > free_bytes:
        ways = "a smaller model, or tensor_parallel_size with more GPUs"
        if settings.dtype == "float32":
            ways = f"dtype='bfloat16', {ways}"
        raise ValueError(
            f"the weights take {_size(num_bytes)} in {settings.dtype}, and {_size(free_bytes)} of {where} are free; "
            f"choose {ways}"
        )


def plan_memory(
    settings: Settings, model: ModelConfig, weight_bytes: int, tp: TensorParallel | None = None
) -> MemoryPlan:
    """Size the cache of one rank, of which `model` is the view: as many blocks as fit on every rank.

    Raises ValueError with the numbers and the way out, on all ranks, when no full-length request would fit.
    """
    tp = tp or TensorParallel()
    activation_bytes = activation_bytes_on_cpu(settings, model)
    share = min(settings.gpu_memory_utilization, MAX_CPU_SHARE)
    free_bytes = int(cpu.available_memory_bytes() * share) // tp.size - activation_bytes  # the ranks share it
    return _plan(settings, model, weight_bytes, activation_bytes, free_bytes, tp)


def plan_device_memory(
    settings: Settings,
    model: ModelConfig,
    weight_bytes: int,
    activation_bytes: int,
    tp: TensorParallel | None = None,
) -> MemoryPlan:
    """Size a GPU's cache: what is left of gpu_memory_utilization of the device. As plan_memory otherwise."""
    tp = tp or TensorParallel()
    if settings.device == "cpu":  # the stand-in that tests use
        return _plan(settings, model, weight_bytes, activation_bytes, cpu.available_memory_bytes() // 8, tp)
    torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    graph_bytes = 0
    if settings.enable_graphs:  # graphs keep the temporaries of their largest step
        graph_bytes = GRAPH_BYTES + activation_bytes * MAX_GRAPH_TOKENS // max(
            settings.max_num_batched_tokens, MAX_GRAPH_TOKENS
        )
    not_ours = (1.0 - settings.gpu_memory_utilization) * total_bytes
    left_bytes = int(free_bytes - not_ours) - activation_bytes - graph_bytes
    return _plan(settings, model, weight_bytes, activation_bytes, left_bytes, tp, graph_bytes)


def _plan(
    settings: Settings,
    model: ModelConfig,
    weight_bytes: int,
    activation_bytes: int,
    free_bytes: int,
    tp: TensorParallel,
    graph_bytes: int = 0,
) -> MemoryPlan:
    block_bytes = settings.block_size * settings.kv_bytes_per_token(model)
    useful_blocks = settings.max_num_seqs * -(-settings.max_model_len // settings.block_size)
    if settings.kv_cache_bytes:
        num_blocks = settings.kv_cache_bytes // block_bytes
    else:
        num_blocks = min(max(free_bytes, 0) // block_bytes, useful_blocks)
    num_blocks = tp.minimum(num_blocks)
    max_model_len = settings.max_model_len
    if num_blocks * settings.block_size < max_model_len:
        if not settings.fit_max_model_len or num_blocks == 0:
            raise ValueError(
                f"the KV cache holds {num_blocks * settings.block_size} tokens, fewer than "
                f"max_model_len={max_model_len} ({_size(max_model_len * settings.kv_bytes_per_token(model))}); "
                "lower max_model_len or raise kv_cache_memory"
            )
        max_model_len = num_blocks * settings.block_size
    return MemoryPlan(
        weight_bytes,
        activation_bytes,
        num_blocks * block_bytes,
        num_blocks,
        settings.block_size,
        max_model_len,
        graph_bytes,
    )


def activation_bytes_on_cpu(settings: Settings, model: ModelConfig) -> int:
    """The largest step's temporaries: residual stream and MLP of every token, logits and probabilities of every row."""
    per_token = 6 * model.hidden_size + 3 * model.intermediate_size + 3 * (model.num_heads + 2) * model.head_dim
    tokens = settings.max_num_batched_tokens * per_token * DTYPE_BYTES[settings.dtype]
    return tokens + 6 * settings.max_num_seqs * model.vocab_size * 4


def make_caches(num_blocks: int, settings: Settings, model: ModelConfig, device: torch.device) -> list[Tensor]:
    """One [num_blocks, 2, Hkv, block_size, head_dim] per layer.

    Zeroed: a masked key's weight is 0, and 0 times what an uninitialised page may hold is not 0.
    """
    shape = (num_blocks, 2, model.num_kv_heads, settings.block_size, model.head_dim)
    dtype = getattr(torch, settings.kv_cache_dtype)
    return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(model.num_layers)]
