"""What does sampling cost a step? Milliseconds for batches of one kind of request, on the machine at hand.

Logits are normal with standard deviation 5 (`peaked`: as a trained model's, few tokens matter) or 0.5 (`flat`: as
random weights give, where top-p has to keep most of the vocabulary). Writes benchmarks/results/sampler.json.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from evenflow.request import AdmittedRequest
from evenflow.runner.sampler import Sampler
from evenflow.sampling_params import SamplingParams

SHAPES = [(256, 3072), (64, 32000), (64, 128256)]
LENGTH = 300  # tokens a request has so far, half of them prompt
SETTINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "T=1": SamplingParams(),
    "top_k=50": SamplingParams(top_k=50),
    "top_p=0.9": SamplingParams(top_p=0.9),
    "min_p=0.05": SamplingParams(min_p=0.05),
    "top_k=50 top_p=0.9 T=0.7": SamplingParams(top_k=50, top_p=0.9, temperature=0.7),
    "penalties": SamplingParams(repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5),
    "logprobs=5": SamplingParams(logprobs=5),
}
RESULT = Path(__file__).parent / "results" / "sampler.json"


def wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.cuda.synchronize()


def median_ms(step: Callable[[], object], device: torch.device, num_runs: int) -> float:
    times = []
    for run in range(num_runs + 2):
        wait(device)
        start = time.perf_counter()
        step()
        wait(device)
        if run >= 2:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(num_rows: int, vocab_size: int, params: SamplingParams, scale: float, args: argparse.Namespace) -> float:
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(num_rows, vocab_size, generator=generator)).to(device)
    token_ids = torch.randint(vocab_size, (num_rows, LENGTH + 1), generator=generator)
    sampler = Sampler(num_rows, vocab_size, device)
    for slot in range(num_rows):
        prompt = token_ids[slot, : LENGTH // 2].tolist()
        sampler.admit(AdmittedRequest(slot, prompt, LENGTH // 2, params.replace(seed=slot), [], []))
    slots, lengths = np.arange(num_rows), np.full(num_rows, LENGTH)
    token_ids = token_ids.to(device)

    def step() -> None:
        sampled = sampler.sample(logits, slots, lengths, token_ids)
        assert not sampled.bad_rows
        assert len(sampled.logprobs) in (0, num_rows)

    return median_ms(step, device, args.runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, on CPU")
    parser.add_argument("--runs", type=int, default=9, help="timed runs of each setting; the median is told")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for num_rows, vocab_size in SHAPES:
        for scale, shape in ((5.0, "peaked"), (0.5, "flat")):
            for name, params in SETTINGS.items():
                ms = round(measure(num_rows, vocab_size, params, scale, args), 3)
                rows.append({"R": num_rows, "V": vocab_size, "logits": shape, "setting": name, "ms": ms})
                print(f"R={num_rows:<4} V={vocab_size:<7} {shape:7} {name:26} {ms:9.2f} ms", flush=True)
    about = {
        "device": args.device,
        "machine": platform.processor() or platform.machine(),
        "threads": args.threads,
        "torch": torch.__version__,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
