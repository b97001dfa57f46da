"""lm-evaluation-harness against a real server: what it computes over HTTP is what the engine says offline."""

import json

import pytest

from evenflow import LLM, SamplingParams

lm_eval = pytest.importorskip("lm_eval", reason='pip install -e ".[clients]"')

CHOICES = [" there was a little boy", " zebra quantum invoice", " there lived a king"]
TEXTS = ["Once upon a time", "Long ago,", "In a far country"]


@pytest.fixture
def tasks(tmp_path):
    """Two tiny tasks on local files: multiple choice by log-likelihood, and generation."""
    data = tmp_path / "data.jsonl"
    lines = [{"text": text, "choices": CHOICES, "gold": 0, "answer": "x"} for text in TEXTS]
    data.write_text("\n".join(map(json.dumps, lines)))
    shared = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    (tmp_path / "choice.yaml").write_text(
        f"task: tiny_choice\n{shared}output_type: multiple_choice\ndoc_to_text: text\ndoc_to_choice: choices\n"
        "doc_to_target: gold\ntarget_delimiter: ''\nmetric_list: [{metric: acc}]\n"
    )
    (tmp_path / "generate.yaml").write_text(
        f"task: tiny_generate\n{shared}output_type: generate_until\ndoc_to_text: text\ndoc_to_target: answer\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 12, do_sample: false, temperature: 0}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    return tmp_path


def test_lm_eval_reads_what_the_engine_says(server, tasks):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    arguments = {"model": "demo", "base_url": f"{server.url}/v1/completions", "num_concurrent": 2, "max_retries": 1}
    found = lm_eval.simple_evaluate(
        "local-completions",
        model_args=arguments | {"tokenizer_backend": "remote"},
        tasks=["tiny_choice", "tiny_generate"],
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
    )
    llm = LLM("demo")
    for sample in found["samples"]["tiny_choice"]:
        for choice, response in zip(CHOICES, sample["filtered_resps"], strict=True):
            assert float(response[0]) == pytest.approx(log_likelihood(llm, sample["doc"]["text"], choice), abs=1e-3)
    for sample in found["samples"]["tiny_generate"]:
        params = SamplingParams(temperature=0, max_tokens=12, stop=["."])
        ids = llm.tokenizer.encode(sample["doc"]["text"], add_special_tokens=False)
        assert sample["filtered_resps"][0] == llm.generate([ids], params)[0].outputs[0].text


def log_likelihood(llm, context, continuation):
    """The sum over the continuation's tokens, from a prompt of both. The harness adds no special tokens."""
    start = len(llm.tokenizer.encode(context, add_special_tokens=False))
    ids = llm.tokenizer.encode(context + continuation, add_special_tokens=False)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    entries = llm.generate({"prompt_token_ids": ids}, params)[0].prompt_logprobs
    return sum(entries[i][ids[i]].logprob for i in range(start, len(ids)))
