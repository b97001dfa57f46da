"""Full collections of a run walk what the run has made: everything else is frozen, and only as long."""

import asyncio
import gc
from types import SimpleNamespace

import pytest

from evenflow import LLM, SamplingParams, garbage
from evenflow.config import EngineConfig
from evenflow.engine import process, worker
from evenflow.engine.client import EngineDeadError
from evenflow.engine.messages import Start
from evenflow.garbage import only_new_objects
from evenflow.server.serving import Life

MANY = 10_000  # objects of the interpreter and the libraries: there are ten times as many


def test_objects_are_frozen_within_and_only_there():
    with only_new_objects():
        assert gc.get_freeze_count() > MANY
        made = [[]]
        assert any(known is made for known in gc.get_objects())
        with only_new_objects():
            pass
        assert gc.get_freeze_count() > MANY
    assert gc.get_freeze_count() == 0


def test_an_error_leaves_nothing_frozen():
    with pytest.raises(KeyError), only_new_objects():
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_what_others_froze_stays_frozen():
    gc.freeze()
    try:
        with only_new_objects():
            pass
        assert gc.get_freeze_count() > MANY
    finally:
        gc.unfreeze()


def test_the_few_that_python_froze_itself_do_not_count(monkeypatch):
    """As 3.12 does at its start."""
    calls = []
    stand_in = SimpleNamespace(
        get_freeze_count=lambda: 375, freeze=lambda: calls.append("freeze"), unfreeze=lambda: calls.append("unfreeze")
    )
    monkeypatch.setattr(garbage, "gc", stand_in)
    with only_new_objects():
        assert calls == ["freeze"]
    assert calls == ["freeze", "unfreeze"]


def test_steps_of_generate_run_so(monkeypatch):
    llm = LLM("demo")
    seen, step = [], llm.engine.step

    def watched():
        seen.append(gc.get_freeze_count())
        return step()

    monkeypatch.setattr(llm.engine, "step", watched)
    llm.generate("Once", SamplingParams(max_tokens=3), use_tqdm=False)
    assert min(seen) > MANY
    assert gc.get_freeze_count() == 0


def test_an_engine_process_runs_so():
    seen = []

    class Server:
        def __init__(self, engine, channel):
            pass

        def run(self):
            seen.append(gc.get_freeze_count())

    channel = SimpleNamespace(send=lambda message: None, receive=lambda wait: [Start(EngineConfig(model="demo"))])
    assert process.serve(channel, Server) == 0
    assert seen[0] > MANY
    assert gc.get_freeze_count() == 0


def test_another_rank_runs_so(monkeypatch):
    seen = []
    monkeypatch.setattr(worker, "receive_for_rank", lambda plans: seen.append(gc.get_freeze_count()))  # None: the end
    worker.serve(runner=None, plans=None, progress=None, lag=0)
    assert seen[0] > MANY
    assert gc.get_freeze_count() == 0


def test_a_server_answers_so():
    seen = []

    async def start():
        pass

    async def wait_dead():
        seen.append(gc.get_freeze_count())
        return EngineDeadError("gone")

    client = SimpleNamespace(start=start, wait_dead=wait_dead, memory_account="")
    front = SimpleNamespace(client=client, model_name="m", metrics=SimpleNamespace(engine_up=lambda up: None))
    life = Life.__new__(Life)
    life.front, life._listener = front, SimpleNamespace(getsockname=lambda: ("127.0.0.1", 1))
    life._is_stopping = asyncio.Event()
    assert asyncio.run(life._load_and_wait()) == 1
    assert seen[0] > MANY
    assert gc.get_freeze_count() == 0
