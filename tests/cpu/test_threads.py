"""Small steps run on one thread, and the process's own setting survives them."""

import pytest
import torch

from evenflow.runner.threads import is_small, one_thread_if


@pytest.mark.parametrize(
    ("num_tokens", "num_parameters", "num_bytes", "expected"),
    [
        (1, 5_000_000, 20_000_000, True),
        (8, 5_000_000, 40_000_000, True),
        (64, 5_000_000, 40_000_000, False),  # enough to multiply
        (1, 5_000_000, 100_000_000, False),  # enough to read
        (1, 7_000_000_000, 14_000_000_000, False),
    ],
)
def test_what_is_small(num_tokens, num_parameters, num_bytes, expected):
    assert is_small(num_tokens, num_parameters, num_bytes) is expected


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with one_thread_if(False):
            assert torch.get_num_threads() == 3
        with one_thread_if(True):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        with pytest.raises(RuntimeError, match="planted"), one_thread_if(True):
            raise RuntimeError("planted")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_steps_use_it(llama, monkeypatch):
    from evenflow import LLM, SamplingParams

    llm = LLM(str(llama.directory), skip_tokenizer_init=True)
    seen = []
    forward = llm.engine.runner.model.forward
    monkeypatch.setattr(
        llm.engine.runner.model, "forward", lambda *args: seen.append(torch.get_num_threads()) or forward(*args)
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        llm.generate([[3, 4, 5]], SamplingParams(max_tokens=2, ignore_eos=True, detokenize=False))
        assert seen == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
