"""The runner of a GPU on a device that is always late: the same tokens as the CPU's runner, whatever is in flight."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import VOCAB, make_checkpoint
from lazy_stream import LazyStream

from evenflow import LLM, SamplingParams
from evenflow.engine import building
from evenflow.kernels.self_check import Comparison
from evenflow.layers import attention
from evenflow.layers.attention import SelfAttention
from evenflow.request import ScheduledRow, StepPlan
from evenflow.runner import start_check
from evenflow.runner.device_batch import DeviceSlots
from evenflow.runner.device_runner import DeviceRunner
from evenflow.runner.graphs import Graphs, Sizes, decode_sizes, mixed_sizes
from evenflow.sampling_params import StructuredOutputsParams

OPTIONS = {"max_model_len": 128, "max_num_seqs": 6, "kv_cache_memory": "1MiB", "dtype": "float32"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("llama")).directory


def device_llm(directory, monkeypatch, *, stream=None, overlap=True, graphs=True, cache_dtype=None, **options):
    """An LLM whose runner is the device's, on a lazy stream. cache_dtype: what a CPU's settings would refuse."""
    stream = stream or LazyStream()

    def make_runner(settings, model_config, path):
        settings = replace(settings, enable_overlap=overlap, enable_graphs=graphs)
        if cache_dtype is not None:
            settings = replace(settings, kv_cache_dtype=cache_dtype)
        return DeviceRunner(settings, model_config, path, stream=stream)

    monkeypatch.setattr(building, "make_runner", make_runner)
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


def steps_of(llm, monkeypatch):
    """Of every step to come: its Sizes as they are launched, and the tokens that reach the MLP of the last layer."""
    runner, rows, steps = llm.engine.runner, [], []
    runner.model.model.layers[-1].mlp.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    run = runner.graphs.run

    def watched(step, forward):
        hidden = run(step, forward)
        steps.append((step, rows[-1]))
        return hidden

    monkeypatch.setattr(runner.graphs, "run", watched)
    return steps


@pytest.mark.parametrize("graphs", [False, True])
def test_only_rows_pass_through_the_last_layer(directory, monkeypatch, graphs):
    """Of prompts of 60 tokens in steps of 32, as often as it takes to replay; again after somebody asked for more."""
    llm = device_llm(directory, monkeypatch, graphs=graphs, max_num_batched_tokens=32, enable_prefix_caching=False)
    steps = steps_of(llm, monkeypatch)
    batch = [list(range(3 + i, 63 + i)) for i in range(3)]
    plain, asking = (
        SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=wanted, detokenize=False) for wanted in (None, 0)
    )

    def rows_of_prompts(params):
        """Tokens; of steps with prompts in them, what reached the last layer's MLP, and whether that is rows alone."""
        steps.clear()
        outputs = llm.generate(batch, params, use_tqdm=False)
        assert all(rows >= step.num_tokens for step, rows in steps if step.max_query_len == 1)
        return tokens(outputs), {(rows, step.is_sampling_only) for step, rows in steps if step.max_query_len > 1}

    expected = tokens(cpu_llm(directory).generate(batch, plain, use_tqdm=False))
    for _ in range(3):
        assert rows_of_prompts(plain) == (expected, {(6, True)})
    assert rows_of_prompts([asking, asking, asking]) == (expected, {(32, False)})
    assert not llm.engine.runner._prompts, "what was computed is remembered"
    assert rows_of_prompts(plain) == (expected, {(6, True)})
    # One asks. It is the first to be computed, and goes on beside the prompts of the others.
    assert rows_of_prompts([asking, plain, plain]) == (expected, {(32, False), (6, True)})


def test_a_graph_is_of_one_kind_of_step(directory, monkeypatch):
    """The same sizes with prompt log-probabilities and without, both replayed."""
    llm = device_llm(directory, monkeypatch, enable_prefix_caching=False)
    batch = prompts(4, seed=3)
    kinds = [
        SamplingParams(temperature=0, max_tokens=4, logprobs=1, prompt_logprobs=wanted, detokenize=False)
        for wanted in (None, 1)
    ]
    for params in kinds * 4:
        expected = cpu_llm(directory).generate(batch, params, use_tqdm=False)
        for theirs, ours in zip(expected, llm.generate(batch, params, use_tqdm=False), strict=True):
            assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
            for a, b in zip((ours.prompt_logprobs or [])[1:], (theirs.prompt_logprobs or [])[1:], strict=True):
                assert {t: x.logprob for t, x in a.items()} == pytest.approx(
                    {t: x.logprob for t, x in b.items()}, abs=1e-5
                )
    recorded = [sizes for sizes in llm.engine.runner.graphs._recorded if sizes.max_query_len > 1]
    assert [sizes.is_sampling_only for sizes in recorded] == [True, False]
    assert len({sizes[:3] for sizes in recorded}) == 1


