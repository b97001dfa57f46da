"""The runner of a GPU on a device that is always late: the same tokens as the CPU's runner, whatever is in flight."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import VOCAB, make_checkpoint
from lazy_stream import LazyStream

from evenflow import LLM, SamplingParams
from evenflow.engine import building
from evenflow.runner.device_batch import DeviceSlots
from evenflow.runner.device_runner import DeviceRunner
from evenflow.runner.graphs import Graphs, decode_sizes, mixed_sizes

OPTIONS = {"max_model_len": 128, "max_num_seqs": 6, "kv_cache_memory": "1MiB", "dtype": "float32"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("llama")).directory


def device_llm(directory, monkeypatch, *, stream=None, overlap=True, graphs=True, **options):
    """An LLM whose runner is the device's, on a lazy stream."""
    stream = stream or LazyStream()

    def make_runner(settings, model_config, path):
        settings = replace(settings, enable_overlap=overlap, enable_graphs=graphs)
        return DeviceRunner(settings, model_config, path, stream=stream)

    monkeypatch.setattr(building, "ModelRunner", make_runner)
    llm = LLM(str(directory), skip_tokenizer_init=True, device="cpu", **OPTIONS | options)
    assert isinstance(llm.engine.runner, DeviceRunner)
    return llm


def cpu_llm(directory, **options):
    return LLM(str(directory), skip_tokenizer_init=True, device="cpu", **OPTIONS | options)


def prompts(count=12, seed=0, longest=60):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, rng.integers(1, longest)).tolist() for _ in range(count)]


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


MIXED = [
    SamplingParams(temperature=0, max_tokens=20, detokenize=False),
    SamplingParams(temperature=1.0, seed=7, max_tokens=15, detokenize=False),
    SamplingParams(temperature=0.8, top_p=0.7, seed=8, max_tokens=12, detokenize=False),
    SamplingParams(temperature=1.2, top_k=5, min_p=0.05, seed=2**63 + 5, max_tokens=9, detokenize=False),
    SamplingParams(temperature=0, repetition_penalty=1.5, frequency_penalty=0.4, max_tokens=25, detokenize=False),
    SamplingParams(temperature=0, logit_bias={5: 30.0}, max_tokens=3, detokenize=False),
    SamplingParams(temperature=0, min_tokens=6, stop_token_ids=list(range(3, VOCAB)), max_tokens=9, detokenize=False),
    SamplingParams(temperature=0.5, seed=1, presence_penalty=1.0, max_tokens=18, detokenize=False),
]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_tokens_are_those_of_the_cpus_runner(directory, monkeypatch, overlap, graphs):
    """Chunked prefill, more requests than slots, stops that lag, every kind of parameter."""
    params = [MIXED[i % len(MIXED)] for i in range(12)]
    expected = tokens(cpu_llm(directory, max_num_batched_tokens=32).generate(prompts(), params, use_tqdm=False))
    stream = LazyStream()
    llm = device_llm(directory, monkeypatch, stream=stream, overlap=overlap, graphs=graphs, max_num_batched_tokens=32)
    assert tokens(llm.generate(prompts(), params, use_tqdm=False)) == expected
    assert stream.most_waiting == (2 if overlap else 1)
    assert (llm.engine.runner.graphs.num_replays > 0) == graphs
    llm.engine.scheduler.check_invariants()
    assert not llm.engine.scheduler.has_unfinished
    assert tokens(llm.generate(prompts(), params, use_tqdm=False)) == expected  # after reuse of slots and blocks


def test_preemption_recomputes_tokens_that_were_in_flight(directory, monkeypatch):
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=50, ignore_eos=True, detokenize=False)
    roomy = tokens(cpu_llm(directory).generate(prompts(8), params, use_tqdm=False))
    llm = device_llm(directory, monkeypatch, kv_cache_memory="100KiB", max_model_len=120, max_num_batched_tokens=64)
    assert tokens(llm.generate(prompts(8), params, use_tqdm=False)) == roomy
    assert llm.engine.scheduler.num_preemptions > 0


def test_prefix_cache_hits_while_steps_overlap(directory, monkeypatch):
    shared = prompts(1, seed=5, longest=60)[0] + list(range(10, 60))
    group = [[*shared, 70 + i] for i in range(6)]
    params = SamplingParams(temperature=0, max_tokens=12, detokenize=False)
    expected = tokens(cpu_llm(directory).generate(group, params, use_tqdm=False))
    llm = device_llm(directory, monkeypatch)
    assert tokens(llm.generate(group, params, use_tqdm=False)) == expected
    assert tokens(llm.generate(group, params, use_tqdm=False)) == expected
    assert llm.engine.scheduler.num_prefix_hits > 0


