"""The engine's client: what arrives, what is merged, and that whatever fails, nothing of it stays behind."""

import asyncio
import logging
import sys
from contextlib import aclosing
from itertools import count
from pathlib import Path

import pytest

from evenflow import LLM, EngineConfig, SamplingParams
from evenflow.detokenizer import StopChecker
from evenflow.engine.client import EngineClient, EngineDeadError
from evenflow.engine.input import InputProcessor
from evenflow.engine.opening import open_model
from evenflow.engine.output import _Child
from evenflow.sampling_params import StructuredOutputsParams
from evenflow.tokenizer import Tokenizer

ONCE = "Once upon a time"
FAULTY = str(Path(__file__).with_name("faulty_engine.py"))


def make_client(*fault, **options):
    config = EngineConfig(max_num_batched_tokens=64, max_num_seqs=8)
    command = (sys.executable, FAULTY, *map(str, fault)) if fault else None
    return EngineClient(config, open_model(config), **({"engine_command": command} if command else {}), **options)


def with_client(work, *fault, **options):
    """Run `work(client)`; afterwards the client and its engine must hold nothing."""

    async def main():
        client = make_client(*fault, **options)
        await client.start()
        try:
            result = await work(client)
            if client.error is None:
                await check_nothing_stays(client)
            return result
        finally:
            await client.close()
            assert client._process.returncode is not None
            assert not Path(client._directory).exists()

    return asyncio.run(main())


async def check_nothing_stays(client):
    assert client.num_requests == client.num_prompt_tokens == 0
    assert client._generation_of == client._timings == {}
    assert client._outputs.live_ids() == []
    while True:  # aborts are on their way
        stats = (await client.ping(30)).stats
        if stats.num_running == stats.num_waiting == 0:
            break
    assert stats.num_used_blocks == 0


async def collect(client, prompt, params, streaming=True):
    """(text, token ids, finish reason) of one prompt's first completion."""
    text, ids, reason = "", [], None
    async for output in client.generate(prompt, params, streaming=streaming):
        for completion in output.outputs:
            text += completion.text
            ids += completion.token_ids
            reason = completion.finish_reason
    return text, ids, reason


MIX = [
    SamplingParams(temperature=0, max_tokens=12),
    SamplingParams(seed=1, max_tokens=20),
    SamplingParams(seed=2, max_tokens=30, stop=[" the"]),
    SamplingParams(seed=3, max_tokens=16, logprobs=3),
    SamplingParams(seed=4, max_tokens=60, structured_outputs=StructuredOutputsParams(regex="[a-z ]{10,20}")),
    SamplingParams(seed=5, max_tokens=20, presence_penalty=1.0),
]


@pytest.fixture(scope="module")
def expected():
    llm = LLM("demo", max_num_batched_tokens=64, max_num_seqs=8)
    outputs = [output.outputs[0] for output in llm.generate([ONCE] * len(MIX), MIX, use_tqdm=False)]
    return [(c.text, c.token_ids, c.finish_reason) for c in outputs]


def test_what_arrives_is_what_the_engine_says_offline(expected):
    async def work(client):
        streamed = await asyncio.gather(*[collect(client, ONCE, params) for params in MIX])
        whole = await asyncio.gather(*[collect(client, ONCE, params, streaming=False) for params in MIX])
        return streamed, whole

    streamed, whole = with_client(work)
    assert list(streamed) == list(whole) == expected


def test_what_is_not_read_is_merged():
    async def work(client):
        generation = await client.open([ONCE, "The fox"], SamplingParams(max_tokens=50, seed=1), streaming=True)
        while (stats := (await client.ping(30)).stats).num_running + stats.num_waiting:
            pass
        outputs = [pair async for pair in generation]
        generation.abort()
        return outputs

    outputs = with_client(work)
    assert sorted(index for index, _ in outputs) == [0, 1]
    assert all(output.finished and len(output.outputs[0].token_ids) <= 50 for _, output in outputs)


def test_leaving_early_aborts():
    async def work(client):
        async with aclosing(client.generate(ONCE, SamplingParams(max_tokens=900, ignore_eos=True))) as outputs:
            async for _ in outputs:
                break
        generation = await client.open([ONCE] * 3, SamplingParams(n=4, max_tokens=900, ignore_eos=True))
        generation.abort()
        generation.abort()

    with_client(work)


def test_bad_input_is_refused_before_anything_is_queued():
    async def work(client):
        for prompts, params in (([ONCE, []], MIX[0]), ([[10**9]], MIX[0]), (["a" * 100_000], MIX[0])):
            with pytest.raises(ValueError, match="prompt"):
                await client.open(prompts, params)
            assert client.num_requests == client.num_prompt_tokens == 0
        return (await client.ping(30)).stats.num_steps

    assert with_client(work) == 0


