"""The server's metrics: events against hand computation, percentiles against numpy, text against its parser."""

import json
import random
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest
from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from evenflow.engine.stats import EngineStats
from evenflow.request import FinishReason
from evenflow.server.metrics import Metrics, SlidingPercentiles

ROOT = Path(__file__).parents[2]
FIELDS = EngineStats.__struct_fields__
TOTALS = {  # field of a snapshot: sample that must follow it
    "num_steps": "evenflow_engine_steps_total",
    "step_time_s": "evenflow_engine_step_seconds_total",
    "num_computed_tokens": "evenflow_computed_tokens_total",
    "num_output_tokens": "evenflow_sampled_tokens_total",
    "num_preemptions": "evenflow_num_preemptions_total",
    "num_prefix_queries": "evenflow_prefix_cache_queries_total",
    "num_prefix_hits": "evenflow_prefix_cache_hits_total",
    "num_failed_rows": "evenflow_failed_rows_total",
}


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def metrics(clock):
    return Metrics("demo", clock)


def stats(**fields):
    return EngineStats(**dict.fromkeys(FIELDS, 0) | fields)


def families(metrics):
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain; version=0.0.4")
    return list(text_string_to_metric_families(body.decode()))


def samples(metrics):
    """{(name, label values without the model's): value}; every sample of ours must carry the model's name."""
    values = {}
    for family in families(metrics):
        for sample in family.samples:
            labels = dict(sample.labels)
            if sample.name.startswith("evenflow_"):
                assert labels.pop("model_name") == "demo"
            key = (sample.name, *labels.values())
            assert key not in values
            values[key] = sample.value
    return values


def histogram(values, name):
    """(count, sum, {upper bound: cumulative count})."""
    buckets = {float(key[1]): value for key, value in values.items() if key[0] == f"{name}_bucket"}
    return values[f"{name}_count",], values[f"{name}_sum",], buckets


def test_a_life_of_requests(metrics):
    metrics.request_started(10)
    metrics.request_started(30)
    metrics.request_started(5)
    metrics.first_token(0.25, 0.125)
    metrics.tokens(1, None)
    metrics.tokens(1, 0.5)
    metrics.tokens(3, 0.25)
    metrics.request_finished("stop", 1.5, 10, 5, 0)
    metrics.first_token(0.75, None)
    metrics.tokens(2, None)
    metrics.request_finished(FinishReason.LENGTH, 2.5, 30, 2, 16)
    metrics.request_finished("abort", 9.0, 5, 0, 0)
    metrics.request_finished("error", 9.0, 5, 0, 0)
    values = samples(metrics)
    assert values["evenflow_prompt_tokens_total",] == 45
    assert values["evenflow_generation_tokens_total",] == 7
    assert values["evenflow_prompt_tokens_cached_total",] == 16
    assert values["evenflow_request_success_total", "stop"] == 1
    assert values["evenflow_request_success_total", "length"] == 1
    assert values["evenflow_request_abort_total",] == 1
    assert values["evenflow_request_error_total",] == 1
    assert histogram(values, "evenflow_time_to_first_token_seconds")[:2] == (2, 1.0)
    assert histogram(values, "evenflow_request_queue_time_seconds")[:2] == (1, 0.125)
    assert histogram(values, "evenflow_inter_token_latency_seconds")[:2] == (4, 1.25)
    assert histogram(values, "evenflow_e2e_request_latency_seconds")[:2] == (2, 4.0)
    assert histogram(values, "evenflow_request_prompt_tokens")[:2] == (2, 40)
    assert histogram(values, "evenflow_request_generation_tokens")[:2] == (2, 7)
    assert metrics.live()["num_requests"] == {"completed": 2, "aborted": 1, "failed": 1}


def test_an_unknown_end_is_an_error(metrics):
    with pytest.raises(ValueError, match="finished"):
        metrics.request_finished("finished", 1.0, 1, 1, 0)


def test_buckets_reach_from_a_millisecond_to_minutes(metrics):
    for seconds in (0.0005, 0.03, 0.03, 59.0, 5000.0):
        metrics.first_token(seconds, seconds)
        metrics.tokens(1, seconds)
    values = samples(metrics)
    for name in ("time_to_first_token", "request_queue_time", "inter_token_latency"):
        _, _, buckets = histogram(values, f"evenflow_{name}_seconds")
        assert (buckets[0.001], buckets[0.02], buckets[60.0], buckets[float("inf")]) == (1, 1, 4, 5)
        assert list(buckets.values()) == sorted(buckets.values())
        assert all(high <= 5 * low for low, high in zip(list(buckets), list(buckets)[1:-1], strict=False))


