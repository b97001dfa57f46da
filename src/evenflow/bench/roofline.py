"""The physical limit of a benchmark's work on its machine: bytes over bandwidth, multiplications over the matrix rate.

Every step reads the weights once and the keys and values of its sequences once, and multiplies; communication between
devices, launches and everything on the host are free. What is faster than this does not exist; a result is told as its
fraction. `ideal`: memory and arithmetic overlap perfectly, step by step: max(memory, compute). `no overlap`: their sum.

Only what the answer depends on is counted. A token is sampled from if it is a decoding sequence's or its prompt's last;
in the last layer the others need their keys and values, and neither queries nor anything after them. So `body` are the
weights of all layers, of the last one those of keys and values alone, and `top` are the others of the last layer and
the vocabulary's. Per step with d decoding sequences and c prompt tokens (T = d + c), of which S tokens are sampled
from, B bytes per weight, K KV bytes per token and layer:

    bytes = (body + top) * B + K * (cached keys read, of each layer, + layers * T); without top where S = 0
    flops = 2 * body * T + 2 * top * S + 4 * heads * head_size * (query-key pairs, of each layer)

Owns no measurement of an engine; `measure_cpu` is the one thing here that runs something, and imports torch for it.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from evenflow.config import DTYPE_BYTES
from evenflow.model_config import ModelConfig
from evenflow.platforms.specs import Specs, match_device

MEMORY_SHARE = 0.9
MIN_MEASURED_BYTES, MAX_MEASURED_BYTES = 2**20, 2**29
MEASURE_ROUNDS = 15


@dataclass(frozen=True, slots=True)
class Machine:
    """What bounds work: bytes/s, flop/s, bytes of memory; of all `num_devices` together."""

    name: str
    bandwidth_bytes_per_s: float
    flops: float
    memory_bytes: int
    num_devices: int = 1
    source: str = ""
    is_measured: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def machine_of(specs: Specs, num_devices: int = 1, dtype: str = "bfloat16") -> Machine:
    """A GPU of specs.toml, `num_devices` of them. 8-bit weights take the 8-bit rate where there is one."""
    flops = specs.fp8_flops if DTYPE_BYTES[dtype] == 1 and specs.fp8_flops else specs.bf16_flops
    return Machine(
        name=specs.key if num_devices == 1 else f"{num_devices} x {specs.key}",
        bandwidth_bytes_per_s=specs.bandwidth_bytes_per_s * num_devices,
        flops=flops * num_devices,
        memory_bytes=specs.memory_bytes * num_devices,
        num_devices=num_devices,
        source=("" if specs.verified else "not verified: ") + specs.source,
    )


def find_machine(device_name: str, num_devices: int = 1, dtype: str = "bfloat16") -> Machine | None:
    """Of what a driver calls its GPU; None where specs.toml does not list it."""
    specs = match_device(device_name)
    return machine_of(specs, num_devices, dtype) if specs else None


@dataclass(frozen=True)
class Work:
    """What a model costs. weight_bytes: per element; kv_bytes: per element of keys and values."""

    model: ModelConfig
    weight_bytes: int
    kv_bytes: int

    @classmethod
    def of(cls, model: ModelConfig, dtype: str, kv_cache_dtype: str = "auto") -> "Work":
        kv_dtype = dtype if kv_cache_dtype == "auto" else kv_cache_dtype
        return cls(model, DTYPE_BYTES[dtype], DTYPE_BYTES[kv_dtype])

    @cached_property
    def body(self) -> int:
        """Parameters that every token is multiplied with: the layers', of the last one those of keys and values."""
        return (self.model.num_layers - 1) * self.model.num_layer_parameters + self.model.num_layer_kv_parameters

    @cached_property
    def top(self) -> int:
        """Parameters that only tokens that are sampled from are multiplied with: the rest of the last layer, and the
        vocabulary's."""
        rest = self.model.num_layer_parameters - self.model.num_layer_kv_parameters
        return rest + self.model.vocab_size * self.model.hidden_size

    @cached_property
    def read_bytes(self) -> int:
        """Weights read by a step that samples: all but the input embedding, of which a step reads some rows."""
        return (self.body + self.top) * self.weight_bytes

    @cached_property
    def layer_kv_bytes(self) -> int:
        return 2 * self.model.num_kv_heads * self.model.head_dim * self.kv_bytes

    @cached_property
    def _windows(self) -> Counter[int | None]:
        """Window -> number of layers that have it."""
        return Counter(self.model.windows)

    @cached_property
    def _windows_below_last(self) -> Counter[int | None]:
        return Counter(self.model.windows[:-1])

    def attended(self, contexts: np.ndarray) -> int:
        """Keys that one token after each context looks at, itself included, over all layers."""
        return sum(
            layers * int((contexts + 1 if w is None else np.minimum(contexts + 1, w)).sum())
            for w, layers in self._windows.items()
        )

    def attended_by_chunk(self, context: int, count: int, *, is_last: bool) -> tuple[int, int]:
        """(pairs, keys read) of `count` prompt tokens after `context` computed ones, over all layers.

        is_last: the prompt ends with them. In the last layer only its last token looks at keys.
        """
        pairs = keys = 0
        for window, layers in self._windows_below_last.items():
            limit = context + count if window is None else window
            growing = min(max(limit - context, 0), count)  # tokens whose view still grows
            pairs += layers * (growing * context + growing * (growing + 1) // 2 + (count - growing) * limit)
            keys += layers * min(context, limit - 1)  # the first token's own is not read
        if is_last:
            end, window = context + count, self.model.windows[-1]
            seen = end if window is None else min(end, window)
            pairs += seen
            keys += max(seen - count, 0)
        return pairs, keys

    def cost(self, tokens: int, sampled: int, pairs: int, keys: int) -> tuple[float, float]:
        """(bytes, flops) of a step of `tokens`, `sampled` of which are sampled from.

        pairs: query-key pairs; keys: keys and values read from the cache; over all layers.
        """
        weights = self.read_bytes if sampled else self.body * self.weight_bytes
        num_bytes = weights + self.layer_kv_bytes * (keys + tokens * self.model.num_layers)
        attention = 4 * self.model.num_heads * self.model.head_dim * pairs
        return float(num_bytes), float(2 * self.body * tokens + 2 * self.top * sampled + attention)

    def kv_capacity(self, machine: Machine) -> int:
        """Tokens that fit beside the weights in 0.9 of the memory."""
        embedding = self.model.vocab_size * self.model.hidden_size * self.weight_bytes
        weights = self.read_bytes + (0 if self.model.tie_word_embeddings else embedding)
        free = machine.memory_bytes * MEMORY_SHARE - weights
        copies = max(machine.num_devices // self.model.num_kv_heads, 1)  # fewer heads than devices: held several times
        return max(int(free / (self.layer_kv_bytes * self.model.num_layers * copies)), 0)


@dataclass(slots=True)
class Phase:
    """Steps of one kind: with prompt tokens (prefill), or without (decode)."""

    num_steps: int = 0
    memory_s: float = 0.0
    compute_s: float = 0.0
    ideal_s: float = 0.0
    num_bytes: float = 0.0
    flops: float = 0.0

    @property
    def binding(self) -> str:
        """The resource that takes longer."""
        if not self.num_steps:
            return "none"
        return "memory bandwidth" if self.memory_s >= self.compute_s else "matrix rate"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "binding": self.binding}


@dataclass(frozen=True, slots=True)
class Limit:
    """The shortest time for a set of requests that all wait at the start.

    mean_running: sequences per step. first_token_s: until the last request has its first token.
    """

    ideal_s: float
    no_overlap_s: float
    prefill: Phase
    decode: Phase
    mean_running: float
    first_token_s: float

    @property
    def binding(self) -> str:
        memory = self.prefill.memory_s + self.decode.memory_s
        compute = self.prefill.compute_s + self.decode.compute_s
        return "memory bandwidth" if memory >= compute else "matrix rate"


def offline_limit(
    lengths: Sequence[tuple[int, int]],
    work: Work,
    machine: Machine,
    *,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 8192,
    kv_tokens: int | None = None,
) -> Limit:
    """Continuous batching where every step takes its ideal time. lengths: (prompt, output) tokens.

    A request is admitted when its full length fits the cache beside the others': the lengths are known, so nobody is
    ever preempted. Raises ValueError if one request alone does not fit.
    """
    capacity = work.kv_capacity(machine) if kv_tokens is None else kv_tokens
    longest = max((prompt + output for prompt, output in lengths), default=0)
    if longest > capacity:
        raise ValueError(f"a request of {longest} tokens does not fit the KV cache of {capacity} on {machine.name}")
    schedule = _Schedule(lengths, work, max_num_seqs, max_num_batched_tokens, capacity)
    phases = {True: Phase(), False: Phase()}
    num_steps = num_running = 0
    first_token_s = total_s = 0.0
    while schedule.has_work:
        num_bytes, flops, has_prompts = schedule.step()
        memory_s, compute_s = num_bytes / machine.bandwidth_bytes_per_s, flops / machine.flops
        phase = phases[has_prompts]
        phase.num_steps += 1
        phase.memory_s += memory_s
        phase.compute_s += compute_s
        phase.ideal_s += max(memory_s, compute_s)
        phase.num_bytes += num_bytes
        phase.flops += flops
        total_s += max(memory_s, compute_s)
        num_steps += 1
        num_running += schedule.num_rows
        if has_prompts:
            first_token_s = total_s
    return Limit(
        ideal_s=total_s,
        no_overlap_s=sum(phase.memory_s + phase.compute_s for phase in phases.values()),
        prefill=phases[True],
        decode=phases[False],
        mean_running=num_running / max(num_steps, 1),
        first_token_s=first_token_s,
    )


class _Schedule:
    """The batches of offline continuous batching, for lengths that are known."""

    def __init__(
        self, lengths: Sequence[tuple[int, int]], work: Work, max_num_seqs: int, max_tokens: int, capacity: int
    ) -> None:
        self._waiting = list(lengths)[::-1]
        self._work, self._max_num_seqs, self._max_tokens, self._capacity = work, max_num_seqs, max_tokens, capacity
        self._prefilling: list[list[int]] = []  # [computed, prompt, output]
        self._contexts = np.zeros(0, dtype=np.int64)  # of decoding sequences: tokens whose keys are in the cache
        self._left = np.zeros(0, dtype=np.int64)  # tokens they still generate
        self._final = np.zeros(0, dtype=np.int64)  # their length at the end
        self._reserved = 0
        self.num_rows = 0

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._prefilling or len(self._contexts))

    def step(self) -> tuple[float, float, bool]:
        """(bytes, flops, whether it computes prompt tokens)."""
        self._admit()
        tokens = sampled = len(self._contexts)
        pairs = self._work.attended(self._contexts)
        keys = pairs - tokens * self._work.model.num_layers  # their own are written, not read
        self.num_rows = tokens
        budget, done = self._max_tokens - tokens, []
        for request in self._prefilling:
            if (count := min(budget, request[1] - request[0])) <= 0:
                break
            is_last = request[0] + count == request[1]
            new_pairs, new_keys = self._work.attended_by_chunk(request[0], count, is_last=is_last)
            pairs, keys, tokens, budget = pairs + new_pairs, keys + new_keys, tokens + count, budget - count
            request[0] += count
            self.num_rows += 1
            if is_last:
                done.append(request)
        num_bytes, flops = self._work.cost(tokens, sampled + len(done), pairs, keys)
        self._finish_step(done)
        return num_bytes, flops, tokens > sampled

    def _admit(self) -> None:
        while self._waiting and len(self._prefilling) + len(self._contexts) < self._max_num_seqs:
            prompt, output = self._waiting[-1]
            if self._reserved + prompt + output > self._capacity:
                return
            self._waiting.pop()
            self._reserved += prompt + output
            self._prefilling.append([0, prompt, output])

    def _finish_step(self, done: list[list[int]]) -> None:
        """Every decoding sequence got one token; those whose prompt is done got their first."""
        self._prefilling = self._prefilling[len(done) :]
        new = np.array(done, dtype=np.int64).reshape(-1, 3)
        self._contexts = np.concatenate([self._contexts + 1, new[:, 1]])
        self._left = np.concatenate([self._left - 1, new[:, 2] - 1])
        self._final = np.concatenate([self._final, new[:, 1] + new[:, 2]])
        stays = self._left > 0
        self._reserved -= int(self._final[~stays].sum())
        self._contexts, self._left, self._final = self._contexts[stays], self._left[stays], self._final[stays]


