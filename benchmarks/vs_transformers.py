"""Tokens per second of Evenflow beside transformers on this machine's CPU, and what our mechanisms are worth.

The demo model, random prompts with the length law of workload.py, temperature 0, no early stop, so that every
contestant computes the same number of tokens. All run one after the other in this process, several rounds, interleaved;
the ratio of a round compares neighbours in time.

    python benchmarks/vs_transformers.py                      # a round takes 11 minutes on 2 cores
    python benchmarks/vs_transformers.py --requests 64 --rounds 1 --only "evenflow,transformers static batches"
"""

import argparse
import json
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
import workload

import evenflow
from evenflow import LLM, SamplingParams
from evenflow.demo import MODEL_DIR

RESULTS = Path(__file__).parent / "results" / "vs_transformers.json"
BATCH = 32
LIMITS = {"transformers static batches": 5.0, "transformers continuous batching": 2.0}

Lengths = Sequence[tuple[int, int]]
Contestant = Callable[[Sequence[list[int]], Lengths], int]


def run_evenflow(llm: LLM) -> Contestant:
    def run(prompts: Sequence[list[int]], lengths: Lengths) -> int:
        params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for _, n in lengths]
        outputs = llm.generate(list(prompts), params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return run


def run_static_generate(model: transformers.PreTrainedModel) -> Contestant:
    """transformers.generate as most people call it: left-padded batches, each as long as its longest request."""

    def run(prompts: Sequence[list[int]], lengths: Lengths) -> int:
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            longest = max(map(len, batch))
            ids = torch.zeros(len(batch), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(batch):
                ids[row, longest - len(prompt) :] = torch.tensor(prompt)
                mask[row, longest - len(prompt) :] = 1
            most = max(n for _, n in lengths[start : start + BATCH])
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, do_sample=False, pad_token_id=0
            )
            assert out.shape[1] == longest + most
        return sum(n for _, n in lengths)

    return run


def run_continuous_generate(model: transformers.PreTrainedModel) -> Contestant:
    """transformers' own continuous batching, every request with its own length.

    The cache holds all 256 requests at their mean length; a larger one exceeds the memory that it grants itself on CPU.
    The fastest of four settings tried: its own choice, pages of 16 and of 256 tokens, steps of 512 and of 2,048.
    """
    config = transformers.generation.configuration_utils.ContinuousBatchingConfig(
        page_size=16, num_blocks=7168, max_batch_tokens=2048, max_requests_per_batch=256
    )
    generation = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1024)

    def run(prompts: Sequence[list[int]], lengths: Lengths) -> int:
        num_tokens, left = 0, len(prompts)
        with model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=config
        ) as manager:
            for prompt, (_, n) in zip(prompts, lengths, strict=True):
                manager.add_request(prompt, max_new_tokens=n, eos_token_id=-1)
            while left:
                result = manager.get_result(timeout=600)
                if result is None:
                    raise RuntimeError("transformers' continuous batching brought nothing for 10 minutes")
                if result.error:
                    raise RuntimeError(f"transformers' continuous batching failed: {result.error}")
                if result.is_finished():
                    num_tokens += len(result.generated_tokens)
                    left -= 1
        return num_tokens

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--only", help="comma-separated contestants", default=None)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()

    lengths = workload.lengths(args.requests, 1024)
    prompts = workload.prompts(lengths, 3000)
    llm = LLM("demo", dtype=args.dtype, enable_prefix_caching=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=getattr(torch, args.dtype)).eval()
    contestants: dict[str, Contestant] = {
        "evenflow": run_evenflow(llm),
        "transformers static batches": run_static_generate(model),
        "transformers continuous batching": run_continuous_generate(model),
    }
    if args.only:
        contestants = {name: run for name, run in contestants.items() if name in args.only.split(",")}
    expected = sum(n for _, n in lengths)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run(prompts[:8], [(p, 8) for p, _ in lengths[:8]])  # warm-up
    for round_number in range(args.rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            num_tokens = run(prompts, lengths)
            seconds[name].append(time.perf_counter() - start)
            assert num_tokens == expected, f"{name} made {num_tokens} tokens, not {expected}"
            rate = expected / seconds[name][-1]
            print(
                f"round {round_number}: {name:34s} {seconds[name][-1]:7.1f} s {rate:8.0f} output tokens/s", flush=True
            )
    ratios = {
        name: [theirs / ours for theirs, ours in zip(times, seconds["evenflow"], strict=True)]
        for name, times in seconds.items()
        if name != "evenflow" and "evenflow" in seconds
    }
    for name, values in ratios.items():
        print(f"evenflow over {name}: {statistics.median(values):.2f}x ({min(values):.2f} to {max(values):.2f})")
    record = {
        "requests": args.requests,
        "dtype": args.dtype,
        "prompt_tokens": sum(p for p, _ in lengths),
        "output_tokens": expected,
        "seconds": seconds,
        "ratios": ratios,
        "threads": torch.get_num_threads(),
        "versions": {
            "evenflow": evenflow.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "cpu": platform.processor() or platform.machine(),
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    missed = [name for name, limit in LIMITS.items() if name in ratios and statistics.median(ratios[name]) < limit]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
