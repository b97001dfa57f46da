"""A load on an OpenAI-compatible server: request rates, concurrency, and what the requests saw.

The JSON has the fields of `vllm bench serve`, the seed's normalized latency, and the manifest. Needs no torch.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from evenflow.bench.arrivals import times_of
from evenflow.bench.client import ENDPOINTS, Client, make_http, served_model
from evenflow.bench.metrics import RequestRecord, summarize
from evenflow.bench.workload import BenchRequest, Workload, as_text
from evenflow.progress import Bar

MAX_TOLD_ERRORS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingOptions:
    """Whom to ask and how. request_rates: requests/s of each run, inf: all at once. slo_ms: for goodput."""

    base_url: str = "http://127.0.0.1:8000"
    model: str | None = None
    backend: str = "openai"
    api_key: str | None = None
    request_rates: tuple[float, ...] = (float("inf"),)
    mode: str = "current"
    burstiness: float = 1.0
    max_concurrency: int | None = None
    num_warmups: int = 1
    temperature: float = 1.0
    ignore_eos: bool = True
    uses_text: bool = False
    slo_ms: dict[str, float] = field(default_factory=dict)
    percentiles: tuple[float, ...] = (50, 90, 99)
    seed: int = 0
    extra_body: dict[str, Any] = field(default_factory=dict)
    has_details: bool = False

    def __post_init__(self) -> None:
        if self.backend not in ENDPOINTS:
            raise ValueError(f"--backend {self.backend!r} must be one of {', '.join(ENDPOINTS)}")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ValueError(f"--max-concurrency {self.max_concurrency} must be at least 1")
        if self.num_warmups < 0:
            raise ValueError(f"--num-warmups {self.num_warmups} must be at least 0")
        for rate in self.request_rates:
            if not rate > 0:
                raise ValueError(f"--request-rate {rate} must be above 0, or inf for all at once")
        for percentile in self.percentiles:
            if not 0 <= percentile <= 100:
                raise ValueError(f"--metric-percentiles {percentile:g} must be from 0 to 100")


def bench_serving(workload: Workload, options: ServingOptions, *, is_shown: bool = True) -> list[dict[str, Any]]:
    """One result per request rate, in order. Raises ValueError before anything is sent; failures are in the results."""
    if options.uses_text or options.backend == "openai-chat":
        workload = as_text(workload)
    return asyncio.run(_bench(workload, options, is_shown))


async def _bench(workload: Workload, options: ServingOptions, is_shown: bool) -> list[dict[str, Any]]:
    async with make_http(options.base_url, options.api_key) as http:
        model = await served_model(http, options.model)
        body = {"temperature": options.temperature, **options.extra_body}
        client = Client(http, model, options.backend, body, options.ignore_eos)
        for request in workload.requests[: options.num_warmups]:
            warm = await client.send(request)
            if warm.error:
                raise ValueError(f"the server does not take the first request: {warm.error}")
        results = []
        for rate in options.request_rates:
            times = times_of(workload.requests, rate, options.mode, options.burstiness, options.seed)
            label = f"{'all at once' if rate == float('inf') else f'{rate:g} requests/s'}"
            with Bar(label, len(workload.requests), is_shown=is_shown) as bar:
                records, duration_s = await send_all(client, workload.requests, times, options.max_concurrency, bar)
            results.append(result_of(workload, options, model, rate, records, duration_s))
        return results


async def send_all(
    client: Client,
    requests: Sequence[BenchRequest],
    times: Sequence[float],
    max_concurrency: int | None,
    bar: Bar | None = None,
) -> tuple[list[RequestRecord], float]:
    """(a record per request, in order; seconds until the last had ended).

    A request waits for its time and for a place.
    """
    places = asyncio.Semaphore(max_concurrency) if max_concurrency else None
    start_s = client.clock()

    async def send(request: BenchRequest) -> RequestRecord:
        if places is None:
            record = await client.send(request, start_s)
        else:
            async with places:
                record = await client.send(request, start_s)
        if bar is not None:
            bar.advance("failed" if record.error else "")
        return record

    async with asyncio.TaskGroup() if hasattr(asyncio, "TaskGroup") else _Gathered() as group:
        tasks = []
        for request, due_s in zip(requests, times, strict=True):
            if (wait_s := due_s - (client.clock() - start_s)) > 0:
                await asyncio.sleep(wait_s)
            tasks.append(group.create_task(send(request)))
    return [task.result() for task in tasks], client.clock() - start_s


class _Gathered:
    """What we need of asyncio.TaskGroup, which Python 3.10 lacks: nothing outlives the block."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[RequestRecord]] = []

    def create_task(self, work: Any) -> "asyncio.Task[RequestRecord]":
        self._tasks.append(asyncio.create_task(work))
        return self._tasks[-1]

    async def __aenter__(self) -> "_Gathered":
        return self

    async def __aexit__(self, kind: object, error: object, traceback: object) -> None:
        if kind is not None:
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=kind is not None)


def result_of(
    workload: Workload,
    options: ServingOptions,
    model: str,
    rate: float,
    records: Sequence[RequestRecord],
    duration_s: float,
) -> dict[str, Any]:
    """One run as JSON: vLLM's fields first."""
    has_no_rate = rate == float("inf")
    result: dict[str, Any] = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": options.backend,
        "backend": options.backend,
        "label": None,
        "model_id": model,
        "tokenizer_id": model,
        "num_prompts": len(records),
        "request_rate": "inf" if has_no_rate else rate,
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
        **summarize(records, duration_s, slo_ms=options.slo_ms, percentiles=options.percentiles),
        "mode": options.mode,
        "goodput_slo_ms": options.slo_ms or None,
        "workload": workload.describe(),
        "error_samples": sorted({record.error for record in records if record.error})[:MAX_TOLD_ERRORS],
    }
    if options.has_details:
        result |= {
            "input_lens": [record.num_prompt_tokens for record in records],
            "output_lens": [record.num_output_tokens for record in records],
            "ttfts": [record.ttft_s for record in records],
            "itls": [record.itls_s for record in records],
            "latencies": [record.latency_s for record in records],
            "start_times": [record.start_s for record in records],
            "errors": [record.error for record in records],
        }
    return result


def wait_until_ready(base_url: str, timeout_s: float, api_key: str | None = None) -> None:
    """Return when the server lists its models. Raises ValueError after timeout_s."""

    async def ask() -> None:
        async with make_http(base_url, api_key) as http:
            await served_model(http, None)

    end_s = time.monotonic() + timeout_s
    while True:
        try:
            return asyncio.run(ask())
        except ValueError:
            if time.monotonic() > end_s:
                raise
        time.sleep(0.5)
