"""What does a sum over GPUs cost, with the norm that follows it? Microseconds over the message size, in graphs.

library: torch.distributed's all-reduce (NCCL, RCCL) alone. library + norm: and then our fused addition and norm, as the
engine does it without peer memory. one_shot, two_shot: our kernels over peer memory, which do all of it. Each op is
recorded REPLAYS times in a graph, so that launches cost what they cost in the engine. All are compared with float32
sums first. Two GPUs or more of one host; takes about a minute.

Example: python3 benchmarks/all_reduce.py --gpus 2 --out benchmarks/results/all_reduce.json
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
import torch.distributed as dist
from torch import Tensor

from evenflow.distributed import TensorParallel, connect_peers, join, leave
from evenflow.kernels.all_reduce import MAX_BYTES, MAX_PROGRAMS, best_method, launch_reduce_add_rms_norm, num_programs
from evenflow.kernels.rms_norm import add_rms_norm

DEADLINE_S = 110.0
REPLAYS = 20
RUNS = 15
SLEEP_CYCLES = 300_000
NUM_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
HIDDEN_SIZES = (4096, 8192)
EPS = 1e-5
Op = Callable[[], object]


def say(rank: int, text: str) -> None:
    if rank == 0:
        print(text, file=sys.stderr, flush=True)


def median_us(op: Op) -> float:
    """Of one op in a replayed graph of REPLAYS, over RUNS replays. All ranks call this with the same op."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        op()
        op()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        for _ in range(REPLAYS):
            op()
    times = []
    for _ in range(RUNS + 2):
        op()  # no rank begins before the others are here,
        torch.cuda._sleep(SLEEP_CYCLES)  # nor before all of the work is in its queue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / REPLAYS)
    del graph
    return statistics.median(times[2:])


def ops(tp: TensorParallel, x: Tensor, residual: Tensor, weight: Tensor) -> dict[str, Op]:
    """What is measured for x, by name. Sums in place grow without end, so the library's are of zeros."""
    assert tp.group is not None
    zeros = torch.zeros_like(x)
    found: dict[str, Op] = {
        "library": lambda: dist.all_reduce(zeros),
        "library + norm": lambda: add_rms_norm(tp.all_reduce(zeros), residual, weight, EPS),
    }
    peers = tp.group.peers
    for method in ("one_shot", "two_shot") if peers is not None else ():
        fits = x.nbytes <= MAX_BYTES and num_programs(method, *x.shape, tp.size) <= MAX_PROGRAMS
        if fits:
            found[method] = lambda method=method: launch_reduce_add_rms_norm(x, residual, weight, EPS, peers, method)
    return found


def largest_error(tp: TensorParallel, x: Tensor, residual: Tensor, weight: Tensor, op: str) -> float:
    """Of the normed sum, against float32 on the GPU."""
    assert tp.group is not None
    total = x.float()
    dist.all_reduce(total)
    exact = torch.nn.functional.rms_norm(total + residual.float(), x.shape[1:], weight.float(), EPS)
    if op.startswith("library"):
        found, _ = add_rms_norm(tp.all_reduce(x.clone()), residual, weight, EPS)
    else:
        assert tp.group.peers is not None
        found, _ = launch_reduce_add_rms_norm(x, residual, weight, EPS, tp.group.peers, op)
    return float((found.float() - exact).abs().max())


def measure(tp: TensorParallel, hidden: int, end_s: float) -> list[dict[str, object]]:
    rows = []
    for num_tokens in NUM_TOKENS:
        late = torch.tensor([int(time.monotonic() > end_s)], device="cuda")
        dist.all_reduce(late)
        if late.item():  # on any rank, so that all stop here
            say(tp.rank, "no time is left for the larger sizes")
            break
        generator = torch.Generator("cuda").manual_seed(tp.rank)
        x = torch.randn(num_tokens, hidden, generator=generator, device="cuda").bfloat16()
        generator.manual_seed(99)
        residual = torch.randn(num_tokens, hidden, generator=generator, device="cuda").bfloat16()
        weight = torch.ones(hidden, device="cuda").bfloat16()
        row: dict[str, object] = {"hidden_size": hidden, "num_tokens": num_tokens, "kib": x.nbytes / 1024}
        for name, op in ops(tp, x, residual, weight).items():
            error = largest_error(tp, x, residual, weight, name)
            assert error < 0.1, f"{name} of {num_tokens} x {hidden} is wrong by {error}"
            row[f"{name}_us"] = round(median_us(op), 2)
        assert tp.group is not None
        peers = tp.group.peers
        row["chosen"] = (best_method(x, peers) if peers is not None else None) or "library + norm"
        rows.append(row)
        say(tp.rank, "  ".join(f"{name} {value}" for name, value in row.items()))
    return rows


def run_rank(rank: int, size: int, address: str, out: str | None) -> None:
    end_s = time.monotonic() + DEADLINE_S - 35
    torch.cuda.set_device(rank)
    tp = join(rank, size, address, torch.device("cuda"), deadline_s=60)
    say(rank, "the ranks have met")
    account = connect_peers(tp, HIDDEN_SIZES[0], torch.bfloat16)
    say(rank, account)
    with torch.inference_mode():
        rows = [row for hidden in HIDDEN_SIZES for row in measure(tp, hidden, end_s)]
    if rank == 0:
        facts = {
            "gpu": torch.cuda.get_device_name(),
            "gpus": size,
            "torch": torch.__version__,
            "dtype": "bfloat16",
            "peer_memory": account,
        }
        text = json.dumps({**facts, "rows": rows}, indent=1)
        print(text, flush=True)
        if out is not None:
            Path(out).write_text(text + "\n")
    torch.cuda.synchronize()
    dist.barrier()
    threading.Timer(10.0, os._exit, (0,)).start()  # if the library does not end
    leave()
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2, metavar="N", help="2, 4 or 8 (default: 2)")
    parser.add_argument("--out", metavar="FILE", help="where to write the JSON, beside standard output")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        run_rank(args.rank, args.gpus, args.address, args.out)
    if torch.cuda.device_count() < args.gpus:
        parser.error(f"--gpus {args.gpus}: PyTorch sees {torch.cuda.device_count()}")
    from evenflow.distributed import listen

    listener, address = listen("tcp://127.0.0.1:0")
    listener.close()
    options = ["--gpus", str(args.gpus), "--address", address, *(["--out", args.out] if args.out else [])]
    ranks = [
        subprocess.Popen([sys.executable, __file__, *options, "--rank", str(rank)], start_new_session=True)
        for rank in range(args.gpus)
    ]
    end_s = time.monotonic() + DEADLINE_S
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < end_s:
        if any(rank.returncode for rank in ranks):  # the others wait for it
            break
        time.sleep(0.1)
    for number, rank in enumerate(ranks):
        if rank.poll() is None:
            print(f"rank {number} is ended: another one failed, or {DEADLINE_S:g} s are over", file=sys.stderr)
            os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()
    return int(any(rank.returncode for rank in ranks))


if __name__ == "__main__":
    sys.exit(main())
