"""How near are the small kernels to the memory's speed? Microseconds on a GPU, beside what their bytes need at least.

Sampling in bfloat16 for batches of one kind of request, rotary and store, the norms and the gated activation. Each op
is captured in a graph and replayed, so launches cost what they cost in the engine. "least_us" is the bytes that an op
must read and write over the bandwidth of a large copy, measured first; small operands stay in the L2 cache, where an op
can be faster than that. Writes benchmarks/results/device_sampling.json; takes under 40 s.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evenflow.kernels.draw import draw
from evenflow.kernels.filter import filter_thresholds
from evenflow.kernels.logprobs import token_logprobs
from evenflow.kernels.masks import apply_masks_
from evenflow.kernels.penalties import apply_penalties_
from evenflow.kernels.rms_norm import add_rms_norm, rms_norm
from evenflow.kernels.rotary import rotary_and_store
from evenflow.kernels.sampling_table import pack_params
from evenflow.kernels.silu_and_mul import silu_and_mul

DEVICE = torch.device("cuda")
NUM_ROWS = (1, 64, 256)
VOCAB_SIZES = (32000, 128256)
NUM_TOKENS = (1, 256, 2048)
LENGTH = 480  # tokens a request has so far, half of them prompt
REPLAYS = 20
RESULT = Path(__file__).parent / "results" / "device_sampling.json"

FILTERS = {
    "top_k=50": {"top_k": 50},
    "top_p=0.9": {"top_p": 0.9},
    "min_p=0.05": {"min_p": 0.05},
    "top_k=50 top_p=0.9 T=0.7": {"top_k": 50, "top_p": 0.9, "temperature": 0.7},
}


@dataclass(frozen=True)
class Job:
    """One line of the result. num_bytes: that it must read and write."""

    op: str
    shape: str
    num_bytes: int
    call: Callable[[], object]


def median_us(call: Callable[[], object]) -> float:
    """Of a replay of the captured call, over five runs of REPLAYS."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(REPLAYS):
            call()
    graph.replay()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / REPLAYS)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes a second that a copy of 1 GiB reads and writes."""
    source = torch.zeros(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-6 * median_us(lambda: target.copy_(source)))


def sampling_jobs(num_rows: int, vocab_size: int) -> Iterator[Job]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = (5 * torch.randn(num_rows, vocab_size, generator=generator, device=DEVICE)).bfloat16()
    flat = logits / 10
    slots = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
    lengths = torch.full_like(slots, LENGTH)
    buffer = torch.randint(vocab_size, (num_rows, 2048), generator=generator, device=DEVICE, dtype=torch.int32)
    shape = f"R={num_rows} V={vocab_size}"
    row_bytes, size = 2 * vocab_size * num_rows, logits.numel()

    def table(**values: float) -> Tensor:
        rows = [pack_params(seed=seed, num_prompt_tokens=LENGTH // 2, **values) for seed in range(num_rows)]
        return torch.from_numpy(np.stack(rows)).to(DEVICE)

    def drawing(params: Tensor, thresholds: Tensor | None = None) -> Callable[[], object]:
        return lambda: draw(logits, params, slots, lengths, buffer, thresholds)

    yield Job("draw greedy", shape, row_bytes, drawing(table(temperature=0.0)))
    yield Job("draw T=1", shape, row_bytes, drawing(table()))
    cut = torch.zeros(num_rows, device=DEVICE)
    yield Job("draw T=0.7 with thresholds", shape, row_bytes, drawing(table(temperature=0.7), cut))
    for name, values in {"none": {}, **FILTERS}.items():
        params, least = table(**values), row_bytes if values else 64 * num_rows
        yield Job(f"filter {name}", shape, least, lambda params=params: filter_thresholds(logits, params, slots))
    params = table(top_p=0.9)
    yield Job("filter top_p=0.9, flat", shape, row_bytes, lambda: filter_thresholds(flat, params, slots))
    penalised, scratch = logits.float(), torch.zeros(num_rows, vocab_size, dtype=torch.int32, device=DEVICE)
    for name, values in {"none": {}, "all": {"repetition": 1.1, "presence": 0.5, "frequency": 0.5}}.items():
        params, least = table(**values), (2 * 4 + 2 * 8 + 8) * LENGTH * num_rows if values else 64 * num_rows
        yield Job(
            f"penalties {name}",
            shape,
            least,
            lambda params=params: apply_penalties_(penalised, buffer, params, slots, lengths, scratch),
        )
    bits = torch.full((num_rows, -(-vocab_size // 32)), -1, dtype=torch.int32, device=DEVICE)
    yield Job("masks", shape, size // 8, lambda: apply_masks_(logits, slots, bits))
    tokens = buffer[:, 0].long()
    yield Job("logprobs k=0", shape, row_bytes, lambda: token_logprobs(logits, tokens, 0))
    if num_rows < 256:
        yield Job("logprobs k=20", shape, row_bytes, lambda: token_logprobs(logits, tokens, 20))


def layer_jobs(num_tokens: int) -> Iterator[Job]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).bfloat16()

    T, H, Hkv, D, S = num_tokens, 32, 8, 128, 16
    qkv, kv_cache = normal(T, (H + 2 * Hkv) * D), normal(1024, 2, Hkv, S, D)
    cos, sin = torch.rand(4096, D // 2, device=DEVICE), torch.rand(4096, D // 2, device=DEVICE)
    index = torch.randperm(1024 * S, device=DEVICE)[:T]
    positions = torch.arange(T, device=DEVICE)
    num_bytes = 2 * T * D * (2 * (H + Hkv) + Hkv + 2 * Hkv)
    yield Job(
        "rotary_and_store",
        f"T={T} H=32 Hkv=8 D=128",
        num_bytes,
        lambda: rotary_and_store(qkv, kv_cache, cos, sin, positions, index, H, Hkv),
    )
    x, residual, weight = normal(T, 4096), normal(T, 4096), normal(4096)
    yield Job("rms_norm", f"T={T} D=4096", 4 * x.numel(), lambda: rms_norm(x, weight, 1e-5))
    yield Job("add_rms_norm", f"T={T} D=4096", 8 * x.numel(), lambda: add_rms_norm(x, residual, weight, 1e-5))
    for size in (11008, 14336):
        both = normal(T, 2 * size)
        yield Job("silu_and_mul", f"T={T} D={size}", 6 * T * size, lambda both=both: silu_and_mul(both))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    parser.add_argument("--only", default="", help="run the ops whose name contains this")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here")
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copies at {bandwidth / 1e9:.0f} GB/s")
    lines = []
    groups = [sampling_jobs(rows, size) for size in VOCAB_SIZES for rows in NUM_ROWS]
    for group in [*groups, *(layer_jobs(num_tokens) for num_tokens in NUM_TOKENS)]:
        for job in group:
            if args.only not in job.op:
                continue
            time_us, least_us = median_us(job.call), 1e6 * job.num_bytes / bandwidth
            lines.append({"op": job.op, "shape": job.shape, "us": round(time_us, 2), "least_us": round(least_us, 2)})
            print(f"{job.op:28} {job.shape:24} {time_us:9.2f} us {least_us:9.2f} us at least", flush=True)
    versions = {"torch": torch.__version__, "triton": __import__("triton").__version__}
    facts = {"gpu": torch.cuda.get_device_name(), "copy_gb_per_s": round(bandwidth / 1e9, 1), **versions}
    args.out.write_text(json.dumps(facts | {"lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
