"""Log-probabilities against float64, ranks and alternatives against the reference."""

import pytest
import torch
from sampling_cases import DTYPES, make_logits

from evenflow.kernels import logprobs
from evenflow.kernels.logprobs import LOWEST_LOGPROB, launch_token_logprobs, token_logprobs


def check(logits: torch.Tensor, tokens: list[int], k: int) -> None:
    token_ids = torch.tensor(tokens)
    ids, found, ranks = launch_token_logprobs(logits, token_ids, k)
    expected_ids, expected, expected_ranks = token_logprobs(logits.float(), token_ids, k)
    exact = logits.double().log_softmax(-1).gather(1, expected_ids).clamp(min=LOWEST_LOGPROB)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(ranks, expected_ranks)
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), exact, rtol=3e-7, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 60, 2048, 5001])
@pytest.mark.parametrize("k", [0, 1, 20])
def test_against_float64(vocab_size, dtype, k):
    check(make_logits(3, vocab_size, dtype, scale=6.0), [0, vocab_size // 2, vocab_size - 1], k)


@pytest.mark.parametrize("num_programs", [1, 4, 10**6])
def test_any_number_of_parts(monkeypatch, num_programs):
    monkeypatch.setattr(logprobs, "NUM_PROGRAMS", num_programs)
    monkeypatch.setattr(logprobs, "BLOCK", 256)
    check(make_logits(2, 1500), [3, 1499], 5)


def test_ties_go_by_id():
    logits = make_logits(2, 400, scale=1.0).round()
    logits[1] = torch.where(torch.arange(400) % 2 == 0, 0.0, -0.0)
    check(logits, [7, 8], 30)


def test_banned_tokens_have_the_lowest():
    logits = make_logits(2, 3000)
    logits[:, 100:2700] = -torch.inf
    check(logits, [5, 200], 10)
    _, found, ranks = launch_token_logprobs(logits, torch.tensor([5, 200]), 0)
    assert found[1] == LOWEST_LOGPROB
    assert ranks[1] == 401


def test_large_logits_do_not_overflow():
    logits = 1e4 * make_logits(2, 300)
    token_ids = torch.tensor([1, 2])
    found = launch_token_logprobs(logits, token_ids, 3)[1]
    torch.testing.assert_close(found, token_logprobs(logits, token_ids, 3)[1], rtol=1e-6, atol=0.0)


def test_bad_rows_are_nan():
    logits = make_logits(3, 300)
    logits[0, 7] = torch.nan
    logits[1] = -torch.inf
    _, found, _ = launch_token_logprobs(logits, torch.tensor([1, 2, -1]), 0)
    assert found.isnan().all()


def test_no_rows():
    ids, found, ranks = launch_token_logprobs(torch.zeros(0, 50), torch.zeros(0, dtype=torch.int64), 3)
    assert ids.shape == found.shape == (0, 4)
    assert ranks.shape == (0,)