def test_logprobs_of_prompt_and_output(directory, monkeypatch):
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=3, prompt_logprobs=2, detokenize=False)
    plain = SamplingParams(temperature=0, max_tokens=8, detokenize=False)
    mixed = [params, plain] * 3
    expected = cpu_llm(directory).generate(prompts(6), mixed, use_tqdm=False)
    found = device_llm(directory, monkeypatch, max_num_batched_tokens=24).generate(prompts(6), mixed, use_tqdm=False)
    for theirs, ours in zip(expected, found, strict=True):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
        for a, b in zip(
            (theirs.prompt_logprobs or []) + (theirs.outputs[0].logprobs or []),
            (ours.prompt_logprobs or []) + (ours.outputs[0].logprobs or []),
            strict=True,
        ):
            assert (a is None) == (b is None)
            if a is not None:
                assert list(a) == list(b)
                torch.testing.assert_close(
                    torch.tensor([x.logprob for x in a.values()]), torch.tensor([x.logprob for x in b.values()])
                )
    assert found[1].outputs[0].logprobs is None


def test_a_row_that_is_not_finite_fails_alone(directory, monkeypatch):
    llm = device_llm(directory, monkeypatch)
    plain = SamplingParams(temperature=0, max_tokens=10, detokenize=False)
    expected = tokens(llm.generate(prompts(5), plain, use_tqdm=False))
    logits, calls = llm.engine.runner.model.logits, []

    def poisoned(hidden):
        out = logits(hidden)
        calls.append(1)
        if len(calls) == 4:
            out[2] = float("nan")
        return out

    monkeypatch.setattr(llm.engine.runner.model, "logits", poisoned)
    outputs = llm.generate(prompts(5), plain, use_tqdm=False)
    failed = [i for i, output in enumerate(outputs) if output.outputs[0].finish_reason == "error"]
    assert len(failed) == 1
    assert [t for i, t in enumerate(tokens(outputs)) if i not in failed] == [
        t for i, t in enumerate(expected) if i not in failed
    ]
    assert tokens(llm.generate(prompts(5), plain, use_tqdm=False)) == expected


@pytest.mark.parametrize("when", ["launch", "run"])
def test_a_step_that_fails_takes_those_launched_after_it_along(directory, monkeypatch, when):
    """Afterwards the engine is as new."""
    llm = device_llm(directory, monkeypatch)
    plain = SamplingParams(temperature=0, max_tokens=10, detokenize=False)
    expected = tokens(llm.generate(prompts(5), plain, use_tqdm=False))
    owner, name = (llm.engine.runner.slots, "write") if when == "launch" else (llm.engine.runner.sampler, "draw")
    original, calls = getattr(owner, name), []

    def failing(*args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("planted")
        return original(*args)

    monkeypatch.setattr(owner, name, failing)
    outputs = llm.generate(prompts(5), plain, use_tqdm=False)
    assert {output.outputs[0].finish_reason for output in outputs} == {"error"}
    while llm.engine.has_unfinished:  # a step that was launched before the one that failed
        assert llm.engine.step() == []
    llm.engine.scheduler.check_invariants()
    assert tokens(llm.generate(prompts(5), plain, use_tqdm=False)) == expected


def test_an_aborted_request_leaves_its_step_in_flight_to_be_collected(directory, monkeypatch):
    llm = device_llm(directory, monkeypatch)
    plain = SamplingParams(temperature=0, max_tokens=10, detokenize=False)
    stream = llm.stream(prompts(1)[0], plain)
    next(stream)
    stream.close()
    assert not llm.engine.scheduler.has_unfinished
    assert llm.engine.has_unfinished  # a step is on its way
    assert llm.engine.step() == []
    assert not llm.engine.has_unfinished


def test_too_few_buffers_are_seen(directory, monkeypatch):
    """Planted: the words of a step are overwritten before the device has read them."""
    params = SamplingParams(temperature=0, max_tokens=20, detokenize=False)
    expected = tokens(cpu_llm(directory).generate(prompts(), params, use_tqdm=False))
    original = DeviceSlots.__init__
    monkeypatch.setattr(DeviceSlots, "__init__", lambda self, *args: original(self, *args[:-1], 1))
    try:
        found = tokens(device_llm(directory, monkeypatch).generate(prompts(), params, use_tqdm=False))
    except Exception:
        return
    assert found != expected


def test_padded_sizes_cover_every_step():
    graphs = Graphs(LazyStream(), 300, is_enabled=True)
    for num_rows in range(1, 301):
        size, rows, longest = graphs.padded(num_rows, num_rows, 1)
        assert size == rows >= num_rows
        assert longest == 1
        assert size - num_rows <= max(8, num_rows / 8 + 4)
    for num_tokens in range(2, 2049):
        size, rows, longest = graphs.padded(num_tokens, min(num_tokens - 1, 300), num_tokens)
        assert size >= num_tokens
        assert rows >= min(num_tokens - 1, 300)
        assert longest >= 2
    assert graphs.padded(2049, 10, 500) is None
    assert decode_sizes(300)[-1] == 300
    assert len(decode_sizes(1024)) + len(mixed_sizes()) < 60
