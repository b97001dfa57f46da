"""The engine on a GPU: the tokens of transformers and of the CPU's runner, however steps are run."""

from itertools import product

import numpy as np
import pytest
import torch
from checkpoints import CASES, VOCAB, make_checkpoint

from evenflow import LLM, SamplingParams
from evenflow.platforms import detect

OPTIONS = {"max_model_len": 200, "max_num_seqs": 8, "kv_cache_memory": "8MiB", "dtype": "float32"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = {}

    def get(case):
        if case not in made:
            made[case] = make_checkpoint(tmp_path_factory.mktemp(case), case)
        return made[case]

    return get


def llm_on(device, checkpoint, **options):
    return LLM(str(checkpoint.directory), skip_tokenizer_init=True, device=device, **OPTIONS | options)


def prompts(count=10, seed=0, longest=90):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, rng.integers(1, longest)).tolist() for _ in range(count)]


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_transformers(checkpoints, case):
    checkpoint = checkpoints(case)
    found = tokens(llm_on("cuda", checkpoint).generate(prompts(4), GREEDY, use_tqdm=False))
    assert found == [checkpoint.greedy(prompt, 24) for prompt in prompts(4)]


@pytest.mark.parametrize(("overlap", "graphs"), list(product([False, True], [False, True])))
@pytest.mark.parametrize("case", ["llama", "mistral-window", "qwen3"])
def test_overlap_and_graphs_change_nothing(checkpoints, case, overlap, graphs):
    mixed = [
        GREEDY,
        SamplingParams(temperature=1.0, seed=7, max_tokens=20, detokenize=False),
        SamplingParams(temperature=0.8, top_p=0.7, seed=8, max_tokens=20, detokenize=False),
        SamplingParams(temperature=1.2, top_k=5, min_p=0.05, seed=2**63 + 5, max_tokens=20, detokenize=False),
        SamplingParams(temperature=0, repetition_penalty=1.5, frequency_penalty=0.4, max_tokens=25, detokenize=False),
    ]
    params = [mixed[i % len(mixed)] for i in range(20)]
    options = {"max_num_batched_tokens": 64}
    expected = tokens(llm_on("cpu", checkpoints(case), **options).generate(prompts(20), params, use_tqdm=False))
    llm = llm_on("cuda", checkpoints(case), enable_overlap=overlap, enable_graphs=graphs, **options)
    for _ in range(3):  # a size is recorded when it comes the second time
        assert tokens(llm.generate(prompts(20), params, use_tqdm=False)) == expected
    assert (llm.engine.runner.graphs.num_replays > 0) == graphs
    llm.engine.scheduler.check_invariants()


def test_preemption_changes_nothing(checkpoints):
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=80, ignore_eos=True, detokenize=False)
    roomy = tokens(llm_on("cuda", checkpoints("llama")).generate(prompts(8), params, use_tqdm=False))
    tight = llm_on("cuda", checkpoints("llama"), kv_cache_memory="300KiB", max_model_len=180)
    assert tokens(tight.generate(prompts(8), params, use_tqdm=False)) == roomy
    assert tight.engine.scheduler.num_preemptions > 0


def test_long_contexts(checkpoints, tmp_path_factory):
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("long"), "llama", max_position_embeddings=4096)
    options = {"max_model_len": 4000, "kv_cache_memory": "64MiB", "max_num_batched_tokens": 1000}
    batch = [np.random.default_rng(i).integers(3, VOCAB, 3000 - 700 * i).tolist() for i in range(4)]
    expected = tokens(llm_on("cpu", checkpoint, **options).generate(batch, GREEDY, use_tqdm=False))
    assert tokens(llm_on("cuda", checkpoint, **options).generate(batch, GREEDY, use_tqdm=False)) == expected


def test_logprobs(checkpoints):
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=3, prompt_logprobs=2, detokenize=False)
    expected = llm_on("cpu", checkpoints("llama")).generate(prompts(6), params, use_tqdm=False)
    found = llm_on("cuda", checkpoints("llama")).generate(prompts(6), params, use_tqdm=False)
    for theirs, ours in zip(expected, found, strict=True):
        for a, b in zip(
            theirs.prompt_logprobs[1:] + theirs.outputs[0].logprobs,
            ours.prompt_logprobs[1:] + ours.outputs[0].logprobs,
            strict=True,
        ):
            assert list(a) == list(b)
            gaps = [abs(a[token].logprob - b[token].logprob) for token in a]
            assert max(gaps) < 2e-4


@pytest.mark.parametrize("case", ["llama", "qwen3", "mistral-window"])
def test_a_cache_of_8_bits_is_as_near_as_its_digits(checkpoints, case):
    """4 significant bits where bfloat16 has 8: 16 times its error."""
    if detect().fp8_dtype is None:
        pytest.skip("this GPU has no 8-bit floats")
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    batch = prompts(12, longest=150)

    def logprobs(kind):
        found = llm_on("cuda", checkpoints(case), kv_cache_dtype=kind).generate(batch, params, use_tqdm=False)
        return np.array(
            [
                output.prompt_logprobs[place][token].logprob
                for output, prompt in zip(found, batch, strict=True)
                for place, token in enumerate(prompt)
                if place > 0
            ]
        )

    exact = logprobs("auto")
    allowed = 20 * np.abs(logprobs("bfloat16") - exact).mean()
    assert allowed / 2 < np.abs(logprobs("fp8") - exact).mean() < allowed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_logprobs_stay_near_float32(checkpoints, dtype):
    """Teacher-forced: the mean gap of 16-bit log-probabilities, at most twice that of transformers in the same type."""
    checkpoint = checkpoints("llama")
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    batch = prompts(8, longest=150)
    found = llm_on("cuda", checkpoint, dtype=dtype).generate(batch, params, use_tqdm=False)
    oracle16 = checkpoint.oracle.__class__.from_pretrained(checkpoint.directory, dtype=getattr(torch, dtype)).cuda()
    ours, theirs = [], []
    for prompt, output in zip(batch, found, strict=True):
        if len(prompt) < 2:
            continue
        exact = checkpoint.logits(prompt).double().log_softmax(-1)
        with torch.inference_mode():
            eager = oracle16(torch.tensor([prompt], device="cuda")).logits[0].double().cpu().log_softmax(-1)
        for i, token in enumerate(prompt[1:]):
            ours.append(abs(output.prompt_logprobs[i + 1][token].logprob - exact[i, token].item()))
            theirs.append(abs((eager[i, token] - exact[i, token]).item()))
    assert np.mean(ours) <= 2 * np.mean(theirs)
