"""The step loop: schedule, launch, collect, update. Owns the pairing of one scheduler with one runner.

A runner whose device works by itself has several steps in flight: step N + 1 is planned and launched before the
tokens of step N are on the host, so the device never waits for Python. Where a step is computed in `launch`, it is
collected at once. A request that fails ends alone. A step that fails ends its requests, and those of the steps launched
after it, which may have read what it did not write; the engine goes on.
"""

import logging
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from evenflow.engine.rank_error import RankError
from evenflow.engine.stats import EngineStats
from evenflow.request import FinishReason, Request, RequestDelta, StepPlan, StepResult, TokenMasks
from evenflow.scheduler import Scheduler

if TYPE_CHECKING:
    from evenflow.guided.matcher import GuidedDecoding

BUILD_WAIT_S = 0.005

logger = logging.getLogger("evenflow")


class Runner(Protocol):
    """What the engine needs of a runner. max_in_flight: steps that may be launched before the first is collected."""

    @property
    def max_in_flight(self) -> int: ...

    def launch(self, plan: StepPlan, masks: TokenMasks | None) -> Any:
        """Begin a step. Steps run in the order of their launches; what is returned goes to `collect`."""

    def collect(self, pending: Any) -> StepResult:
        """Wait for the step to end."""


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step that runs, or has run and was not looked at yet."""

    plan: StepPlan
    masks: TokenMasks | None
    pending: Any
    start_s: float


class Engine:
    """add and abort at any time between steps; step until has_unfinished is False.

    guided: for requests with structured_outputs; None: there are none.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, guided: "GuidedDecoding | None" = None) -> None:
        self.scheduler, self.runner, self._guided = scheduler, runner, guided
        self.num_steps = 0
        self.queue_times: list[tuple[str, float]] = []  # (request id, seconds waited) of those the last step began
        self._building: dict[str, tuple[Request, Future[Any]]] = {}  # their grammars are being compiled
        self._launched: deque[LaunchedStep] = deque()  # in order
        self._last_end_s = 0.0
        self._step_time_s = 0.0
        self._added_s: dict[str, float] = {}  # requests that no step has computed anything of
        self._num_computed_tokens = self._num_output_tokens = self._num_failed_rows = 0  # since the start

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished or bool(self._building) or bool(self._launched)

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError if it could never run."""
        self.scheduler.check(request)
        if request.request_id in self._building:
            raise ValueError(f"request id {request.request_id!r} is already in use; choose another")
        self._added_s[request.request_id] = time.perf_counter()
        if request.params.structured_outputs is None:
            self.scheduler.add(request)
        elif self._guided is None:
            raise ValueError("structured_outputs needs a tokenizer, and none is loaded; leave it out")
        else:
            self._building[request.request_id] = (request, self._guided.begin(request))

    def check_grammar(self, request: Request) -> None:
        """Compile the grammar of a request that is not added yet. Raises ValueError if it cannot be used."""
        if self._guided is not None and request.params.structured_outputs is not None:
            self._guided.begin(request).result()

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests in whatever state they are; unknown and finished ids are fine."""
        for request_id in request_ids:
            self._building.pop(request_id, None)
            self.scheduler.finish(request_id, FinishReason.ABORT)
            self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        self._added_s.pop(request_id, None)
        if self._guided is not None:
            self._guided.forget(request_id)

    def step(self) -> list[RequestDelta]:
        """Launch the next step; once enough are in flight, return what the oldest brought to each of its requests."""
        deltas = self._add_built() if self._building else []
        plan = self.scheduler.schedule()
        self.queue_times = []
        if plan.rows:
            deltas += self._launch(plan)
        if self._launched and (not plan.rows or len(self._launched) >= self.runner.max_in_flight):
            deltas += self._collect()
        for delta in deltas:
            if delta.finish_reason is not None:
                self._forget(delta.request_id)
        return deltas

    def _add_built(self) -> list[RequestDelta]:
        """Queue the requests whose grammars are compiled. With nothing else to do, waits for one a moment."""
        futures = [future for _, future in self._building.values()]
        wait(futures, timeout=0 if self.scheduler.has_unfinished else BUILD_WAIT_S, return_when=FIRST_COMPLETED)
        failed = []
        for request_id, (request, future) in list(self._building.items()):
            if not future.done():
                continue
            del self._building[request_id]
            assert self._guided is not None
            if (error := future.exception()) is None:
                self._guided.ready(request_id, future.result())
                self.scheduler.add(request)
            else:
                failed.append(RequestDelta(request_id, [], finish_reason=FinishReason.ERROR, error=str(error)))
        return failed

    def _launch(self, plan: StepPlan) -> list[RequestDelta]:
        """Begin the step; returns the ends of its requests if that failed."""
        self.num_steps += 1
        start_s = time.perf_counter()
        if self._added_s:
            self.queue_times = self._take_queue_times(plan, start_s)
        try:
            masks = self._guided.masks(plan) if self._guided is not None else None
            pending = self.runner.launch(plan, masks)
        except RankError as error:  # there is no next step
            self._fail_steps([*self._take_launched(), plan], str(error))
            raise
        except Exception as error:  # whatever it was, it must not take the waiting requests down
            logger.exception("a step of %d requests could not be launched", len(plan.rows))
            return self._fail_steps([plan], f"the engine failed in this step: {type(error).__name__}")
        except BaseException:  # interrupted: what the steps were to compute is not there
            self._fail_steps([*self._take_launched(), plan], "interrupted")
            raise
        self._launched.append(LaunchedStep(plan, masks, pending, start_s))
        return []

    def _collect(self) -> list[RequestDelta]:
        """Wait for the oldest step and take its tokens."""
        step = self._launched.popleft()
        plan, masks = step.plan, step.masks
        try:
            result = self.runner.collect(step.pending)
        except RankError as error:
            self._fail_steps([plan, *self._take_launched()], str(error))
            raise
        except Exception as error:
            logger.exception("a step of %d requests failed", len(plan.rows))
            reason = f"the engine failed in this step: {type(error).__name__}"
            return self._fail_steps([plan, *self._take_launched()], reason)
        except BaseException:
            self._fail_steps([plan, *self._take_launched()], "interrupted")
            raise
        complete = self._guided.advance(plan, masks, result) if self._guided is not None and masks is not None else []
        deltas = self.scheduler.update(plan, result)
        if complete:
            self._end_complete(deltas, set(complete))
        self._count(step, result)
        return deltas

    def _take_launched(self) -> list[StepPlan]:
        """The plans of all steps in flight; nobody will collect them."""
        plans = [step.plan for step in self._launched]
        self._launched.clear()
        return plans

    def _fail_steps(self, plans: list[StepPlan], error: str) -> list[RequestDelta]:
        self._num_failed_rows += sum(len(plan.rows) for plan in plans)
        return [delta for plan in plans for delta in self.scheduler.fail_step(plan, error)]

    def _end_complete(self, deltas: list[RequestDelta], complete: set[str]) -> None:
        """End the requests whose grammar takes nothing more; one that ended in this step anyway stays as it is."""
        assert self._guided is not None
        for delta in deltas:
            if delta.request_id in complete and delta.finish_reason is None:
                self.scheduler.finish(delta.request_id, FinishReason.STOP)
                delta.finish_reason = FinishReason.STOP
                delta.is_grammar_end = not self._guided.is_end(delta.new_token_ids[-1])

    def _take_queue_times(self, plan: StepPlan, now_s: float) -> list[tuple[str, float]]:
        """Of the requests in the plan that no step before has computed anything of."""
        ids = [request.request_id for request in plan.requests if request.request_id in self._added_s]
        return [(request_id, now_s - self._added_s.pop(request_id)) for request_id in ids]

    def _count(self, step: LaunchedStep, result: StepResult) -> None:
        """A step's time begins when the one before it has ended: their sum is the time that the engine was busy."""
        now, plan = time.perf_counter(), step.plan
        self._step_time_s += now - max(step.start_s, self._last_end_s)
        self._last_end_s = now
        self._num_computed_tokens += plan.num_tokens
        self._num_output_tokens += len(result.token_ids) - result.token_ids.count(-1)
        self._num_failed_rows += sum(not error.startswith("structured_outputs") for error in result.errors.values())

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
