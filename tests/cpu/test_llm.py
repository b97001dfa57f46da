"""The engine end to end, on tiny checkpoints: equal to transformers, and independent of how the work was cut up."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoints import CASES, VOCAB, Checkpoint, make_checkpoint

import evenflow
from evenflow import LLM, BeamSearchParams, SamplingParams
from evenflow.runner.model_runner import ModelRunner

BYTES_PER_TOKEN = 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head size, float32


def make_llm(directory, **options) -> LLM:
    return LLM(str(directory), skip_tokenizer_init=True, **options)


def random_prompts(count: int, longest: int = 60, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def run(llm: LLM, prompts, params) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


def greedy(num_tokens: int = 24, **options) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, **options)


@pytest.mark.parametrize("case", sorted(CASES))
def test_greedy_tokens_equal_transformers(case, tmp_path):
    checkpoint = make_checkpoint(tmp_path, case)
    prompts = [*random_prompts(3), random_prompts(1, 1)[0], random_prompts(40, 150)[17]]
    expected = [checkpoint.greedy(prompt, 24) for prompt in prompts]
    assert run(make_llm(tmp_path, max_num_batched_tokens=64), prompts, greedy()) == expected


PROMPTS = random_prompts(12) + [[*range(3, 60), i] for i in range(3, 9)]  # the last six share 57 tokens
PARAMS = [greedy()] * 9 + [
    SamplingParams(temperature=1.0, seed=i, max_tokens=24, ignore_eos=True, detokenize=False) for i in range(9)
]


@pytest.fixture(scope="module")
def demo() -> LLM:
    return LLM("demo", max_num_seqs=8)


@pytest.fixture(scope="module")
def expected(llama: Checkpoint) -> list[list[int]]:
    """Every request alone, without prefix cache."""
    llm = make_llm(llama.directory, enable_prefix_caching=False)
    return [run(llm, [prompt], [params])[0] for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 1},
        {"max_num_batched_tokens": 7},
        {"max_num_batched_tokens": 50, "enable_prefix_caching": False},
        {"max_num_seqs": 1},
        {"max_num_seqs": 5},
        {"block_size": 1},
        {"block_size": 3},
        {"block_size": 64},
        {"enable_chunked_prefill": False},
    ],
    ids=str,
)
def test_tokens_depend_on_the_request_alone(llama, expected, options):
    llm = make_llm(llama.directory, **options)
    assert run(llm, PROMPTS, PARAMS) == expected
    assert run(llm, PROMPTS[::-1], PARAMS[::-1]) == expected[::-1]  # now with a warm prefix cache
    llm.engine.scheduler.check_invariants()


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preemption_changes_nothing(llama, expected, prefix_caching):
    llm = make_llm(
        llama.directory,
        kv_cache_memory=str(BYTES_PER_TOKEN * 132),
        max_model_len=120,
        enable_prefix_caching=prefix_caching,
        block_size=4,
    )
    assert run(llm, PROMPTS, PARAMS) == expected
    assert llm.engine.scheduler.num_preemptions >= 5
    llm.engine.scheduler.check_invariants()


def test_shared_beginnings_are_computed_once(llama):
    llm = make_llm(llama.directory)
    outputs = llm.generate(PROMPTS[12:], greedy(), use_tqdm=False)
    assert [output.num_cached_tokens for output in outputs] == [0] + [48] * 5
    assert llm.generate(PROMPTS[12:13], greedy(), use_tqdm=False)[0].num_cached_tokens == 48


def rows_after_attention(llm: LLM) -> list[tuple[int, int]]:
    """Of every step to come: tokens that reach the MLP of the first layer, and of the last."""
    first, steps = [], []
    layers = llm.engine.runner.model.model.layers
    layers[0].mlp.register_forward_pre_hook(lambda _, args: first.append(len(args[0])))
    layers[-1].mlp.register_forward_pre_hook(lambda _, args: steps.append((first[-1], len(args[0]))))
    return steps


def test_only_tokens_that_are_sampled_pass_through_the_last_layer(llama):
    llm = make_llm(llama.directory, max_num_batched_tokens=20, enable_prefix_caching=False)
    steps = rows_after_attention(llm)
    long, short = list(range(3, 53)), [7, 8, 9]
    expected = [llama.greedy(prompt, 3) for prompt in (long, short)]
    assert run(llm, [long, short], [greedy(3), greedy(3)]) == expected
    # 50 prompt tokens in chunks of 20, the last beside 3 of the other request, then decode steps.
    assert steps == [(20, 0), (20, 0), (13, 2), (2, 2), (2, 2)]
    steps.clear()
    asking = greedy(5, prompt_logprobs=1)
    assert run(llm, [long], [asking])[0][:3] == expected[0]
    assert steps == [(20, 20), (20, 20), (10, 10)] + [(1, 1)] * 4
    steps.clear()
    assert run(llm, [long, short], [greedy(3), greedy(3)]) == expected  # the one that asked has ended
    assert steps == [(20, 0), (20, 0), (13, 2), (2, 2), (2, 2)]
    steps.clear()
    run(llm, [short, long], [asking, greedy(3)])  # it asks in the first step, and goes on beside the other's prompt
    assert steps == [(20, 20), (20, 1), (15, 2), (2, 2), (2, 2)]


def test_logprobs_are_those_of_all_tokens_in_the_last_layer(llama, monkeypatch):
    """Steps in which some rows ask for prompt log-probabilities, some sample, some do neither."""
    params = [
        greedy(12, logprobs=2, prompt_logprobs=1 if i % 4 == 1 else None) if i % 2 else PARAMS[-1 - i]
        for i in range(len(PROMPTS))
    ]
    options = {"max_num_batched_tokens": 24, "max_num_seqs": 5}
    llm = make_llm(llama.directory, **options)
    steps = rows_after_attention(llm)
    found = llm.generate(PROMPTS, params, use_tqdm=False)
    monkeypatch.setattr(ModelRunner, "_sampling_tokens", lambda self, batch: None)
    unreduced = make_llm(llama.directory, **options)
    all_steps = rows_after_attention(unreduced)
    expected = unreduced.generate(PROMPTS, params, use_tqdm=False)
    assert all(first == last for first, last in all_steps)
    for is_met in (
        [last == 0 for _, last in steps],
        [0 < last < first for first, last in steps],
        [first == last > 5 for first, last in steps],  # more tokens than rows: somebody asked
    ):
        assert any(is_met)
    for prompt, ours, theirs in zip(PROMPTS, found, expected, strict=True):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
        pairs = zip(
            (ours.prompt_logprobs or [])[1:] + (ours.outputs[0].logprobs or []),
            (theirs.prompt_logprobs or [])[1:] + (theirs.outputs[0].logprobs or []),
            strict=True,
        )
        exact = torch.log_softmax(llama.logits(prompt + ours.outputs[0].token_ids).double(), -1)
        start = 0 if ours.prompt_logprobs else len(prompt) - 1
        for position, (ours_there, theirs_there) in enumerate(pairs, start):
            assert list(ours_there) == list(theirs_there)
            for token_id, entry in ours_there.items():
                assert entry.logprob == pytest.approx(theirs_there[token_id].logprob, abs=1e-5)
                assert entry.logprob == pytest.approx(float(exact[position, token_id]), abs=2e-5)


def test_logprobs_equal_transformers(llama):
    prompt = PROMPTS[3]
    output = make_llm(llama.directory, max_num_batched_tokens=16).generate(
        prompt, greedy(6, logprobs=3, prompt_logprobs=2), use_tqdm=False
    )[0]
    tokens = prompt + output.outputs[0].token_ids
    exact = torch.log_softmax(llama.logits(tokens).double(), -1)
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    found = output.prompt_logprobs[1:] + output.outputs[0].logprobs
    for position, entry in enumerate(found):
        assert tokens[position + 1] in entry
        top = exact[position].topk(3 if position >= len(prompt) - 1 else 2).indices.tolist()
        assert set(top) <= set(entry)
        for token_id, logprob in entry.items():
            assert logprob.logprob == pytest.approx(float(exact[position, token_id]), abs=2e-5)
            assert logprob.rank == int((exact[position] > exact[position, token_id]).sum()) + 1
    total = sum(
        entry[t].logprob for t, entry in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
    )
    assert output.outputs[0].cumulative_logprob == pytest.approx(total)


def test_prompt_logprobs_survive_chunks_prefix_cache_and_preemption(llama):
    params = [greedy(20, prompt_logprobs=1)] * 6
    alone = [make_llm(llama.directory).generate(p, params[0], use_tqdm=False)[0] for p in PROMPTS[:6]]
    llm = make_llm(
        llama.directory,
        kv_cache_memory=str(BYTES_PER_TOKEN * 132),
        max_model_len=120,
        max_num_batched_tokens=13,
        block_size=4,
    )
    for _ in range(2):
        for output, reference in zip(llm.generate(PROMPTS[:6], params, use_tqdm=False), alone, strict=True):
            found = [None if e is None else {t: p.logprob for t, p in e.items()} for e in output.prompt_logprobs]
            wanted = [None if e is None else {t: p.logprob for t, p in e.items()} for e in reference.prompt_logprobs]
            assert len(found) == len(wanted)
            assert all(f == w or f == pytest.approx(w, abs=2e-5) for f, w in zip(found, wanted, strict=True))
    assert llm.engine.scheduler.num_preemptions > 0


def test_n_completions_share_the_prompt(llama):
    llm = make_llm(llama.directory)
    params = SamplingParams(n=5, temperature=1.0, seed=3, max_tokens=12, ignore_eos=True, detokenize=False)
    output = llm.generate([PROMPTS[12]], params)[0]
    assert [completion.index for completion in output.outputs] == list(range(5))
    tokens = [tuple(completion.token_ids) for completion in output.outputs]
    assert len(set(tokens)) == 5
    assert tokens[0] == tuple(run(llm, [PROMPTS[12]], params.replace(n=1))[0])


def test_finish_reasons(llama):
    llm = make_llm(llama.directory, max_model_len=80)
    prompt = PROMPTS[12]
    tokens = run(llm, [prompt], greedy(10))[0]
    stop_id = tokens[4]
    first = tokens.index(stop_id)
    output = llm.generate([prompt], greedy(10, stop_token_ids=[stop_id]))[0].outputs[0]
    assert (output.finish_reason, output.stop_reason, output.token_ids) == ("stop", stop_id, tokens[: first + 1])
    output = llm.generate([prompt], greedy(10, stop_token_ids=[stop_id], min_tokens=8))[0].outputs[0]
    assert stop_id not in output.token_ids[:8]
    output = llm.generate([prompt], greedy(3))[0].outputs[0]
    assert (output.finish_reason, len(output.token_ids)) == ("length", 3)
    output = llm.generate([prompt], SamplingParams(max_tokens=None, ignore_eos=True, detokenize=False))[0].outputs[0]
    assert (output.finish_reason, len(output.token_ids)) == ("length", 80 - len(prompt))


def test_streaming_brings_the_same_tokens(llama):
    llm = make_llm(llama.directory)
    outputs = list(llm.stream(PROMPTS[0], greedy(9)))
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(range(1, 10))
    assert outputs[-1].finished
    assert outputs[-1].outputs[0].token_ids == run(llm, [PROMPTS[0]], greedy(9))[0]


def test_leaving_a_stream_frees_everything(llama):
    llm = make_llm(llama.directory)
    for _ in llm.stream(PROMPTS[0], greedy(50)):
        break
    assert not llm.engine.has_unfinished
    llm.engine.scheduler.check_invariants()


def test_nan_logits_fail_one_request_only(llama, expected, monkeypatch):
    llm = make_llm(llama.directory)
    logits, calls = llm.engine.runner.model.logits, []

    def poisoned(hidden):
        out = logits(hidden)
        calls.append(out)
        if len(calls) == 5:
            out[2] = float("nan")
        return out

    monkeypatch.setattr(llm.engine.runner.model, "logits", poisoned)
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    failed = [i for i, output in enumerate(outputs) if output.outputs[0].finish_reason == "error"]
    assert failed == [2]
    assert "not finite" in outputs[2].outputs[0].error
    for i, output in enumerate(outputs):
        assert i == 2 or output.outputs[0].token_ids == expected[i]
    llm.engine.scheduler.check_invariants()


def test_nan_keys_do_not_outlive_their_request(llama, expected, monkeypatch):
    """A poisoned page that is given to the next request must not reach it through a masked weight of 0."""
    llm = make_llm(llama.directory, kv_cache_memory=str(BYTES_PER_TOKEN * 96), max_model_len=96)
    embed, poison = llm.engine.runner.model.model.embed_tokens.forward, [True]
    monkeypatch.setattr(
        llm.engine.runner.model.model.embed_tokens,
        "forward",
        lambda ids: embed(ids) * (float("nan") if poison[0] else 1.0),
    )
    assert llm.generate([PROMPTS[12]], greedy(), use_tqdm=False)[0].outputs[0].finish_reason == "error"
    poison[0] = False
    assert run(llm, PROMPTS, PARAMS) == expected


def test_nan_in_a_prompt_chunk_is_an_error_not_a_logprob(llama, monkeypatch):
    llm = make_llm(llama.directory, max_num_batched_tokens=16)
    logits, calls = llm.engine.runner.model.logits, []
    monkeypatch.setattr(
        llm.engine.runner.model, "logits", lambda hidden: calls.append(1) or logits(hidden) * float("nan")
    )
    output = llm.generate([PROMPTS[12]], greedy(prompt_logprobs=1), use_tqdm=False)[0].outputs[0]
    assert (output.finish_reason, len(calls)) == ("error", 1)
    llm.engine.scheduler.check_invariants()


def test_an_interrupted_step_leaves_other_requests_sane(llama, monkeypatch):
    llm = make_llm(llama.directory)
    stream = llm.stream(PROMPTS[0], greedy(9))
    next(stream)
    forward = llm.engine.runner.model.forward
    monkeypatch.setattr(llm.engine.runner.model, "forward", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    monkeypatch.setattr(llm.engine.runner.model, "forward", forward)
    assert not llm.engine.has_unfinished
    assert len(run(llm, [PROMPTS[0]], greedy(9))[0]) == 9
    llm.engine.scheduler.check_invariants()


def test_a_failing_step_ends_its_requests_and_not_the_engine(llama, expected, monkeypatch):
    llm = make_llm(llama.directory)
    forward, calls = llm.engine.runner.model.forward, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("planted")
        return forward(*args)

    monkeypatch.setattr(llm.engine.runner.model, "forward", failing)
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert {output.outputs[0].finish_reason for output in outputs} == {"error"}
    assert "RuntimeError" in outputs[0].outputs[0].error
    llm.engine.scheduler.check_invariants()
    assert run(llm, PROMPTS, PARAMS) == expected


def test_an_interrupted_run_leaves_nothing(llama, expected, monkeypatch):
    llm = make_llm(llama.directory)
    step = llm.engine.step
    monkeypatch.setattr(llm.engine, "step", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, PARAMS)
    monkeypatch.setattr(llm.engine, "step", step)
    assert not llm.engine.has_unfinished
    assert run(llm, PROMPTS, PARAMS) == expected


def test_bad_prompts_are_refused_before_anything_runs(llama):
    llm = make_llm(llama.directory, max_model_len=50)
    for prompts, params, message in [
        ([[3, 4], []], None, "prompt 1: the prompt is empty"),
        (None, None, "prompts must be a string, token ids, .* not NoneType"),
        (5, None, "not int"),
        (b"abc", None, "not bytes"),
        ([[3, VOCAB]], None, f"token id {VOCAB} is outside this model's vocabulary, 0 to {VOCAB - 1}"),
        ([[3, -1]], None, "token id -1 is outside"),
        ([[3] * 50], None, "the prompt has 50 tokens, but at most 49 fit with max_model_len=50"),
        (["text"], None, "no tokenizer is loaded"),
        ([[3]], [greedy(), greedy()], "one for each of the 1 prompts"),
        ([[3]], greedy(logprobs=21), "logprobs=21 exceeds max_logprobs=20"),
        ([[3]], greedy(logit_bias={VOCAB: 1.0}), f"logit_bias: token id {VOCAB} is outside"),
        ([[3]], greedy(stop_token_ids=[VOCAB]), "stop_token_ids: token id"),
    ]:
        with pytest.raises(ValueError, match=message):
            llm.generate(prompts, params)
        assert not llm.engine.has_unfinished


def test_calls_written_for_vllm(llama):
    llm = make_llm(
        llama.directory,
        trust_remote_code=False,
        quantization=None,
        enforce_eager=True,
        disable_log_stats=True,
        swap_space=4,
        dtype=torch.float32,
        generation_config="vllm",
    )
    settings = llm.settings
    assert (settings.enable_graphs, settings.dtype, settings.generation_config) == (False, "float32", "none")
    assert llm.generate([]) == []
    params = llm.get_default_sampling_params()
    params.max_tokens, params.detokenize, params.seed = 5, False, 1
    assert llm.get_default_sampling_params().max_tokens == 16
    outputs = llm.generate([(3, 4), np.array([5, 6])], params, use_tqdm=False, lora_request=None, priority=None)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [5, 5]
    assert [output.prompt_token_ids for output in outputs] == [[3, 4], [5, 6]]
    assert outputs[0].outputs[0].finished()
    assert outputs[0].metrics is outputs[0].lora_request is outputs[0].outputs[0].lora_request is None
    assert len(llm.generate(np.array([3, 4]), params)) == 1
    for refused in ({"lora_request": "x"}, {"priority": [1]}):
        with pytest.raises(ValueError, match=f"{next(iter(refused))} is not implemented"):
            llm.generate([3, 4], params, **refused)


def test_assigning_to_params_reaches_no_running_request(llama):
    llm = make_llm(llama.directory)
    params = greedy(6, seed=1)
    stream = llm.stream([3, 4], params)
    next(stream)
    params.max_tokens, params.logprobs, params.temperature = -1, 3, float("nan")
    assert len(list(stream)[-1].outputs[0].token_ids) == 6
    with pytest.raises(ValueError, match="temperature=nan"):
        llm.generate([3, 4], params)


def test_salts_keep_prefixes_apart(llama):
    llm = make_llm(llama.directory)
    prompts = [{"prompt_token_ids": list(range(3, 60)), "cache_salt": salt} for salt in ("a", "b", "a")]
    cached = [llm.generate(prompt, greedy(1))[0].num_cached_tokens for prompt in prompts]
    assert cached == [0, 0, 48]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust_remote_code": True}, "trust_remote_code=True is not implemented"),
        ({"quantization": "awq"}, "quantization='awq' is not implemented"),
        ({"enforce_eager": True, "enable_graphs": True}, "enforce_eager=True and enable_graphs=True"),
    ],
)
def test_options_of_vllm_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LLM("demo", **options)


def test_chats_name_their_arguments():
    llm = LLM("demo")
    hi, params = {"role": "user", "content": "hi"}, SamplingParams(max_tokens=3, temperature=0)
    output = llm.chat([hi], params, chat_template_kwargs={"enable_thinking": False}, tools=None, chat_template=None)[0]
    text, token_ids = llm.tokenizer.chat_prompt([hi])
    assert (output.prompt, output.prompt_token_ids) == (text, token_ids)
    assert llm.chat(hi, params)[0].outputs == llm.chat([[hi]], params)[0].outputs == output.outputs
    assert list(llm.stream_chat([hi], params, chat_template_kwargs={"x": 1}))[-1].outputs == output.outputs
    began = [hi, {"role": "assistant", "content": "Once"}]
    going_on = llm.chat(began, params, add_generation_prompt=False, continue_final_message=True)[0]
    assert going_on.prompt.endswith("Once")
    for messages, options, message in [
        ([hi], {"chat_template": "x"}, "chat_template is not implemented"),
        ([hi], {"lora_request": 1}, "lora_request is not implemented"),
        ([hi], {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs has 'tools'"),
        ([hi], {"tools": [1]}, "tools must be a list"),
        ("hi", {}, "messages must be a list"),
        ([], {}, "messages must be a list"),
        ([hi], {"continue_final_message": True}, "add_generation_prompt=False"),
    ]:
        with pytest.raises(ValueError, match=message):
            llm.chat(messages, params, **options)
    with pytest.raises(TypeError, match="enable_thinking"):
        llm.chat([hi], params, enable_thinking=False)


def test_weights_that_cannot_fit_are_refused_before_any_is_made(llama, monkeypatch):
    monkeypatch.setattr("evenflow.platforms.cpu.available_memory_bytes", lambda: 1 << 17)
    monkeypatch.setattr("evenflow.runner.model_runner.make_model", None)  # calling it would be a TypeError
    message = (
        r"the weights take \d+\.\d MiB in float32, and 0.1 MiB of memory are free; choose dtype='bfloat16', a smaller"
    )
    with pytest.raises(ValueError, match=message):
        make_llm(llama.directory)


def test_a_context_beyond_the_pool(llama):
    """Left open, the context shrinks to what the cache holds; asked for, it is an error with both numbers."""
    memory = str(BYTES_PER_TOKEN * 64)
    llm = make_llm(llama.directory, kv_cache_memory=memory)
    assert llm.settings.max_model_len == 64
    with pytest.raises(ValueError, match="the prompt has 70 tokens, but at most 63 fit"):
        llm.generate([[3] * 70])
    with pytest.raises(ValueError, match="the KV cache holds 64 tokens, fewer than max_model_len=100"):
        make_llm(llama.directory, kv_cache_memory=memory, max_model_len=100)
    with pytest.raises(ValueError, match="the KV cache holds 0 tokens"):
        make_llm(llama.directory, kv_cache_memory="1KiB")


def test_wrong_options_and_directories():
    with pytest.raises(ValueError, match="LLM has no option 'max_seqs'"):
        LLM("demo", max_seqs=3)
    with pytest.raises(ValueError, match="does not exist"):
        LLM("./nowhere")


def test_dummy_weights_need_no_file(llama, tmp_path):
    (tmp_path / "config.json").write_text((llama.directory / "config.json").read_text())
    llm = make_llm(tmp_path, load_format="dummy", dtype="bfloat16")
    assert run(llm, PROMPTS[:2], greedy(4)) == run(
        make_llm(tmp_path, load_format="dummy", dtype="bfloat16"), PROMPTS[:2], greedy(4)
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(llama, dtype):
    llm = make_llm(llama.directory, dtype=dtype)
    prompt = PROMPTS[12]
    entries = llm.generate([prompt], greedy(1, prompt_logprobs=0), use_tqdm=False)[0].prompt_logprobs
    exact = torch.log_softmax(llama.logits(prompt).double(), -1)
    errors = [
        abs(e[t].logprob - float(exact[i, t])) for i, (t, e) in enumerate(zip(prompt[1:], entries[1:], strict=True))
    ]
    # Measured: 0.06 and 0.008.
    assert max(errors) < {"bfloat16": 0.15, "float16": 0.02}[dtype]


def test_import_is_lazy():
    code = "import evenflow, sys; evenflow.SamplingParams; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        getattr(evenflow, "LMM")  # noqa: B009


def test_calls_within_a_stream_leave_each_its_own(demo):
    """Each step is everybody's: what it brings to others waits for them."""
    params = SamplingParams(temperature=0, max_tokens=8)
    texts = ("Once upon a time", "There was once a fox")
    alone = [demo.generate(text, params)[0].outputs[0].token_ids for text in texts]

    found = list(zip(demo.stream(texts[0], params), demo.stream(texts[1], params), strict=True))
    for index, text in enumerate(texts):
        assert {pair[index].prompt for pair in found} == {text}
        assert found[-1][index].outputs[0].token_ids == alone[index]

    beams = demo.beam_search(texts[1], BeamSearchParams(beam_width=2, max_tokens=3))
    outputs = []
    for output in demo.stream(texts[0], params):
        outputs.append(output)
        if len(outputs) == 2:
            assert demo.generate(texts[1], params)[0].outputs[0].token_ids == alone[1]
        if len(outputs) == 4:
            assert demo.beam_search(texts[1], BeamSearchParams(beam_width=2, max_tokens=3)) == beams
    assert outputs[-1].outputs[0].token_ids == alone[0]
    assert outputs[-1].finished
    assert not demo._kept


@pytest.mark.parametrize("call", ["generate", "beam_search"])
def test_an_interrupted_call_within_a_stream_ends_the_stream(demo, monkeypatch, call):
    """What the interrupted step brought to it is lost, so it must not wait for that."""
    stream = demo.stream("Once upon a time", SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.engine, "step", interrupted)
    params = SamplingParams() if call == "generate" else BeamSearchParams(beam_width=2)
    with pytest.raises(KeyboardInterrupt):
        getattr(demo, call)("There was once a fox", params)
    monkeypatch.undo()
    assert list(stream) == []
    assert not demo.engine.has_unfinished
