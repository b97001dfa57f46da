"""What is asked of an engine: prompts with fixed numbers of tokens to generate.

Five kinds: the built-in sample (ShareGPT's length law without the file), random lengths, shared prefixes, a trace, and
ShareGPT itself (sharegpt.py). Every kind is a pure function of its arguments and a seed.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

MEAN_PROMPT, CV_PROMPT = 249.0, 1.3
MEAN_OUTPUT, CV_OUTPUT = 230.0, 0.85
MIN_TOKENS, MAX_PROMPT, MAX_TOTAL = 4, 1024, 2048
FULL_LAW_CONTEXT = 1024  # contexts below cannot hold the law's long prompts
FIRST_ID = 16  # ids below are often special tokens
DEFAULT_VOCAB = 3000  # these ids exist in every vocabulary

WORDS = (
    "the old king had a daughter who went into wood and found there an iron stove that spoke to her with human voice "
    "so she ran home told father what happened he sent for miller whose son was brave knew no fear took his knife "
    "walked all night until morning light came over hill where three ravens sat upon stone under which lay golden key"
).split()


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request. prompt: text or token ids. arrival_s: when a trace sends it, counted from the start.

    num_prompt_tokens: what the prompt has by the tokenizer at hand; a server may count differently.
    """

    prompt: str | list[int]
    num_prompt_tokens: int
    num_output_tokens: int
    arrival_s: float | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests with the words that a report needs. note: what the reader must know, such as a replaced file."""

    name: str
    requests: list[BenchRequest]
    note: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        prompts = [request.num_prompt_tokens for request in self.requests]
        outputs = [request.num_output_tokens for request in self.requests]
        return {
            "name": self.name,
            "note": self.note,
            "num_requests": len(self.requests),
            "mean_prompt_tokens": float(np.mean(prompts)),
            "mean_output_tokens": float(np.mean(outputs)),
            "max_prompt_tokens": max(prompts),
            "max_output_tokens": max(outputs),
            **self.parameters,
        }


def builtin(count: int, *, context: int = MAX_TOTAL, vocab_size: int = DEFAULT_VOCAB, seed: int = 0) -> Workload:
    """Random token ids with ShareGPT's length law; no two prompts share a beginning."""
    lengths, scale = sample_lengths(count, context, seed)
    note = "built-in sample, ShareGPT's length law: log-normal, mean 249 in, 230 out"
    if scale < 1:
        note += f"; lengths scaled by {scale:.2f} to fit a context of {context}"
    requests = [BenchRequest(ids, len(ids), n) for ids, n in _with_ids(lengths, vocab_size, seed)]
    return Workload("builtin", requests, note, {"seed": seed, "context": context})


def sample_lengths(count: int, context: int = MAX_TOTAL, seed: int = 0) -> tuple[list[tuple[int, int]], float]:
    """((prompt, output) tokens of each request, the factor that lengths were scaled by).

    Two log-normal laws cut as vLLM v0.1.4's filter cuts ShareGPT: both at least 4, the prompt at most 1,024, together
    at most 2,048 or `context`. Stratified: request i has quantile (i + 1/2) / count, shuffled, so that the means are
    249 and 230 for any count, not only in the limit. The spreads (1.3 and 0.85) are an assumption; the means are not.
    """
    _at_least("num_prompts", count, 1)
    _at_least("context", context, 4 * MIN_TOKENS)
    scale = min(1.0, context / FULL_LAW_CONTEXT)
    total = min(MAX_TOTAL, context)
    longest = min(int(MAX_PROMPT * scale), total - MIN_TOKENS)
    rng = np.random.default_rng(seed)
    prompts = rng.permutation(_stratified(count, MEAN_PROMPT * scale, CV_PROMPT, longest))
    outputs = rng.permutation(_stratified(count, MEAN_OUTPUT * scale, CV_OUTPUT, total - MIN_TOKENS))
    _make_fit(prompts, outputs, total, rng)
    return list(zip(prompts.tolist(), outputs.tolist(), strict=True)), scale


