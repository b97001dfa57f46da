"""The server's metrics: what Prometheus scrapes and what the status page polls.

Owns names, buckets and the last minute's percentiles. Measures nothing itself: the front hands it durations and the
engine's snapshots. All methods belong to the event loop's thread; those called for each step take microseconds.
Names are those of vLLM where it has the metric, with the prefix `evenflow_`.
"""

import math
import operator
import sys
import time
from bisect import bisect_left
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Metric, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from evenflow.engine.stats import EngineStats
from evenflow.request import FinishReason

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
WINDOW_S = 60.0  # of the percentiles
SLICE_S = 5.0  # the window moves in steps of this
RATE_WINDOW_S = 5.0
RATE_SLICE_S = 0.25
GROWTH = 1.05  # of a percentile's buckets: a value is off by 2.5 % at most
LOG_GROWTH = math.log(GROWTH)
SMALLEST_S, LARGEST_S = 1e-6, 1e6  # what lies outside counts as this, which bounds the number of buckets at 567

# fmt: off
TOKEN_SECONDS = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075,
    0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0,
)
REQUEST_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75,
    1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 120.0, 300.0, 600.0, 1800.0,
)
# fmt: on
TOKEN_COUNTS = tuple(2.0**power for power in range(18))  # up to a context of 131072 tokens
REFUSED_STATUSES = (400, 401, 404, 413, 429, 503)  # exist from the start, so that a rate sees the first refusal

