"""What continuous batching and paging are worth inside this engine: each is replaced by what came before it.

The demo model, the length law of workload.py, a KV cache as large as `--full-length` requests of the whole context, all
in one process, several rounds, interleaved.

- static batching: nobody is admitted until everybody has finished.
- contiguous allocation: a request takes blocks for the whole context when it is admitted.

    python benchmarks/ablation.py                 # about 5 minutes on 2 cores
    python benchmarks/ablation.py --requests 64 --rounds 1
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import workload

import evenflow
from evenflow import LLM, SamplingParams
from evenflow.request import Request, StepPlan
from evenflow.scheduler import Scheduler

RESULTS = Path(__file__).parent / "results" / "ablation.json"
CONTEXT = 1024
MAX_WASTE = 0.04


class StaticScheduler(Scheduler):
    """Admits a batch only when the one before it is done."""

    def _admit_waiting(self, *args: Any) -> None:
        if not self.running:
            super()._admit_waiting(*args)


class ContiguousScheduler(Scheduler):
    """Takes the whole context's blocks at admission, as engines without paging must."""

    def _num_blocks_to_admit(self, end: int) -> int:
        return -(-self.max_model_len // self.block_size)


class Meter:
    """Follows the running requests from step to step."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.num_running, self.waste = scheduler, [], []
        self._schedule = scheduler.schedule
        scheduler.schedule = self.schedule  # type: ignore[method-assign]

    def schedule(self) -> StepPlan:
        plan = self._schedule()
        running: list[Request] = self.scheduler.running
        if plan.rows and self.scheduler.waiting:  # the steady state: the end of a run says nothing about memory
            used = sum(request.num_computed_tokens for request in running)
            held = sum(len(request.block_table) for request in running) * self.scheduler.block_size
            self.num_running.append(len(running))
            self.waste.append(1 - used / held)
        return plan


def run(kind: type[Scheduler], llm: LLM, prompts: list[list[int]], lengths: list[tuple[int, int]]) -> dict[str, float]:
    old = llm.engine.scheduler
    llm.engine.scheduler = kind(
        num_blocks=old.num_blocks,
        block_size=old.block_size,
        max_num_seqs=old.max_num_seqs,
        max_num_batched_tokens=old.max_num_batched_tokens,
        max_model_len=CONTEXT,
        enable_prefix_caching=False,
    )
    meter = Meter(llm.engine.scheduler)
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for _, n in lengths]
    start = time.perf_counter()
    outputs = llm.generate(list(prompts), params, use_tqdm=False)
    seconds = time.perf_counter() - start
    assert [len(output.outputs[0].token_ids) for output in outputs] == [n for _, n in lengths]
    return {
        "seconds": seconds,
        "tokens_per_s": sum(n for _, n in lengths) / seconds,
        "mean_running": statistics.mean(meter.num_running or [0]),
        "wasted_kv": statistics.mean(meter.waste or [0.0]),
        "preemptions": llm.engine.scheduler.num_preemptions,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full-length", type=int, default=32, help="KV cache in requests of the whole context")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    lengths = workload.lengths(args.requests, CONTEXT)
    prompts = workload.prompts(lengths, 3000)
    llm = LLM("demo", enable_prefix_caching=False, kv_cache_memory="1GiB", max_model_len=CONTEXT)
    cache_bytes = args.full_length * CONTEXT * llm.settings.kv_bytes_per_token(llm.model_config)
    llm = LLM("demo", enable_prefix_caching=False, kv_cache_memory=str(cache_bytes), max_model_len=CONTEXT)
    kinds = {
        "continuous, paged": Scheduler,
        "static batching": StaticScheduler,
        "contiguous allocation": ContiguousScheduler,
    }
    llm.generate(prompts[:4], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    print(f"{'':24s}{'tokens/s':>10s}{'running':>10s}{'wasted KV':>11s}{'preempted':>11s}")
    for _ in range(args.rounds):
        for name, kind in kinds.items():
            found[name].append(result := run(kind, llm, prompts, lengths))
            print(
                f"{name:24s}{result['tokens_per_s']:10.0f}{result['mean_running']:10.1f}"
                f"{result['wasted_kv']:11.1%}{result['preemptions']:11.0f}",
                flush=True,
            )
    base = found["continuous, paged"]
    ratios: dict[str, float] = {}
    for name in ("static batching", "contiguous allocation"):
        pairs = list(zip(base, found[name], strict=True))
        ratios[f"tokens/s over {name}"] = statistics.median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs)
        ratios[f"running over {name}"] = statistics.median(a["mean_running"] / b["mean_running"] for a, b in pairs)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}x")
    record = {
        "requests": args.requests,
        "kv_cache_full_length_requests": args.full_length,
        "runs": found,
        "ratios": ratios,
        "threads": torch.get_num_threads(),
        "versions": {"evenflow": evenflow.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if max(result["wasted_kv"] for result in base) > MAX_WASTE else 0


if __name__ == "__main__":
    sys.exit(main())
