"""Sampling against closed forms: Random123's vectors, exact float64 distributions, transformers' processors.

Every chi-square test fails a correct sampler with probability ALPHA; seeds are fixed, so a run repeats exactly.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from evenflow.kernels import sampling
from evenflow.kernels.logprobs import LOWEST_LOGPROB, token_logprobs
from evenflow.kernels.philox import log_exponential_, log_noise, log_noise_at, philox_4x32
from evenflow.kernels.sampling import filter_thresholds, filtered_argmax, gumbel_argmax, row_max
from evenflow.request import AdmittedRequest
from evenflow.runner.sampler import SampledTokens, Sampler
from evenflow.sampling_params import SamplingParams

ALPHA = 1e-4
CPU = torch.device("cpu")


def run(
    logits: Tensor,
    params: list[SamplingParams],
    prompts: list[list[int]] | None = None,
    outputs: list[list[int]] | None = None,
    order: list[int] | None = None,
    **lists: Any,
) -> SampledTokens:
    """One step over the rows in `order`, each in the slot of its number."""
    count = len(params)
    prompts = prompts or [[1, 2]] * count
    outputs = outputs or [[]] * count
    sampler = Sampler(count, logits.shape[1], CPU)
    buffer = np.zeros((count, 64), dtype=np.int64)
    for slot, param in enumerate(params):
        tokens = prompts[slot] + outputs[slot]
        buffer[slot, : len(tokens)] = tokens
        stops, words = lists.get("stop_token_ids", []), lists.get("bad_words_ids", [])
        sampler.admit(AdmittedRequest(slot, tokens, len(prompts[slot]), param, stops, words))
    slots = np.array(range(count) if order is None else order)
    lengths = np.array([len(p) + len(o) for p, o in zip(prompts, outputs, strict=True)])
    return sampler.sample(logits[torch.from_numpy(slots)].clone(), slots, lengths[slots], buffer)


def processed(logits: Tensor, **fields: Any) -> Tensor:
    """The logits that one greedy row leaves behind: the sampler edits float32 logits in place."""
    names = ("prompt", "output", "stop_token_ids", "bad_words_ids")
    prompt, output, stops, words = (fields.pop(name, []) for name in names)
    sampler = Sampler(1, logits.shape[-1], CPU)
    params = SamplingParams(temperature=0.0, **fields)
    sampler.admit(AdmittedRequest(0, prompt + output, len(prompt), params, stops, words))
    buffer = np.array([[*prompt, *output, 0]])
    edited = logits.clone().reshape(1, -1)
    sampler.sample(edited, np.array([0]), np.array([len(prompt) + len(output)]), buffer)
    return edited[0]


# The generator


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    words = philox_4x32(*(torch.tensor([word]) for word in counter + key))
    assert " ".join(f"{word.item():08x}" for word in words) == expected


def test_philox_broadcasts_every_word():
    words = torch.randint(2**32, (6, 4))
    for varying in range(6):
        rows = [words[i] if i == varying else words[i, :1] for i in range(6)]
        whole = philox_4x32(*rows)
        for j in range(4):
            single = philox_4x32(*(row[j : j + 1] if len(row) > 1 else row for row in rows))
            assert [word[j].item() for word in whole] == [word.item() for word in single]


def test_noise_is_a_function_of_seed_position_and_index():
    seeds, positions = torch.tensor([3, 3, -1, 2**62]), torch.tensor([0, 7, 7, 2**20])
    noise = log_noise(seeds, positions, 1000)
    assert torch.equal(log_noise(seeds.flip(0), positions.flip(0), 3072).flip(0)[:, :1000], noise)
    assert torch.equal(log_noise(seeds[1:2], positions[1:2], 1000)[0], noise[1])
    indices = torch.randint(1000, (4, 77))
    assert torch.equal(log_noise_at(seeds, positions, indices), noise.gather(1, indices))
    # index 700: tile 2, run 2 of 64, counter 2 * 64 + 60
    word = philox_4x32(*(torch.tensor([x]) for x in (188, 7, 0, 0, 3, 0)))[2].item()
    assert noise[1, 700].item() == pytest.approx(math.log(-math.log1p(-(word + 0.5) / 2**32)), rel=1e-6)


def test_noise_is_exponential_and_finite_at_the_ends():
    ends = log_exponential_(torch.tensor([0.0, 1.0, 2.0**31, 2.0**32]))
    assert torch.isfinite(ends).all()
    noise = log_noise(torch.arange(64), torch.zeros(64, dtype=torch.int64), 4096).double().exp().flatten()
    assert stats.kstest(noise.numpy(), "expon").pvalue > ALPHA


# The distribution


def exact_distribution(logits: Tensor, params: SamplingParams) -> np.ndarray:
    """By loops in float64: temperature, min_p, top_k, top_p, in that order."""
    x = logits.double().numpy() / params.temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    p[p < params.min_p * p.max()] = 0
    order = np.argsort(-p)
    if params.top_k:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    reached, kept = 0.0, 0
    while kept < len(p) and reached < params.top_p:
        reached += p[order[kept]]
        kept += 1
    p[order[kept:]] = 0
    return p / p.sum()


def draw(logits: Tensor, params: SamplingParams, count: int) -> np.ndarray:
    """`count` tokens of one logits row: as many seeds, the sampler's own path."""
    sampler = Sampler(count, len(logits), CPU)
    for slot in range(count):
        sampler.admit(AdmittedRequest(slot, [0], 1, params.replace(seed=slot), [], []))
    slots = np.arange(count)
    rows = logits.expand(count, -1).clone()
    return sampler.sample(rows, slots, np.ones(count, dtype=np.int64), np.zeros((count, 2))).token_ids.numpy()