def test_a_bucket_includes_its_bound(metrics):
    metrics.tokens(4, 0.02)
    _, _, buckets = histogram(samples(metrics), "evenflow_inter_token_latency_seconds")
    assert (buckets[0.015], buckets[0.02]) == (0, 4)


def test_refusals_by_status_exist_before_the_first(metrics):
    assert samples(metrics)["evenflow_request_refused_total", "429"] == 0
    for status in (429, 429, 400, 418):
        metrics.request_refused(status)
    values = samples(metrics)
    assert [values["evenflow_request_refused_total", status] for status in ("429", "400", "418", "503")] == [2, 1, 1, 0]


def test_gauges_follow_the_snapshot_and_fall_to_0_with_the_engine(metrics):
    assert samples(metrics)["evenflow_engine_up",] == 0
    assert samples(metrics)["evenflow_kv_cache_usage_perc",] == 0
    metrics.engine_stats(
        stats(num_running=3, num_waiting=2, num_blocks=200, block_size=16, num_used_blocks=50, num_cached_blocks=30)
    )
    values = samples(metrics)
    assert values["evenflow_engine_up",] == 1
    assert values["evenflow_num_requests_running",] == 3
    assert values["evenflow_num_requests_waiting",] == 2
    assert values["evenflow_kv_cache_usage_perc",] == 0.25
    assert [values["evenflow_kv_cache_blocks", state] for state in ("used", "cached", "free")] == [50, 30, 120]
    metrics.engine_up(False)
    values = samples(metrics)
    assert values["evenflow_engine_up",] == values["evenflow_num_requests_running",] == 0
    assert values["evenflow_kv_cache_blocks", "free"] == 0
    metrics.engine_up(True)
    assert samples(metrics)["evenflow_engine_up",] == 1


def test_steps_are_observed_from_the_growth_of_the_totals(metrics):
    metrics.engine_stats(stats(num_steps=1, step_time_s=0.25, num_computed_tokens=100))
    metrics.engine_stats(stats(num_steps=2, step_time_s=0.75, num_computed_tokens=164))
    metrics.engine_stats(stats(num_steps=2, step_time_s=0.75, num_computed_tokens=164))  # no step since
    metrics.engine_stats(stats(num_steps=4, step_time_s=1.75, num_computed_tokens=196))  # two: their mean
    values = samples(metrics)
    assert histogram(values, "evenflow_step_time_seconds")[:2] == (3, 1.25)
    assert histogram(values, "evenflow_iteration_tokens_total")[:2] == (3, 180)


def grow(rng, before):
    return msgspec.structs.replace(
        before, **{name: getattr(before, name) + rng.choice([0, rng.randrange(50)]) for name in TOTALS}
    )


@pytest.mark.parametrize("seed", range(10))
def test_totals_over_several_engines_and_repeats_never_fall(metrics, seed):
    rng = random.Random(seed)
    expected, scraped = dict.fromkeys(TOTALS, 0), dict.fromkeys(TOTALS.values(), 0.0)
    for _ in range(4):  # engines
        now = stats()
        for _ in range(rng.randrange(1, 20)):
            now = grow(rng, now)
            for _ in range(rng.choice([1, 1, 3])):  # the same snapshot again adds nothing
                metrics.engine_stats(now)
            values = samples(metrics)
            for field, name in TOTALS.items():
                assert values[name,] >= scraped[name]
                assert values[name,] == expected[field] + getattr(now, field)
                scraped[name] = values[name,]
        for field in TOTALS:
            expected[field] += getattr(now, field)
        metrics.engine_up(False)


@pytest.mark.parametrize("field", TOTALS)
def test_a_new_engine_is_noticed_by_any_total_that_fell(metrics, field):
    metrics.engine_stats(stats(**dict.fromkeys(TOTALS, 10)))
    metrics.engine_stats(stats(**dict.fromkeys(TOTALS, 10) | {field: 9}))
    values = samples(metrics)
    assert {name: values[name,] for name in TOTALS.values()} == dict.fromkeys(TOTALS.values(), 20) | {TOTALS[field]: 19}


def test_a_replayed_log_never_lowers_a_counter(metrics):
    log = [stats(**dict.fromkeys(TOTALS, count)) for count in (3, 10, 25)]
    seen = []
    for snapshot in log + log:
        metrics.engine_stats(snapshot)
        seen.append(samples(metrics)["evenflow_engine_steps_total",])
    assert seen == [3, 10, 25, 28, 35, 50]


