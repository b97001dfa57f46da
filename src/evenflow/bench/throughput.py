"""How many tokens a second the engine makes of a set of requests that all wait at the start.

As the seed counted: tokens/s is prompt and output tokens together, loading and profiling are outside the clock, prompts
are tokenized before it. Output tokens/s stands beside it. Several repeats give a confidence interval.
"""

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from evenflow.bench import engines, roofline
from evenflow.bench.metrics import mean_and_half_width
from evenflow.bench.workload import BenchRequest, Workload
from evenflow.progress import Bar

if TYPE_CHECKING:
    from evenflow.llm import LLM

BASELINES = ("transformers",)
BASELINE_BATCH = 32
NO_TRANSFORMERS = "--baseline transformers needs it: pip install 'transformers>=5.23,<6'"
WARMUP_REQUESTS, WARMUP_TOKENS = 8, 8

Contestant = Callable[[Sequence[BenchRequest]], int]


def bench_throughput(
    model: str,
    make_workload: Callable[[int, int], Workload],
    options: dict[str, Any],
    *,
    repeats: int = 1,
    gpu: str | None = None,
    baseline: str | None = None,
    temperature: float = 1.0,
    is_shown: bool = True,
) -> dict[str, Any]:
    """Run the workload `repeats` times. make_workload: (context, vocabulary size) -> requests.

    Returns JSON: vLLM's fields of `bench throughput` first, then the confidence interval, the limit and the settings.
    Raises ValueError for a request that cannot fit, and RuntimeError when an engine made too few tokens.
    """
    if repeats < 1:
        raise ValueError(f"--repeats {repeats} must be at least 1")
    if baseline is not None and find_spec("transformers") is None:  # said before the engine's work, not after it
        raise ValueError(NO_TRANSFORMERS)
    llm = engines.open_engine(model, {"enable_prefix_caching": False, **options})
    workload = make_workload(llm.settings.max_model_len, llm.model_config.vocab_size)
    check_fits(workload, llm.settings.max_model_len)
    seconds = timed(evenflow_runner(llm, temperature), workload.requests, repeats, "evenflow", is_shown)
    result = {
        "kind": "throughput",
        "model_id": model,
        **rates(workload.requests, seconds),
        "workload": workload.describe(),
        "engine": engines.described(llm, model),
    }
    num_devices = options.get("tensor_parallel_size", 1)
    machine, why_not = engines.machine_for(llm.model_config, llm.settings, gpu, num_devices)
    if machine is not None:
        result["roofline"] = roofline.report(
            engines.lengths_of(workload.requests),
            result["elapsed_time"],
            engines.work_of(llm.model_config, llm.settings),
            machine,
            **engines.bounds_of(llm),
        )
    else:
        result["roofline_missing"] = why_not
    if baseline is not None:
        device, dtype = llm.settings.device, llm.settings.dtype
        llm.close()
        del llm  # its memory is the baseline's
        engines.release_memory()
        result["baseline"] = _baseline(model, device, dtype, workload, repeats, is_shown)
        result["over_baseline"] = result["tokens_per_second"] / result["baseline"]["tokens_per_second"]
    return result


def check_fits(workload: Workload, context: int) -> None:
    for index, request in enumerate(workload.requests):
        if request.num_prompt_tokens + request.num_output_tokens > context:
            raise ValueError(
                f"request {index} has {request.num_prompt_tokens} + {request.num_output_tokens} tokens, above the "
                f"context of {context}; shorten it, or raise --max-model-len"
            )


