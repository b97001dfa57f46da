"""How long one batch takes: time to first token, time per step, and both limits, over batch sizes and lengths.

Prompts of one cell are of equal length and all wait at the start. TTFT is the time until every one of them has its
first token; the time of a step is what then follows, divided by the number of further tokens.
"""

import itertools
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evenflow.bench import engines
from evenflow.bench.roofline import Machine, Work, offline_limit
from evenflow.bench.workload import random_lengths
from evenflow.progress import Bar

if TYPE_CHECKING:
    from evenflow.llm import LLM
    from evenflow.request import RequestDelta

PERCENTILES = (10, 25, 50, 75, 90, 99)


def bench_latency(
    model: str,
    options: dict[str, Any],
    *,
    batch_sizes: Sequence[int] = (8,),
    input_lens: Sequence[int] = (32,),
    output_lens: Sequence[int] = (128,),
    num_warmups: int = 1,
    repeats: int = 3,
    gpu: str | None = None,
    is_shown: bool = True,
) -> dict[str, Any]:
    """The grid batch sizes x input lengths x output lengths. Returns JSON; each cell has vLLM's fields of `bench
    latency`.

    Raises ValueError for a cell that does not fit the context.
    """
    grid = list(itertools.product(batch_sizes, input_lens, output_lens))
    for name, values in (("--batch-size", batch_sizes), ("--input-len", input_lens), ("--repeats", (repeats,))):
        if min(values) < 1:
            raise ValueError(f"{name} {min(values)} must be at least 1")
    if min(output_lens) < 2:
        raise ValueError(f"--output-len {min(output_lens)} must be at least 2: one token has no time per further token")
    llm = engines.open_engine(model, {"enable_prefix_caching": False, **options})
    context = llm.settings.max_model_len
    if too_long := [cell for cell in grid if cell[1] + cell[2] > context]:
        raise ValueError(
            f"--input-len {too_long[0][1]} + --output-len {too_long[0][2]} exceed the context of {context}"
        )
    machine, why_not = engines.machine_for(llm.model_config, llm.settings, gpu, options.get("tensor_parallel_size", 1))
    work = engines.work_of(llm.model_config, llm.settings)
    cells = []
    with Bar("cells", len(grid), is_shown=is_shown) as bar:
        for batch, input_len, output_len in grid:
            cell = measure(llm, batch, input_len, output_len, num_warmups, repeats)
            if machine is not None:
                cell["limit"] = cell_limit(cell, work, machine, engines.bounds_of(llm))
            cells.append(cell)
            bar.advance(f"{1e3 * cell['step_time_s']:.2f} ms a step")
    found: dict[str, Any] = {"kind": "latency", "model_id": model, "cells": cells}
    found |= {"machine": machine.as_dict()} if machine is not None else {"roofline_missing": why_not}
    return {**found, "engine": engines.described(llm, model)}


def measure(llm: "LLM", batch: int, input_len: int, output_len: int, num_warmups: int, repeats: int) -> dict[str, Any]:
    """One cell. Seconds; medians over the repeats."""
    workload = random_lengths(batch, input_len=input_len, output_len=output_len, vocab_size=llm.model_config.vocab_size)
    prompts = [request.prompt for request in workload.requests]

    for _ in range(num_warmups):
        run(llm, prompts, output_len)
    firsts, wholes = zip(*(run(llm, prompts, output_len) for _ in range(repeats)), strict=True)
    return cell_of(batch, input_len, output_len, firsts, wholes)


def run(llm: "LLM", prompts: list[Any], num_tokens: int) -> tuple[float, float]:
    """Seconds until all prompts have (their first token, all their tokens)."""
    from evenflow.sampling_params import SamplingParams

    params = SamplingParams(temperature=1.0, max_tokens=num_tokens, ignore_eos=True)
    first_s: dict[str, float] = {}

    def see(deltas: "list[RequestDelta]") -> None:
        seconds = time.perf_counter() - start
        for delta in deltas:
            if delta.new_token_ids:
                first_s.setdefault(delta.request_id, seconds)

    start = time.perf_counter()
    with engines.watched_steps(llm, see):
        outputs = llm.generate(prompts, params, use_tqdm=False)
    whole_s = time.perf_counter() - start
    if any(len(output.outputs[0].token_ids) != num_tokens for output in outputs):
        raise RuntimeError("the engine made fewer tokens than asked for; requests failed")
    return max(first_s.values()), whole_s


def cell_of(
    batch: int, input_len: int, output_len: int, firsts: Sequence[float], wholes: Sequence[float]
) -> dict[str, Any]:
    """firsts, wholes: of each run, seconds until all had the first and the last token."""
    first_s = statistics.median(firsts)
    step_s = statistics.median(w - f for f, w in zip(firsts, wholes, strict=True)) / (output_len - 1)
    return {
        "batch_size": batch,
        "input_len": input_len,
        "output_len": output_len,
        "avg_latency": statistics.fmean(wholes),
        "latencies": list(wholes),
        "percentiles": {str(p): float(np.percentile(wholes, p)) for p in PERCENTILES},
        "ttft_s": first_s,
        "step_time_s": step_s,
        "time_per_token_s": step_s / batch,
        "prefill_tokens_per_s": batch * input_len / first_s,
        "decode_tokens_per_s": batch / step_s,
    }


def cell_limit(cell: dict[str, Any], work: Work, machine: Machine, bounds: dict[str, int]) -> dict[str, Any]:
    """The ideal times of a cell, the fractions reached and what binds, per phase."""
    batch, input_len, output_len = cell["batch_size"], cell["input_len"], cell["output_len"]
    first = offline_limit([(input_len, 1)] * batch, work, machine, **bounds)
    whole = offline_limit([(input_len, output_len)] * batch, work, machine, **bounds)
    step_s = (whole.ideal_s - first.ideal_s) / (output_len - 1)
    return {
        "ttft_s": first.ideal_s,
        "step_time_s": step_s,
        "prefill_fraction": first.ideal_s / cell["ttft_s"],
        "decode_fraction": step_s / cell["step_time_s"],
        "prefill_binding": first.prefill.binding,
        "decode_binding": whole.decode.binding,
    }
