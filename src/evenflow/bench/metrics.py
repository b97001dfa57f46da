"""What is measured of requests, by definition: TTFT, ITL, TPOT, end to end, goodput, normalized latency, throughput.

Names and formulas are those of `vllm bench serve` where it has one, so that tools which read its JSON read ours.
Normalized latency is the seed's (vLLM v0.1.4): mean over requests of latency / (prompt + output tokens); its printed
throughput counts prompt and output tokens too. Owns no clock and no network: everything is computed from RequestRecord.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LATENCIES = ("ttft", "tpot", "itl", "e2el")
# Two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom; beyond, the normal law's with two corrections
# (Abramowitz and Stegun, 26.7.5).
STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)


@dataclass(slots=True)
class RequestRecord:
    """What happened to one request. Times in seconds; start_s on the run's clock.

    ttft_s: sent until the first chunk with a choice. itls_s: gaps between successive chunks. latency_s: sent until the
    last chunk with a choice. error: why it failed; empty: it did not.
    """

    start_s: float = 0.0
    ttft_s: float = 0.0
    latency_s: float = 0.0
    itls_s: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: str = ""

    @property
    def tpot_s(self) -> float:
        """Seconds per output token after the first; 0 where there is one token only."""
        if self.num_output_tokens < 2:
            return 0.0
        return (self.latency_s - self.ttft_s) / (self.num_output_tokens - 1)

    @property
    def normalized_latency_s(self) -> float:
        return self.latency_s / max(self.num_prompt_tokens + self.num_output_tokens, 1)


def parse_goodput(pairs: Sequence[str]) -> dict[str, float]:
    """['ttft:200', 'e2el:5000'] -> milliseconds by name. Raises ValueError."""
    found = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        try:
            limit_ms = float(value)
        except ValueError:
            limit_ms = math.nan
        if name not in ("ttft", "tpot", "e2el") or not limit_ms > 0:
            raise ValueError(f"--goodput {pair!r} must be ttft:MS, tpot:MS or e2el:MS with a positive number")
        found[name] = limit_ms
    return found


def meets(record: RequestRecord, slo_ms: dict[str, float]) -> bool:
    """Whether a request that succeeded kept every limit."""
    values = {"ttft": record.ttft_s, "tpot": record.tpot_s, "e2el": record.latency_s}
    return all(1e3 * values[name] <= limit for name, limit in slo_ms.items())


def summarize(
    records: Sequence[RequestRecord],
    duration_s: float,
    *,
    slo_ms: dict[str, float] | None = None,
    percentiles: Sequence[float] = (50, 90, 99),
) -> dict[str, Any]:
    """The metrics of a run, with vLLM's names; milliseconds where the name ends in _ms, else seconds.

    Failed requests count in `failed` only. Where nothing succeeded, latencies are None (vLLM writes 0).
    """
    good = [record for record in records if not record.error]
    num_input = sum(record.num_prompt_tokens for record in good)
    num_output = sum(record.num_output_tokens for record in good)
    duration_s = max(duration_s, 1e-9)
    peak_tokens, peak_requests = peaks(good)
    result: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(records) - len(good),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(good) / duration_s,
        "request_goodput": sum(meets(r, slo_ms) for r in good) / duration_s if slo_ms else None,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": peak_requests,
        "normalized_latency_s": float(np.mean([r.normalized_latency_s for r in good])) if good else None,
        "latency_per_output_token_s": (
            float(np.mean([r.latency_s / max(r.num_output_tokens, 1) for r in good])) if good else None
        ),
    }
    samples = {
        "ttft": [r.ttft_s for r in good],
        "tpot": [r.tpot_s for r in good if r.num_output_tokens > 1],
        "itl": [gap for r in good for gap in r.itls_s],
        "e2el": [r.latency_s for r in good],
    }
    for name in LATENCIES:
        result |= _statistics(name, samples[name], percentiles)
    return result


def _statistics(name: str, seconds: Sequence[float], percentiles: Sequence[float]) -> dict[str, float | None]:
    ms = 1e3 * np.asarray(seconds, dtype=np.float64)
    found: dict[str, float | None] = {}
    for kind, function in (("mean", np.mean), ("median", np.median), ("std", np.std)):
        found[f"{kind}_{name}_ms"] = float(function(ms)) if len(ms) else None
    for percentile in percentiles:
        value = float(np.percentile(ms, percentile)) if len(ms) else None
        found[f"p{percentile:g}_{name}_ms"] = value
    return found


def peaks(records: Sequence[RequestRecord]) -> tuple[float, int]:
    """(most chunks in one second of the run, most requests at a time), over whole seconds from the first start."""
    if not records:
        return 0.0, 0
    start = min(record.start_s for record in records)
    seconds = math.ceil(max(record.start_s + record.latency_s for record in records) - start) + 1
    tokens, running = np.zeros(seconds), np.zeros(seconds, dtype=np.int64)
    for record in records:
        first = record.start_s - start
        times = first + record.ttft_s + np.concatenate([[0.0], np.cumsum(record.itls_s)])
        np.add.at(tokens, np.minimum(times.astype(np.int64), seconds - 1), 1)
        running[int(first) : int(first + record.latency_s) + 1] += 1
    return float(tokens.max()), int(running.max())


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, half of the 95 % confidence interval by Student's t); None for a single value, which has no interval."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return float(array.mean()), None
    freedom = len(array) - 1
    t = STUDENT_95[freedom - 1] if freedom <= len(STUDENT_95) else 1.95996 + 2.3723 / freedom + 2.823 / freedom**2
    return float(array.mean()), float(t * array.std(ddof=1) / math.sqrt(len(array)))
