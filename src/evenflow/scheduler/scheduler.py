"""Decides which tokens are computed next. `schedule` reserves and says, `update` takes what came of it.

A request's counters advance when it is scheduled, so that a step can be planned while the one before it still runs:
`num_inflight_tokens` counts the sampled tokens that are not known here yet.
"""

from collections import deque

from evenflow.request import (
    AdmittedRequest,
    FinishReason,
    Request,
    RequestDelta,
    ScheduledRow,
    StepPlan,
    StepResult,
)
from evenflow.scheduler.block_pool import BlockPool
from evenflow.scheduler.prefix_cache import extend_block_hashes

_NO_BLOCKS: list[int] = []


class Scheduler:
    """First come, first served: running requests get the tokens they lack, then waiting ones are admitted.

    max_num_batched_tokens: tokens of one step. max_num_seqs: running requests, and the number of slots.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
    ) -> None:
        if not enable_chunked_prefill and max_num_batched_tokens < max_model_len:
            raise ValueError(
                f"max_num_batched_tokens={max_num_batched_tokens} cannot hold max_model_len={max_model_len} in one "
                "step; raise it or enable chunked prefill"
            )
        self.block_size = block_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.enable_prefix_caching = enable_prefix_caching
        self.enable_chunked_prefill = enable_chunked_prefill
        self.pool = BlockPool(num_blocks)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission, so the last has the least to lose
        self.num_preemptions = 0
        self.num_prefix_queries = 0  # prompt tokens looked up, and found
        self.num_prefix_hits = 0
        self._requests: dict[str, Request] = {}
        self._free_slots = list(range(max_num_seqs))[::-1]
        self._unverified: set[Request] = set()  # admitted, and no token sampled from what they computed since

    @property
    def num_blocks(self) -> int:
        return self.pool.num_blocks

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError if its id is taken or it could never run."""
        self.check(request)
        self._requests[request.request_id] = request
        self.waiting.append(request)

    def check(self, request: Request) -> None:
        """Raises the ValueError that `add` would."""
        if request.request_id in self._requests:
            raise ValueError(f"request id {request.request_id!r} is already in use; choose another")
        if not request.token_ids or request.max_tokens < 1:
            raise ValueError(
                f"prompt of {request.num_prompt_tokens} tokens and max_tokens={request.max_tokens}: both must be at "
                "least 1"
            )
        longest = request.num_prompt_tokens + request.max_tokens
        capacity = min(self.max_model_len, self.num_blocks * self.block_size)
        if longest > capacity:
            raise ValueError(
                f"prompt of {request.num_prompt_tokens} + max_tokens={request.max_tokens} exceeds the {capacity} "
                "tokens that a request may have here; shorten the prompt or lower max_tokens"
            )

    def schedule(self) -> StepPlan:
        """The next step. Empty only when nothing can be done before `update`, or nothing is left."""
        rows: list[ScheduledRow] = []
        requests: list[Request] = []
        admitted: list[AdmittedRequest] = []
        budget, has_preempted = self._schedule_running(rows, requests)
        # A step that had to take blocks back admits nobody: the newcomer would be the next victim.
        if self.waiting and not has_preempted:
            self._admit_waiting(rows, requests, admitted, budget)
        if not rows:
            return StepPlan(admitted, rows, requests, _NO_BLOCKS)
        zero_block_ids, self.pool.zero_block_ids = self.pool.zero_block_ids, []
        return StepPlan(admitted, rows, requests, zero_block_ids)

    def _schedule_running(self, rows: list[ScheduledRow], requests: list[Request]) -> tuple[int, bool]:
        """A row for every running request, oldest first. Returns the budget that is left and if any was preempted."""
        budget, block_size, pool = self.max_num_batched_tokens, self.block_size, self.pool
        has_preempted = False
        for request in list(self.running):
            if not budget or request.slot < 0:  # preempted by one before it, as all after it are
                break
            start, num_inflight = request.num_computed_tokens, request.num_inflight_tokens
            num_total = len(request.token_ids) + num_inflight
            if num_inflight and num_total - request.num_prompt_tokens >= request.max_tokens:
                continue  # its last token is on its way
            if num_inflight and request.params.structured_outputs is not None:
                continue  # its grammar must see the token that is on its way; the others go on
            end = num_total if num_total - start <= budget else start + budget
            new_blocks = _NO_BLOCKS
            if (needed := -(-end // block_size) - len(request.block_table)) > 0:
                while needed > pool.num_free and request.slot >= 0:
                    has_preempted = True
                    self._preempt(self.running[-1])
                if request.slot < 0:
                    break
                new_blocks = pool.allocate(needed)
                request.block_table += new_blocks
            budget -= end - start
            self._advance(request, end, num_total)
            rows.append(ScheduledRow(request.slot, start, end, end == num_total, new_blocks))
            requests.append(request)
        return budget, has_preempted

    def _admit_waiting(
        self, rows: list[ScheduledRow], requests: list[Request], admitted: list[AdmittedRequest], budget: int
    ) -> None:
        """Admit from the head of the queue while slots, budget and blocks last; nobody overtakes.

        A block stays free for each running request that may need one: who is admitted into the last ones is soon
        preempted.
        """
        num_kept = sum(map(self._may_grow, self.running))
        while self.waiting and budget and self._free_slots:
            request = self.waiting[0]
            if request.num_inflight_tokens:
                return  # preempted with a token on its way: the recomputation must contain it
            num_total = len(request.token_ids)
            hits = self._cached_blocks(request)
            start = len(hits) * self.block_size
            end = start + min(num_total - start, budget)
            if end < num_total and not self.enable_chunked_prefill:
                return
            num_new = self._num_blocks_to_admit(end) - len(hits)
            num_free = self.pool.num_free - sum(self.pool.references[block] == 0 for block in hits)
            if num_new + num_kept > num_free:
                return
            self.waiting.popleft()
            self._admit(request, hits, num_new)
            num_kept += self._may_grow(request)
            self._advance(request, end, num_total)
            budget -= end - start
            admitted.append(
                AdmittedRequest(
                    request.slot,
                    list(request.token_ids),
                    request.num_prompt_tokens,
                    request.params,
                    sorted(request.stop_token_ids),
                    request.bad_words_ids,
                )
            )
            rows.append(ScheduledRow(request.slot, start, end, end == num_total, list(request.block_table)))
            requests.append(request)

    def _num_blocks_to_admit(self, end: int) -> int:
        return -(-end // self.block_size)

    def _may_grow(self, request: Request) -> bool:
        """Beyond its blocks. The last token that it may have is stored nowhere."""
        most = request.num_prompt_tokens + request.max_tokens - 1
        return len(request.block_table) * self.block_size < most

    def _admit(self, request: Request, hits: list[int], num_new: int) -> None:
        for block in hits:
            self.pool.acquire(block)
        request.block_table = hits + self.pool.allocate(num_new)
        request.num_registered_blocks = len(hits)
        request.slot = self._free_slots.pop()
        self.running.append(request)
        self._unverified.add(request)
        if request.num_preemptions == 0:
            request.num_cached_tokens = len(hits) * self.block_size
            self.num_prefix_queries += request.num_prompt_tokens
            self.num_prefix_hits += request.num_cached_tokens

    def _cached_blocks(self, request: Request) -> list[int]:
        """The longest chain of cached blocks that the request begins with; its last token is always computed."""
        wants_all = request.params.prompt_logprobs is not None
        if not self.enable_prefix_caching or (
            wants_all and request.num_prompt_logprobs < request.num_prompt_tokens - 1
        ):
            return []
        hits: list[int] = []
        hashes = extend_block_hashes(request, self.block_size)
        for block_hash in hashes[: (len(request.token_ids) - 1) // self.block_size]:
            if (block := self.pool.find(block_hash)) is None:
                break
            hits.append(block)
        return hits

    def _advance(self, request: Request, end: int, num_total: int) -> None:
        """The request's tokens up to `end` are computed by the step that is being planned.

        Its blocks that become full are found from now on: in a step, all keys and values are written before any are
        read, and steps run in order.
        """
        request.num_computed_tokens = end
        if end == num_total:
            request.num_inflight_tokens += 1
        if self.enable_prefix_caching and end >= (request.num_registered_blocks + 1) * self.block_size:
            num_full = min(end, len(request.token_ids)) // self.block_size
            hashes = extend_block_hashes(request, self.block_size)
            for index in range(request.num_registered_blocks, num_full):
                self.pool.register(request.block_table[index], hashes[index])
            request.num_registered_blocks = max(num_full, request.num_registered_blocks)

    def update(self, plan: StepPlan, result: StepResult) -> list[RequestDelta]:
        """Take the tokens of a step that has run. Tokens of requests that ended meanwhile are dropped."""
        deltas: list[RequestDelta] = []
        has_extras = bool(result.errors or result.logprobs or result.prompt_logprobs)
        unverified = self._unverified
        for index, (row, request, token_id) in enumerate(zip(plan.rows, plan.requests, result.token_ids, strict=True)):
            samples = row.samples
            if samples:
                request.num_inflight_tokens -= 1
            if has_extras and index in result.errors:
                deltas += self._fail(request, result.errors[index])
                continue
            if request.finish_reason is not None:
                continue
            delta = RequestDelta(request.request_id, [], num_cached_tokens=request.num_cached_tokens)
            if samples:
                if unverified:
                    unverified.discard(request)
                request.token_ids.append(token_id)
                delta.new_token_ids.append(token_id)
                num_output_tokens = len(request.token_ids) - request.num_prompt_tokens
                if num_output_tokens >= request.max_tokens or token_id in request.stop_token_ids:
                    self._check_stop(request, token_id, num_output_tokens)
                    delta.finish_reason, delta.stop_reason = request.finish_reason, request.stop_reason
            elif index not in result.prompt_logprobs:
                continue
            if has_extras:
                self._add_logprobs(delta, index, row, request, result)
                if not samples and delta.prompt_logprobs is None:
                    continue  # all of them have been told before a preemption
            deltas.append(delta)
        return deltas

    def _check_stop(self, request: Request, token_id: int, num_output_tokens: int) -> None:
        if token_id in request.stop_token_ids and num_output_tokens > request.params.min_tokens:
            if token_id in request.params.stop_token_ids:
                request.stop_reason = token_id
            self.finish(request, FinishReason.STOP)
        elif num_output_tokens >= request.max_tokens:
            self.finish(request, FinishReason.LENGTH)

    @staticmethod
    def _add_logprobs(delta: RequestDelta, index: int, row: ScheduledRow, request: Request, result: StepResult) -> None:
        if delta.new_token_ids and index in result.logprobs:
            delta.logprobs = [result.logprobs[index]]
        if found := result.prompt_logprobs.get(index):
            # After preemption the first ones come again; they have been told.
            new = found[max(request.num_prompt_logprobs - row.start, 0) :]
            request.num_prompt_logprobs += len(new)
            delta.prompt_logprobs = new or None

    def fail_step(self, plan: StepPlan, error: str) -> list[RequestDelta]:
        """The step raised: all its requests end, and what it was to compute is not found any more.

        Steps launched after it may have read what it did not write: pass them here too, not to `update`.
        """
        deltas: list[RequestDelta] = []
        for row, request in zip(plan.rows, plan.requests, strict=True):
            request.num_inflight_tokens -= row.samples
            deltas += self._fail(request, error)
        return deltas

    def _fail(self, request: Request, error: str) -> list[RequestDelta]:
        """End a request whose row failed; one that has ended since leaves only its blocks to be distrusted."""
        if request.finish_reason is not None:
            self._distrust(request)
            return []
        self.finish(request, FinishReason.ERROR, error)
        cached = request.num_cached_tokens
        return [RequestDelta(request.request_id, [], None, None, FinishReason.ERROR, None, cached, error)]

    def finish(self, request: Request | str, reason: FinishReason, error: str | None = None) -> None:
        """The single exit: every ending passes here. Unknown and ended requests are left alone."""
        found = self._requests.get(request) if isinstance(request, str) else request
        if found is None or self._requests.get(found.request_id) is not found:
            return
        found.finish_reason, found.error = reason, error
        del self._requests[found.request_id]
        if reason is FinishReason.ERROR:
            self._distrust(found)
        if found.slot < 0:
            self.waiting.remove(found)
        else:
            self._release(found)

    def _distrust(self, request: Request) -> None:
        """A failure may have left anything in the request's blocks: they are not found again.

        By their names, not from the table: it may have been preempted or aborted since, and have none.
        """
        for block_hash in request.block_hashes:
            if (block := self.pool.find(block_hash)) is not None:
                self.pool.forget(block)

    def _preempt(self, victim: Request) -> None:
        """Take the blocks back; the request goes to the head of the queue and is computed again."""
        self._release(victim)
        self.waiting.appendleft(victim)
        victim.num_preemptions += 1
        self.num_preemptions += 1

    def _release(self, request: Request) -> None:
        """The only line that returns blocks and slots."""
        self.running.remove(request)
        self._free_slots.append(request.slot)
        self.pool.mark_dirty(self._unverified_blocks(request))
        self._unverified.discard(request)
        # Tail first: a chain's head is the most likely to be shared, so it should be reused last.
        self.pool.release(reversed(request.block_table))
        request.slot, request.block_table = -1, []
        request.num_computed_tokens = 0

    def _unverified_blocks(self, request: Request) -> list[int]:
        """Those that may hold a NaN which nobody will report. A sampled token vouches for all before it."""
        if request in self._unverified:
            return request.block_table
        num_verified = len(request.token_ids) - 1
        return (
            request.block_table[num_verified // self.block_size :] if request.num_computed_tokens > num_verified else []
        )

    def check_invariants(self) -> None:
        """Held + free = all, for blocks and slots. Raises AssertionError."""
        held: dict[int, int] = {}
        for request in self.running:
            assert len(set(request.block_table)) == len(request.block_table)
            assert len(request.block_table) * self.block_size >= request.num_computed_tokens
            for block in request.block_table:
                held[block] = held.get(block, 0) + 1
        self.pool.check_invariants(held)
        slots = [request.slot for request in self.running]
        assert sorted(slots + self._free_slots) == list(range(self.max_num_seqs))
        assert all(request.slot < 0 and not request.block_table for request in self.waiting)
        assert {id(r) for r in self._requests.values()} == {id(r) for r in [*self.running, *self.waiting]}