def p_value(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    """Of a chi-square test; cells that expect fewer than five are pooled. A token of probability 0 gives 0."""
    observed = np.bincount(tokens, minlength=len(probabilities)).astype(float)
    if observed[probabilities == 0].any():
        return 0.0
    expected = probabilities * len(tokens)
    small = expected < 5
    if small.any():
        observed = np.append(observed[~small], observed[small].sum())
        expected = np.append(expected[~small], expected[small].sum())
    used = expected > 0
    if used.sum() < 2:
        return 1.0
    return float(stats.chisquare(observed[used], expected[used]).pvalue)


DISTRIBUTIONS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.5},
    {"top_k": 5},
    {"top_k": 40},
    {"top_p": 0.8},
    {"top_p": 0.3},
    {"min_p": 0.1},
    {"temperature": 1.7, "top_k": 12, "top_p": 0.7},
    {"temperature": 0.8, "min_p": 0.02, "top_p": 0.9},
    {"min_p": 0.05, "top_k": 7, "top_p": 0.95, "temperature": 3.0},
]


@pytest.mark.parametrize("fields", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize("vocab_size", [50, 700])
def test_tokens_follow_the_exact_distribution(fields, vocab_size):
    """700 tokens: the best are tried first; 50: the whole rows are sorted."""
    logits = 2 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    params = SamplingParams(**fields)
    assert p_value(draw(logits, params, 6000), exact_distribution(logits, params)) > ALPHA


@pytest.mark.parametrize("neighbour", ["position", "seed"])
def test_neighbours_are_independent(neighbour):
    logits = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0])
    marginal = torch.softmax(logits.double(), 0).numpy()
    count = 20000
    seeds, positions = torch.arange(2 * count) // 2 * 2, torch.zeros(2 * count, dtype=torch.int64)
    (positions if neighbour == "position" else seeds)[1::2] += 1
    tokens = gumbel_argmax(logits.expand(2 * count, -1), torch.ones(2 * count), seeds, positions)[1].numpy()
    pairs = tokens[0::2] * 5 + tokens[1::2]
    assert p_value(pairs, np.outer(marginal, marginal).ravel()) > ALPHA


