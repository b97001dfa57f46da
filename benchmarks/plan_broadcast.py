"""What does it cost rank 0 to send a step to the other tensor-parallel ranks? Milliseconds, with receiving processes.

send: packing the plan once and writing it to every rank's socket, which is the time that rank 0 loses. arrived: until
the last rank has read and unpacked it. decode: 256 running requests, every 16th of which gets a block. prompts: 8
prompts of 1,000 tokens enter beside 128 running requests. masks: 64 of 256 rows have a grammar over 128,256 tokens.
Writes benchmarks/results/plan_broadcast.json.

Example: PYTHONPATH=src python benchmarks/plan_broadcast.py --limit-ms 0.1
"""

import argparse
import json
import os
import platform
import socket
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from evenflow.engine.rank_messages import Step, receive_for_rank
from evenflow.request import AdmittedRequest, ScheduledRow, StepPlan, TokenMasks
from evenflow.sampling_params import SamplingParams

RESULT = Path(__file__).parent / "results" / "plan_broadcast.json"
SIZES = (2, 4, 8)
Work = tuple[StepPlan, TokenMasks | None]


def running(count: int) -> list[ScheduledRow]:
    return [ScheduledRow(i, 500 + i, 501 + i, True, [1000 + i] if i % 16 == 0 else []) for i in range(count)]


def workloads() -> dict[str, Work]:
    params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=200)
    prompts = [AdmittedRequest(200 + i, list(range(1000)), 1000, params, [], []) for i in range(8)]
    rows = [ScheduledRow(200 + i, 0, 240, False, list(range(15))) for i in range(8)]
    masks = TokenMasks(list(range(64)), np.full((64, 128256 // 32), -1, dtype=np.int32))
    return {
        "decode": (StepPlan([], running(256), [], []), None),
        "prompts": (StepPlan(prompts, running(128) + rows, [], []), None),
        "masks": (StepPlan([], running(256), [], []), masks),
    }


def receive(plans_fd: int, control_fd: int) -> None:
    """A rank that only reads; one byte back for each step.

    It does not take the sender's core when it is woken: ranks of GPUs have cores of their own, this machine may not.
    """
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    plans, control = socket.socket(fileno=plans_fd), socket.socket(fileno=control_fd)
    while (step := receive_for_rank(plans)) is not None:
        assert isinstance(step, Step)
        step.plan_and_masks()
        plans.send(b".")
    control.close()


def measure(size: int, work: Work, num_steps: int) -> dict[str, float]:
    from evenflow.engine.ranks import Deadlines, Ranks

    ranks = Ranks(size, Deadlines(), command=(sys.executable, __file__, "--receive"))
    sent, arrived = [], []
    for number in range(num_steps + 50):
        start = time.perf_counter()
        ranks.send_step(*work)
        sent.append((time.perf_counter() - start) * 1e3)
        for rank in ranks._ranks:
            rank.plans.recv(1)
        arrived.append((time.perf_counter() - start) * 1e3)
        if number % 10 == 0:
            time.sleep(0.001)
    ranks.close()
    return {
        "send_median_ms": round(statistics.median(sent[50:]), 4),
        "send_p99_ms": round(statistics.quantiles(sent[50:], n=100)[98], 4),
        "arrived_median_ms": round(statistics.median(arrived[50:]), 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, metavar="N")
    parser.add_argument(
        "--limit-ms", type=float, metavar="MS", help="exit code 1 if sending a decode step takes longer"
    )
    parser.add_argument("--receive", nargs=3, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.receive:
        receive(*args.receive[:2])
        return 0
    found = {
        name: {f"{size} ranks": measure(size, work, args.steps) for size in SIZES} for name, work in workloads().items()
    }
    facts = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    text = json.dumps({**facts, "python": platform.python_version(), "steps": args.steps, "workloads": found}, indent=2)
    print(text)
    RESULT.write_text(text + "\n")
    worst = max(entry["send_median_ms"] for entry in found["decode"].values())
    return int(args.limit_ms is not None and worst > args.limit_ms)


if __name__ == "__main__":
    sys.exit(main())
