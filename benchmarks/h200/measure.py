"""The measurements, the same for each engine: a function (prompts, output lengths, temperature) -> seconds.

    python benchmarks/h200/measure.py evenflow llama-2-7b --out result.json
    python benchmarks/h200/measure.py evenflow llama-2-7b --parts startup
    python benchmarks/h200/measure.py vllm llama-2-7b --out peer.json

Prompts of random token ids, end-of-sequence ignored, no detokenizing, no prefix cache. Each engine warms up on part of
the work first. With --weights both load the same random weights; without, each makes its own kind on the GPU.
"""

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from statistics import mean
from typing import Any

import numpy as np
from shapes import SHAPES, random_prompts, request_lengths, write_checkpoint, write_config

DECODE_GRID = ((1, 128), (1, 2048), (64, 512), (256, 512))
PREFILL_GRID = ((1, 2048), (4, 2048))
DECODE_STEPS = 128
PARTS = ("throughput", "decode", "prefill", "profile", "startup")

Run = Callable[[list[list[int]], list[int], float], float]


def evenflow_engine(directory: Path, load_format: str, options: dict[str, Any]) -> tuple[Run, dict[str, Any], Any]:
    from evenflow import LLM, SamplingParams

    start_s = time.perf_counter()
    llm = LLM(
        str(directory), device="cuda", dtype="bfloat16", load_format=load_format, skip_tokenizer_init=True,
        max_model_len=4096, enable_prefix_caching=False, **options,
    )  # fmt: skip
    facts = {"init_s": time.perf_counter() - start_s, "memory": llm.memory_account}

    def run(prompts: list[list[int]], outputs: list[int], temperature: float) -> float:
        params = [
            SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=int(n), detokenize=False)
            for n in outputs
        ]
        start_s = time.perf_counter()
        done = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start_s
        assert sum(len(output.outputs[0].token_ids) for output in done) == sum(outputs)
        return seconds

    return run, facts, llm


def vllm_engine(directory: Path, load_format: str, options: dict[str, Any]) -> tuple[Run, dict[str, Any], Any]:
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if find_spec("flashinfer") is None:  # which vLLM samples with where it is not told otherwise
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    start_s = time.perf_counter()
    import vllm
    from vllm import LLM, SamplingParams

    imported_s = time.perf_counter()
    llm = LLM(
        model=str(directory), dtype="bfloat16", load_format=load_format, skip_tokenizer_init=True, max_model_len=4096,
        enable_prefix_caching=False, **options,
    )  # fmt: skip
    config = llm.llm_engine.vllm_config
    facts = {
        "version": vllm.__version__,
        "import_s": imported_s - start_s,
        "init_s": time.perf_counter() - imported_s,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "num_gpu_blocks": config.cache_config.num_gpu_blocks,
    }

    def run(prompts: list[list[int]], outputs: list[int], temperature: float) -> float:
        params = [
            SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=int(n), detokenize=False)
            for n in outputs
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        start_s = time.perf_counter()
        done = llm.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - start_s
        assert sum(len(output.outputs[0].token_ids) for output in done) == sum(outputs)
        return seconds

    return run, facts, llm


ENGINES = {"evenflow": evenflow_engine, "vllm": vllm_engine}