ENGINE_TOTALS = {  # field of EngineStats: (metric, help)
    "num_steps": ("engine_steps", "Steps that the engine ran."),
    "step_time_s": ("engine_step_seconds", "Seconds that the engine spent in steps."),
    "num_computed_tokens": ("computed_tokens", "Tokens computed by steps, recomputation after preemption included."),
    "num_output_tokens": ("sampled_tokens", "Tokens sampled by the engine, also those that no client waited for."),
    "num_preemptions": ("num_preemptions", "Requests that lost their KV cache blocks and were computed again."),
    "num_prefix_queries": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "num_prefix_hits": ("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "num_failed_rows": ("failed_rows", "Rows of a step that failed alone, as with NaN logits."),
}
NO_STATS = EngineStats(0, 0, 0, 0, 0, 0, 0, 0.0, 0, 0, 0, 0, 0, 0)
_totals_of = operator.attrgetter(*ENGINE_TOTALS)


class SlidingPercentiles:
    """Percentiles of the last WINDOW_S seconds, to 2.5 %, in memory that does not grow with the number of values.

    Counts per logarithmic bucket, in one slice for each SLICE_S; a slice leaves as a whole.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._slices: deque[tuple[int, Tally[int]]] = deque()  # (time // SLICE_S, bucket -> count)

    def add(self, seconds: float, count: int = 1) -> None:
        now = int(self._clock() // SLICE_S)
        if not self._slices or self._slices[-1][0] != now:
            self._slices.append((now, Tally()))
            self._drop_old(now)
        clamped = min(max(seconds, SMALLEST_S), LARGEST_S)
        self._slices[-1][1][math.floor(math.log(clamped) / LOG_GROWTH)] += count

    def milliseconds(self, *percents: int) -> dict[str, float | None]:
        """{"p50": ...} by nearest rank, None where the window holds nothing."""
        self._drop_old(int(self._clock() // SLICE_S))
        counts: Tally[int] = Tally()
        for _, slice_counts in self._slices:
            counts.update(slice_counts)
        return {f"p{percent}": _nearest_rank(counts, percent) for percent in percents}

    def _drop_old(self, now: int) -> None:
        while self._slices and self._slices[0][0] <= now - WINDOW_S / SLICE_S:
            self._slices.popleft()


def _nearest_rank(counts: Tally[int], percent: int) -> float | None:
    rank = math.ceil(counts.total() * percent / 100)
    for bucket in sorted(counts):
        rank -= counts[bucket]
        if rank <= 0:
            return 1000 * math.exp((bucket + 0.5) * LOG_GROWTH)
    return None


class TokenRates:
    """Prompt and output tokens a second over the last RATE_WINDOW_S, which moves in steps of RATE_SLICE_S."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._started = clock, clock()
        self._slices: deque[tuple[int, list[int]]] = deque()  # (time // RATE_SLICE_S, [prompt, output])

    def add(self, num_prompt_tokens: int, num_output_tokens: int) -> None:
        now = int(self._clock() // RATE_SLICE_S)
        if not self._slices or self._slices[-1][0] != now:
            self._slices.append((now, [0, 0]))
            self._drop_old(now)
        counts = self._slices[-1][1]
        counts[0] += num_prompt_tokens
        counts[1] += num_output_tokens

    def rates(self) -> tuple[float, float]:
        """(prompt, output) tokens a second up to now."""
        time_now = self._clock()
        oldest = self._drop_old(int(time_now // RATE_SLICE_S))
        elapsed = max(time_now - max(oldest * RATE_SLICE_S, self._started), RATE_SLICE_S)
        prompts, outputs = (sum(counts[i] for _, counts in self._slices) for i in (0, 1))
        return max(prompts, 0) / elapsed, outputs / elapsed

    def _drop_old(self, now: int) -> int:
        """Returns the first slice of the window."""
        oldest = now - round(RATE_WINDOW_S / RATE_SLICE_S) + 1
        while self._slices and self._slices[0][0] < oldest:
            self._slices.popleft()
        return oldest


class Histogram(Collector):
    """Takes many equal values at once, as a step brings them; the client library's takes one by one."""

    def __init__(self, name: str, text: str, model_name: str, bounds: tuple[float, ...]) -> None:
        self._name, self._text, self._model_name = name, text, model_name
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=["model_name"])
        bounds = [*map(str, self._bounds), "+Inf"]
        family.add_metric([self._model_name], list(zip(bounds, accumulate(self._counts), strict=True)), self._sum)
        yield family


class EngineCollector(Collector):
    """The engine's last snapshot as metrics, made when scraped. Totals go on where a dead engine's ended."""

    def __init__(self, model_name: str) -> None:
        self.is_up = False
        self.latest = NO_STATS
        self._model_name = model_name
        self._before: tuple[float, ...] = _totals_of(NO_STATS)  # totals of the engines before this one

    def update(self, stats: EngineStats) -> EngineStats:
        """Take a snapshot; returns the one before it of this engine. A total that fell means a new engine."""
        if any(map(operator.lt, _totals_of(stats), _totals_of(self.latest))):
            self.reset()
        before, self.latest, self.is_up = self.latest, stats, True
        return before

    def reset(self) -> None:
        """The engine is gone: its gauges are 0, its totals are kept."""
        self._before = tuple(map(operator.add, self._before, _totals_of(self.latest)))
        self.latest, self.is_up = NO_STATS, False

    def totals(self) -> dict[str, float]:
        """By field name of EngineStats, over all engines so far."""
        return dict(zip(ENGINE_TOTALS, map(operator.add, self._before, _totals_of(self.latest)), strict=True))

    def collect(self) -> Iterator[Metric]:
        for field, value in self.totals().items():
            name, text = ENGINE_TOTALS[field]
            counter = CounterMetricFamily(f"evenflow_{name}", text, labels=["model_name"])
            counter.add_metric([self._model_name], value)
            yield counter
        stats = self.latest
        usage = stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0
        yield self._gauge("engine_up", "1 while the engine process answers.", float(self.is_up))
        yield self._gauge("num_requests_running", "Requests that take part in steps.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Requests that wait to be admitted.", stats.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of KV cache blocks held by requests; 1 is all.", usage)
        yield self._blocks()

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(f"evenflow_{name}", text, labels=["model_name"])
        gauge.add_metric([self._model_name], value)
        return gauge

    def _blocks(self) -> Metric:
        stats = self.latest
        states = {
            "used": stats.num_used_blocks,
            "cached": stats.num_cached_blocks,
            "free": stats.num_blocks - stats.num_used_blocks - stats.num_cached_blocks,
        }
        text = "KV cache blocks: used by requests, cached (free, content still findable), or free."
        gauge = GaugeMetricFamily("evenflow_kv_cache_blocks", text, labels=["model_name", "state"])
        for state, count in states.items():
            gauge.add_metric([self._model_name, state], count)
        return gauge


class Metrics(Collector):
    """One model's metrics, in a registry of its own. Labels are bound here, once."""

    def __init__(self, model_name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self._engine = EngineCollector(model_name)
        self._registry.register(self._engine)
        if sys.platform == "linux":
            ProcessCollector(registry=self._registry)
        self._rates = TokenRates(clock)
        self._ttft, self._itl = SlidingPercentiles(clock), SlidingPercentiles(clock)
        self._num_finished = dict.fromkeys(FinishReason, 0)
        self._bind_counters()
        self._bind_histograms()

    def _bind_counters(self) -> None:
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of the requests taken in.")
        self._cached_tokens = self._counter(
            "prompt_tokens_cached", "Prompt tokens of ended requests that came from the prefix cache."
        )
        self._generation_tokens = self._counter("generation_tokens", "Output tokens handed to requests.")
        success = self._family("request_success", "Requests that ran to their end.", "finished_reason")
        self._finished = {
            FinishReason.STOP: success.labels(self._model_name, "stop"),
            FinishReason.LENGTH: success.labels(self._model_name, "length"),
            FinishReason.ABORT: self._counter("request_abort", "Requests whose client left."),
            FinishReason.ERROR: self._counter("request_error", "Requests that failed."),
        }
        self._refused_family = self._family("request_refused", "Requests refused, by HTTP status.", "status")
        self._refused = {status: self._refused_child(status) for status in REFUSED_STATUSES}

    def _bind_histograms(self) -> None:
        self._ttft_s = self._histogram("time_to_first_token_seconds", "Arrival to first token.", REQUEST_SECONDS)
        self._queue_s = self._histogram("request_queue_time_seconds", "Arrival to first step.", REQUEST_SECONDS)
        self._itl_s = self._histogram("inter_token_latency_seconds", "Between tokens of a request.", TOKEN_SECONDS)
        self._e2e_s = self._histogram(
            "e2e_request_latency_seconds", "Arrival to last token, of requests that ran to their end.", REQUEST_SECONDS
        )
        self._request_prompt = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a request that ran to its end.", TOKEN_COUNTS
        )
        self._request_generation = self._histogram(
            "request_generation_tokens", "Output tokens of a request that ran to its end.", TOKEN_COUNTS
        )
        self._step_s = self._histogram("step_time_seconds", "Seconds of a step of the engine.", TOKEN_SECONDS)
        self._step_tokens = self._histogram("iteration_tokens_total", "Tokens computed by a step.", TOKEN_COUNTS)

    def _family(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"evenflow_{name}", text, ["model_name", *labels], registry=self._registry)

    def _counter(self, name: str, text: str) -> Counter:
        return self._family(name, text).labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"evenflow_{name}", text, self._model_name, buckets)
        self._registry.register(histogram)
        return histogram

    def _refused_child(self, status: int) -> Counter:
        return self._refused_family.labels(self._model_name, str(status))

    def request_started(self, num_prompt_tokens: int) -> None:
        """A request was taken in: it will reach the engine."""
        self._prompt_tokens.inc(num_prompt_tokens)

    def first_token(self, ttft_s: float, queue_s: float | None) -> None:
        """A request's first token came, `ttft_s` after its arrival; it had waited `queue_s` for its first step.

        The token itself is counted by `tokens`.
        """
        self._rates.add(1, 0)
        self._ttft_s.observe(ttft_s)
        self._ttft.add(ttft_s)
        if queue_s is not None:
            self._queue_s.observe(queue_s)

    def tokens(self, count: int, itl_s: float | None) -> None:
        """`count` tokens came in a step, each `itl_s` after the one before it; None: each is its request's first."""
        self._generation_tokens.inc(count)
        if itl_s is not None and count > 0:
            self._itl_s.observe(itl_s, count)
            self._itl.add(itl_s, count)

    def request_finished(
        self, reason: str, e2e_s: float, num_prompt_tokens: int, num_output_tokens: int, num_cached_tokens: int
    ) -> None:
        """A request that was started ended; once for each. `reason` is a FinishReason; ValueError if it is not."""
        finish_reason = FinishReason(reason)
        self._num_finished[finish_reason] += 1
        self._finished[finish_reason].inc()
        self._cached_tokens.inc(num_cached_tokens)
        if finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._e2e_s.observe(e2e_s)
            self._request_prompt.observe(num_prompt_tokens)
            self._request_generation.observe(num_output_tokens)

    def request_refused(self, status: int) -> None:
        """A request was answered with this HTTP error before it was started."""
        if status not in self._refused:
            self._refused[status] = self._refused_child(status)
        self._refused[status].inc()

    def engine_stats(self, stats: EngineStats) -> None:
        """The engine's snapshot after a step. It proves that the engine is up."""
        before = self._engine.update(stats)
        num_steps = stats.num_steps - before.num_steps
        num_computed = stats.num_computed_tokens - before.num_computed_tokens
        num_sampled = stats.num_output_tokens - before.num_output_tokens
        if num_steps > 0:  # one message a step; a message about several observes their mean
            self._step_s.observe((stats.step_time_s - before.step_time_s) / num_steps)
            self._step_tokens.observe(num_computed / num_steps)
        # A request of P prompt and N output tokens computes P + N - 1: `first_token` adds the one that lacks.
        self._rates.add(num_computed - num_sampled, num_sampled)

    def engine_up(self, is_up: bool) -> None:
        """The engine process became ready, or is gone and its last snapshot was taken; its gauges are then 0."""
        if not is_up:
            self._engine.reset()
        self._engine.is_up = is_up

    def render(self) -> tuple[bytes, str]:
        """Everything in Prometheus' text format, and its content type."""
        return generate_latest(self), CONTENT_TYPE

    def collect(self) -> Iterator[Metric]:
        """What the registry holds, less the creation time that the client library adds to each series."""
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric

    def live(self) -> dict[str, object]:
        """The state now, for a page that polls: JSON types only; rates over 5 s, percentiles over 60 s."""
        stats, totals = self._engine.latest, self._engine.totals()
        prompt_rate, output_rate = self._rates.rates()
        finished = self._num_finished
        return {
            "num_running": stats.num_running,
            "num_waiting": stats.num_waiting,
            "prompt_tokens_per_s": prompt_rate,
            "output_tokens_per_s": output_rate,
            "kv": {
                "num_blocks": stats.num_blocks,
                "block_size": stats.block_size,
                "num_used": stats.num_used_blocks,
                "num_cached": stats.num_cached_blocks,
            },
            "ttft_ms": self._ttft.milliseconds(50, 90, 99),
            "itl_ms": self._itl.milliseconds(50, 90, 99),
            "prefix": {"queries": totals["num_prefix_queries"], "hits": totals["num_prefix_hits"]},
            "num_preemptions": totals["num_preemptions"],
            "num_requests": {
                "completed": finished[FinishReason.STOP] + finished[FinishReason.LENGTH],
                "aborted": finished[FinishReason.ABORT],
                "failed": finished[FinishReason.ERROR],
            },
        }