def alone_s(prompt: int, output: int, work: Work, machine: Machine) -> float:
    """The shortest latency of one request on an idle machine."""
    limit = offline_limit(
        [(prompt, output)], work, machine, max_num_batched_tokens=prompt + 1, kv_tokens=prompt + output
    )
    return limit.ideal_s


def report(
    lengths: Sequence[tuple[int, int]], seconds: float, work: Work, machine: Machine, **bounds: Any
) -> dict[str, Any]:
    """The limit of some work beside the seconds it took: tokens/s and fractions, per phase what binds."""
    limit = offline_limit(lengths, work, machine, **bounds)
    total = sum(prompt + output for prompt, output in lengths)
    return {
        "machine": machine.as_dict(),
        "limit_total_tokens_per_s": total / limit.ideal_s,
        "limit_no_overlap_total_tokens_per_s": total / limit.no_overlap_s,
        "fraction_of_ideal": limit.ideal_s / seconds,
        "fraction_of_no_overlap": limit.no_overlap_s / seconds,
        "binding": limit.binding,
        "mean_running": limit.mean_running,
        "phases": {"prefill": limit.prefill.as_dict(), "decode": limit.decode.as_dict()},
    }


def measure_cpu(dtype: str, working_set_bytes: int, memory_bytes: int, name: str = "CPU") -> Machine:
    """This CPU's limits, measured: the best of several matrix-vector and matrix-matrix products by PyTorch.

    working_set_bytes: the model's weights. A small model stays in the caches, whose bandwidth is then what bounds it,
    so bandwidth is measured by reading as many bytes as the model has.
    """
    import torch

    kind = getattr(torch, dtype)
    size = DTYPE_BYTES[dtype]
    num_bytes = min(max(working_set_bytes, MIN_MEASURED_BYTES), MAX_MEASURED_BYTES)
    columns = 1024
    matrix = torch.randn(max(num_bytes // size // columns, 1), columns).to(kind)
    vector = torch.randn(columns).to(kind)
    a, b = torch.randn(1024, 1024).to(kind), torch.randn(1024, 1024).to(kind)
    return Machine(
        name=name,
        bandwidth_bytes_per_s=matrix.numel() * size / _best_s(lambda: matrix @ vector),
        flops=2 * 1024**3 / _best_s(lambda: a @ b),
        memory_bytes=memory_bytes,
        source=f"measured in {dtype} with {torch.get_num_threads()} threads on {num_bytes / 2**20:.0f} MiB",
        is_measured=True,
    )


def _best_s(run: Callable[[], object]) -> float:
    times = []
    for _ in range(MEASURE_ROUNDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)


def with_devices(machine: Machine, num_devices: int) -> Machine:
    """The same devices, another number of them."""
    factor = num_devices / machine.num_devices
    return replace(
        machine,
        bandwidth_bytes_per_s=machine.bandwidth_bytes_per_s * factor,
        flops=machine.flops * factor,
        memory_bytes=int(machine.memory_bytes * factor),
        num_devices=num_devices,
    )
