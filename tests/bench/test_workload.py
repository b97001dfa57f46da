"""Workloads: ShareGPT by both rules beside a transcription of vLLM's, the built-in law, prefixes, traces, bad files."""

import json
import random

import numpy as np
import pytest

from evenflow.bench import workload
from evenflow.bench.sharegpt import passes, sharegpt


def encode(texts):
    """A token a word, and one before the first, as LLaMA's tokenizer."""
    return [[1, *(len(word) for word in text.split())] for text in texts]


def write_sharegpt(path, count=400, seed=3):
    rng = random.Random(seed)
    data = []
    for index in range(count):
        turns = rng.choice([0, 1, 2, 2, 3, 5])
        lengths = [int(rng.lognormvariate(4.5, 1.6)) for _ in range(turns)]
        data.append(
            {
                "id": str(index),
                "conversations": [{"from": "human", "value": " ".join(["w" * (1 + index % 9)] * n)} for n in lengths],
            }
        )
    path.write_text(json.dumps(data))
    return data


def sample_of_v0_1_4(data, num_requests):
    """benchmark_throughput.py of vLLM v0.1.4, `sample_requests`, with the global generator that it seeds with 0."""
    random.seed(0)
    dataset = [d for d in data if len(d["conversations"]) >= 2]
    dataset = [(d["conversations"][0]["value"], d["conversations"][1]["value"]) for d in dataset]
    prompts = [prompt for prompt, _ in dataset]
    prompt_ids, completion_ids = encode(prompts), encode([completion for _, completion in dataset])
    filtered = []
    for i in range(len(dataset)):
        prompt_len, output_len = len(prompt_ids[i]), len(completion_ids[i])
        if prompt_len < 4 or output_len < 4:
            continue
        if prompt_len > 1024 or prompt_len + output_len > 2048:
            continue
        filtered.append((prompt_ids[i], prompt_len, output_len))
    return random.sample(filtered, num_requests)


def sample_of_today(data, num_requests):
    """vllm/benchmarks/datasets, ShareGPTDataset: shuffle, the first that are valid, repeated where they are too few."""
    random.seed(0)
    data = [d for d in data if len(d["conversations"]) >= 2]
    random.shuffle(data)
    found = []
    for entry in data:
        if len(found) >= num_requests:
            break
        prompt, completion = (encode([entry["conversations"][i]["value"]])[0] for i in range(2))
        n, m = len(prompt), len(completion)
        if not (n < 4 or m < 4 or n > 1024 or n + m > 2048):
            found.append((prompt, n, m))
    if len(found) < num_requests:
        random.seed(0)
        found += [random.choice(found) for _ in range(num_requests - len(found))]
    return found


def as_tuples(found):
    return [(r.prompt, r.num_prompt_tokens, r.num_output_tokens) for r in found.requests]


def test_the_seeds_rules_draw_what_vllm_0_1_4_drew(tmp_path):
    data = write_sharegpt(tmp_path / "s.json")
    assert as_tuples(sharegpt(tmp_path / "s.json", encode, 50, mode="seed")) == sample_of_v0_1_4(data, 50)


@pytest.mark.parametrize("count", [50, 500])
def test_todays_rules_draw_what_vllm_draws_and_repeat_where_it_repeats(tmp_path, count):
    data = write_sharegpt(tmp_path / "s.json")
    drawn = as_tuples(sharegpt(tmp_path / "s.json", encode, count, mode="current"))
    assert drawn == sample_of_today(data, count)
    assert drawn[:50] != sample_of_v0_1_4(data, 50)


@pytest.mark.parametrize(
    ("prompt", "output", "kept"),
    [(4, 4, True), (3, 9, False), (9, 3, False), (1024, 1024, True), (1025, 4, False), (1024, 1025, False)],
)
def test_the_filters_edges(prompt, output, kept):
    assert passes(prompt, output) is kept


def test_the_seeds_rules_do_not_make_up_requests(tmp_path):
    write_sharegpt(tmp_path / "s.json", count=20)
    with pytest.raises(ValueError, match=r"conversations that pass the filter, fewer than num_prompts=50.*'current'"):
        sharegpt(tmp_path / "s.json", encode, 50, mode="seed")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not valid JSON"),
        ("[]", "is empty"),
        ('{"a": 1}', "must hold a list of conversations"),
        ("[1]", "must hold a list of conversations"),
        ('[{"text": "x"}]', "conversation 0 has no list 'conversations'"),
        ('[{"conversations": [{"value": 1}, {"value": "b"}]}]', "conversation 0 has a turn without text"),
        ('[{"conversations": [{"value": "a"}, {"value": "b"}]}]', "no conversation that passes the filter"),
        ('[{"conversations": [', "is not valid JSON"),
    ],
)
def test_malformed_datasets_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "broken.json").write_text(content)
    with pytest.raises(ValueError, match=message) as refused:
        sharegpt(tmp_path / "broken.json", encode, 5)
    assert "broken.json" in str(refused.value) or "conversation 0" in str(refused.value)


