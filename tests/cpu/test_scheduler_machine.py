"""Anything may happen to the scheduler in any order: a state machine, seeded walks, and bugs planted to be found."""

import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from shadow_kv import VOCAB, Config, World

from evenflow.scheduler import Scheduler, block_pool, prefix_cache
from evenflow.scheduler import scheduler as scheduler_module

FAMILIES = [[(7 * family + 3 * i) % VOCAB for i in range(12)] for family in range(3)]
STOPS = [(), range(0, VOCAB, 5), range(VOCAB)]


def make_prompt(family: int, length: int, last: int) -> list[int]:
    """One of few prefixes; `last` other than 0 makes its last token differ from its family's."""
    prompt = FAMILIES[family][:length]
    return prompt if not last else [*prompt[:-1], (prompt[-1] + last) % VOCAB]


def make_config(draw) -> Config:
    """draw(low, high) -> int. Pools so small that preemption is common."""
    block_size, max_model_len = draw(1, 4), draw(6, 16)
    least = -(-max_model_len // block_size)
    is_chunked = draw(0, 3) > 0
    return Config(
        block_size=block_size,
        num_blocks=max(2, least + draw(-2, 6)),
        max_num_seqs=draw(1, 5),
        max_num_batched_tokens=draw(1, 16) if is_chunked else max_model_len + draw(0, 4),
        max_model_len=max_model_len,
        enable_prefix_caching=draw(0, 4) > 0,
        enable_chunked_prefill=is_chunked,
    )


def make_request(draw) -> dict:
    max_tokens = draw(1, 8)
    return {
        "prompt": make_prompt(draw(0, 2), draw(1, 12), draw(0, 1)),
        "max_tokens": max_tokens,
        "salt": draw(0, 1),
        "stop": STOPS[draw(0, 2)] if draw(0, 2) else (),
        "min_tokens": draw(0, max_tokens) if draw(0, 1) else 0,
        "prompt_logprobs": 1 if draw(0, 4) == 0 else None,
        "logprobs": 1 if draw(0, 3) == 0 else None,
    }


def mostly_fits(request: dict, config: Config) -> dict:
    """Refusals are one rule of many: cut most prompts to what the world can hold."""
    room = min(config.max_model_len, config.num_blocks * config.block_size) - request["max_tokens"]
    return request | {"prompt": request["prompt"][: max(room, 1)]}


class SchedulerMachine(RuleBasedStateMachine):
    """The rules of World in any order that Hypothesis finds."""

    @initialize(data=st.data())
    def start(self, data):
        self.world = World(make_config(lambda low, high: data.draw(st.integers(low, high))))

    @rule(data=st.data(), count=st.sampled_from([1, 1, 1, 4]))
    def add(self, data, count):
        request = make_request(lambda low, high: data.draw(st.integers(low, high)))
        for _ in range(count):
            self.world.add(**request)

    @rule(number=st.integers(0, 30), num_tokens=st.integers(1, 15), max_tokens=st.integers(1, 4))
    def follow_up(self, number, num_tokens, max_tokens):
        self.world.follow_up(number, num_tokens, max_tokens=max_tokens)

    @precondition(lambda self: self.world.launched)
    @rule(row=st.integers(0, 4))
    def abort_in_flight(self, row):
        requests = self.world.launched[0][0].requests
        self.world.abort(self.world.by_id[requests[row % len(requests)].request_id].number)

    @rule(number=st.integers(0, 30))
    def abort(self, number):
        self.world.abort(number)

    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            self.world.launch()
            self.world.collect()
            self.world.check()

    @rule(count=st.integers(1, 3))
    def launch(self, count):
        for _ in range(count):
            self.world.launch()

    @precondition(lambda self: self.world.launched)
    @rule()
    def collect(self):
        self.world.collect()

    @precondition(lambda self: self.world.launched)
    @rule(row=st.integers(0, 4))
    def fail_row(self, row):
        self.world.collect([row])

    @precondition(lambda self: self.world.launched)
    @rule()
    def fail_step(self):
        self.world.collect(fails=True)

    @rule()
    def drain(self):
        self.world.drain()

    @invariant()
    def holds(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.drain()


SchedulerMachine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
TestSchedulerMachine = SchedulerMachine.TestCase


def walk(seed: int, scheduler_class: type = Scheduler, num_rules: int = 60) -> World:
    """The same rules, drawn from a seed: as many as Hypothesis would take seconds for, in milliseconds."""
    rng = random.Random(seed)
    world = World(make_config(rng.randint), scheduler_class)
    max_in_flight = rng.choice([1, 1, 2, 3])
    failure_rate = rng.choice([0, 0, 0.05, 0.4])
    abort_rate = rng.choice([0.02, 0.08, 0.15])
    for _ in range(num_rules):
        action = rng.random()
        if action < 0.2:
            add(world, rng)
        elif action < 0.2 + abort_rate:
            abort(world, rng)
        elif action < 0.21 + abort_rate:
            world.drain()
        elif action < 0.68 and len(world.launched) < max_in_flight:
            world.launch()
        else:
            is_failing = rng.random() < failure_rate
            world.collect([rng.randint(0, 3)] if is_failing else (), fails=is_failing and rng.random() < 0.5)
        world.check()
    world.drain()
    return world


def walk_many(num_walks: int, scheduler_class: type) -> None:
    for seed in range(num_walks):
        walk(seed, scheduler_class)


def add(world: World, rng: random.Random) -> None:
    if world.tracked and rng.random() < 0.25:
        world.follow_up(
            rng.randrange(len(world.tracked)), rng.choice([15, rng.randint(1, 15)]), max_tokens=rng.randint(1, 4)
        )
        return
    request = make_request(rng.randint)
    if rng.random() < 0.9:
        request = mostly_fits(request, world.config)
    for _ in range(rng.choice([1, 1, 1, 4])):
        world.add(**request)


def abort(world: World, rng: random.Random) -> None:
    if world.launched and rng.random() < 0.5:
        victim = rng.choice(world.launched[0][0].requests)
        world.abort(world.by_id[victim.request_id].number)
    else:
        world.abort(rng.randint(max(len(world.tracked) - 8, 0), len(world.tracked) + 1))


@pytest.mark.parametrize("start", range(0, 600, 100))
def test_every_request_gets_its_tokens_whatever_happens(start):
    for seed in range(start, start + 100):
        walk(seed)


def test_the_walks_go_where_the_bugs_are():
    worlds = [walk(seed) for seed in range(100)]
    assert sum(world.scheduler.num_preemptions for world in worlds) > 100
    assert sum(world.scheduler.num_prefix_hits for world in worlds) > 1000


# name: (module, what is there, what a bug makes of it)
PLANTED = {
    "an abort leaks the blocks": (scheduler_module, "            self._release(found)\n", "            pass\n"),
    "a preemption leaks the blocks": (
        scheduler_module,
        "self.pool.release(reversed(request.block_table))",
        "request.finish_reason and self.pool.release(reversed(request.block_table))",
    ),
    "blocks are released twice": (
        scheduler_module,
        "self.pool.release(reversed(request.block_table))",
        "self.pool.release(request.block_table * 2)",
    ),
    "a hit takes no reference": (block_pool, "self.references[block] += 1", "self.references[block] = 1"),
    "a hit stays in the free list": (block_pool, "del self._free[block]", "pass"),
    "a block handed out keeps its name": (block_pool, "if block in self._hash_of:", "if False:"),
    "a partial block gets a name": (
        scheduler_module,
        "hashes = extend_block_hashes(request, self.block_size)\n            for",
        "num_full = -(-min(end, len(request.token_ids)) // self.block_size)\n"
        "            hashes = extend_block_hashes(request, self.block_size)\n"
        "            num_full = min(num_full, len(hashes))\n            for",
    ),
    "blocks are named before they are computed": (
        scheduler_module,
        "num_full = min(end, len(request.token_ids)) // self.block_size",
        "num_full = min(len(request.token_ids) // self.block_size, len(request.block_table))",
    ),
    "a preemption keeps the progress": (
        scheduler_module,
        "start = len(hits) * self.block_size",
        "start = num_total - 1 if request.num_preemptions else len(hits) * self.block_size",
    ),
    "the salt is ignored": (prefix_cache, "cache_salt.encode()", 'b""'),
    "names have four bits": (
        prefix_cache,
        'return blake2b(parent + array("I", token_ids).tobytes(), digest_size=DIGEST_BYTES).digest()',
        'return bytes([blake2b(parent + array("I", token_ids).tobytes()).digest()[0] % 16])',
    ),
    "names are not chained": (prefix_cache, "blake2b(parent + array", 'blake2b(b"" + array'),
    "last come, first served": (scheduler_module, "self.waiting.append(request)", "self.waiting.appendleft(request)"),
    "the preempted go to the back": (
        scheduler_module,
        "self.waiting.appendleft(victim)",
        "self.waiting.append(victim)",
    ),
    "the oldest is preempted": (scheduler_module, "self._preempt(self.running[-1])", "self._preempt(self.running[0])"),
    "the budget is one more": (
        scheduler_module,
        "budget, block_size, pool = self.max_num_batched_tokens,",
        "budget, block_size, pool = self.max_num_batched_tokens + 1,",
    ),
    "admission does not count": (
        scheduler_module,
        "            budget -= end - start\n            admitted",
        "            admitted",
    ),
    "a slot is kept": (
        scheduler_module,
        "self._free_slots.append(request.slot)",
        "request.finish_reason or self._free_slots.append(request.slot)",
    ),
    "the whole prompt may be a hit": (
        scheduler_module,
        "hashes[: (len(request.token_ids) - 1) // self.block_size]",
        "hashes[: len(request.token_ids) // self.block_size]",
    ),
    "a hit counts one token too many": (
        scheduler_module,
        "start = len(hits) * self.block_size",
        "start = len(hits) * self.block_size + bool(hits)",
    ),
    "hits are not counted as free blocks": (
        scheduler_module,
        "self.pool.num_free - sum(self.pool.references[block] == 0 for block in hits)",
        "self.pool.num_free",
    ),
    "a preemption drops the token on its way": (
        scheduler_module,
        "        victim.num_preemptions += 1",
        "        victim.num_inflight_tokens = 0\n        victim.num_preemptions += 1",
    ),
    "admitted while a token is on its way": (scheduler_module, "if request.num_inflight_tokens:\n", "if False:\n"),
    "the last token is asked for twice": (
        scheduler_module,
        ">= request.max_tokens:\n                continue",
        "> request.max_tokens:\n                continue",
    ),
    "a failed request's blocks keep their names": (
        scheduler_module,
        "                self.pool.forget(block)\n",
        "                pass\n",
    ),
    "failures forget only the table": (
        scheduler_module,
        "for block_hash in request.block_hashes:",
        "for block_hash in request.block_hashes[: len(request.block_table)]:",
    ),
    "a failure after the request's end is ignored": (
        scheduler_module,
        "            self._distrust(request)\n            return []",
        "            return []",
    ),
    "unverified blocks are not zeroed": (
        scheduler_module,
        "self.pool.mark_dirty(self._unverified_blocks(request))",
        "pass",
    ),
    "nothing is zeroed": (block_pool, "self.zero_block_ids.append(block)", "pass"),
    "a token comes after the end": (
        scheduler_module,
        "            if request.finish_reason is not None:\n                continue\n            delta",
        "            delta",
    ),
    "stop tokens are ignored": (scheduler_module, "max_tokens or token_id in request.stop_token_ids:", "max_tokens:"),
    "min_tokens is off by one": (
        scheduler_module,
        "num_output_tokens > request.params.min_tokens",
        "num_output_tokens >= request.params.min_tokens",
    ),
    "max_tokens is off by one": (
        scheduler_module,
        "elif num_output_tokens >= request.max_tokens",
        "elif num_output_tokens > request.max_tokens",
    ),
    "prompt logprobs come again after preemption": (
        scheduler_module,
        "found[max(request.num_prompt_logprobs - row.start, 0) :]",
        "found",
    ),
    "prompt logprobs are skipped by hits": (
        scheduler_module,
        "wants_all = request.params.prompt_logprobs is not None",
        "wants_all = False",
    ),
    "what never fits is accepted": (scheduler_module, "if longest > capacity:", "if False:"),
}


def plant(module: ModuleType, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> type:
    """The Scheduler of a package in which `old` reads `new`."""
    for original in (block_pool, prefix_cache, scheduler_module):
        source = Path(str(original.__file__)).read_text()
        if original is module:
            assert source.count(old) == 1, (
                f"the planted bug does not apply any more: {old!r} is there {source.count(old)} times"
            )
            source = source.replace(old, new)
        copy = ModuleType(original.__name__)
        monkeypatch.setitem(sys.modules, original.__name__, copy)
        exec(compile(source, f"<planted {original.__name__}>", "exec"), vars(copy))
    planted: type = copy.Scheduler
    return planted


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_found(bug, monkeypatch):
    scheduler_class = plant(*PLANTED[bug], monkeypatch)
    with pytest.raises((AssertionError, LookupError, ValueError, TypeError)):
        walk_many(2000, scheduler_class)
