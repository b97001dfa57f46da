"""When requests are sent: the seed's Poisson process, today's Gamma law, or a trace. Pure functions of a seed."""

import math
from collections.abc import Sequence

import numpy as np

from evenflow.bench.workload import BenchRequest


def arrival_times(
    count: int, rate: float, *, mode: str = "current", burstiness: float = 1.0, seed: int = 0
) -> list[float]:
    """Seconds from the start at which each of `count` requests is sent, at `rate` requests/s; inf: all at once.

    seed: vLLM v0.1.4's: the first at 0, then gaps that are exponential, so the count in any second is Poisson. current:
    Gamma gaps of shape `burstiness` (1 is exponential), then all times stretched so that the last is count / rate.
    Raises ValueError.
    """
    if not rate > 0:
        raise ValueError(f"--request-rate {rate} must be above 0, or inf for all at once")
    if not burstiness > 0:
        raise ValueError(f"--burstiness {burstiness} must be above 0; 1 is a Poisson process")
    if math.isinf(rate):
        return [0.0] * count
    rng = np.random.RandomState(seed)  # the legacy generator: the same numbers as np.random.seed(seed)
    if mode == "seed":
        gaps = rng.exponential(1.0 / rate, count)
        return [0.0, *np.cumsum(gaps)[:-1].tolist()]
    times = np.cumsum(rng.gamma(burstiness, 1.0 / (rate * burstiness), count))
    return list((times * (count / rate) / times[-1]).tolist()) if count else []


def times_of(requests: Sequence[BenchRequest], rate: float, mode: str, burstiness: float, seed: int) -> list[float]:
    """As arrival_times; a trace brings its own times, and then the rate is left alone."""
    if requests and requests[0].arrival_s is not None:
        return [request.arrival_s or 0.0 for request in requests]
    return arrival_times(len(requests), rate, mode=mode, burstiness=burstiness, seed=seed)
