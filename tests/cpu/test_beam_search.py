"""Beam search against exhaustive search and transformers."""

import itertools

import numpy as np
import pytest
import torch
from checkpoints import VOCAB

from evenflow import LLM, BeamSearchParams
from evenflow.beam_search import beam_search

END = 0


def random_model(num_tokens: int, seed: int):
    """A next-token distribution for every sequence, and the NextTokens of it."""

    def logprobs(sequence: list[int]) -> np.ndarray:
        rng = np.random.default_rng([seed, *sequence])
        logits = rng.standard_normal(num_tokens) * 2
        return logits - np.log(np.exp(logits).sum())

    def next_tokens(sequences):
        found = [logprobs(sequence) for sequence in sequences]
        return [[(int(i), float(p[i])) for i in np.argsort(-p)] for p in found]

    return logprobs, next_tokens


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_wide_beam_finds_the_best_of_all(seed, length_penalty):
    logprobs, next_tokens = random_model(3, seed)
    scores = {}
    for length in (1, 2, 3, 4):
        for tokens in itertools.product(range(3), repeat=length):
            if END in tokens[:-1] or (length < 4 and tokens[-1] != END):
                continue
            total = sum(logprobs([7, *tokens[:i]])[token] for i, token in enumerate(tokens))
            scores[tokens] = total / length**length_penalty
    best = sorted(scores, key=scores.__getitem__, reverse=True)
    params = BeamSearchParams(beam_width=64, max_tokens=4, length_penalty=length_penalty)
    found = beam_search([[7]], params, frozenset([END]), next_tokens)[0].sequences
    assert [tuple(sequence.token_ids) for sequence in found] == best[:64]
    for sequence in found:
        assert sequence.score(length_penalty) == pytest.approx(scores[tuple(sequence.token_ids)])
        assert sequence.finish_reason == ("stop" if sequence.token_ids[-1] == END else "length")


def test_width_one_is_greedy():
    logprobs, next_tokens = random_model(5, 0)
    params = BeamSearchParams(beam_width=1, max_tokens=6, ignore_eos=True)
    tokens = []
    for _ in range(6):
        tokens.append(int(np.argmax(logprobs([1, *tokens]))))
    assert beam_search([[1]], params, frozenset([END]), next_tokens)[0].sequences[0].token_ids == tokens


def test_equal_to_transformers(llama):
    llm = LLM(str(llama.directory), skip_tokenizer_init=True)
    prompts = [list(range(5, 20)), [9, 8, 7], list(range(30, 90))]
    params = BeamSearchParams(beam_width=4, max_tokens=8, ignore_eos=True)
    for prompt, output in zip(prompts, llm.beam_search(prompts, params), strict=True):
        with torch.inference_mode():
            expected = llama.oracle.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                num_beams=4,
                num_return_sequences=4,
                max_new_tokens=8,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_scores=True,
                return_dict_in_generate=True,
            )
        assert [s.token_ids for s in output.sequences] == expected.sequences[:, len(prompt) :].tolist()
        assert output.sequences[0].tokens == prompt + output.sequences[0].token_ids
        assert output.sequences[0].cum_logprob == output.sequences[0].cumulative_logprob
        for sequence, score in zip(output.sequences, expected.sequences_scores.tolist(), strict=True):
            assert sequence.score(1.0) == pytest.approx(score, abs=1e-5)
    assert not llm.engine.has_unfinished


def test_bad_input(llama):
    for options, message in [
        ({"beam_width": 0}, "beam_width=0 must be an integer from 1 to 64"),
        ({"beam_width": 2, "max_tokens": 0}, "max_tokens=0"),
        ({"beam_width": 2, "length_penalty": float("nan")}, "length_penalty=nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            BeamSearchParams(**options)
    llm = LLM(str(llama.directory), skip_tokenizer_init=True)
    with pytest.raises(ValueError, match=f"token id {VOCAB} is outside"):
        llm.beam_search([[VOCAB]], BeamSearchParams(beam_width=2))


def test_a_long_prompt_does_not_shorten_the_others():
    llm = LLM("demo", max_model_len=64)
    short, long = ({"prompt_token_ids": list(range(5, end))} for end in (8, 63))
    params = BeamSearchParams(beam_width=2, max_tokens=30, ignore_eos=True)
    (alone,) = llm.beam_search(short, params)
    together, cut = llm.beam_search([short, long], params)
    assert [s.token_ids for s in together.sequences] == [s.token_ids for s in alone.sequences]
    assert {len(s.token_ids) for s in together.sequences} == {30}
    assert {len(s.token_ids) for s in cut.sequences} == {64 - 58}