def test_words_beyond_the_rows_that_sample_are_zero():
    """Of a buffer that a larger step was in: they are read as indices of this step's tokens."""
    slots = DeviceSlots(4, 64, 16, VOCAB, LazyStream(), 1)
    rows = [ScheduledRow(slot, 0, 30, True, []) for slot in range(4)]
    step, buffers = slots.write(StepPlan([], rows, [], []))
    assert buffers.rows.sample_tokens.tolist() == [29, 59, 89, 119]
    for is_sampling in (True, False):
        plan = StepPlan([], [ScheduledRow(0, 30, 32, is_sampling, []), ScheduledRow(1, 30, 33, False, [])], [], [])
        step, buffers = slots.write(plan)
        slots.send(step, buffers)
        assert slots.rows.sample_tokens.tolist() == [1 if is_sampling else 0, 0, 0, 0]
        assert slots.rows.sample_slots.tolist() == [0, 0, 0, 0]


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


def prompt_logprobs(llm, scales=None):
    """Of every prompt token after the first. scales: of keys and of values, for every layer."""
    for module in llm.engine.runner.model.modules():
        if isinstance(module, SelfAttention) and scales is not None:
            module.k_scale.fill_(scales[0])
            module.v_scale.fill_(scales[1])
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    batch = prompts(12, longest=100)
    found = llm.generate(batch, params, use_tqdm=False)
    return np.array(
        [
            output.prompt_logprobs[place][token].logprob
            for output, prompt in zip(found, batch, strict=True)
            for place, token in enumerate(prompt)
            if place > 0
        ]
    )


@pytest.mark.parametrize("case", ["llama", "qwen3", "mistral-window"])
def test_a_cache_of_8_bits_is_as_near_as_its_digits(monkeypatch, tmp_path, case):
    """It has 4 significant bits where bfloat16 has 8, so 16 times its error; measured 15 to 17.

    Scales may be anything that keeps values within the type's range. Where a kernel is not given them, it shows.
    """
    made = make_checkpoint(tmp_path, case).directory

    def gap(cache_dtype, scales=None):
        found = prompt_logprobs(device_llm(made, monkeypatch, cache_dtype=cache_dtype), scales)
        return float(np.abs(found - exact).mean())

    exact = prompt_logprobs(device_llm(made, monkeypatch))
    allowed = 20 * gap("bfloat16")
    for cache_dtype in ("float8_e4m3fn", "float8_e4m3fnuz"):
        for scales in (None, (3.0, 0.3), (0.02, 0.05)):
            assert allowed / 2 < gap(cache_dtype, scales) < allowed
    original = attention.device_attention
    monkeypatch.setattr(attention, "device_attention", lambda *args: original(*args[:-2], None, args[-1]))
    assert gap("float8_e4m3fn", (3.0, 0.3)) > 3 * allowed


def test_both_kinds_of_8_bits_keep_the_same(directory, monkeypatch):
    """Bit for bit, so a model writes the same text on targets of either kind."""
    runs = [device_llm(directory, monkeypatch, cache_dtype=f"float8_{kind}") for kind in ("e4m3fn", "e4m3fnuz")]
    params = SamplingParams(temperature=0, max_tokens=30, detokenize=False)
    found = [tokens(llm.generate(prompts(5), params, use_tqdm=False)) for llm in runs]
    assert found[0] == found[1]
    for one, other in zip(*(llm.engine.runner.kv_caches for llm in runs), strict=True):
        assert (one.float() == 2 * other.float()).all()
        assert one.float().abs().max() > 1


def test_a_cache_of_8_bits_holds_more_blocks(directory, monkeypatch):
    whole, small = (device_llm(directory, monkeypatch, cache_dtype=kind) for kind in (None, "float8_e4m3fn"))
    runner = small.engine.runner
    assert runner.memory.num_blocks // 4 == whole.engine.runner.memory.num_blocks
    assert {cache.dtype for cache in runner.kv_caches} == {torch.float8_e4m3fn}
    assert sum(cache.nbytes for cache in runner.kv_caches) == runner.memory.cache_bytes <= 2**20


