"""What each technique is worth on this machine: it is taken away alone, the rest stays.

The seed's claims are continuous over static batching (5 to 10 times) and paged over contiguous KV memory (3 times).
Beside them: prefix cache, chunked prefill, overlap of steps, graphs. What does not apply here is skipped, with the
reason.
"""

import dataclasses
import time
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from evenflow.bench import engines
from evenflow.bench.metrics import mean_and_half_width
from evenflow.bench.throughput import evenflow_runner
from evenflow.bench.workload import BenchRequest, builtin, shared_prefixes
from evenflow.config import EngineConfig
from evenflow.progress import Bar

if TYPE_CHECKING:
    from evenflow.llm import LLM

CPU_FULL_LENGTH = 32  # the cache of a CPU run, in requests of the whole context, as 7B has on an 80 GB GPU
DEFAULT_CONTEXT = 2048


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """One technique. option: the field of EngineConfig that turns it off; scheduler: or a scheduler without it.

    claim: what the seed says. needs_gpu: it does nothing on a CPU.
    """

    name: str
    without: str
    option: str | None = None
    scheduler: str | None = None
    workload: str = "builtin"
    claim: str = ""
    needs_gpu: bool = False


VARIANTS = (
    Variant("continuous batching", "static batching", scheduler="static", claim="5 to 10x"),
    Variant("paged KV cache", "contiguous KV memory", scheduler="contiguous", claim="3x"),
    Variant("prefix cache", "no prefix cache", option="enable_prefix_caching", workload="prefix"),
    Variant("chunked prefill", "whole prompts", option="enable_chunked_prefill"),
    Variant("overlapped steps", "no overlap", option="enable_overlap", needs_gpu=True),
    Variant("graphs", "no graphs", option="enable_graphs", needs_gpu=True),
)


