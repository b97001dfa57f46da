"""A model over two GPUs: the tokens of one GPU and of transformers, with graphs and without; and what ends it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import VOCAB, make_checkpoint

DEADLINE_S = 120.0
OPTIONS = {
    "max_model_len": 200,
    "max_num_seqs": 8,
    "kv_cache_memory": "8MiB",
    "dtype": "float32",
    "max_num_batched_tokens": 64,
}
GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
MIXED = [
    GREEDY,
    {"temperature": 1.0, "seed": 7, "max_tokens": 20},
    {"temperature": 0.8, "top_p": 0.7, "seed": 8, "max_tokens": 20},
    {"temperature": 0, "repetition_penalty": 1.5, "frequency_penalty": 0.4, "max_tokens": 25},
]


def run_child(mode: str, **arguments):
    """What tests/multi/child.py prints. Killed, with all that it started, at the deadline."""
    command = [sys.executable, str(Path(__file__).with_name("child.py")), mode, json.dumps(arguments)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, err = child.communicate(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        out, err = child.communicate()
        pytest.fail(f"{mode} did not end within {DEADLINE_S:g} s\n{err[-6000:]}")
    print(err[-3000:])  # with -s, or when the test fails
    assert child.returncode == 0, err[-6000:]
    return json.loads(out.splitlines()[-1])


def prompts(count=8, longest=90):
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCAB, rng.integers(2, longest)).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = {}

    def get(case):
        if case not in made:
            changes = {"vocab_size": VOCAB + 1} if case == "llama-tied" else {}  # no multiple of the ranks
            made[case] = make_checkpoint(tmp_path_factory.mktemp(case), case, **changes)
        return made[case]

    return get


@pytest.fixture(scope="module")
def of_one_gpu(checkpoints):
    """Tokens of MIXED on the first GPU."""
    options = OPTIONS | {"model": str(checkpoints("llama-tied").directory)}
    params = [MIXED[i % len(MIXED)] for i in range(8)]
    (found,) = run_child("generate", runs=[options], prompts=prompts(), params=params)
    return found["tokens"]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("custom", [False, True])
def test_two_gpus_generate_what_one_does(checkpoints, of_one_gpu, graphs, custom):
    """With NCCL or RCCL alone, and with our kernel over peer memory."""
    options = OPTIONS | {"model": str(checkpoints("llama-tied").directory), "tensor_parallel_size": 2}
    options |= {"enable_graphs": graphs, "enable_custom_all_reduce": custom}
    params = [MIXED[i % len(MIXED)] for i in range(8)]
    (found,) = run_child("generate", runs=[options], prompts=prompts(), params=params)
    assert found["tokens"] == of_one_gpu
    assert (found["num_replays"] > 0) == graphs
    greedy = [checkpoints("llama-tied").greedy(prompt, 24) for prompt in prompts()[:: len(MIXED)]]
    assert found["tokens"][:: len(MIXED)] == greedy
    assert ("all-reduce" in found["account"]) == custom
    if custom and "our kernel over peer memory for small steps" not in found["account"]:
        pytest.skip(found["account"])  # the tokens were compared all the same


@pytest.mark.parametrize("case", ["llama-mqa", "mistral-window", "qwen3"])
def test_models_generate_what_transformers_does(checkpoints, case):
    options = OPTIONS | {"model": str(checkpoints(case).directory), "tensor_parallel_size": 2}
    (found,) = run_child("generate", runs=[options], prompts=prompts(4), params=[GREEDY] * 4)
    assert found["tokens"] == [checkpoints(case).greedy(prompt, 24) for prompt in prompts(4)]


def test_engines_one_after_another_in_one_process_and_bfloat16(checkpoints):
    """Mean gap of log-probabilities to float32: of two GPUs at most twice that of one."""
    checkpoint = checkpoints("llama-tied")
    one = OPTIONS | {"model": str(checkpoint.directory), "dtype": "bfloat16"}
    params = [{"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0}] * 8
    sizes = [1, 2, 2]
    runs = [one | {"tensor_parallel_size": size} for size in sizes]
    found = run_child("generate", runs=runs, prompts=prompts(), params=params)
    exact = []
    for prompt in prompts():
        logprobs = checkpoint.logits(prompt).double().log_softmax(-1)
        exact += [logprobs[i, token].item() for i, token in enumerate(prompt[1:])]
    gaps = [np.abs(np.concatenate(run["logprobs"]) - exact).mean() for run in found]
    print("mean gaps", gaps)
    assert max(gaps[1:]) <= 2 * gaps[0]


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize(
    ("signal_name", "cause", "within_s"),
    [
        ("SIGKILL", "tensor-parallel rank 1 was killed by SIGKILL (out of memory?)", 10),
        ("SIGSTOP", "tensor-parallel rank 1 gave no sign of life for 10 s", 30),
    ],
)
def test_a_rank_that_fails_ends_the_engine(checkpoints, signal_name, cause, within_s, custom):
    """The GPU of rank 0 waits in a kernel for what will not come."""
    options = OPTIONS | {"model": str(checkpoints("llama-tied").directory), "tensor_parallel_size": 2}
    options |= {"enable_custom_all_reduce": custom}
    found = run_child("fail", options=options, signal_name=signal_name)
    assert found["error"] == cause
    assert found["took_s"] < within_s
    assert found["alive"] == []