@pytest.mark.parametrize("error", [0.01, 0.5])
def test_kernels_are_checked_before_anything_else(directory, monkeypatch, tmp_path, error):
    """On a device where they run; here nothing does, so what is found there is made up."""
    facts = {"gpu": "GPU 9000", "arch": "arch9", "triton": "3.x"}
    shapes = []

    def check(shape, device):
        shapes.append(shape)
        return [Comparison("paged_attention", error, 0.02)]

    monkeypatch.setattr(start_check, "device_facts", lambda _: dict(facts))
    monkeypatch.setattr(start_check, "check_kernels", check)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if error > 0.02:
        monkeypatch.setattr("evenflow.runner.device_runner.make_model", None)  # it is not reached
        with pytest.raises(RuntimeError, match="kernel paged_attention computes something else .* on GPU 9000 "):
            device_llm(directory, monkeypatch)
        return
    for what in ("s)", "(cached)"):
        llm = device_llm(directory, monkeypatch)
        assert llm.engine.runner.kernel_account == llm.kernel_account
        assert "on GPU 9000, the worst is paged_attention with 50%" in llm.kernel_account
        assert llm.kernel_account.endswith(what)
    (shape,) = shapes
    sizes = (shape.hidden_size, shape.intermediate_size, shape.num_heads, shape.num_kv_heads, shape.head_dim)
    assert sizes == (64, 96, 4, 2, 16)
    assert (shape.vocab_size, shape.windows, shape.has_head_norm) == (VOCAB, (0,), False)
    assert (shape.dtype, shape.cache_dtype, shape.block_size) == ("float32", "float32", 16)


def test_no_kernel_runs_on_a_cpu(directory, monkeypatch):
    assert device_llm(directory, monkeypatch).kernel_account == cpu_llm(directory).kernel_account == ""


def test_padded_sizes_cover_every_step():
    graphs = Graphs(LazyStream(), 300, is_enabled=True)
    for num_rows in range(1, 301):
        size, rows, longest, _ = graphs.padded(Sizes(num_rows, num_rows, 1))
        assert size == rows >= num_rows
        assert longest == 1
        assert size - num_rows <= max(8, 0.3 * num_rows)
    for num_tokens in range(2, 2049):
        size, rows, longest, _ = graphs.padded(Sizes(num_tokens, min(num_tokens - 1, 300), num_tokens))
        assert size >= num_tokens
        assert rows >= min(num_tokens - 1, 300)
        assert longest >= 2
    assert graphs.padded(Sizes(2049, 10, 500)) is None
    assert decode_sizes(300)[-1] == 300
    assert len(decode_sizes(1024)) + len(mixed_sizes()) < 70


def test_a_guided_request_may_end_while_its_step_is_under_way(monkeypatch):
    """By a stop string, or because its client left: with two steps in flight its next token is on its way by then."""
    stream = LazyStream()

    def make_runner(settings, model_config, path):
        return DeviceRunner(replace(settings, enable_overlap=True), model_config, path, stream=stream)

    monkeypatch.setattr(building, "make_runner", make_runner)
    llm = LLM("demo", device="cpu", **OPTIONS | {"kv_cache_memory": "8MiB"})
    guided = StructuredOutputsParams(regex="[a-z ]{40}")
    llm._add(["There was"], [SamplingParams(max_tokens=40, ignore_eos=True, seed=1)])  # keeps two steps in flight
    ids = llm._add(["Once upon"], [SamplingParams(max_tokens=30, structured_outputs=guided, seed=1)])
    while not any(step.masks is not None for step in llm.engine._launched):
        llm._step(())
    llm._abort(ids)
    while llm.engine.has_unfinished:
        llm._step(())
    stops = [SamplingParams(max_tokens=30, structured_outputs=guided, seed=seed, stop=["e"]) for seed in range(6)]
    outputs = llm.generate(["Once upon"] * 6, stops, use_tqdm=False)
    assert {output.outputs[0].finish_reason for output in outputs} <= {"stop", "length"}


def test_more_tokens_than_words_are_numbered_are_refused():
    with pytest.raises(ValueError, match="max_num_seqs=1024 requests of max_model_len=2097152 tokens are more than"):
        DeviceSlots(1024, 2**21, 16, VOCAB, LazyStream(), 3)
