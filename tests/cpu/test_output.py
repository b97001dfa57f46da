"""StopChecker against its offline definition; OutputProcessor: stop strings, logprobs, merging, streaming, failures."""

import logging
from itertools import chain, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from evenflow.detokenizer import StopChecker
from evenflow.engine.output import OutputProcessor
from evenflow.request import CompletionOutput, FinishReason, Logprob, RequestDelta, RequestOutput, TokenLogprobs
from evenflow.sampling_params import SamplingParams
from evenflow.tokenizer import Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LONG = ["xx", "abc", "ca"]


def letter_tokenizer() -> Tokenizer:
    """Every byte is a token, "abc" one more, and 257 is the end-of-sequence token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)} | {"</s>": 256, "xx": 257, "abc": 258, "ca": 259}
    backend = Backend(models.BPE(vocab, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return Tokenizer(backend, {"eos_token": "</s>"}, {})


TOKENIZER = letter_tokenizer()
EOS = 256
TEXTS = st.text("abcx", max_size=14)
STOPS = st.lists(st.text("abcx", min_size=1, max_size=4), min_size=1, max_size=4, unique=True)


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def first_stop(text: str, stops: list[str], min_end: int = 0) -> tuple[int, int] | None:
    """The definition: of all occurrences that end after min_end, the first to begin, then the first to end."""
    found = [
        (start, start + len(stop))
        for stop in stops
        for start in range(len(text))
        if text.startswith(stop, start) and start + len(stop) > min_end
    ]
    return min(found, default=None)


def expected_text(text: str, match: tuple[int, int] | None, include: bool) -> str:
    return text if match is None else text[: match[1] if include else match[0]]


@given(text=TEXTS, stops=STOPS, cuts=st.lists(st.integers(0, 14)), include=st.booleans(), min_end=st.integers(0, 8))
@hypothesis_settings(max_examples=500, deadline=None)
def test_stop_checker_is_its_definition(
    text: str, stops: list[str], cuts: list[int], include: bool, min_end: int
) -> None:
    checker, emitted = StopChecker(stops, include), ""
    borders = sorted({0, len(text), min(min_end, len(text)), *[min(c, len(text)) for c in cuts]})
    match = first_stop(text, stops, min(min_end, len(text)))
    final = expected_text(text, match, include)
    for a, b in pairwise(borders):
        emitted += checker.append(text[a:b], counts=b > min_end)
        assert final.startswith(emitted)
    assert emitted + checker.flush() == final
    assert (checker.match and (checker.match.end - len(checker.match.stop), checker.match.end)) == match


def test_stop_checker_holds_back_only_what_may_be_a_stop_string() -> None:
    checker = StopChecker(["</end>", "stop"])
    assert checker.append("a < b") == "a < b"
    assert checker.append("x</") == "x"
    assert checker.append("en") == ""
    assert checker.append("d!") == "</end!"
    assert checker.append("sto") == ""
    assert checker.append("p more") == ""
    assert checker.append("later") == ""
    assert checker.flush() == ""
    assert checker.match is not None
    assert checker.match.stop == "stop"
    assert StopChecker([]).append("x") == "x"


def test_a_stop_string_ends_the_text_at_once_even_if_a_longer_one_begins_with_it() -> None:
    checker = StopChecker(["abc", "ab"])
    assert checker.append("xab") == "x"
    assert checker.match is not None
    assert checker.match.stop == "ab"


def test_stop_checker_waits_for_a_stop_string_that_began_earlier() -> None:
    for rest, kept, stop in (("d", "", "abcd"), ("x", "a", "bc")):
        checker = StopChecker(["bc", "abcd"])
        assert checker.append("abc") == ""
        assert checker.append(rest) == kept
        assert checker.match is not None
        assert checker.match.stop == stop


def run_one(
    params: SamplingParams, chunks: list[list[int]], finish: FinishReason = FinishReason.LENGTH, **how: Any
) -> tuple[list[RequestOutput], list[str]]:
    """All outputs and aborts of one request whose engine sends these chunks."""
    processor = OutputProcessor(TOKENIZER)
    processor.add("r", "p", ids_of("p"), params, ["r"], **how)
    outputs, aborted = [], []
    for i, chunk in enumerate(chunks):
        logprobs = [TokenLogprobs([t], [-1.0 - t], 1) for t in chunk]
        reason = finish if i == len(chunks) - 1 else None
        out, to_abort = processor.process([RequestDelta("r", chunk, logprobs=logprobs, finish_reason=reason)])
        outputs += out
        aborted += to_abort
    assert processor.live_ids() == []
    assert not processor._children
    return outputs, aborted


def chunked(ids: list[int], cuts: list[int]) -> list[list[int]]:
    borders = sorted({0, len(ids), *[c for c in cuts if c < len(ids)]})
    return [ids[a:b] for a, b in pairwise(borders)] or [[]]


TOKENS = st.lists(st.sampled_from([*ids_of("abcx"), 257, 258, 259]), max_size=10)


@given(ids=TOKENS, stops=STOPS, cuts=st.lists(st.integers(0, 10)), include=st.booleans(), min_tokens=st.integers(0, 6))
@hypothesis_settings(max_examples=400, deadline=None)
def test_text_and_tokens_are_cut_alike_in_any_chunks_and_any_mode(
    ids: list[int], stops: list[str], cuts: list[int], include: bool, min_tokens: int
) -> None:
    params = SamplingParams(
        stop=stops, include_stop_str_in_output=include, min_tokens=min_tokens, max_tokens=99, logprobs=0
    )
    text, ends = TOKENIZER.decode(ids), [len(TOKENIZER.decode(ids[: i + 1])) for i in range(len(ids))]
    min_end = ([0, *ends])[min(min_tokens, len(ends))]
    match = first_stop(text, stops, min_end)
    count = len(ids) if match is None else next(i + 1 for i, end in enumerate(ends) if end >= match[1])
    for how in (dict[str, Any](), {"streaming": True}, {"increments": True}):
        outputs, _ = run_one(params, chunked(ids, cuts), **how)
        parts = [o.outputs[0] for o in outputs]
        last = parts[-1]
        is_sum = "increments" in how
        assert ("".join(p.text for p in parts) if is_sum else last.text) == expected_text(text, match, include)
        assert (list(chain.from_iterable(p.token_ids for p in parts)) if is_sum else last.token_ids) == ids[:count]
        assert last.finish_reason == ("length" if match is None else "stop")
        assert last.stop_reason == (None if match is None else text[slice(*match)])
        told = list(chain.from_iterable(p.logprobs or [] for p in parts)) if is_sum else last.logprobs
        assert [next(iter(entry)) for entry in told or []] == ids[:count]
        assert last.cumulative_logprob == pytest.approx(sum(-1.0 - t for t in ids[:count]))
        if "streaming" in how:
            assert all(b.text.startswith(a.text) for a, b in pairwise(parts))
            assert all(b.token_ids[: len(a.token_ids)] == a.token_ids for a, b in pairwise(parts))
        assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]


def test_a_stop_string_aborts_the_child_and_later_deltas_are_ignored() -> None:
    processor = OutputProcessor(TOKENIZER)
    processor.add("r", None, [1], SamplingParams(stop=["b"]), ["r"])
    outputs, to_abort = processor.process([RequestDelta("r", ids_of("ab"))])
    assert to_abort == ["r"]
    assert outputs[0].outputs[0] == CompletionOutput(0, "a", ids_of("ab"), finish_reason="stop", stop_reason="b")
    assert processor.process(
        [RequestDelta("r", ids_of("c")), RequestDelta("r", [], finish_reason=FinishReason.ABORT)]
    ) == (
        [],
        [],
    )
    outputs, to_abort = run_one(SamplingParams(stop=["b"]), [ids_of("ab")])
    assert to_abort == []  # the engine ended it as well
    assert outputs[0].outputs[0].stop_reason == "b"


@pytest.mark.parametrize(("include", "text"), [(False, "a"), (True, "a</s>")])
def test_the_stop_token_is_a_token_but_no_text(include: bool, text: str) -> None:
    params = SamplingParams(include_stop_str_in_output=include, skip_special_tokens=False)
    outputs, _ = run_one(params, [ids_of("a"), [EOS]], FinishReason.STOP)
    assert (outputs[0].outputs[0].text, outputs[0].outputs[0].token_ids) == (text, [*ids_of("a"), EOS])
    assert outputs[0].outputs[0].finish_reason == "stop"
    outputs, _ = run_one(SamplingParams(skip_special_tokens=False), [ids_of("a"), [EOS]], FinishReason.LENGTH)
    assert outputs[0].outputs[0].text == "a</s>"


def test_incomplete_bytes_come_out_at_the_end() -> None:
    half = ids_of("é")[:1]
    for how in (dict[str, Any](), {"streaming": True}):
        outputs, _ = run_one(SamplingParams(), [ids_of("a"), half], **how)
        assert outputs[-1].outputs[0].text == "a\ufffd"
    outputs, _ = run_one(SamplingParams(stop=["zz"]), [ids_of("az"), half])
    assert outputs[-1].outputs[0].text == "az\ufffd"


def test_logprobs_are_dicts_as_in_vllm() -> None:
    processor = OutputProcessor(TOKENIZER)
    a, b, c = ids_of("abc")
    params = SamplingParams(logprobs=2, prompt_logprobs=1)
    processor.add("r", "abc", [a, b, c], params, ["r"], increments=True)
    prompt = [TokenLogprobs([b, a], [-3.0, -0.5], 7), TokenLogprobs([c, c], [-0.25, -0.25], 1)]
    assert processor.process([RequestDelta("r", [], prompt_logprobs=prompt[:1])]) == ([], [])
    sampled = TokenLogprobs([c, a, b], [-5.0, -0.1, -0.2], 9)
    outputs, _ = processor.process([RequestDelta("r", [c], [sampled], prompt[1:], num_cached_tokens=2)])
    assert outputs[0].outputs[0].logprobs == [
        {c: Logprob(-5.0, 9, "c"), a: Logprob(-0.1, 1, "a"), b: Logprob(-0.2, 2, "b")}
    ]
    assert list(outputs[0].outputs[0].logprobs[0]) == [c, a, b]
    assert outputs[0].prompt_logprobs == [
        None,
        {b: Logprob(-3.0, 7, "b"), a: Logprob(-0.5, 1, "a")},
        {c: Logprob(-0.25, 1, "c")},
    ]
    assert outputs[0].num_cached_tokens == 2
    top = TokenLogprobs([a, a, b], [-0.1, -0.1, -0.2], 1)
    outputs, _ = processor.process([RequestDelta("r", [a], [top], finish_reason=FinishReason.LENGTH)])
    assert outputs[0].outputs[0].logprobs == [{a: Logprob(-0.1, 1, "a"), b: Logprob(-0.2, 2, "b")}]
    assert outputs[0].outputs[0].cumulative_logprob == pytest.approx(-5.1)
    assert outputs[0].prompt_logprobs is None  # told once


def test_prompt_logprobs_are_those_of_the_first_child() -> None:
    processor = OutputProcessor(TOKENIZER)
    processor.add("r", None, [1, 2, 3], SamplingParams(n=2, prompt_logprobs=0), ["r-0", "r-1"])
    for child, token_id in (("r-1", 7), ("r-0", 2), ("r-0", 3)):
        processor.process([RequestDelta(child, [], prompt_logprobs=[TokenLogprobs([token_id], [-1.0], 1)])])
    done = [RequestDelta(child, [5], finish_reason=FinishReason.LENGTH) for child in ("r-0", "r-1")]
    (output,), _ = processor.process(done)
    assert [None if p is None else list(p) for p in output.prompt_logprobs or []] == [None, [2], [3]]


def test_no_logprobs_unless_asked_for() -> None:
    outputs, _ = run_one(SamplingParams(), [ids_of("a")])
    assert outputs[0].outputs[0].logprobs is None
    assert outputs[0].outputs[0].cumulative_logprob is None
    assert outputs[0].prompt_logprobs is None


def test_children_are_merged_in_order_and_one_output_is_made_at_the_end() -> None:
    processor = OutputProcessor(TOKENIZER)
    processor.add("r", "p", [1], SamplingParams(n=3), ["r-0", "r-1", "r-2"])
    done = FinishReason.LENGTH
    assert processor.process([RequestDelta("r-2", ids_of("c"), finish_reason=done)]) == ([], [])
    assert processor.process([RequestDelta("r-0", ids_of("a"))]) == ([], [])
    assert processor.is_live("r")
    both = [RequestDelta("r-1", ids_of("b"), finish_reason=done), RequestDelta("r-0", ids_of("x"), finish_reason=done)]
    (output,), _ = processor.process(both)
    assert [(c.index, c.text) for c in output.outputs] == [(0, "ax"), (1, "b"), (2, "c")]
    assert output.finished
    assert (output.prompt, output.prompt_token_ids) == ("p", [1])
    assert not processor.is_live("r")


def test_increments_hold_the_children_that_moved() -> None:
    processor = OutputProcessor(TOKENIZER)
    processor.add("r", "p", [1], SamplingParams(n=2), ["r-0", "r-1"], increments=True)
    (output,), _ = processor.process([RequestDelta("r-1", ids_of("b"))])
    assert [(c.index, c.text) for c in output.outputs] == [(1, "b")]
    (output,), _ = processor.process([RequestDelta("r-1", ids_of("c")), RequestDelta("r-1", ids_of("d"))])
    assert [(c.index, c.text, len(c.token_ids)) for c in output.outputs] == [(1, "cd", 2)]


def test_abort_forgets_and_is_harmless_twice() -> None:
    processor = OutputProcessor(TOKENIZER)
    processor.add("r", None, [1], SamplingParams(n=2), ["r-0", "r-1"])
    processor.process([RequestDelta("r-0", [], finish_reason=FinishReason.LENGTH)])
    assert processor.abort("r") == ["r-1"]
    assert processor.abort("r") == [] == processor.abort("unknown")
    assert processor.process([RequestDelta("r-1", ids_of("a"))]) == ([], [])
    processor.add("r", None, [1], SamplingParams(), ["r"])
    with pytest.raises(ValueError, match="'r' is already in use"):
        processor.add("r", None, [1], SamplingParams(), ["r"])


def test_an_error_of_one_child_is_shown_in_it() -> None:
    processor = OutputProcessor(TOKENIZER)
    processor.add("r", None, [1], SamplingParams(n=2), ["r-0", "r-1"])
    failed = RequestDelta("r-1", [], finish_reason=FinishReason.ERROR, error="NaN logits")
    (output,), to_abort = processor.process(
        [RequestDelta("r-0", ids_of("a"), finish_reason=FinishReason.LENGTH), failed]
    )
    assert [(c.finish_reason, c.error) for c in output.outputs] == [("length", None), ("error", "NaN logits")]
    assert to_abort == []


def test_an_exception_in_detokenizing_fails_its_request_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    processor = OutputProcessor(TOKENIZER)
    for name in ("bad", "good"):
        processor.add(name, None, [1], SamplingParams(), [name])

    def explode(token_ids: Any) -> str:
        raise RuntimeError("secret 0x7f")

    monkeypatch.setattr(processor._children["bad"]._detokenizer, "append", explode)
    with caplog.at_level(logging.CRITICAL):
        deltas = [RequestDelta("bad", [1]), RequestDelta("good", ids_of("a"), finish_reason=FinishReason.LENGTH)]
        (bad, good), to_abort = processor.process(deltas)
    assert (bad.outputs[0].finish_reason, to_abort) == ("error", ["bad"])
    assert "secret" not in str(bad.outputs[0].error)
    assert good.outputs[0].text == "a"


@pytest.mark.parametrize(("tokenizer", "detokenize"), [(None, True), (TOKENIZER, False)])
def test_without_detokenizing_there_are_ids_only(tokenizer: Tokenizer | None, detokenize: bool) -> None:
    processor = OutputProcessor(tokenizer)
    processor.add("r", None, [1], SamplingParams(detokenize=detokenize, logprobs=0), ["r"])
    delta = RequestDelta("r", [65], [TokenLogprobs([65], [-1.0], 1)], finish_reason=FinishReason.STOP)
    (output,), _ = processor.process([delta])
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("", [65])
    assert output.outputs[0].logprobs == [
        {65: Logprob(-1.0, 1, None if tokenizer is None else TOKENIZER.token_text(65))}
    ]