def test_one_seed_over_many_positions_follows_the_distribution():
    logits = torch.randn(30, generator=torch.Generator().manual_seed(1))
    count = 20000
    ones = torch.ones(count)
    tokens = gumbel_argmax(logits.expand(count, -1), ones, 5 * ones.long(), torch.arange(count))[1].numpy()
    assert p_value(tokens, torch.softmax(logits.double(), 0).numpy()) > ALPHA


def _off_by_one_top_p(values: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The planted bug: one token too many, as `cumsum > p` without the shift keeps one too few."""
    threshold, _ = THRESHOLD(values, *args)
    position = (values >= threshold[:, None]).sum(-1).clamp(max=values.shape[1] - 1)
    return values.gather(1, position[:, None])[:, 0], torch.ones_like(threshold, dtype=torch.bool)


THRESHOLD = sampling.threshold_of_sorted


def test_the_chi_square_finds_planted_bugs(monkeypatch):
    logits = 2 * torch.randn(50, generator=torch.Generator().manual_seed(3))
    plain, nucleus = SamplingParams(), SamplingParams(top_p=0.8)
    assert p_value(draw(logits, plain, 6000), exact_distribution(logits, plain)) > ALPHA
    assert p_value(draw(logits, SamplingParams(temperature=1.1), 6000), exact_distribution(logits, plain)) < ALPHA
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "threshold_of_sorted", _off_by_one_top_p)
        assert p_value(draw(logits, nucleus, 6000), exact_distribution(logits, nucleus)) < ALPHA
    with monkeypatch.context() as patch:  # a uniform that never comes near 0: the rare winners are missing
        patch.setattr(sampling, "log_noise", lambda *args: log_noise(*args).clamp(min=-2.0))
        assert p_value(draw(logits, plain, 6000), exact_distribution(logits, plain)) < ALPHA


# Batches


def mixed_params(count: int) -> list[SamplingParams]:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {},
        {"top_k": 5},
        {"top_k": 100},
        {"top_p": 0.9},
        {"top_p": 0.999, "temperature": 5.0},
        {"min_p": 0.1, "top_k": 3, "repetition_penalty": 1.3},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"logit_bias": {4: 3.0}, "logprobs": 3},
    ]
    return [SamplingParams(seed=1000 + i, **kinds[i % len(kinds)]) for i in range(count)]


@pytest.mark.parametrize("vocab_size", [100, 1003, 3072])
def test_tokens_do_not_depend_on_the_batch(vocab_size):
    count = 36
    logits = 3 * torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(9))
    params = mixed_params(count)
    whole = run(logits, params)
    order = np.random.default_rng(0).permutation(count).tolist()
    assert run(logits, params, order=order).token_ids.tolist() == whole.token_ids[order].tolist()
    alone = [run(logits, params, order=[row]) for row in range(count)]
    assert [sampled.token_ids.item() for sampled in alone] == whole.token_ids.tolist()
    assert {row: alone[row].logprobs[0] for row in whole.logprobs} == whole.logprobs


def test_greedy_rows_of_a_mixed_batch_are_the_argmax():
    logits = torch.randn(36, 300, generator=torch.Generator().manual_seed(2)).round(decimals=1)  # with ties
    tokens = run(logits, mixed_params(36)).token_ids
    for row in range(0, 36, 9):
        assert tokens[row] == int(np.argmax(logits[row].numpy()))


@pytest.mark.parametrize("size", [1, 63, 64, 256, 300, 3072])
def test_row_max_takes_the_lowest_index_of_equals(size):
    x = torch.randint(4, (50, size), generator=torch.Generator().manual_seed(size)).float()
    assert row_max(x)[1].tolist() == np.argmax(x.numpy(), axis=1).tolist()


def test_tokens_do_not_depend_on_the_dtype_of_the_buffer_or_on_trying_candidates_first():
    logits = 3 * torch.randn(40, 3000, generator=torch.Generator().manual_seed(4))
    logits[20:] = logits[20:].bfloat16().float()  # ties
    count = len(logits)
    seeds, positions, ones = torch.arange(count), torch.arange(count), torch.ones(count)
    top_k = torch.tensor([0, 10, 300, 0] * 10)
    top_p = torch.tensor([0.9, 1.0, 0.8, 0.999] * 10, dtype=torch.float64)
    min_p = torch.tensor([0.0, 0.01, 0.0, 0.001, 0.2] * 8)
    results = [
        filtered_argmax(logits, ones, top_k, top_p, min_p, seeds, positions, candidates)
        for candidates in (0, 4, 64, 256, 1024)
    ]
    for best, tokens in results[1:]:
        assert torch.equal(best, results[0][0])
        assert torch.equal(tokens, results[0][1])


def test_seeds_are_64_bits():
    logits = torch.zeros(1, 3000)

    def token(seed: int | None) -> int:
        return run(logits, [SamplingParams(seed=seed)]).token_ids.item()

    assert token(-2) == token(2**64 - 2)
    assert token(None) == token(0)
    assert len({token(seed) for seed in (0, 1, 2**32, 2**63, 2**64 - 1)}) == 5


# Filters, against transformers


def kept(scaled: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    full = torch.full((len(scaled),), 1.0, dtype=torch.float64)
    thresholds = filter_thresholds(scaled, (full * top_k).long(), full * top_p, (full * min_p).float())
    return scaled >= thresholds[:, None]


@pytest.mark.parametrize("scale", [0.3, 2.0, 8.0])
def test_filters_keep_what_transformers_keeps(scale):
    scaled = scale * torch.randn(40, 800, generator=torch.Generator().manual_seed(8))
    for k in (1, 2, 50, 799, 800):
        assert torch.equal(kept(scaled, top_k=k), torch.isfinite(TopKLogitsWarper(k)(None, scaled)))
    for p in (0.05, 0.5, 0.9, 0.99):
        assert torch.equal(kept(scaled, top_p=p), torch.isfinite(TopPLogitsWarper(p)(None, scaled.double())))
    for p in (0.001, 0.1, 0.9, 1.0):
        assert torch.equal(kept(scaled, min_p=p), torch.isfinite(MinPLogitsWarper(p)(None, scaled)))
    chained = MinPLogitsWarper(0.02)(None, scaled.double())
    chained = TopPLogitsWarper(0.7)(None, TopKLogitsWarper(20)(None, chained))
    assert torch.equal(kept(scaled, 20, 0.7, 0.02), torch.isfinite(chained))
    cold = TemperatureLogitsWarper(0.6)(None, scaled)
    assert torch.equal(cold, scaled / torch.full((40, 1), 0.6))


def test_filters_keep_at_least_one_token_and_all_equals():
    scaled = torch.tensor([[5.0, 1.0, 5.0, 5.0, -1.0]])
    for fields in ({"top_k": 2}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert kept(scaled, **fields).tolist() == [[True, False, True, True, False]]
    assert kept(torch.tensor([[0.0, -200.0, -torch.inf]])).tolist() == [[True, True, True]]


def test_top_k_of_one_is_greedy():
    logits = torch.tensor([[1.0, 3.0, 3.0]]).expand(50, -1)
    params = [SamplingParams(top_k=1, seed=seed, temperature=2.0) for seed in range(50)]
    assert run(logits, params).token_ids.tolist() == [1] * 50


# Edits of the logits


def test_penalties_follow_transformers_and_a_float64_loop():
    rng = np.random.default_rng(5)
    for _ in range(20):
        logits = torch.from_numpy(rng.normal(0, 3, 60)).float()
        prompt, output = rng.integers(40, size=9).tolist(), rng.integers(60, size=int(rng.integers(0, 20))).tolist()
        r, presence, frequency = rng.uniform(0.5, 2), rng.uniform(-2, 2), rng.uniform(-2, 2)
        ours = processed(logits, prompt=prompt, output=output, repetition_penalty=r)
        theirs = RepetitionPenaltyLogitsProcessor(r)(torch.tensor([prompt + output]), logits[None])[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        penalties = {"repetition_penalty": r, "presence_penalty": presence, "frequency_penalty": frequency}
        ours = processed(logits, prompt=prompt, output=output, **penalties)
        exact = logits.double().numpy().copy()
        for token in set(prompt + output):
            exact[token] *= 1 / r if exact[token] > 0 else r
        for token in set(output):
            exact[token] -= frequency * output.count(token) + presence
        np.testing.assert_allclose(ours.numpy(), exact, rtol=1e-5, atol=2e-6)


def test_penalties_ignore_what_a_slot_held_before():
    logits = torch.zeros(2, 50)
    sampler = Sampler(2, 50, CPU)
    params = SamplingParams(temperature=0.0, presence_penalty=1.0)
    buffer = np.tile(np.arange(10), (2, 1))
    sampler.admit(AdmittedRequest(0, [9, 0], 1, params, [], []))
    sampler.admit(AdmittedRequest(1, [9, 0, 1, 2], 1, params, [], []))
    sampler.sample(logits, np.array([1, 0]), np.array([4, 2]), buffer)
    assert torch.nonzero(logits).tolist() == [[0, 1], [0, 2], [0, 3], [1, 1]]


def test_logit_bias_and_min_tokens():
    logits = torch.randn(40)
    edited = processed(logits, logit_bias={3: 5.0, 7: -100.0}, min_tokens=2, stop_token_ids=[3, 9], output=[1])
    expected = logits.clone()
    expected[7] -= 100
    expected[[3, 9]] = -torch.inf
    assert torch.equal(edited, expected)
    assert torch.equal(processed(logits, min_tokens=2, stop_token_ids=[3, 9], output=[1, 1]), logits)


def test_bad_words():
    logits = torch.randn(40)
    words = [[5], [1, 2, 6], [2, 6], [2, 7], [3, 2, 8], [9, 9, 9, 9, 9, 9]]

    def banned(**tokens: list[int]) -> list[int]:
        return torch.nonzero(processed(logits, bad_words_ids=words, **tokens) == -torch.inf)[:, 0].tolist()

    assert banned(prompt=[4], output=[]) == [5]
    assert banned(prompt=[4], output=[1, 2]) == [5, 6, 7]
    assert banned(prompt=[4], output=[3, 2]) == [5, 6, 7, 8]
    assert banned(prompt=[4, 3], output=[2]) == [5, 6, 7], "a prefix must be output, as in vLLM"
    assert banned(prompt=[4], output=[9] * 5) == [5, 9]


def test_bad_words_of_several_rows():
    logits = torch.zeros(3, 20)
    sampler = Sampler(3, 20, CPU)
    for slot, words in enumerate([[[1]], [], [[5, 2], [3]]]):
        sampler.admit(AdmittedRequest(slot, [0, 5], 1, SamplingParams(temperature=0.0), [], words))
    sampler.sample(logits, np.array([2, 1, 0]), np.array([2, 2, 2]), np.array([[0, 5, 0]] * 3))
    assert torch.nonzero(logits == -torch.inf).tolist() == [[0, 2], [0, 3], [2, 1]]


# Rows that fail alone


@pytest.mark.parametrize("vocab_size", [60, 3072])
@pytest.mark.parametrize("fault", ["nan", "inf", "-inf"])
def test_bad_rows_fail_alone(fault, vocab_size):
    logits = torch.randn(36, vocab_size, generator=torch.Generator().manual_seed(6))
    params = mixed_params(36)
    good = run(logits, params)
    broken = logits.clone()
    bad = [*range(9), 20]
    broken[bad] = broken[bad] * 0 - torch.inf if fault == "-inf" else broken[bad]
    if fault != "-inf":
        broken[bad, torch.arange(10) * 5] = float(fault)
    sampled = run(broken, params)
    assert sampled.bad_rows == bad
    expected = [-1 if row in bad else token for row, token in enumerate(good.token_ids.tolist())]
    assert sampled.token_ids.tolist() == expected
    assert sampled.logprobs == {row: entry for row, entry in good.logprobs.items() if row not in bad}


def test_a_row_whose_tokens_are_all_banned_is_bad():
    params = [SamplingParams(temperature=temperature) for temperature in (0.0, 1.0)]
    assert run(torch.zeros(2, 3), params, bad_words_ids=[[0], [1], [2]]).bad_rows == [0, 1]


# Log-probabilities


def test_logprobs_are_those_of_the_raw_logits():
    logits = 4 * torch.randn(30, 500, generator=torch.Generator().manual_seed(7)) + 50
    params = [SamplingParams(logprobs=i % 6, seed=i, temperature=2.0, logit_bias={1: 9.0}) for i in range(30)]
    sampled = run(logits, params)
    exact = torch.log_softmax(logits.double(), -1)
    torch_error = (torch.log_softmax(logits, -1).double() - exact).abs().max().item()
    for row in range(30):
        entry, token = sampled.logprobs[row], sampled.token_ids[row].item()
        order = exact[row].argsort(descending=True).tolist()
        assert entry.token_ids == [token, *order[: row % 6]]
        assert entry.rank == 1 + order.index(token)
        errors = [abs(got - exact[row, i].item()) for got, i in zip(entry.logprobs, entry.token_ids, strict=True)]
        assert max(errors) <= 2 * torch_error + 1e-6
        if token in entry.token_ids[1:]:
            assert entry.logprobs[0] == entry.logprobs[1 + entry.token_ids[1:].index(token)]


def test_logprobs_of_equals_go_by_id_whatever_k_is():
    logits = torch.randint(3, (20, 400), generator=torch.Generator().manual_seed(1)).float()
    expected = np.argsort(-logits.numpy(), axis=1, kind="stable")
    for k in (1, 5, 60, 390, 400, 500):
        ids, _, ranks = token_logprobs(logits, torch.from_numpy(expected[:, 0]), k)
        assert ids[:, 1:].tolist() == expected[:, :k].tolist()
        assert ranks.tolist() == [1] * 20


def test_logprobs_are_never_infinite():
    _, logprobs, ranks = token_logprobs(torch.tensor([[0.0, -torch.inf, -torch.inf]]), torch.tensor([2]), 3)
    assert logprobs.tolist() == [[LOWEST_LOGPROB, 0.0, LOWEST_LOGPROB, LOWEST_LOGPROB]]
    assert ranks.tolist() == [2]


def test_prompt_logprobs_do_not_depend_on_the_chunks(monkeypatch):
    hidden, head = torch.randn(23, 8), torch.randn(8, 90)
    targets = torch.randint(90, (23,))
    sampler = Sampler(1, 90, CPU)
    whole = sampler.prompt_logprobs(lambda x: x @ head, hidden, targets, 2)
    monkeypatch.setattr("evenflow.runner.sampler.PROMPT_CHUNK_BYTES", 4 * 90 * 5)
    parts = sampler.prompt_logprobs(lambda x: x @ head, hidden, targets, 2)
    exact = torch.log_softmax(hidden.double() @ head.double(), -1)
    for position, (one, other) in enumerate(zip(whole, parts, strict=True)):
        assert one.token_ids == other.token_ids
        assert one.token_ids[0] == targets[position]
        for entry in (one, other):
            assert entry.logprobs == pytest.approx(exact[position, entry.token_ids].tolist(), abs=1e-5)
