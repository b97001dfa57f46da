"""Arrivals: the seed's numbers exactly, Poisson by chi-square, and a chi-square that refuses what is not."""

import numpy as np
import pytest
import scipy.stats

from evenflow.bench.arrivals import arrival_times, times_of
from evenflow.bench.workload import BenchRequest


def poisson_p_value(times, rate):
    """Of the number of arrivals in whole seconds, against the Poisson law of that rate."""
    counts = np.bincount(np.floor(times).astype(int))[:-1]  # the last second may be cut
    law = scipy.stats.poisson(rate)
    low, high = int(law.ppf(0.01)), int(law.ppf(0.99))  # what is rarer counts as these
    observed = np.bincount(np.clip(counts, low, high) - low, minlength=high - low + 1)
    expected = law.pmf(np.arange(low, high + 1))
    expected[0], expected[-1] = law.cdf(low), law.sf(high - 1)
    assert (expected * len(counts)).min() > 5
    return scipy.stats.chisquare(observed, expected * len(counts)).pvalue


@pytest.mark.parametrize("mode", ["seed", "current"])
@pytest.mark.parametrize("rate", [1.0, 4.0])
def test_arrivals_are_poisson(mode, rate):
    values = [poisson_p_value(arrival_times(20_000, rate, mode=mode, seed=seed), rate) for seed in range(5)]
    assert min(values) > 1e-4
    assert np.median(values) > 0.05


@pytest.mark.parametrize("burstiness", [0.5, 2.0])
def test_the_chi_square_refuses_other_laws(burstiness):
    assert poisson_p_value(arrival_times(20_000, 4.0, burstiness=burstiness), 4.0) < 1e-6


def test_the_seeds_arrivals_are_those_of_its_script():
    """benchmark_serving.py of vLLM v0.1.4: send, then sleep np.random.exponential(1 / rate)."""
    np.random.seed(0)
    now, expected = 0.0, []
    for _ in range(100):
        expected.append(now)
        now += np.random.exponential(1.0 / 3.0)
    np.testing.assert_allclose(arrival_times(100, 3.0, mode="seed"), expected, rtol=1e-12)


def test_todays_arrivals_end_at_count_over_rate_and_keep_their_law():
    times = arrival_times(100, 4.0, burstiness=0.3, seed=5)
    assert times[-1] == pytest.approx(25.0)
    gaps = np.random.RandomState(5).gamma(0.3, 1 / (4.0 * 0.3), 100)
    np.testing.assert_allclose(np.diff(times) / np.diff(times)[0], gaps[1:] / gaps[1], rtol=1e-9, atol=1e-9)


def test_no_rate_is_all_at_once_and_a_trace_brings_its_own_times():
    assert arrival_times(3, float("inf")) == [0.0, 0.0, 0.0]
    traced = [BenchRequest([1], 1, 1, 0.0), BenchRequest([1], 1, 1, 9.0)]
    assert times_of(traced, 100.0, "current", 1.0, 0) == [0.0, 9.0]


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match="--request-rate"):
        arrival_times(3, rate)
    with pytest.raises(ValueError, match="--burstiness"):
        arrival_times(3, 1.0, burstiness=rate)