def test_the_observer_sees_every_token():
    class Observer:
        def __init__(self):
            self.firsts, self.counts, self.stats = [], [], []

        def engine_stats(self, stats):
            self.stats.append(stats)

        def first_token(self, ttft_s, queue_s):
            self.firsts.append((ttft_s, queue_s))

        def tokens(self, count, itl_s):
            self.counts.append((count, itl_s))

    observer = Observer()

    async def work(client):
        params = SamplingParams(max_tokens=9, ignore_eos=True, n=3)
        await asyncio.gather(*[collect(client, ONCE, params) for _ in range(4)])

    with_client(work, observer=observer)
    assert len(observer.firsts) == 12
    assert all(0 <= queue_s <= ttft_s for ttft_s, queue_s in observer.firsts)
    assert sum(number for number, _ in observer.counts) == 12 * 9
    assert sum(number for number, itl_s in observer.counts if itl_s is None) == 12
    assert observer.stats[-1].num_output_tokens == 12 * 9


def test_a_start_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr("evenflow.engine.client.IMPORT_DEADLINE_S", 0.01)
    client = make_client()
    with pytest.raises(EngineDeadError, match=r"starting its process took longer than 0.01 s"):
        asyncio.run(client.start())
    assert client._process.returncode is not None


def test_an_engine_that_ends_at_once_is_told():
    config = EngineConfig()
    client = EngineClient(config, open_model(config), engine_command=(sys.executable, "-c", "raise SystemExit(3)"))
    with pytest.raises(EngineDeadError, match="ended with exit code 3 while starting its process"):
        asyncio.run(client.start())


def test_a_start_that_fails_is_told():
    client = make_client("build", 1)
    with pytest.raises(EngineDeadError, match="^planted: call 1 of build$") as caught:
        asyncio.run(client.start())
    assert not caught.value.is_bad_input


def test_a_message_that_cannot_be_used_is_the_end(monkeypatch, caplog):
    async def work(client):
        monkeypatch.setattr(client, "_apply", lambda message: 1 / 0)
        with pytest.raises(EngineDeadError, match="could not be used: ZeroDivisionError"):
            await collect(client, ONCE, MIX[0])

    with_client(work)


def test_a_large_model_on_a_cpu_gets_time_for_its_largest_step(monkeypatch):
    monkeypatch.setattr("evenflow.engine.client.SLOWEST_CPU_FLOPS", 1e6)

    async def work(client):
        return client._engine_timeout_s

    assert with_client(work) == pytest.approx(2 * 64 * 4_918_528 / 1e6)


def test_a_closed_client_takes_nothing():
    async def main():
        client = make_client()
        with pytest.raises(EngineDeadError, match="not running"):
            await client.open([ONCE], MIX[0])
        await client.start()
        await client.close()
        await client.close()
        with pytest.raises(EngineDeadError, match="not running"):
            await client.open([ONCE], MIX[0])
        assert not await client.is_ready()

    asyncio.run(main())


# Faults: the k-th call of something fails, for k = 1, 2, 3, ... until it does not come to that


async def run_mix(client, expected):
    """All of the mix at once. Each gives the right answer, or fails cleanly; returns how many failed."""
    results = await asyncio.gather(*[collect(client, ONCE, params) for params in MIX], return_exceptions=True)
    num_failed = 0
    for result, right in zip(results, expected, strict=True):
        if isinstance(result, BaseException):
            assert isinstance(result, (ValueError, RuntimeError)), result
            num_failed += 1
        elif result[2] == "error":
            num_failed += 1
        else:
            assert result == right
    return num_failed


@pytest.mark.parametrize(
    ("site", "steps"), [("forward", (1, 2, 9)), ("sampler", (1, 5)), ("masks", (2, 6)), ("admit", (3,))]
)
def test_a_step_that_fails_ends_its_requests_and_no_others(expected, site, steps):
    for k in steps:

        async def work(client):
            num_failed = await run_mix(client, expected)
            assert num_failed > 0
            assert await run_mix(client, expected) == 0  # the engine goes on, and nothing wrong is in its cache

        with_client(work, site, k)


def test_a_grammar_that_cannot_be_built_ends_its_request_only(expected):
    async def work(client):
        assert await run_mix(client, expected) == 1
        assert await run_mix(client, expected) == 0

    with_client(work, "grammar", 1)


FRONT = [(InputProcessor, "process"), (Tokenizer, "encode"), (StopChecker, "append"), (_Child, "apply")]


@pytest.mark.parametrize(("owner", "name"), FRONT)
def test_a_failure_in_the_front_ends_its_request_only(expected, monkeypatch, caplog, owner, name):
    caplog.set_level(logging.CRITICAL)

    async def work(client):
        for k in range(1, 200, 7):
            calls, original = count(1), getattr(owner, name)

            def failing(*args, k=k, calls=calls, original=original, **kwargs):
                if next(calls) == k:
                    raise RuntimeError("planted")
                return original(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, failing)
                num_failed = await run_mix(client, expected)
            await check_nothing_stays(client)
            if next(calls) <= k:
                assert num_failed == 0
                return k
            assert num_failed == 1
        raise AssertionError("the fault never stopped coming")

    assert with_client(work) > 1