def measure(
    run: Run, vocab_size: int, repeats: int, parts: list[str], found: dict[str, Any], save: Callable[[], None]
) -> None:
    """Every number of one engine and one model, into `found`; saved after each part, since the machine may be gone."""
    lengths, outputs = request_lengths()
    prompts = random_prompts(lengths, vocab_size)
    total = int(lengths.sum() + outputs.sum())
    found["warm_up_s"] = run(prompts[:64], (outputs[:64] // 8 + 1).tolist(), 1.0)
    if "throughput" in parts:
        run(prompts[:300], outputs[:300].tolist(), 1.0)
        found["throughput"] = []
        for _ in range(repeats):
            with watched_power() as power:
                seconds = run(prompts, outputs.tolist(), 1.0)
            found["throughput"].append(
                {
                    "s": seconds,
                    "total_tokens_per_s": total / seconds,
                    "output_tokens_per_s": int(outputs.sum()) / seconds,
                    **power,
                }
            )
            print("throughput", found["throughput"][-1], flush=True)
            save()
    if "decode" in parts:
        found["decode"] = [decode(run, vocab_size, *shape) for shape in DECODE_GRID]
        save()
    if "prefill" in parts:
        found["prefill"] = [prefill(run, vocab_size, *shape) for shape in PREFILL_GRID]
        save()


@contextmanager
def watched_power() -> Iterator[dict[str, float]]:
    """Filled at the end: watts and clock of the multiprocessors, as means of samples, beside the most there can be.

    Of the first GPU; nothing where nvidia-smi is not found.
    """
    found: dict[str, float] = {}
    if which("nvidia-smi") is None:
        yield found
        return
    fields = {"watts": "power.draw", "sm_mhz": "clocks.sm", "limit_watts": "power.limit", "max_sm_mhz": "clocks.max.sm"}
    query = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits"]
    with subprocess.Popen([*query, "-lms", "200"], stdout=subprocess.PIPE, text=True) as sampler:
        try:
            yield found
        finally:
            sampler.terminate()
        assert sampler.stdout is not None
        lines = sampler.stdout.read().split("\n")[:-1]  # the last may be cut off
    for name, cells in zip(fields, zip(*(line.split(", ") for line in lines), strict=True), strict=False):
        with suppress(ValueError):  # "[N/A]"
            found[name] = round(mean(map(float, cells)), 1)


def decode(run: Run, vocab_size: int, batch: int, context: int) -> dict[str, Any]:
    """ms a step: the time of 129 tokens less that of one, greedy."""
    prompts = random_prompts(np.full(batch, context), vocab_size)
    run(prompts, [9] * batch, 0.0)
    first = min(run(prompts, [1] * batch, 0.0) for _ in range(2))
    whole = min(run(prompts, [1 + DECODE_STEPS] * batch, 0.0) for _ in range(2))
    found = {"batch": batch, "context": context, "ms_per_step": (whole - first) / DECODE_STEPS * 1e3}
    print("decode", found, flush=True)
    return found


def prefill(run: Run, vocab_size: int, batch: int, context: int) -> dict[str, Any]:
    """ms to the first token of all of them."""
    prompts = random_prompts(np.full(batch, context), vocab_size)
    run(prompts, [1] * batch, 0.0)
    found = {"tokens": batch * context, "ms": min(run(prompts, [1] * batch, 0.0) for _ in range(3)) * 1e3}
    print("prefill", found, flush=True)
    return found


def ceilings() -> dict[str, float]:
    """What this card does at most: copy bandwidth, read and write counted, and the rate of a large bf16 product."""
    import torch

    def seconds(work: Callable[[], object], count: int) -> float:
        for _ in range(3):
            work()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    x, y = (torch.empty(2**31, dtype=torch.uint8, device="cuda") for _ in range(2))
    copy_s = seconds(lambda: y.copy_(x), 20)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product_s = seconds(lambda: a @ b, 10)
    return {"copy_bytes_per_s": 2 * 2**31 / copy_s, "bf16_flops": 2 * 8192**3 / product_s}


def profile(llm: Any, vocab_size: int, batch: int, context: int) -> dict[str, Any]:
    """One decode batch of ours under the profiler: share of time that the GPU is busy, where that goes, and the host's.

    host_ms_per_step: what planning, launching and accounting take of the host, beside the GPU's work.
    """
    import torch
    from torch.profiler import ProfilerActivity

    from evenflow import SamplingParams
    from evenflow.runner.device_runner import DeviceRunner
    from evenflow.scheduler import Scheduler

    prompts = random_prompts(np.full(batch, context), vocab_size)
    params = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=60, detokenize=False)
    for _ in range(2):
        llm.generate(prompts, params, use_tqdm=False)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        llm.generate(prompts, params, use_tqdm=False)
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    middle = spans[len(spans) // 4 : 3 * len(spans) // 4]  # steady state: no prefill, no tail
    busy, end = 0.0, middle[0][0]
    for first, last in middle:
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    by_name: dict[str, float] = {}
    for event in events:
        by_name[event.name[:70]] = by_name.get(event.name[:70], 0.0) + event.time_range.elapsed_us()
    total = sum(by_name.values())
    top = sorted(by_name.items(), key=lambda item: -item[1])[:14]
    host: dict[str, float] = {}
    with timed(Scheduler, "schedule", host), timed(Scheduler, "update", host), timed(DeviceRunner, "launch", host):
        num_steps = llm.engine.num_steps
        llm.generate(prompts, params, use_tqdm=False)
        num_steps = llm.engine.num_steps - num_steps
    return {
        "batch": batch,
        "context": context,
        "gpu_busy": busy / (middle[-1][1] - middle[0][0]),
        "host_ms_per_step": {name: round(1e3 * s / num_steps, 4) for name, s in host.items()},
        "share_of_gpu_time": {name: round(us / total, 4) for name, us in top},
    }


@contextmanager
def timed(owner: type, name: str, found: dict[str, float]) -> Iterator[None]:
    """Add the seconds in calls of a method to found[name]."""
    method = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        start_s = time.perf_counter()
        result = method(*args, **kwargs)
        found[name] = found.get(name, 0.0) + time.perf_counter() - start_s
        return result

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, method)


def seconds_since_process_start() -> float:
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=list(ENGINES))
    parser.add_argument("model", choices=list(SHAPES))
    parser.add_argument("--parts", nargs="+", default=["throughput", "decode", "prefill"], choices=PARTS)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="load weights, made there once")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON object of engine options")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if find_spec(args.engine) is None:
        parser.error(f"{args.engine} is not installed here")
    result: dict[str, Any] = {"engine": args.engine, "model": args.model, "options": args.options}
    if args.engine == "evenflow" and args.parts != ["startup"]:
        import torch

        if not torch.cuda.is_available():
            parser.error("PyTorch sees no GPU here")
        result["ceilings"] = ceilings()
        torch.cuda.empty_cache()
        result["versions"] = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name()}
        print(result["ceilings"], result["versions"], flush=True)
    if args.weights is None:
        directory, load_format = write_config(args.model, Path("/tmp/evenflow-shapes")), "dummy"
    else:
        directory, load_format = write_checkpoint(args.model, args.weights), "safetensors"
    result["load_format"] = load_format
    if "tensor_parallel_size" in args.options:
        result["num_gpus"] = args.options["tensor_parallel_size"]
    run, result["start"], llm = ENGINES[args.engine](directory, load_format, args.options)
    if "ceilings" not in result:
        result["start"]["ready_s"] = seconds_since_process_start()
    print(result["start"], flush=True)
    vocab_size = SHAPES[args.model]["vocab_size"]

    def save() -> None:
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")

    measure(run, vocab_size, args.repeats, args.parts, result, save)
    if "profile" in args.parts and args.engine == "evenflow":
        result["profiles"] = [profile(llm, vocab_size, *shape) for shape in ((1, 512), (256, 512))]
        print(json.dumps(result["profiles"], indent=1), flush=True)
    save()


if __name__ == "__main__":
    main()
