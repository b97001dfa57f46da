"""A world for the real scheduler: a runner whose memory is digests, and an oracle that knows every request's tokens.

Position p of a request is stored as a digest of (salt, tokens[: p + 1]). In a step all rows write first, then every row
reads all its positions through its block table, and the next token is a function of what was read; the oracle's is one
of the true tokens. Wrong sharing, use after free, stale hits and bad recomputation therefore become a wrong token.
A failing row writes Poison, as NaNs spread in the real cache: also from what is masked in a row's last page.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from evenflow.request import FinishReason, Request, RequestDelta, ScheduledRow, StepPlan, StepResult, TokenLogprobs
from evenflow.sampling_params import SamplingParams
from evenflow.scheduler import Scheduler

VOCAB = 40
GARBAGE = -1  # what a failed step leaves


@dataclass(frozen=True)
class Config:
    block_size: int = 2
    num_blocks: int = 8
    max_num_seqs: int = 3
    max_num_batched_tokens: int = 16
    max_model_len: int = 16
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True


@dataclass(eq=False)
class Poison:
    """NaNs of one row. reported_at: the time of the update that told the scheduler."""

    reported_at: int | None = None


def digest(parent: int, token_id: int) -> int:
    return hash((parent, token_id)) & 0x7FFF_FFFF_FFFF


def digests(salt: int, token_ids: list[int]) -> list[int]:
    found = [salt]
    for token_id in token_ids:
        found.append(digest(found[-1], token_id))
    return found[1:]


def next_token(read: list[Any]) -> int:
    return hash(tuple(read)) % VOCAB


def position_logprobs(read: list[Any], position: int, token_id: int) -> TokenLogprobs:
    """What is reported at a position: depends on all that was read up to it."""
    return TokenLogprobs([token_id], [float(hash(tuple(read[: position + 1])) % 1000)], position + 1)


@dataclass
class Slot:
    """What a worker knows of one running request. The salt travels as the seed: workers are not told it."""

    salt: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    admitted_at: int
    block_table: list[int] = field(default_factory=list)
    poisons: set[Poison] = field(default_factory=set)  # read or written
    num_computed_tokens: int | None = None


class ShadowRunner:
    """Executes plans, seeing only what a worker sees of them: admitted, rows, zero_block_ids."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.cells: list[list[Any]] = [[None] * config.block_size for _ in range(config.num_blocks)]
        self.slots: dict[int, Slot] = {}

    def execute(self, plan: StepPlan, planned_at: int, bad_rows: Collection[int] = ()) -> StepResult:
        self._prepare(plan, planned_at)
        for block in plan.zero_block_ids:
            self.cells[block] = [0] * self.config.block_size
        for index, row in enumerate(plan.rows):
            self._write(row, Poison() if index in bad_rows else None)
        result = StepResult([-1] * len(plan.rows))
        reads = [self._read(row) for row in plan.rows]
        for index, (row, read) in enumerate(zip(plan.rows, reads, strict=True)):
            self._finish_row(index, row, read, result)
        return result

    def fail(self, plan: StepPlan, planned_at: int) -> None:
        """The step stops somewhere: nothing is zeroed, some rows' tokens are garbage, some NaN."""
        self._prepare(plan, planned_at)
        for index, row in enumerate(plan.rows):
            self._write(row, Poison() if index % 2 else None, GARBAGE)

    def report(self, row: ScheduledRow, now: int) -> None:
        """The scheduler has been told that this row failed."""
        for poison in self.slots[row.slot].poisons:
            poison.reported_at = now if poison.reported_at is None else poison.reported_at

    def _prepare(self, plan: StepPlan, planned_at: int) -> None:
        for new in plan.admitted:
            assert new.params.seed is not None
            self.slots[new.slot] = Slot(
                new.params.seed, list(new.token_ids), new.num_prompt_tokens, new.params, planned_at
            )
        for row in plan.rows:
            slot, block_size = self.slots[row.slot], self.config.block_size
            slot.block_table += row.new_block_ids
            assert len(set(slot.block_table)) == len(slot.block_table), "a block is twice in a table"
            assert len(slot.block_table) == -(-row.end // block_size), "too few or too many blocks for the row"
            if slot.num_computed_tokens is None:
                assert row.start % block_size == 0, "a hit is whole blocks"
            else:
                assert row.start == slot.num_computed_tokens, "tokens skipped or computed twice"
            assert row.start < row.end <= len(slot.token_ids), "a row computes tokens that exist, at least one"
            assert row.samples == (row.end == len(slot.token_ids)), "sampling is after the last token"
            slot.num_computed_tokens = row.end
            if row.samples:
                slot.token_ids.append(-1)  # known when it is sampled

    def _write(self, row: ScheduledRow, poison: Poison | None, garbage: int | None = None) -> None:
        slot, block_size = self.slots[row.slot], self.config.block_size
        true_digests = digests(slot.salt, slot.token_ids[: row.end])
        if poison is not None:
            slot.poisons.add(poison)
        for position in range(row.start, row.end):
            content = true_digests[position] if garbage is None else garbage
            block = slot.block_table[position // block_size]
            self.cells[block][position % block_size] = content if poison is None else poison

    def _read(self, row: ScheduledRow) -> list[Any]:
        """All that attention touches. A NaN may only be one that nobody knew of when the request was admitted."""
        slot = self.slots[row.slot]
        pages = [cell for block in slot.block_table for cell in self.cells[block]]
        assert not any(isinstance(cell, Poison) for cell in pages[row.end :]), "a NaN in the tail of a page"
        found = {cell for cell in pages[: row.end] if isinstance(cell, Poison)}
        for poison in found:
            is_known = poison.reported_at is not None and poison.reported_at <= slot.admitted_at
            assert not is_known, "the prefix cache hands out NaNs"
        if found:
            slot.poisons |= found
            self._write(row, Poison())
        return pages[: row.end]

    def _finish_row(self, index: int, row: ScheduledRow, read: list[Any], result: StepResult) -> None:
        slot = self.slots[row.slot]
        is_bad = any(isinstance(cell, Poison) for cell in read)
        last = min(row.end, slot.num_prompt_tokens - 1)
        if slot.params.prompt_logprobs is not None and row.start < last:
            if is_bad:
                result.errors[index] = "not finite"  # as the runner does, although the row may not sample
            else:
                logprobs = [position_logprobs(read, p, slot.token_ids[p + 1]) for p in range(row.start, last)]
                result.prompt_logprobs[index] = logprobs
        if not row.samples:
            return
        slot.token_ids[row.end] = 0 if is_bad else next_token(read)
        if is_bad:
            result.errors[index] = "not finite"
            return
        result.token_ids[index] = slot.token_ids[row.end]
        if slot.params.logprobs is not None:
            result.logprobs[index] = position_logprobs(read, row.end - 1, slot.token_ids[row.end])


@dataclass(eq=False)
class Tracked:
    """One request from the outside: what must come, and what came."""

    number: int
    request: Request
    prompt: list[int]
    expected: list[int]
    expected_reason: FinishReason
    expected_prompt_logprobs: list[TokenLogprobs]
    received: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_admissions: int = 0
    may_fail: bool = False
    finish_reason: FinishReason | None = None
    num_cached_tokens: int | None = None


def expect(request: Request, salt: int) -> tuple[list[int], FinishReason]:
    """The oracle: output tokens and finish reason of a request that is alone in the world."""
    token_ids, output = list(request.token_ids), []
    while True:
        token_id = next_token(digests(salt, token_ids))
        token_ids.append(token_id)
        output.append(token_id)
        if token_id in request.stop_token_ids and len(output) > request.params.min_tokens:
            return output, FinishReason.STOP
        if len(output) == request.max_tokens:
            return output, FinishReason.LENGTH


class World:
    """The rules (add, abort, launch, collect, drain) and the checks. Every check raises AssertionError."""

    def __init__(self, config: Config, scheduler_class: type[Scheduler] = Scheduler) -> None:
        self.config = config
        self.scheduler = scheduler_class(**vars(config))
        self.runner = ShadowRunner(config)
        self.tracked: list[Tracked] = []
        self.by_id: dict[str, Tracked] = {}
        self.launched: deque[tuple[StepPlan, int]] = deque()
        self.now = 0

    def add(
        self, prompt: list[int], *, max_tokens: int, salt: int = 0, stop: Collection[int] = (), **params: Any
    ) -> None:
        """Queue a request; one that could never run must be refused."""
        number = len(self.tracked)
        checked = SamplingParams(max_tokens=max_tokens, seed=salt, stop_token_ids=sorted(stop), **params)
        request = Request(f"r{number}", list(prompt), checked, max_tokens, frozenset(stop), cache_salt=str(salt))
        expected, reason = expect(request, salt)
        read = digests(salt, prompt)
        logprobs = [position_logprobs(read, p, prompt[p + 1]) for p in range(len(prompt) - 1)]
        item = Tracked(number, request, list(prompt), expected, reason, logprobs)
        if checked.prompt_logprobs is None:
            item.expected_prompt_logprobs = []
        capacity = min(self.config.max_model_len, self.config.num_blocks * self.config.block_size)
        try:
            self.scheduler.add(request)
        except ValueError:
            assert len(prompt) + max_tokens > capacity, "refused a request that fits"
            return
        assert len(prompt) + max_tokens <= capacity, "accepted a request that never fits"
        self.tracked.append(item)
        self.by_id[request.request_id] = item

    def abort(self, number: int) -> None:
        """Of a request in any state, or of none."""
        self.scheduler.finish(f"r{number}", FinishReason.ABORT)
        if (item := self.by_id.get(f"r{number}")) is not None and item.finish_reason is None:
            item.finish_reason = FinishReason.ABORT
            assert item.request.finish_reason is FinishReason.ABORT

    def follow_up(self, number: int, num_tokens: int, **params: Any) -> None:
        """The next turn of a conversation: what a request has so far, or the first of it, is the prompt."""
        if (item := self.by_id.get(f"r{number}")) is not None:
            self.add(item.request.token_ids[:num_tokens], salt=int(item.request.cache_salt), **params)

    def launch(self) -> bool:
        """Plan one more step, while others may be in flight. False if there was nothing to plan."""
        plan = self.scheduler.schedule()
        self._check_plan(plan)
        if plan.rows:
            self.launched.append((plan, self.now))
        else:
            is_idle = not self.launched
            assert not (is_idle and self.scheduler.has_unfinished), "work is left and nothing is planned"
            assert not plan.admitted
            assert not plan.zero_block_ids
        return bool(plan.rows)

    def collect(self, bad_rows: Collection[int] = (), *, fails: bool = False) -> None:
        """Run the oldest launched step and hand the result back. A step that fails takes those launched after along."""
        if not self.launched:
            return
        if fails:
            while self.launched:
                self._fail_step(*self.launched.popleft())
            return
        plan, planned_at = self.launched.popleft()
        result = self.runner.execute(plan, planned_at, bad_rows)
        for index in result.errors:
            self.by_id[plan.requests[index].request_id].may_fail = True
        deltas = self.scheduler.update(plan, result)
        self.now += 1
        for index in result.errors:
            self.runner.report(plan.rows[index], self.now)
        self._take(plan, deltas)

    def _fail_step(self, plan: StepPlan, planned_at: int) -> None:
        self.runner.fail(plan, planned_at)
        for request in plan.requests:
            self.by_id[request.request_id].may_fail = True
        deltas = self.scheduler.fail_step(plan, "the step failed")
        self.now += 1
        for row in plan.rows:
            self.runner.report(row, self.now)
        self._take(plan, deltas)
        for request in plan.requests:
            assert self.by_id[request.request_id].finish_reason is not None, "a failed step left a request running"

    def drain(self) -> None:
        """Everything ends, and nothing is left behind."""
        for _ in range(3000):
            if not self.launch() and not self.launched:
                break
            self.collect()
            self.check()
        assert not self.scheduler.has_unfinished, "no end"
        assert all(item.finish_reason is not None for item in self.tracked)
        assert self.scheduler.pool.num_free == self.config.num_blocks
        assert not self.scheduler.num_running
        assert not self.scheduler.num_waiting
        self.check()

    def _check_plan(self, plan: StepPlan) -> None:
        config = self.config
        assert sum(row.end - row.start for row in plan.rows) <= config.max_num_batched_tokens, "over budget"
        assert len({row.slot for row in plan.rows}) == len(plan.rows) <= config.max_num_seqs
        assert all(0 <= row.slot < config.max_num_seqs for row in plan.rows)
        admitted = {new.slot for new in plan.admitted}
        assert len(admitted) == len(plan.admitted)
        assert admitted <= {row.slot for row in plan.rows}, "admitted without a row"
        assert len(set(plan.zero_block_ids)) == len(plan.zero_block_ids)
        for row, request in zip(plan.rows, plan.requests, strict=True):
            item = self.by_id[request.request_id]
            assert item.finish_reason is None, "a row of a finished request"
            num_coming = request.num_output_tokens + request.num_inflight_tokens
            assert num_coming <= request.max_tokens, "more tokens are asked for than wanted"
            if row.slot in admitted:
                item.num_admissions += 1
                assert config.enable_prefix_caching or row.start == 0
                assert config.enable_chunked_prefill or row.samples, "a chunk although chunks are off"
        self._check_order(plan)

    def _check_order(self, plan: StepPlan) -> None:
        """First come, first served: the running ones are older than all that wait, and get their tokens first."""
        running, waiting = self.scheduler.running, self.scheduler.waiting
        numbers = [self.by_id[request.request_id].number for request in [*running, *waiting]]
        assert numbers == sorted(numbers), "somebody was overtaken"
        if plan.num_tokens < self.config.max_num_batched_tokens:
            for request in running:
                is_ending = request.num_output_tokens + request.num_inflight_tokens >= request.max_tokens
                is_done = request.num_computed_tokens == len(request.token_ids) + request.num_inflight_tokens - 1
                assert is_done or is_ending, "a running request went without although there was budget"

    def _take(self, plan: StepPlan, deltas: list[RequestDelta]) -> None:
        assert len({delta.request_id for delta in deltas}) == len(deltas)
        in_plan = {request.request_id for request in plan.requests}
        for delta in deltas:
            item = self.by_id[delta.request_id]
            assert delta.request_id in in_plan
            assert item.finish_reason is None, "something comes after the end"
            item.received += delta.new_token_ids
            assert item.received == item.expected[: len(item.received)], "a wrong token"
            self._check_extras(item, delta)
            if delta.finish_reason is not None:
                self._check_end(item, delta)

    def _check_extras(self, item: Tracked, delta: RequestDelta) -> None:
        params = item.request.params
        if delta.error is None:
            if params.logprobs is not None:
                assert [entry.token_ids[0] for entry in delta.logprobs or []] == delta.new_token_ids
            if item.num_cached_tokens is None:
                item.num_cached_tokens = delta.num_cached_tokens
            assert item.num_cached_tokens == delta.num_cached_tokens < len(item.prompt)
            assert params.prompt_logprobs is None or not delta.num_cached_tokens
        assert delta.prompt_logprobs != []
        item.prompt_logprobs += delta.prompt_logprobs or []
        positions = [entry.rank - 1 for entry in item.prompt_logprobs]
        assert positions == list(range(len(positions))), "prompt positions come once, in order"
        if delta.new_token_ids:
            assert len(positions) == len(item.expected_prompt_logprobs), "prompt logprobs come before the first token"
        for entry, expected in zip(item.prompt_logprobs, item.expected_prompt_logprobs, strict=False):
            assert entry == expected, "wrong prompt logprobs"

    def _check_end(self, item: Tracked, delta: RequestDelta) -> None:
        item.finish_reason = delta.finish_reason
        if delta.finish_reason is FinishReason.ERROR:
            assert item.may_fail, "an innocent request failed"
            assert delta.error
            assert not delta.new_token_ids
            return
        assert delta.finish_reason is item.expected_reason
        assert item.received == item.expected, "too few tokens"
        assert item.request.token_ids == item.prompt + item.expected
        assert delta.stop_reason == (item.expected[-1] if item.expected_reason is FinishReason.STOP else None)

    def check(self) -> None:
        """What holds between any two rules: nothing leaks, nobody got less or more than the scheduler says."""
        self.scheduler.check_invariants()
        held: set[int] = set()
        slots = []
        for item in self.tracked:
            request = item.request
            assert request.finish_reason is item.finish_reason, "the end was not told"
            assert request.num_inflight_tokens >= 0
            if item.finish_reason is not None or request.slot < 0:
                assert not request.block_table, "blocks are kept without running"
                assert request.slot < 0, "a slot is kept after the end"
                continue
            held.update(request.block_table)
            slots.append(request.slot)
            assert request.token_ids == item.prompt + item.received
            assert len(item.received) <= request.max_tokens
        assert len(held) + self.scheduler.pool.num_free == self.config.num_blocks, "blocks leak"
        assert len(set(slots)) == len(slots) == self.scheduler.num_running <= self.config.max_num_seqs
        alive = sum(item.finish_reason is None for item in self.tracked)
        assert alive == self.scheduler.num_running + self.scheduler.num_waiting
        in_flight = sum(row.samples for plan, _ in self.launched for row in plan.rows)
        assert in_flight == sum(item.request.num_inflight_tokens for item in self.tracked), "a token is lost on its way"
