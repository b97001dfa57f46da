"""The step loop: schedule, execute, update. Owns the pairing of one scheduler with one runner.

A request that fails ends alone. A step that fails ends its requests, and the engine goes on.
"""

import logging
import time
from collections.abc import Iterable
from typing import Protocol

from evenflow.engine.stats import EngineStats
from evenflow.request import FinishReason, Request, RequestDelta, StepPlan, StepResult
from evenflow.scheduler import Scheduler

logger = logging.getLogger("evenflow")


class Runner(Protocol):
    """What the engine needs of a runner."""

    def execute(self, plan: StepPlan) -> StepResult: ...


class Engine:
    """add and abort at any time between steps; step until has_unfinished is False."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self.scheduler, self.runner = scheduler, runner
        self.num_steps = 0
        self._step_time_s = 0.0
        self._added_s: dict[str, float] = {}  # requests that no step has computed anything of
        self.queue_times: list[tuple[str, float]] = []  # (request id, seconds waited) of those the last step began
        self._num_computed_tokens = self._num_output_tokens = self._num_failed_rows = 0  # since the start

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError if it could never run."""
        self.scheduler.add(request)
        self._added_s[request.request_id] = time.perf_counter()

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests in whatever state they are; unknown and finished ids are fine."""
        for request_id in request_ids:
            self._added_s.pop(request_id, None)
            self.scheduler.finish(request_id, FinishReason.ABORT)

    def step(self) -> list[RequestDelta]:
        """Run one step and return what it brought to each of its requests."""
        plan = self.scheduler.schedule()
        if not plan.rows:
            return []
        self.num_steps += 1
        start_s = time.perf_counter()
        self.queue_times = self._take_queue_times(plan, start_s) if self._added_s else []
        try:
            result = self.runner.execute(plan)
        except Exception as error:  # whatever it was, it must not take the waiting requests down
            logger.exception("a step of %d requests failed", len(plan.rows))
            self._num_failed_rows += len(plan.rows)
            return self.scheduler.fail_step(plan, f"the engine failed in this step: {type(error).__name__}")
        except BaseException:  # interrupted: what the step was to compute is not there
            self.scheduler.fail_step(plan, "interrupted")
            raise
        deltas = self.scheduler.update(plan, result)
        self._count(plan, result, time.perf_counter() - start_s)
        return deltas

    def _take_queue_times(self, plan: StepPlan, now_s: float) -> list[tuple[str, float]]:
        """Of the requests in the plan that no step before has computed anything of."""
        ids = [request.request_id for request in plan.requests if request.request_id in self._added_s]
        return [(request_id, now_s - self._added_s.pop(request_id)) for request_id in ids]

    def _count(self, plan: StepPlan, result: StepResult, step_time_s: float) -> None:
        self._step_time_s += step_time_s
        self._num_computed_tokens += plan.num_tokens
        self._num_output_tokens += len(result.token_ids) - result.token_ids.count(-1)
        self._num_failed_rows += len(result.errors)

    def stats(self) -> EngineStats:
        """Where things stand between two steps."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks=pool.num_blocks,
            block_size=scheduler.block_size,
            num_used_blocks=pool.num_blocks - pool.num_free,
            num_cached_blocks=pool.num_cached,
            num_steps=self.num_steps,
            step_time_s=self._step_time_s,
            num_computed_tokens=self._num_computed_tokens,
            num_output_tokens=self._num_output_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_prefix_queries=scheduler.num_prefix_queries,
            num_prefix_hits=scheduler.num_prefix_hits,
            num_failed_rows=self._num_failed_rows,
        )