def timed(
    run: Contestant, requests: Sequence[BenchRequest], repeats: int, label: str, is_shown: bool = True
) -> list[float]:
    """Seconds of each repeat, after a short warm-up. Raises RuntimeError if tokens are missing."""
    short = [
        BenchRequest(r.prompt, r.num_prompt_tokens, min(r.num_output_tokens, WARMUP_TOKENS))
        for r in requests[:WARMUP_REQUESTS]
    ]
    run(short)
    expected = sum(request.num_output_tokens for request in requests)
    seconds = []
    with Bar(label, repeats, is_shown=is_shown) as bar:
        for _ in range(repeats):
            start = time.perf_counter()
            num_tokens = run(requests)
            seconds.append(time.perf_counter() - start)
            if num_tokens != expected:
                raise RuntimeError(f"{label} made {num_tokens} output tokens of {expected}; requests failed")
            bar.advance(f"{expected / seconds[-1]:,.0f} output tokens/s")
    return seconds


def rates(requests: Sequence[BenchRequest], seconds: Sequence[float]) -> dict[str, Any]:
    """tokens/s in the seed's sense (in + out) and of outputs, requests/min; means over the repeats, with intervals."""
    num_input = sum(request.num_prompt_tokens for request in requests)
    num_output = sum(request.num_output_tokens for request in requests)
    total = num_input + num_output
    tokens_per_s, half_width = mean_and_half_width([total / s for s in seconds])
    return {
        "elapsed_time": total / tokens_per_s,
        "num_requests": len(requests),
        "total_num_tokens": total,
        "requests_per_second": len(requests) * tokens_per_s / total,
        "tokens_per_second": tokens_per_s,
        "tokens_per_second_ci95": half_width,
        "output_tokens_per_second": tokens_per_s * num_output / total,
        "requests_per_minute": 60 * len(requests) * tokens_per_s / total,
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "seconds": list(seconds),
    }


def evenflow_runner(llm: "LLM", temperature: float = 1.0) -> Contestant:
    from evenflow.sampling_params import SamplingParams

    def run(requests: Sequence[BenchRequest]) -> int:
        params = [
            SamplingParams(temperature=temperature, max_tokens=request.num_output_tokens, ignore_eos=True)
            for request in requests
        ]
        outputs = llm.generate([request.prompt for request in requests], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return run


def _baseline(model: str, device: str, dtype: str, workload: Workload, repeats: int, is_shown: bool) -> dict[str, Any]:
    run = transformers_runner(model, device, dtype)
    seconds = timed(run, workload.requests, repeats, "transformers", is_shown)
    return {"name": f"transformers.generate, static batches of {BASELINE_BATCH}", **rates(workload.requests, seconds)}


def transformers_runner(model: str, device: str, dtype: str) -> Contestant:
    """transformers.generate as most people call it: left-padded batches, each as long as its longest request."""
    try:
        import torch
        import transformers
    except ImportError:
        raise ValueError(NO_TRANSFORMERS) from None
    from evenflow.model_files import find_model

    library: Any = transformers  # parts of it are not typed
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()
    kind = getattr(torch, dtype)
    if engines.is_dummy(model):
        config = library.AutoConfig.from_pretrained(engines.shape_directory(model))
        with torch.device(device):
            network = library.AutoModelForCausalLM.from_config(config, dtype=kind).eval()
    else:
        network = library.AutoModelForCausalLM.from_pretrained(find_model(model), dtype=kind).eval().to(device)

    def run(requests: Sequence[BenchRequest]) -> int:
        return sum(
            _generate_batch(network, requests[start : start + BASELINE_BATCH], device)
            for start in range(0, len(requests), BASELINE_BATCH)
        )

    return run


def _generate_batch(network: Any, batch: Sequence[BenchRequest], device: str) -> int:
    import torch

    longest = max(request.num_prompt_tokens for request in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(batch):
        assert not isinstance(request.prompt, str)
        ids[row, longest - request.num_prompt_tokens :] = torch.tensor(request.prompt)
        mask[row, longest - request.num_prompt_tokens :] = 1
    most = max(request.num_output_tokens for request in batch)
    network.generate(
        ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=most,
        min_new_tokens=most,
        do_sample=False,
        pad_token_id=0,
    )
    return sum(request.num_output_tokens for request in batch)
