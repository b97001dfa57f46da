"""The step loop: schedule, execute, update. Owns the pairing of one scheduler with one runner.

A request that fails ends alone. A step that fails ends its requests, and the engine goes on.
"""

import logging
from collections.abc import Iterable
from typing import Protocol

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

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError if it could never run."""
        self.scheduler.add(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests in whatever state they are; unknown and finished ids are fine."""
        for request_id in request_ids:
            self.scheduler.finish(request_id, FinishReason.ABORT)

    def step(self) -> list[RequestDelta]:
        """Run one step and return what it brought to each of its requests."""
        plan = self.scheduler.schedule()
        if not plan.rows:
            return []
        self.num_steps += 1
        try:
            result = self.runner.execute(plan)
        except Exception as error:  # whatever it was, it must not take the waiting requests down
            logger.exception("a step of %d requests failed", len(plan.rows))
            return self.scheduler.fail_step(plan, f"the engine failed in this step: {type(error).__name__}")
        except BaseException:  # interrupted: what the step was to compute is not there
            self.scheduler.fail_step(plan, "interrupted")
            raise
        return self.scheduler.update(plan, result)