def _stratified(count: int, mean: float, cv: float, longest: int) -> np.ndarray:
    """`count` integers at even quantiles of a log-normal law cut to [4, longest], whose mean is `mean`.

    [count] int64
    """
    sigma = math.sqrt(math.log(1 + cv**2))
    normal = NormalDist()

    def values(mu: float) -> np.ndarray:
        low, high = (normal.cdf((math.log(edge) - mu) / sigma) for edge in (MIN_TOKENS, longest + 1))
        quantiles = low + (high - low) * (np.arange(count) + 0.5) / count
        z = np.array([normal.inv_cdf(min(max(q, 1e-12), 1 - 1e-12)) for q in quantiles])
        return np.clip(np.exp(mu + sigma * z).astype(np.int64), MIN_TOKENS, longest)

    below, above = 0.0, math.log(longest) + 2
    for _ in range(40):
        middle = (below + above) / 2
        below, above = (middle, above) if values(middle).mean() < mean else (below, middle)
    return values(above)


def _make_fit(prompts: np.ndarray, outputs: np.ndarray, total: int, rng: np.random.Generator) -> None:
    """Exchange outputs, in place, until every request fits. What cannot be helped is shortened."""
    for index in np.flatnonzero(prompts + outputs > total):
        partners = np.flatnonzero((prompts[index] + outputs <= total) & (prompts + outputs[index] <= total))
        if len(partners):
            other = rng.choice(partners)
            outputs[[index, other]] = outputs[[other, index]]
        else:
            outputs[index] = max(total - prompts[index], MIN_TOKENS)


def random_lengths(
    count: int,
    *,
    input_len: int = 1024,
    output_len: int = 128,
    range_ratio: float = 0.0,
    vocab_size: int = DEFAULT_VOCAB,
    seed: int = 0,
) -> Workload:
    """Random token ids; lengths uniform in [len * (1 - range_ratio), len * (1 + range_ratio)]."""
    for name, value in (("num_prompts", count), ("input_len", input_len), ("output_len", output_len)):
        _at_least(name, value, 1)
    if not 0 <= range_ratio < 1:
        raise ValueError(f"range_ratio={range_ratio} must be in [0, 1)")
    rng = np.random.default_rng(seed)

    def draw(length: int) -> np.ndarray:
        low, high = math.floor(length * (1 - range_ratio)), math.ceil(length * (1 + range_ratio))
        return rng.integers(max(low, 1), high, count, endpoint=True)

    lengths = list(zip(draw(input_len).tolist(), draw(output_len).tolist(), strict=True))
    requests = [BenchRequest(ids, len(ids), n) for ids, n in _with_ids(lengths, vocab_size, seed)]
    return Workload("random", requests, "", {"seed": seed, "range_ratio": range_ratio})


def shared_prefixes(
    count: int,
    *,
    num_prefixes: int = 8,
    prefix_len: int = 512,
    suffix_len: int = 64,
    output_len: int = 64,
    vocab_size: int = DEFAULT_VOCAB,
    seed: int = 0,
) -> Workload:
    """Each prompt is one of `num_prefixes` common beginnings and an ending of its own, in random order."""
    named = {"num_prompts": count, "num_prefixes": num_prefixes, "prefix_len": prefix_len, "suffix_len": suffix_len}
    for name, value in (named | {"output_len": output_len}).items():
        _at_least(name, value, 1)
    rng = np.random.default_rng(seed)
    prefixes = rng.integers(FIRST_ID, vocab_size, (num_prefixes, prefix_len)).tolist()
    order = rng.permutation(np.arange(count) % num_prefixes)
    suffixes = rng.integers(FIRST_ID, vocab_size, (count, suffix_len)).tolist()
    requests = [
        BenchRequest(prefixes[which] + suffix, prefix_len + suffix_len, output_len)
        for which, suffix in zip(order.tolist(), suffixes, strict=True)
    ]
    shared = 1 - num_prefixes / count if count > num_prefixes else 0.0
    note = f"{num_prefixes} prefixes of {prefix_len} tokens; at most {shared:.0%} of prefix tokens can be reused"
    return Workload("prefix", requests, note, {"seed": seed, "num_prefixes": num_prefixes, "prefix_len": prefix_len})


