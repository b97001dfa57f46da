"""Definitions against examples computed by hand."""

import numpy as np
import pytest
import scipy.stats

from evenflow.bench.metrics import RequestRecord, mean_and_half_width, meets, parse_goodput, peaks, summarize

# Sent at 0; tokens at 1.0, 1.5, 2.5 -> TTFT 1, ITL 0.5 and 1, latency 2.5, TPOT (2.5 - 1) / 2 = 0.75
FIRST = RequestRecord(0.0, 1.0, 2.5, [0.5, 1.0], num_prompt_tokens=7, num_output_tokens=3)
# Sent at 2; tokens at 2.2, 2.3 -> TTFT 0.2, ITL 0.1, latency 0.3, TPOT 0.1
SECOND = RequestRecord(2.0, 0.2, 0.3, [0.1], num_prompt_tokens=4, num_output_tokens=2)
# One token only: it has no time per further token
THIRD = RequestRecord(3.0, 0.4, 0.4, [], num_prompt_tokens=3, num_output_tokens=1)
FAILED = RequestRecord(1.0, num_prompt_tokens=100, error="HTTP 500")


def test_a_run_by_hand():
    found = summarize([FIRST, SECOND, THIRD, FAILED], 4.0, slo_ms={"ttft": 500, "e2el": 350})
    expected = {
        "duration": 4.0,
        "completed": 3,
        "failed": 1,
        "total_input_tokens": 14,
        "total_output_tokens": 6,
        "request_throughput": 0.75,
        "request_goodput": 0.25,  # the first is late, the third takes 400 ms
        "output_throughput": 1.5,
        "total_token_throughput": 5.0,
        "mean_ttft_ms": 1600 / 3,
        "median_ttft_ms": 400.0,
        "mean_tpot_ms": 425.0,
        "mean_itl_ms": 1600 / 3,  # gaps pooled over requests, not a mean of means
        "median_itl_ms": 500.0,
        "mean_e2el_ms": 3200 / 3,
        "std_tpot_ms": 325.0,
        "p50_e2el_ms": 400.0,
        "p90_ttft_ms": 880.0,  # 0.4 + (1.0 - 0.4) * 0.8
        "normalized_latency_s": (2.5 / 10 + 0.3 / 6 + 0.4 / 4) / 3,
        "latency_per_output_token_s": (2.5 / 3 + 0.3 / 2 + 0.4) / 3,
        "max_concurrent_requests": 2,
        "max_output_tokens_per_s": 3.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_normalized_latency_counts_prompt_and_output():
    """The seed's definition; the paper of vLLM divides by the output alone, and gives another number."""
    found = summarize([FIRST], 1.0)
    assert found["normalized_latency_s"] == pytest.approx(0.25)
    assert found["latency_per_output_token_s"] == pytest.approx(2.5 / 3)


def test_where_everything_failed_there_is_no_latency():
    found = summarize([FAILED, FAILED], 2.0, slo_ms={"ttft": 1.0})
    assert (found["completed"], found["failed"], found["request_goodput"]) == (0, 2, 0.0)
    assert found["mean_ttft_ms"] is found["p99_itl_ms"] is found["normalized_latency_s"] is None


def test_peaks_by_hand():
    """Tokens in second 0: none; 1: two; 2: 2.5, 2.2, 2.3; 3: one. Running in second 2: the first and the second."""
    assert peaks([FIRST, SECOND, THIRD]) == (3.0, 2)
    assert peaks([]) == (0.0, 0)


@pytest.mark.parametrize(("limits", "kept"), [({"ttft": 1000}, True), ({"ttft": 999}, False), ({"tpot": 749}, False)])
def test_a_limit_is_kept_when_it_is_met(limits, kept):
    assert meets(FIRST, limits) is kept


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:-1", "ttft:nan", "itl:5", ":5"])
def test_limits_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="--goodput"):
        parse_goodput([text])
    assert parse_goodput(["ttft:200", "e2el:5e3"]) == {"ttft": 200.0, "e2el": 5000.0}


@pytest.mark.parametrize("count", [2, 3, 10, 15, 16, 20, 60])
def test_intervals_are_students(count):
    values = np.random.default_rng(count).normal(100, 5, count)
    low, high = scipy.stats.t.interval(0.95, count - 1, values.mean(), scipy.stats.sem(values))
    mean, half = mean_and_half_width(values)
    assert mean == pytest.approx(values.mean())
    assert half == pytest.approx((high - low) / 2, rel=2e-3)
    assert mean_and_half_width([3.0]) == (3.0, None)
