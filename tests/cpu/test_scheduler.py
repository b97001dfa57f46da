"""What the scheduler promises, rule by rule."""

import pytest

from evenflow.request import FinishReason, Request, RequestDelta, StepPlan, StepResult, TokenLogprobs
from evenflow.sampling_params import SamplingParams
from evenflow.scheduler import Scheduler

EOS = 2
PROMPT = list(range(100, 112))  # three blocks
LIMITS = {
    "num_blocks": 64,
    "block_size": 4,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "max_model_len": 64,
}


def make_scheduler(**limits) -> Scheduler:
    return Scheduler(**(LIMITS | limits))


def make_request(name: str, prompt: int | list[int], max_tokens: int = 8, *, salt: str = "", **params) -> Request:
    """`prompt` may be a length: then it shares no prefix with any other name."""
    token_ids = [1000 * ord(name[0]) + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    checked = SamplingParams(max_tokens=max_tokens, **params)
    stop = frozenset([EOS, *checked.stop_token_ids])
    return Request(name, list(token_ids), checked, max_tokens, stop, cache_salt=salt)


def rows(plan: StepPlan) -> list[tuple[str, int, int]]:
    return [(request.request_id, row.start, row.end) for row, request in zip(plan.rows, plan.requests, strict=True)]


def result(plan: StepPlan, token_id: int = 7, **extras) -> StepResult:
    return StepResult([token_id if row.samples else -1 for row in plan.rows], **extras)


def step(scheduler: Scheduler, token_id: int = 7) -> tuple[list[tuple[str, int, int]], list[RequestDelta]]:
    plan = scheduler.schedule()
    return rows(plan), scheduler.update(plan, result(plan, token_id))


def run(scheduler: Scheduler, token_id: int = 7) -> None:
    while scheduler.has_unfinished:
        assert step(scheduler, token_id)[0]
        scheduler.check_invariants()


class TestPolicy:
    def test_running_requests_come_before_newcomers(self):
        scheduler = make_scheduler()
        scheduler.add(make_request("a", 3))
        assert step(scheduler)[0] == [("a", 0, 3)]
        scheduler.add(make_request("b", 3))
        assert step(scheduler)[0] == [("a", 3, 4), ("b", 0, 3)]

    def test_a_long_prompt_is_computed_in_chunks_beside_the_others(self):
        scheduler = make_scheduler()
        scheduler.add(make_request("a", 3))
        step(scheduler)
        scheduler.add(make_request("b", 40))
        assert step(scheduler)[0] == [("a", 3, 4), ("b", 0, 15)]
        plan = scheduler.schedule()
        assert rows(plan) == [("a", 4, 5), ("b", 15, 30)]
        assert [row.samples for row in plan.rows] == [True, False]
        assert [delta.request_id for delta in scheduler.update(plan, result(plan))] == ["a"]
        assert step(scheduler)[0] == [("a", 5, 6), ("b", 30, 40)]

    def test_without_chunks_a_prompt_waits_for_a_step_that_takes_it_whole(self):
        scheduler = make_scheduler(enable_chunked_prefill=False, max_model_len=16)
        for name in "ab":
            scheduler.add(make_request(name, 12, max_tokens=2))
        assert step(scheduler)[0] == [("a", 0, 12)]
        assert step(scheduler)[0] == [("a", 12, 13), ("b", 0, 12)]

    def test_nobody_overtakes_one_that_does_not_fit(self):
        scheduler = make_scheduler(num_blocks=5)
        scheduler.add(make_request("a", 8))
        step(scheduler)
        scheduler.add(make_request("b", 15, max_tokens=4))
        scheduler.add(make_request("c", 1, max_tokens=4))
        assert step(scheduler)[0] == [("a", 8, 9)]
        assert scheduler.num_waiting == 2

    def test_the_slots_bound_the_running_requests(self):
        scheduler = make_scheduler(max_num_seqs=2)
        for name in "abc":
            scheduler.add(make_request(name, 2, max_tokens=2))
        assert step(scheduler)[0] == [("a", 0, 2), ("b", 0, 2)]
        assert step(scheduler)[0] == [("a", 2, 3), ("b", 2, 3)]
        assert step(scheduler)[0] == [("c", 0, 2)]

    def test_the_budget_bounds_the_tokens_of_a_step(self):
        scheduler = make_scheduler(max_num_batched_tokens=3)
        for name in "abcd":
            scheduler.add(make_request(name, 1))
        assert step(scheduler)[0] == [("a", 0, 1), ("b", 0, 1), ("c", 0, 1)]
        assert step(scheduler)[0] == [("a", 1, 2), ("b", 1, 2), ("c", 1, 2)]

    def test_a_run_is_reproducible(self):
        def plans():
            scheduler = make_scheduler(num_blocks=16)
            for name in "abcdef":
                scheduler.add(make_request(name, 13, max_tokens=20))
            while scheduler.has_unfinished:
                plan = scheduler.schedule()
                yield plan.rows
                scheduler.update(plan, result(plan))

        assert list(plans()) == list(plans())


class TestPreemption:
    def preempting(self) -> Scheduler:
        """a and b leave one block; in the next step both need one, and b must give way."""
        scheduler = make_scheduler(num_blocks=5)
        for name in "ab":
            scheduler.add(make_request(name, 8))
        assert step(scheduler)[0] == [("a", 0, 8), ("b", 0, 8)]
        return scheduler

    def test_nobody_is_admitted_into_the_blocks_that_the_running_need_next(self):
        """One each. Before, the newcomer was preempted as soon as they grew."""
        scheduler = make_scheduler(num_blocks=6, max_num_batched_tokens=64)
        for name, prompt in zip("abc", (8, 8, 3), strict=True):
            scheduler.add(make_request(name, prompt, max_tokens=2))
        assert step(scheduler)[0] == [("a", 0, 8), ("b", 0, 8)]
        assert step(scheduler)[0] == [("a", 8, 9), ("b", 8, 9)]
        assert step(scheduler)[0] == [("c", 0, 3)]
        assert scheduler.num_preemptions == 0

    @pytest.mark.parametrize(("max_tokens", "num_running"), [(1, 3), (2, 2)])
    def test_nothing_is_kept_for_who_needs_no_more(self, max_tokens, num_running):
        """The last token is stored nowhere: a prompt that fills its blocks and gets one token needs no other."""
        scheduler = make_scheduler(num_blocks=3, max_num_batched_tokens=64)
        for name in "abc":
            scheduler.add(make_request(name, 4, max_tokens=max_tokens))
        assert len(step(scheduler)[0]) == num_running
        run(scheduler)
        assert scheduler.num_preemptions == (max_tokens > 1)

    def test_a_pool_that_one_prompt_fills_runs_it(self):
        scheduler = make_scheduler(num_blocks=4)
        scheduler.add(make_request("a", 15, max_tokens=1))
        assert step(scheduler)[0] == [("a", 0, 15)]

    def test_the_youngest_gives_way_and_is_computed_again_with_its_output(self):
        scheduler = self.preempting()
        assert step(scheduler)[0] == [("a", 8, 9)]
        assert scheduler.num_preemptions == 1
        scheduler.finish("a", FinishReason.ABORT)
        plan = scheduler.schedule()
        assert plan.admitted[0].token_ids[8:] == [7]
        assert plan.rows[0].end == 9

    def test_a_step_that_took_blocks_back_admits_nobody_although_a_chunk_would_fit(self):
        limits = {"num_blocks": 6, "max_num_batched_tokens": 8, "max_model_len": 24, "enable_prefix_caching": False}
        scheduler = make_scheduler(**limits)
        scheduler.add(make_request("a", 7))
        scheduler.add(make_request("b", 11))
        planned = []
        while not scheduler.num_preemptions:
            planned = step(scheduler)[0]
        assert scheduler.pool.num_free >= 2, "enough for the first 7 tokens of b"
        assert [name for name, *_ in planned] == ["a"]
        assert [name for name, *_ in step(scheduler)[0]] == ["a", "b"]

    def test_the_preempted_return_before_newcomers_in_their_order(self):
        scheduler = make_scheduler(num_blocks=6)
        for name in "abc":
            scheduler.add(make_request(name, [ord(name)] * 4, max_tokens=20))
        scheduler.add(make_request("d", 16))
        seen = []
        while scheduler.has_unfinished:
            plan = scheduler.schedule()
            seen += [plan.requests[i].request_id for i, row in enumerate(plan.rows) if row.start == 0]
            waiting = [request.request_id for request in scheduler.waiting]
            assert waiting == sorted(waiting)
            scheduler.update(plan, result(plan))
        assert scheduler.num_preemptions > 0
        assert seen[-1] == "d"

    def test_every_request_that_was_accepted_ends(self):
        scheduler = make_scheduler(num_blocks=5, max_model_len=20)
        for name in "abcdef":
            scheduler.add(make_request(name, 12, max_tokens=8))
        run(scheduler)
        assert scheduler.pool.num_free == 5


class TestPrefixCache:
    def cached(self, prompt: list[int], salt: str = "", **limits) -> int:
        """How much of `prompt` is found after PROMPT has run."""
        scheduler = make_scheduler(**limits)
        scheduler.add(make_request("a", PROMPT, max_tokens=1))
        run(scheduler)
        scheduler.add(make_request("b", prompt, max_tokens=1, salt=salt))
        ((_, start, _),), (delta,) = step(scheduler)
        assert delta.num_cached_tokens == start
        return start

    def test_full_blocks_are_found(self):
        assert self.cached([*PROMPT, 5]) == 12
        assert self.cached([*PROMPT[:11], 5]) == 8
        assert self.cached([5, *PROMPT]) == 0

    def test_the_last_token_is_always_computed(self):
        assert self.cached(PROMPT) == 8

    def test_only_the_same_salt_shares(self):
        assert self.cached([*PROMPT, 5], salt="another") == 0

    def test_off_is_off(self):
        assert self.cached([*PROMPT, 5], enable_prefix_caching=False) == 0

    def test_equal_prompts_that_arrive_together_are_computed_once(self):
        scheduler = make_scheduler()
        for name in "abc":
            scheduler.add(make_request(name, [*PROMPT, 5]))
        assert step(scheduler)[0] == [("a", 0, 13), ("b", 12, 13), ("c", 12, 13)]
        assert scheduler.num_prefix_hits == 24
        assert scheduler.num_prefix_queries == 39

    def test_generated_tokens_are_found_too(self):
        scheduler = make_scheduler()
        request = make_request("a", 3, max_tokens=6)
        scheduler.add(request)
        run(scheduler)
        scheduler.add(make_request("b", [*request.token_ids, 5]))
        assert step(scheduler)[0] == [("b", 8, 10)]

    @pytest.mark.parametrize(("shift", "found"), [(0, 4), (50, 8)])
    def test_the_least_recently_used_goes_first_and_of_a_prefix_its_tail(self, shift, found):
        scheduler = make_scheduler(num_blocks=6)
        old, new = PROMPT, [token_id + 50 for token_id in PROMPT]
        for name, prompt in (("a", old), ("b", new), ("c", 5)):  # c takes two of the old one's three blocks
            scheduler.add(make_request(name, prompt, max_tokens=1))
            run(scheduler)
        scheduler.add(make_request("d", [token_id + shift for token_id in PROMPT], max_tokens=1))
        assert scheduler.schedule().rows[0].start == found

    def test_prompt_logprobs_need_every_position(self):
        scheduler = make_scheduler()
        scheduler.add(make_request("a", PROMPT, max_tokens=1))
        run(scheduler)
        scheduler.add(make_request("b", PROMPT, prompt_logprobs=0))
        assert step(scheduler)[0] == [("b", 0, 12)]


class TestRefusals:
    def test_too_long_for_the_context(self):
        with pytest.raises(ValueError, match="prompt of 60 .* max_tokens=8 exceeds the 64 tokens"):
            make_scheduler().add(make_request("a", 60))

    def test_too_long_for_the_pool(self):
        with pytest.raises(ValueError, match="prompt of 5 .* max_tokens=8 exceeds the 12 tokens"):
            make_scheduler(num_blocks=3).add(make_request("a", 5))

    def test_an_id_that_is_in_use(self):
        scheduler = make_scheduler()
        scheduler.add(make_request("a", 5))
        with pytest.raises(ValueError, match="'a' is already in use"):
            scheduler.add(make_request("a", 5))
        run(scheduler)
        scheduler.add(make_request("a", 5))


class TestEnds:
    def ends(self, token_ids: list[int], **params) -> tuple[FinishReason | None, int | None, int]:
        """Finish reason, stop reason and number of tokens when these are sampled."""
        scheduler = make_scheduler()
        request = make_request("a", 3, **params)
        scheduler.add(request)
        for token_id in token_ids:
            (delta,) = step(scheduler, token_id)[1]
            assert delta.finish_reason is request.finish_reason
            if not scheduler.has_unfinished:
                break
        return request.finish_reason, request.stop_reason, request.num_output_tokens

    def test_end_of_sequence(self):
        assert self.ends([5, EOS, 5]) == (FinishReason.STOP, None, 2)

    def test_a_stop_token_is_named(self):
        assert self.ends([5, 9, 5], stop_token_ids=[9]) == (FinishReason.STOP, 9, 2)

    def test_max_tokens(self):
        assert self.ends([5] * 4, max_tokens=3) == (FinishReason.LENGTH, None, 3)

    def test_a_stop_token_in_the_last_place_is_a_stop(self):
        assert self.ends([5, 5, EOS], max_tokens=3) == (FinishReason.STOP, None, 3)

    def test_no_stop_among_the_first_min_tokens(self):
        assert self.ends([EOS, EOS, EOS, 5], min_tokens=2) == (FinishReason.STOP, None, 3)

    def test_an_abort_is_harmless_in_any_state_and_twice(self):
        scheduler = make_scheduler(max_num_seqs=1)
        for name in "ab":
            scheduler.add(make_request(name, 3))
        step(scheduler)
        for name in ("b", "b", "a", "a", "unknown"):
            scheduler.finish(name, FinishReason.ABORT)
            scheduler.check_invariants()
        assert not scheduler.has_unfinished
        assert not scheduler.schedule().rows
        assert scheduler.pool.num_free == scheduler.num_blocks


class TestExtras:
    def test_prompt_logprobs_come_once_although_preemption_computes_them_again(self):
        scheduler = make_scheduler(num_blocks=7, max_num_batched_tokens=3)
        scheduler.add(make_request("a", 4, max_tokens=16))
        scheduler.add(make_request("b", 18, max_tokens=2, prompt_logprobs=0))
        positions = []
        while scheduler.has_unfinished:
            plan = scheduler.schedule()
            found = {
                index: [TokenLogprobs([p], [0.0], 1) for p in range(row.start, min(row.end, 17))]
                for index, row in enumerate(plan.rows)
                if plan.requests[index].request_id == "b" and row.start < 17
            }
            for delta in scheduler.update(plan, result(plan, prompt_logprobs=found)):
                positions += [entry.token_ids[0] for entry in delta.prompt_logprobs or []]
        assert scheduler.num_preemptions > 0
        assert positions == list(range(17))

    def test_logprobs_go_with_their_token(self):
        scheduler = make_scheduler()
        for name in "ab":
            scheduler.add(make_request(name, 3, logprobs=0))
        plan = scheduler.schedule()
        entry = TokenLogprobs([7], [-0.5], 1)
        first, second = scheduler.update(plan, result(plan, logprobs={1: entry}))
        assert (first.logprobs, second.logprobs) == (None, [entry])


class TestOverlap:
    def test_a_step_is_planned_while_the_one_before_runs(self):
        scheduler = make_scheduler()
        scheduler.add(make_request("a", 3))
        first, second = scheduler.schedule(), scheduler.schedule()
        assert (rows(first), rows(second)) == ([("a", 0, 3)], [("a", 3, 4)])
        assert scheduler.update(first, result(first, 5))[0].new_token_ids == [5]
        assert scheduler.update(second, result(second, 6))[0].new_token_ids == [6]

    def test_no_step_is_planned_beyond_max_tokens(self):
        scheduler = make_scheduler()
        scheduler.add(make_request("a", 3, max_tokens=2))
        plans = [scheduler.schedule() for _ in range(3)]
        assert [len(plan.rows) for plan in plans] == [1, 1, 0]

    def test_what_is_sampled_after_the_end_is_dropped(self):
        scheduler = make_scheduler()
        scheduler.add(make_request("a", 3))
        first, second = scheduler.schedule(), scheduler.schedule()
        assert scheduler.update(first, result(first, EOS))[0].finish_reason is FinishReason.STOP
        assert scheduler.update(second, result(second)) == []
        assert not scheduler.has_unfinished

    def test_a_preempted_request_waits_for_its_token(self):
        scheduler = make_scheduler(num_blocks=5)
        for name in "ab":
            scheduler.add(make_request(name, 8))
        first = scheduler.schedule()
        second = scheduler.schedule()
        assert rows(second) == [("a", 8, 9)]
        scheduler.finish("a", FinishReason.ABORT)
        assert not scheduler.schedule().rows
        scheduler.update(first, result(first, 5))
        (admitted,) = scheduler.schedule().admitted
        assert admitted.token_ids[8:] == [5]


class TestFailures:
    def test_a_row_that_fails_ends_alone(self):
        scheduler = make_scheduler()
        for name in "ab":
            scheduler.add(make_request(name, 3))
        plan = scheduler.schedule()
        first, second = scheduler.update(plan, result(plan, errors={0: "not finite"}))
        assert (first.finish_reason, first.error, first.new_token_ids) == (FinishReason.ERROR, "not finite", [])
        assert (second.finish_reason, second.new_token_ids) == (None, [7])

    def test_a_step_that_fails_ends_its_requests_and_no_other(self):
        scheduler = make_scheduler(max_num_seqs=1)
        for name in "ab":
            scheduler.add(make_request(name, 3))
        deltas = scheduler.fail_step(scheduler.schedule(), "out of memory")
        assert [(delta.request_id, delta.error) for delta in deltas] == [("a", "out of memory")]
        assert step(scheduler)[0] == [("b", 0, 3)]

    @pytest.mark.parametrize("fails", ["row", "step"])
    @pytest.mark.parametrize("meanwhile", ["nothing", "abort", "preemption"])
    def test_what_failed_is_not_found_again(self, fails, meanwhile):
        scheduler = make_scheduler()
        scheduler.add(make_request("a", PROMPT))
        failing = scheduler.schedule()
        if meanwhile == "abort":
            scheduler.finish("a", FinishReason.ABORT)
        elif meanwhile == "preemption":
            scheduler._preempt(scheduler.running[-1])
        if fails == "row":
            scheduler.update(failing, result(failing, errors={0: "not finite"}))
        else:
            scheduler.fail_step(failing, "out of memory")
        scheduler.add(make_request("b", [*PROMPT, 5]))
        assert rows(scheduler.schedule()) == [("b", 0, 13)]

    def handed_out_dirty(self, scheduler: Scheduler) -> set[int]:
        """Blocks that are zeroed when a request takes the whole pool."""
        scheduler.add(make_request("z", 27, max_tokens=1))
        plan = scheduler.schedule()
        assert len(plan.rows[0].new_block_ids) == 7
        return set(plan.zero_block_ids)

    def test_the_blocks_of_a_failed_request_are_zeroed_before_use(self):
        scheduler = make_scheduler(num_blocks=7, max_num_batched_tokens=64)
        scheduler.add(make_request("a", 6))
        plan = scheduler.schedule()
        scheduler.update(plan, result(plan, errors={0: "not finite"}))
        assert self.handed_out_dirty(scheduler) == set(plan.rows[0].new_block_ids)
        assert not scheduler.pool.zero_block_ids

    def test_so_are_those_of_one_that_ended_before_a_failure_could_show(self):
        scheduler = make_scheduler(num_blocks=7, max_num_batched_tokens=64)
        scheduler.add(make_request("a", 6))
        plan = scheduler.schedule()
        scheduler.finish("a", FinishReason.ABORT)
        assert self.handed_out_dirty(scheduler) == set(plan.rows[0].new_block_ids)

    def test_so_is_the_block_that_a_surplus_token_is_written_to(self):
        scheduler = make_scheduler(num_blocks=7, max_num_batched_tokens=64)
        scheduler.add(make_request("a", 8))
        first, second = scheduler.schedule(), scheduler.schedule()
        scheduler.update(first, result(first, EOS))
        assert self.handed_out_dirty(scheduler) == set(second.rows[0].new_block_ids)

    def test_a_request_that_ended_well_leaves_nothing_to_zero(self):
        scheduler = make_scheduler(num_blocks=7, max_num_batched_tokens=64)
        scheduler.add(make_request("a", 8))
        run(scheduler)
        assert self.handed_out_dirty(scheduler) == set()


class TestOddCallers:
    def test_an_unknown_request_object_is_left_alone(self):
        scheduler = make_scheduler()
        request = make_request("a", 3)
        scheduler.finish(request, FinishReason.ABORT)
        assert request.finish_reason is None
        scheduler.add(make_request("a", 3))
        scheduler.finish(request, FinishReason.ABORT)  # another one of the same id
        assert scheduler.num_waiting == 1

    def test_an_empty_prompt_and_chunks_that_cannot_be_are_refused(self):
        with pytest.raises(ValueError, match="prompt of 0 tokens"):
            make_scheduler().add(make_request("a", []))
        with pytest.raises(ValueError, match="max_num_batched_tokens=31 .*max_model_len=32"):
            make_scheduler(enable_chunked_prefill=False, max_num_batched_tokens=31, max_model_len=32)

    def test_prompt_logprobs_that_were_told_make_no_delta(self):
        scheduler = make_scheduler(num_blocks=4, max_num_batched_tokens=4, max_model_len=16)
        scheduler.add(make_request("old", 4))
        scheduler.add(make_request("a", 8, max_tokens=4, prompt_logprobs=0))
        while scheduler.has_unfinished:
            plan = scheduler.schedule()
            found = {
                index: [TokenLogprobs([p + 1], [0.0], 1) for p in range(row.start, min(row.end, 7))]
                for index, (row, request) in enumerate(zip(plan.rows, plan.requests, strict=True))
                if request.request_id == "a" and row.start < 7
            }
            for delta in scheduler.update(plan, result(plan, prompt_logprobs=found)):
                assert delta.new_token_ids or delta.prompt_logprobs
        assert scheduler.num_preemptions
