"""The k-th call of each part of a step fails, for k = 1, 2, 3, ... until it does not come to that."""

from itertools import count

import pytest

from evenflow import LLM, SamplingParams, StructuredOutputsParams

ONCE = "Once upon a time"
MIX = [
    SamplingParams(temperature=0, max_tokens=6),
    SamplingParams(seed=1, max_tokens=8, stop=[" the"]),
    SamplingParams(seed=2, max_tokens=5, logprobs=2, prompt_logprobs=1),
    SamplingParams(seed=3, max_tokens=8, structured_outputs=StructuredOutputsParams(regex="[a-z ]{4,9}")),
    SamplingParams(seed=4, max_tokens=6, repetition_penalty=1.3, n=2),
]
PROMPTS = [ONCE, "The fox", "A wolf, meeting with a lamb", "In the woods", ONCE + " there was"]


@pytest.fixture(scope="module")
def llm():
    """A pool in which the mix must be preempted now and then."""
    return LLM(
        "demo", max_num_batched_tokens=16, max_num_seqs=4, block_size=2, kv_cache_memory="224KiB", max_model_len=36
    )


def results(llm):
    outputs = llm.generate(PROMPTS, MIX, use_tqdm=False)
    return [(c.text, c.token_ids, c.finish_reason) for output in outputs for c in output.outputs]


@pytest.fixture(scope="module")
def expected(llm):
    found = results(llm)
    assert llm.engine.scheduler.num_preemptions > 0
    return found


SITES = {
    "forward": lambda llm: (llm.engine.runner.model, "forward"),
    "logits": lambda llm: (llm.engine.runner.model, "logits"),
    "sampler": lambda llm: (llm.engine.runner.sampler, "sample"),
    "admission": lambda llm: (llm.engine.runner.sampler, "admit"),
    "batch": lambda llm: (llm.engine.runner.slots, "make_batch"),
    "prompt logprobs": lambda llm: (llm.engine.runner.sampler, "prompt_logprobs"),
    "masks": lambda llm: (llm.engine._guided, "masks"),
    "grammar": lambda llm: (llm.engine._guided, "_build"),
}


@pytest.mark.parametrize("site", SITES)
def test_a_fault_ends_what_it_hits_and_nothing_else(llm, expected, monkeypatch, caplog, site):
    caplog.set_level("CRITICAL")
    monkeypatch.setattr(llm.engine, "check_grammar", lambda request: None)  # it is before the step, see below
    owner, name = SITES[site](llm)
    original = getattr(owner, name)
    for k in count(1):
        calls = count(1)

        def failing(*args, k=k, calls=calls, **kwargs):
            if next(calls) == k:
                raise RuntimeError("planted")
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            found = results(llm)
        check_nothing_stays(llm)
        hit = [index for index, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
        assert all(found[index][2] == "error" for index in hit), (site, k)
        if next(calls) <= k:  # it was not called so often
            assert hit == []
            break
        assert hit, (site, k)
        assert results(llm) == expected, (site, k)  # nothing wrong is left in the cache
    assert k > 1


def test_a_fault_before_anything_is_queued_leaves_nothing(llm, expected, monkeypatch):
    def failing(params):
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine._guided, "_build", failing)
        with pytest.raises(RuntimeError, match="planted"):
            results(llm)
    check_nothing_stays(llm)
    assert not llm._outputs.live_ids()
    assert results(llm) == expected


def check_nothing_stays(llm):
    engine, scheduler = llm.engine, llm.engine.scheduler
    assert not engine.has_unfinished
    assert engine._building == engine._added_s == {}
    assert engine._guided._matchers == {}
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    assert len(scheduler._free_slots) == scheduler.max_num_seqs
    scheduler.pool.check_invariants({})