def test_a_missing_dataset_names_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="does not exist; without one, use --dataset builtin"):
        sharegpt(tmp_path / "none.json", encode, 5)
    with pytest.raises(ValueError, match="is a directory"):
        sharegpt(tmp_path, encode, 5)


@pytest.mark.parametrize("count", [100, 1000, 3000])
def test_the_builtin_sample_has_the_means_of_sharegpt(count):
    lengths, scale = workload.sample_lengths(count)
    prompts, outputs = np.array(lengths).T
    assert scale == 1.0
    assert abs(prompts.mean() - 249) < 1
    assert abs(outputs.mean() - 230) < 1
    assert all(passes(prompt, output) for prompt, output in lengths)
    # Table 3 / (table 4 / 60) of the seed: 477 to 481 tokens a request.
    assert 477 <= (prompts + outputs).mean() <= 481


def test_the_builtin_sample_is_log_normal():
    """Skewed to the right in the way of its law: the median is far below the mean, the logarithms are symmetric."""
    lengths, _ = workload.sample_lengths(4000)
    for column, cv, mean in ((0, 1.3, 249), (1, 0.85, 230)):
        values = np.array(lengths)[:, column]
        sigma = np.sqrt(np.log(1 + cv**2))
        inner = np.percentile(np.log(values), [25, 50, 75])
        assert np.exp(inner[1]) < 0.85 * mean
        assert abs((inner[2] - inner[0]) / (2 * 0.6745 * sigma) - 1) < 0.1  # cut tails make it a little narrower


def test_the_builtin_sample_depends_on_its_seed_alone():
    first, again, other = (workload.builtin(64, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert sum(r.num_output_tokens for r in first.requests) == sum(r.num_output_tokens for r in other.requests)


@pytest.mark.parametrize("context", [64, 512, 1024, 2048])
def test_the_builtin_sample_fits_the_context_and_says_what_it_scaled(context):
    found = workload.builtin(200, context=context, vocab_size=100)
    assert max(r.num_prompt_tokens + r.num_output_tokens for r in found.requests) <= context
    assert ("scaled" in found.note) == (context < 1024)
    assert all(16 <= token < 100 for request in found.requests for token in request.prompt)


def test_random_lengths_stay_in_their_range_and_reach_its_ends():
    found = workload.random_lengths(500, input_len=20, output_len=10, range_ratio=0.2).requests
    assert {r.num_prompt_tokens for r in found} == set(range(16, 25))
    assert {r.num_output_tokens for r in found} == set(range(8, 13))


def test_prefixes_are_shared_evenly_and_endings_are_not():
    found = workload.shared_prefixes(40, num_prefixes=4, prefix_len=32, suffix_len=8, output_len=5).requests
    beginnings = [tuple(r.prompt[:32]) for r in found]
    assert sorted(map(beginnings.count, set(beginnings))) == [10, 10, 10, 10]
    assert len({tuple(r.prompt[32:]) for r in found}) == 40
    assert beginnings != sorted(beginnings)


def test_a_trace_keeps_arrivals_and_lengths(tmp_path):
    (tmp_path / "t.csv").write_text("Timestamp,Model,Request tokens,Response tokens\n7.5,x,10,3\n5,x,20,4\n")
    found = workload.trace(tmp_path / "t.csv").requests
    assert [(r.arrival_s, len(r.prompt), r.num_output_tokens) for r in found] == [(0.0, 20, 4), (2.5, 10, 3)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no column 'arrival_s'; its header is empty"),
        ("arrival_s,prompt_tokens\n", "no column 'output_tokens'"),
        ("arrival_s,prompt_tokens,output_tokens\n", "holds no request"),
        ("arrival_s,prompt_tokens,output_tokens\n0,4,x\n", "line 2: 0, 4, x must be"),
        ("arrival_s,prompt_tokens,output_tokens\n0,4,1\nnan,4,1\n", "line 3"),
        ("arrival_s,prompt_tokens,output_tokens\n0,4\n", "line 2: 0, 4, None"),
    ],
)
def test_malformed_traces_name_the_line(tmp_path, content, message):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        workload.trace(tmp_path / "t.csv")


def test_words_instead_of_ids_have_as_many():
    found = workload.as_text(workload.random_lengths(3, input_len=12, output_len=2))
    assert [len(r.prompt.split()) for r in found.requests] == [12, 12, 12]
    assert "counts are the server's" in found.note