TRACE_COLUMNS = {
    "arrival_s": ("arrival_s", "timestamp"),
    "prompt_tokens": ("prompt_tokens", "request tokens", "contexttokens"),
    "output_tokens": ("output_tokens", "response tokens", "generatedtokens"),
}


def trace(path: str | Path, *, count: int | None = None, vocab_size: int = DEFAULT_VOCAB, seed: int = 0) -> Workload:
    """Arrival times and lengths from a CSV file with a header: arrival_s, prompt_tokens, output_tokens.

    BurstGPT's names (Timestamp, Request tokens, Response tokens) are read too. Arrivals are counted from the first.
    Raises ValueError that names the file and the line.
    """
    rows = _trace_rows(Path(path))
    if count is not None:
        rows = rows[:count]
    if not rows:
        raise ValueError(f"{path} holds no request; it needs lines of {', '.join(TRACE_COLUMNS)}")
    start = min(arrival for arrival, _, _ in rows)
    rows.sort(key=lambda row: row[0])
    prompts = _with_ids([(prompt, output) for _, prompt, output in rows], vocab_size, seed)
    requests = [
        BenchRequest(ids, len(ids), output, arrival - start)
        for (arrival, _, _), (ids, output) in zip(rows, prompts, strict=True)
    ]
    return Workload("trace", requests, f"arrivals and lengths of {Path(path).name}", {"seed": seed})


def _trace_rows(path: Path) -> list[tuple[float, int, int]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns = _trace_columns(path, reader.fieldnames or [])
            return [_trace_row(path, reader.line_num, [row[name] for name in columns]) for row in reader]
    except FileNotFoundError:
        raise ValueError(f"trace file {str(path)!r} does not exist") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"trace file {str(path)!r} is not text: {error}") from None


def _trace_columns(path: Path, header: Sequence[str]) -> list[str]:
    found = []
    for name, spellings in TRACE_COLUMNS.items():
        match = [column for column in header if column.strip().lower() in spellings]
        if not match:
            raise ValueError(f"{path} has no column {name!r}; its header is {', '.join(header) or 'empty'}")
        found.append(match[0])
    return found


def _trace_row(path: Path, line: int, values: Sequence[str | None]) -> tuple[float, int, int]:
    try:
        arrival, prompt, output = float(values[0] or ""), int(values[1] or ""), int(values[2] or "")
        if not (math.isfinite(arrival) and prompt > 0 and output > 0):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{path}, line {line}: {', '.join(map(str, values))} must be a time in seconds and two positive numbers"
        ) from None
    return arrival, prompt, output


def as_text(workload: Workload, seed: int = 0) -> Workload:
    """Prompts as words instead of ids, about one token each, for servers and endpoints that take text only."""
    rng = np.random.default_rng(seed + 2)
    requests = [
        request
        if isinstance(request.prompt, str)
        else replace(request, prompt=" ".join(rng.choice(WORDS, len(request.prompt)).tolist()))
        for request in workload.requests
    ]
    return replace(
        workload, requests=requests, note=f"{workload.note}; as words, so counts are the server's".strip("; ")
    )


def _with_ids(lengths: list[tuple[int, int]], vocab_size: int, seed: int) -> list[tuple[list[int], int]]:
    if vocab_size <= FIRST_ID:
        raise ValueError(f"vocab_size={vocab_size} must be above {FIRST_ID}")
    rng = np.random.default_rng(seed + 1)
    return [(rng.integers(FIRST_ID, vocab_size, prompt).tolist(), output) for prompt, output in lengths]


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ValueError(f"{name}={value} must be at least {low}")