@pytest.mark.parametrize("seed", range(5))
def test_percentiles_against_numpy_on_the_window(clock, seed):
    rng = random.Random(seed)
    window, added = SlidingPercentiles(clock), []
    for _ in range(4000):
        clock.now += rng.expovariate(20)
        value, count = rng.lognormvariate(-3, 1.5), rng.choice([1, 1, 1, 4])
        window.add(value, count)
        added += [(clock.now, value)] * count
        if rng.random() < 0.02:
            clock.now += rng.choice([0, 2, 30])
            recent = [value for time, value in added if time // 5 > clock.now // 5 - 12]
            measured = window.milliseconds(1, 50, 90, 99, 100)
            for percent, got in zip((1, 50, 90, 99, 100), measured.values(), strict=True):
                exact = 1000 * np.percentile(recent, percent, method="inverted_cdf") if recent else None
                assert got == (exact if exact is None else pytest.approx(exact, rel=0.025))


def test_percentiles_of_nothing_and_of_the_absurd(clock):
    window = SlidingPercentiles(clock)
    assert window.milliseconds(50, 99) == {"p50": None, "p99": None}
    for seconds in (0.0, -1.0, 1e-9, 1e9):
        window.add(seconds)
    assert window.milliseconds(50)["p50"] == pytest.approx(0.001, rel=0.05)
    assert window.milliseconds(100)["p100"] == pytest.approx(1e9, rel=0.05)
    clock.now += 65
    assert window.milliseconds(50) == {"p50": None}


def test_live_says_what_the_page_shows(metrics, clock):
    nothing = {"p50": None, "p90": None, "p99": None}
    assert metrics.live() == {
        "num_running": 0,
        "num_waiting": 0,
        "prompt_tokens_per_s": 0,
        "output_tokens_per_s": 0,
        "kv": {"num_blocks": 0, "block_size": 0, "num_used": 0, "num_cached": 0},
        "ttft_ms": nothing,
        "itl_ms": nothing,
        "prefix": {"queries": 0, "hits": 0},
        "num_preemptions": 0,
        "num_requests": {"completed": 0, "aborted": 0, "failed": 0},
    }
    clock.now += 2
    metrics.first_token(0.1, 0.0)
    metrics.tokens(1, None)
    metrics.tokens(1, 0.02)
    metrics.engine_stats(
        EngineStats(
            num_running=3,
            num_waiting=1,
            num_blocks=100,
            block_size=16,
            num_used_blocks=40,
            num_cached_blocks=10,
            num_steps=5,
            step_time_s=0.5,
            num_computed_tokens=24,
            num_output_tokens=5,
            num_preemptions=2,
            num_prefix_queries=64,
            num_prefix_hits=32,
            num_failed_rows=0,
        )
    )
    live = json.loads(json.dumps(metrics.live()))
    ttft, itl = live.pop("ttft_ms"), live.pop("itl_ms")
    assert ttft == dict.fromkeys(nothing, pytest.approx(100, rel=0.025))
    assert itl == dict.fromkeys(nothing, pytest.approx(20, rel=0.025))
    assert live == {
        "num_running": 3,
        "num_waiting": 1,
        "prompt_tokens_per_s": 10,  # 20 prompt tokens and 5 sampled: 24 computed, in 2 s
        "output_tokens_per_s": 2.5,
        "kv": {"num_blocks": 100, "block_size": 16, "num_used": 40, "num_cached": 10},
        "prefix": {"queries": 64, "hits": 32},
        "num_preemptions": 2,
        "num_requests": {"completed": 0, "aborted": 0, "failed": 0},
    }


def test_tokens_that_come_together_weigh_as_many(metrics):
    metrics.tokens(9, 0.02)
    metrics.tokens(1, 0.5)
    metrics.tokens(0, 7.0)
    assert metrics.live()["itl_ms"] == {
        "p50": pytest.approx(20, rel=0.025),
        "p90": pytest.approx(20, rel=0.025),
        "p99": pytest.approx(500, rel=0.025),
    }


def test_rates_are_those_of_the_last_seconds(metrics, clock):
    for step in range(1, 2001):  # 100 steps a second, 3 output and 8 prompt tokens each
        clock.now += 0.01
        metrics.engine_stats(stats(num_steps=step, num_computed_tokens=11 * step, num_output_tokens=3 * step))
        if step % 97 == 0:
            live = metrics.live()
            # One step more or less in a window: 0.25 s at least at first, 4.75 s later.
            assert live["output_tokens_per_s"] == pytest.approx(300, rel=0.05 if step < 500 else 0.005)
            assert live["prompt_tokens_per_s"] == pytest.approx(800, rel=0.05 if step < 500 else 0.005)
    clock.now += 5
    assert (metrics.live()["output_tokens_per_s"], metrics.live()["prompt_tokens_per_s"]) == (0, 0)
    clock.now = 2000.0
    metrics.engine_stats(stats(num_steps=2001, num_computed_tokens=22100, num_output_tokens=6019))
    assert metrics.live()["output_tokens_per_s"] == 19 / 4.75
    assert metrics.live()["prompt_tokens_per_s"] == 81 / 4.75


def test_memory_does_not_grow_with_events(metrics, clock):
    rng = random.Random(0)

    def events(count):
        for _ in range(count):
            clock.now += 0.01
            metrics.first_token(10 ** rng.uniform(-9, 9), 0.1)
            metrics.tokens(1, 10 ** rng.uniform(-9, 9))

    events(10_000)  # 100 s: the window is full
    tracemalloc.start()
    events(50_000)  # of two kinds
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    # The 12 slices were replaced since tracing began: 2 * 12 * 567 buckets of at most 150 bytes.
    assert grown < 2 * 12 * 567 * 150


def test_labels_are_looked_up_once(metrics, monkeypatch):
    metrics.request_refused(418)

    def labels(*_, **__):
        raise AssertionError("labels are bound when Metrics is made")

    monkeypatch.setattr(MetricWrapperBase, "labels", labels)
    metrics.request_started(1)
    metrics.first_token(0.1, 0.1)
    metrics.tokens(2, 0.1)
    metrics.engine_stats(stats(num_steps=1))
    for reason in FinishReason:
        metrics.request_finished(reason, 1.0, 1, 1, 0)
    for status in (400, 401, 404, 413, 418, 429, 503):
        metrics.request_refused(status)


def test_two_models_share_nothing_and_the_global_registry_stays_empty():
    one, other = Metrics("demo"), Metrics("demo")
    one.request_started(5)
    assert samples(other)["evenflow_prompt_tokens_total",] == 0
    assert not any(family.name.startswith("evenflow") for family in REGISTRY.collect())
    assert 'model_name="a\\"b\\\\"' in Metrics('a"b\\').render()[0].decode()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_front_process_is_measured(metrics):
    assert samples(metrics)["process_resident_memory_bytes",] > 1e6


def test_no_torch_and_no_opentelemetry_are_loaded():
    code = (
        "import sys, evenflow.server.metrics, evenflow.server.tracing, evenflow.engine.stats\n"
        "evenflow.server.tracing.make_tracer(None)\n"
        "assert not {'torch', 'opentelemetry'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The dashboard and the page speak of what is there.


def names_in(promql):
    return set(re.findall(r"\bevenflow_\w+", promql))


def dashboard():
    return json.loads((ROOT / "dashboards" / "grafana.json").read_text())


def expressions(board):
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]


def test_the_dashboard_asks_for_what_exists(metrics):
    board = dashboard()
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert set(variables) == {"datasource", "model_name", "instance"}
    queries = [variable["query"]["query"] for name, variable in variables.items() if name != "datasource"]
    sample_names = {name for name, *_ in samples(metrics)}
    for expression in expressions(board) + queries:
        assert names_in(expression) <= sample_names, expression
    for expression in expressions(board):
        assert 'instance=~"$instance"' in expression
        assert expression.count('model_name=~"$model_name"') == len(re.findall(r"evenflow_\w+", expression))


def test_the_dashboard_shows_every_metric_of_ours(metrics):
    shown = set().union(*map(names_in, expressions(dashboard())))
    for family in families(metrics):
        if family.type == "histogram":
            assert f"{family.name}_bucket" in shown
        elif family.name.startswith("evenflow_"):
            assert family.samples[0].name in shown


def test_the_dashboard_is_well_formed():
    board = dashboard()
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Load", "Latency", "Tokens", "KV cache and prefix hits", "Errors"]
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == "${datasource}"


def test_the_page_lists_every_metric_with_its_type(metrics):
    page = (ROOT / "docs" / "monitoring.md").read_text()
    listed = dict(re.findall(r"^\| `(evenflow_\w+)` \| (\w+) \|", page, re.MULTILINE))
    ours = {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in families(metrics)
        if family.name.startswith("evenflow_")
    }
    assert listed == ours


def test_the_alerts_ask_for_what_exists(metrics):
    page = (ROOT / "docs" / "monitoring.md").read_text()
    alerts = re.findall(r"^ +expr: (.+)$", page, re.MULTILINE)
    assert len(alerts) == page.count("- alert: ") > 0
    sample_names = {name for name, *_ in samples(metrics)}
    for expression in alerts:
        assert set() < names_in(expression) <= sample_names, expression