def bench_ablation(
    model: str,
    options: dict[str, Any],
    *,
    num_requests: int = 256,
    rounds: int = 3,
    names: Sequence[str] | None = None,
    is_shown: bool = True,
) -> dict[str, Any]:
    """Rounds of with and without, by turns where one engine can do both. Returns JSON: rows, skipped, settings."""
    if unknown := [name for name in names or () if name not in {variant.name for variant in VARIANTS}]:
        known = ", ".join(variant.name for variant in VARIANTS)
        raise ValueError(f"--only {unknown[0]!r} is none of {known}")
    for name, value in (("--num-prompts", num_requests), ("--rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    chosen = [variant for variant in VARIANTS if names is None or variant.name in names]
    base, is_gpu, about = _base_options(model, options)
    rows, skipped = [], []
    with Bar("techniques", len(chosen), is_shown=is_shown) as bar:
        for variant in chosen:
            if reason := why_skipped(variant, is_gpu):
                skipped.append({"name": variant.name, "claim": variant.claim, "reason": reason})
            else:
                rows.append(_measure(variant, model, base, num_requests, rounds))
            bar.advance(f"{variant.name}: " + (reason or f"{rows[-1]['ratio']:.2f}x"))
    return {
        "kind": "ablation",
        "model_id": model,
        "num_requests": num_requests,
        "rows": rows,
        "skipped": skipped,
        **about,
    }


def why_skipped(variant: Variant, is_gpu: bool) -> str:
    if variant.needs_gpu and not is_gpu:
        return "not applicable on a CPU: there is no launch to hide"
    if variant.option is not None and variant.option not in {f.name for f in dataclasses.fields(EngineConfig)}:
        return f"this version has no option {variant.option}"
    return ""


def _base_options(model: str, options: dict[str, Any]) -> tuple[dict[str, Any], bool, dict[str, Any]]:
    """(engine options of every run, whether it is a GPU, what the report says of them)."""
    model_config, settings = engines.resolved(model, options)
    context = options.get("max_model_len") or min(model_config.max_context, DEFAULT_CONTEXT)
    is_gpu = settings.device != "cpu"
    base = {"enable_prefix_caching": False, **options, "max_model_len": context}
    if not is_gpu and "kv_cache_memory" not in options:
        base["kv_cache_memory"] = str(CPU_FULL_LENGTH * context * settings.kv_bytes_per_token(model_config))
    about = {"context": context, "kv_cache_memory": base.get("kv_cache_memory", "what is free")}
    return base, is_gpu, about


def _measure(variant: Variant, model: str, base: dict[str, Any], num_requests: int, rounds: int) -> dict[str, Any]:
    if variant.scheduler is not None:
        with_it, without = _by_turns(variant, model, base, num_requests, rounds)
    else:
        assert variant.option is not None
        with_it, without = (
            _rounds(variant, model, {**base, variant.option: value}, num_requests, rounds) for value in (True, False)
        )
    return row_of(variant, with_it, without)


def _by_turns(
    variant: Variant, model: str, base: dict[str, Any], num_requests: int, rounds: int
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """One engine, its scheduler exchanged after every run."""
    assert variant.scheduler is not None
    llm = engines.open_engine(model, base)
    requests, plain = _requests(variant, llm, num_requests), llm.engine.scheduler
    _warm(llm, requests)
    with_it, without = [], []
    for _ in range(rounds):
        with_it.append(_run(llm, requests))
        llm.engine.scheduler = _make_scheduler(variant.scheduler, llm)
        without.append(_run(llm, requests))
        llm.engine.scheduler = plain
    llm.close()
    return with_it, without


def _rounds(
    variant: Variant, model: str, options: dict[str, Any], num_requests: int, rounds: int
) -> list[dict[str, float]]:
    engines.release_memory()
    llm = engines.open_engine(model, options)
    requests = _requests(variant, llm, num_requests)
    _warm(llm, builtin(8, context=llm.settings.max_model_len, seed=7).requests)
    found = [_run(llm, requests, salt=number) for number in range(rounds)]
    llm.close()
    return found


def row_of(
    variant: Variant, with_it: Sequence[dict[str, float]], without: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """Means over the rounds; ratio: of the means of tokens/s, with over without."""
    rates = [mean_and_half_width([run["tokens_per_s"] for run in runs]) for runs in (with_it, without)]
    return {
        "name": variant.name,
        "without": variant.without,
        "claim": variant.claim,
        "workload": variant.workload,
        "tokens_per_s": rates[0][0],
        "tokens_per_s_ci95": rates[0][1],
        "tokens_per_s_without": rates[1][0],
        "tokens_per_s_without_ci95": rates[1][1],
        "ratio": rates[0][0] / rates[1][0],
        "longest_step_s": max(run["longest_step_s"] for run in with_it),
        "longest_step_s_without": max(run["longest_step_s"] for run in without),
        "mean_running": fmean(run["mean_running"] for run in with_it),
        "mean_running_without": fmean(run["mean_running"] for run in without),
        "runs": list(with_it),
        "runs_without": list(without),
    }


def _requests(variant: Variant, llm: "LLM", count: int) -> list[BenchRequest]:
    context, vocab_size = llm.settings.max_model_len, llm.model_config.vocab_size
    if variant.workload == "builtin":
        return builtin(count, context=context, vocab_size=vocab_size).requests
    prefix, rest = context // 2, max(context // 16, 1)
    return shared_prefixes(
        count, num_prefixes=8, prefix_len=prefix, suffix_len=rest, output_len=rest, vocab_size=vocab_size
    ).requests


def _run(llm: "LLM", requests: Sequence[BenchRequest], salt: int = 0) -> dict[str, float]:
    """One run. salt: shifts the tokens, so that no round finds what the round before left in the prefix cache."""
    running: list[int] = []
    ends_s: list[float] = []

    def see(_: Any) -> None:
        running.append(llm.engine.scheduler.num_running)
        ends_s.append(time.perf_counter())

    shifted = [_shifted(request, salt, llm.model_config.vocab_size) for request in requests]
    start = time.perf_counter()
    with engines.watched_steps(llm, see):
        num_tokens = evenflow_runner(llm)(shifted)
    seconds = time.perf_counter() - start
    if num_tokens != sum(request.num_output_tokens for request in requests):
        raise RuntimeError("the engine made fewer tokens than asked for; requests failed")
    return {
        "seconds": seconds,
        "tokens_per_s": num_tokens / seconds,
        "longest_step_s": float(np.diff(ends_s, prepend=start).max()),
        "mean_running": fmean(running),
    }


def _shifted(request: BenchRequest, salt: int, vocab_size: int) -> BenchRequest:
    assert not isinstance(request.prompt, str)
    first = 16 + (request.prompt[0] + salt) % (vocab_size - 16)
    return dataclasses.replace(request, prompt=[first, *request.prompt[1:]])


def _warm(llm: "LLM", requests: Sequence[BenchRequest]) -> None:
    evenflow_runner(llm)([dataclasses.replace(r, num_output_tokens=min(r.num_output_tokens, 8)) for r in requests[:8]])


def _make_scheduler(kind: str, llm: "LLM") -> Any:
    """The engine's scheduler without one of its ideas."""
    from evenflow.scheduler import Scheduler

    class StaticScheduler(Scheduler):
        """Admits a batch only when the one before it is done."""

        def _admit_waiting(self, *args: Any) -> None:
            if not self.running:
                super()._admit_waiting(*args)

    class ContiguousScheduler(Scheduler):
        """Takes the whole context's blocks at admission, as engines without paging must."""

        def _num_blocks_to_admit(self, end: int) -> int:
            return -(-self.max_model_len // self.block_size)

    old = llm.engine.scheduler
    return {"static": StaticScheduler, "contiguous": ContiguousScheduler}[kind](
        num_blocks=old.num_blocks,
        block_size=old.block_size,
        max_num_seqs=old.max_num_seqs,
        max_num_batched_tokens=old.max_num_batched_tokens,
        max_model_len=old.max_model_len,
        enable_prefix_caching=False,
    )


def ablation_plot(result: dict[str, Any]) -> str:
    """The ratios as bars, SVG."""
    from evenflow.bench import plots

    rows = result["rows"]
    groups = [row["name"] for row in rows]
    with_it = plots.Series("with", [row["tokens_per_s"] for row in rows], errors=[r["tokens_per_s_ci95"] for r in rows])
    without = plots.Series(
        "without",
        [row["tokens_per_s_without"] for row in rows],
        errors=[row["tokens_per_s_without_ci95"] for row in rows],
    )
    labels = [f"{name}\n{row['ratio']:.2f}x" for name, row in zip(groups, rows, strict=True)]
    figure = plots.bars(f"Ablation, {result['model_id']}", labels, [with_it, without], "output tokens/s")
    return plots.svg(figure)
