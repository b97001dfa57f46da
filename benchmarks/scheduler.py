"""What does the scheduler cost a step? Milliseconds of schedule + update with 256 running requests, without a model.

decode: every request gets one token. no prefix cache: the same without it. overlap: the next step is planned before the
one before is collected. arrivals: requests are short, and each that ends is replaced by a new one, of which half begin
with a common prefix. Writes benchmarks/results/scheduler.json.

Example: PYTHONPATH=src python benchmarks/scheduler.py --limit-ms 0.4
"""

import argparse
import gc
import itertools
import json
import platform
import random
import statistics
import sys
import time
from collections import deque
from pathlib import Path

from evenflow.request import Request, StepPlan, StepResult
from evenflow.sampling_params import SamplingParams
from evenflow.scheduler import Scheduler

BLOCK_SIZE = 16
MAX_MODEL_LEN = 8192
COMMON_PREFIX = list(range(128))
RESULT = Path(__file__).parent / "results" / "scheduler.json"
# name: prefix cache, steps in flight, output tokens of a request (None: none ends)
WORKLOADS: dict[str, tuple[bool, int, int | None]] = {
    "decode": (True, 1, None),
    "decode, no prefix cache": (False, 1, None),
    "decode, overlap": (True, 2, None),
    "arrivals": (True, 1, 200),
    "arrivals, overlap": (True, 2, 200),
}


class Source:
    """Requests with prompts of 64 to 319 tokens."""

    def __init__(self, max_tokens: int | None, num_steps: int) -> None:
        self.rng = random.Random(0)
        self.max_tokens = max_tokens
        self.num_steps = num_steps
        self.ids = itertools.count()

    def next(self) -> Request:
        number, length = next(self.ids), self.rng.randint(64, 319)
        unique = [number % 30000] + [self.rng.randrange(30000) for _ in range(length - 1)]
        prompt = COMMON_PREFIX + unique if self.max_tokens is not None and number % 2 else unique
        # The first ones end at different times, as in a system that has run for long.
        max_tokens = self.max_tokens or 2 * self.num_steps
        if self.max_tokens is not None and number < 256:
            max_tokens = self.rng.randint(1, self.max_tokens)
        return Request(str(number), prompt, SamplingParams(max_tokens=max_tokens), max_tokens, frozenset([2]))


def measure(name: str, num_requests: int, num_steps: int) -> list[float]:
    """Milliseconds of schedule + update of each step after the prompts are in."""
    uses_cache, num_in_flight, max_tokens = WORKLOADS[name]
    source = Source(max_tokens, num_steps)
    scheduler = Scheduler(
        num_blocks=num_requests * (2 * num_steps + 512) // BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        max_num_seqs=num_requests,
        max_num_batched_tokens=8192,
        max_model_len=max(MAX_MODEL_LEN, 2 * num_steps + 512),
        enable_prefix_caching=uses_cache,
    )
    for _ in range(num_requests):
        scheduler.add(source.next())
    launched: deque[StepPlan] = deque()
    times: list[float] = []
    while len(times) < num_steps:
        is_warm = scheduler.num_waiting == 0 and len(launched) == num_in_flight - 1
        while scheduler.num_running + scheduler.num_waiting < num_requests:
            scheduler.add(source.next())
        start = time.perf_counter()
        plan = scheduler.schedule()
        scheduled = time.perf_counter()
        launched.append(plan)
        if len(launched) < num_in_flight:
            continue
        oldest = launched.popleft()
        result = StepResult([7 if row.samples else -1 for row in oldest.rows])
        sampled = time.perf_counter()
        scheduler.update(oldest, result)
        if is_warm:
            times.append(1e3 * (scheduled - start + time.perf_counter() - sampled))
    return times


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256, help="running requests (256)")
    parser.add_argument("--steps", type=int, default=1500, help="steps measured of each workload (1500)")
    parser.add_argument("--limit-ms", type=float, help="exit with 1 if the median of decode is above this")
    parser.add_argument("--output", type=Path, default=RESULT, help="the JSON file to write")
    args = parser.parse_args()
    figures = {}
    print(f"{'schedule + update, ms a step':32}{'median':>9}{'p99':>9}")
    for name in WORKLOADS:
        gc.collect()
        times = sorted(measure(name, args.requests, args.steps))
        figures[name] = {"median_ms": statistics.median(times), "p99_ms": times[int(0.99 * len(times))]}
        print(f"{name:32}{figures[name]['median_ms']:9.3f}{figures[name]['p99_ms']:9.3f}", flush=True)
    report = {
        "cpu": cpu_model(),
        "python": platform.python_version(),
        "requests": args.requests,
        "steps": args.steps,
        "block_size": BLOCK_SIZE,
        "workloads": {name: {key: round(ms, 4) for key, ms in values.items()} for name, values in figures.items()},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    if args.limit_ms is not None and figures["decode"]["median_ms"] > args.limit_ms:
        sys.exit(f"decode takes {figures['decode']['median_ms']:.3f} ms, more than {args.limit_ms} ms")


if __name__ == "__main__":
    main()
