"""Structured output: the text is what was asked for, the neighbours do not notice, and no grammar harms anybody."""

import json
import re
import time

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from evenflow import LLM, SamplingParams
from evenflow.guided import schema
from evenflow.guided.checker import GrammarChecker
from evenflow.guided.grammar import to_grammar
from evenflow.guided.matcher import GuidedDecoding
from evenflow.request import Request
from evenflow.sampling_params import StructuredOutputsParams

ONCE = "Once upon a time"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"street": {"const": "Elm"}}}]},
    },
    "required": ["name", "age", "pets", "home"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm():
    return LLM("demo", max_num_seqs=16, max_num_batched_tokens=64)


@pytest.fixture(scope="module")
def checker():
    checker = GrammarChecker(3072, {0: "<|begin|>", 1: "<|end|>"})
    yield checker
    checker.close()


def ask(llm, structured, seeds=range(3), **params):
    """Texts of several seeds at temperature 1, in one batch; every one must have ended by itself."""
    asked = {"max_tokens": 200} | params
    sampling = [SamplingParams(seed=seed, structured_outputs=structured, **asked) for seed in seeds]
    completions = [output.outputs[0] for output in llm.generate([ONCE] * len(sampling), sampling, use_tqdm=False)]
    assert {completion.finish_reason for completion in completions} == {"stop"}, completions
    return [completion.text for completion in completions]


def is_person(value):
    return (
        set(value) == {"name", "age", "pets", "home"}
        and isinstance(value["name"], str)
        and len(value["name"]) <= 8
        and isinstance(value["age"], int)
        and 0 <= value["age"] <= 120
        and len(value["pets"]) <= 3
        and set(value["pets"]) <= {"cat", "dog"}
        and (value["home"] is None or value["home"].get("street", "Elm") == "Elm")
    )


@pytest.mark.parametrize("schema", [PERSON, json.dumps(PERSON)])
def test_json_follows_its_schema(llm, schema):
    texts = ask(llm, StructuredOutputsParams(json=schema), seeds=range(6))
    assert all(is_person(json.loads(text)) for text in texts)
    assert len(set(texts)) > 1


def test_any_json_object(llm):
    params = SamplingParams(seed=1, max_tokens=40, structured_outputs=StructuredOutputsParams(json_object=True))
    assert llm.generate(ONCE, params)[0].outputs[0].text.startswith("{")


def test_a_bad_grammar_is_refused_before_anything_runs(llm):
    good = SamplingParams(max_tokens=5, structured_outputs=StructuredOutputsParams(regex="[ab]{3}"))
    bad = good.replace(structured_outputs=StructuredOutputsParams(regex="("))
    for run in (lambda: llm.generate(ONCE, bad), lambda: next(llm.stream(ONCE, bad))):
        with pytest.raises(ValueError, match="^structured_outputs: the grammar cannot be used"):
            run()
    with pytest.raises(ValueError, match="prompt 1: structured_outputs"):
        llm.generate([ONCE] * 3, [good, bad, good])
    assert not llm.engine.has_unfinished


def test_a_grammar_is_compiled_once_for_all_prompts(llm, monkeypatch):
    checked = []
    check = llm.engine.check_grammar
    monkeypatch.setattr(llm.engine, "check_grammar", lambda request: (checked.append(request), check(request)))
    params = SamplingParams(max_tokens=5, structured_outputs=StructuredOutputsParams(regex="[ab]{3}"))
    llm.generate([ONCE] * 5, params, use_tqdm=False)
    assert len(checked) == 1


@pytest.mark.parametrize("regex", [r"[a-c]{3}-\d{2}", r"(yes|no), (sir|madam)!", r"\w+@\w+\.com", "é+[^a-z]漢"])
def test_a_text_matches_its_regex(llm, regex):
    regex = regex.replace("+", "{1,6}")
    assert all(re.fullmatch(regex, text) for text in ask(llm, StructuredOutputsParams(regex=regex)))


def test_a_choice_is_one_of_them(llm):
    choice = ["yes", "no", 'with "quotes" and \\', "yes, but", "漢字", "line\nend"]
    texts = ask(llm, StructuredOutputsParams(choice=choice), seeds=range(12))
    assert set(texts) <= set(choice)


def test_a_lark_grammar(llm):
    grammar = 'start: list\nlist: "[" [NUMBER ("," NUMBER){0,5}] "]"\nNUMBER: /[0-9]{1,3}/\n'
    for text in ask(llm, StructuredOutputsParams(grammar=grammar)):
        json.loads(re.sub(r"\b0+(?=\d)", "", text))


def test_the_end_is_free_exactly_where_the_grammar_accepts(llm):
    """min_tokens and ignore_eos keep off the end-of-sequence token, not the end of the grammar."""
    structured = StructuredOutputsParams(regex="[a-z]{3}")
    for params in ({"min_tokens": 50}, {"ignore_eos": True}, {"min_tokens": 50, "ignore_eos": True}):
        assert all(len(text) == 3 for text in ask(llm, structured, **params))


def test_an_end_that_is_ignored_is_no_text(llm):
    structured = StructuredOutputsParams(regex="a+")
    (text,) = ask(
        llm, structured, seeds=[1], ignore_eos=True, skip_special_tokens=False, logit_bias={1: 50.0}, max_tokens=9
    )
    assert text == "a"


def test_bad_words_that_leave_nothing_are_the_requests_own_fault(llm):
    params = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["the"]), bad_words=["the", "t", "th"])
    (output,) = llm.generate(ONCE, params)
    completion, num_failed = output.outputs[0], llm.engine.stats().num_failed_rows
    assert completion.finish_reason == "error"
    assert completion.error.startswith("structured_outputs: bad_words, min_tokens or logit_bias leave no token")
    assert num_failed == 0  # it is no sign of bad weights


def test_what_ends_by_itself_keeps_its_last_token(llm):
    (output,) = llm.generate(ONCE, SamplingParams(structured_outputs=StructuredOutputsParams(choice=["cat"])))
    completion = output.outputs[0]
    assert completion.text == "cat"
    assert llm.tokenizer.decode(completion.token_ids) == "cat"
    assert completion.stop_reason is None


def test_neighbours_are_not_affected(llm):
    free = SamplingParams(seed=7, max_tokens=30)
    alone = llm.generate(ONCE, free)[0].outputs[0].token_ids
    guided = SamplingParams(seed=7, max_tokens=60, structured_outputs=StructuredOutputsParams(json=PERSON))
    mixed = llm.generate([ONCE] * 5, [guided, free, guided, free, free], use_tqdm=False)
    assert [mixed[i].outputs[0].token_ids for i in (1, 3, 4)] == [alone] * 3
    assert mixed[0].outputs[0].text == mixed[2].outputs[0].text


def test_every_child_has_its_own_state(llm):
    params = SamplingParams(n=6, seed=3, max_tokens=80, structured_outputs=StructuredOutputsParams(json=PERSON))
    texts = [completion.text for completion in llm.generate(ONCE, params)[0].outputs]
    assert all(is_person(json.loads(text)) for text in texts)
    assert len(set(texts)) > 1


def test_preemption_leaves_the_state_alone(llm):
    params = [
        SamplingParams(seed=i, max_tokens=80, structured_outputs=StructuredOutputsParams(json=PERSON)) for i in range(8)
    ]
    expected = [output.outputs[0].text for output in llm.generate([ONCE] * 8, params, use_tqdm=False)]
    small = LLM("demo", kv_cache_memory="768KiB", max_model_len=120, block_size=4)
    found = [output.outputs[0].text for output in small.generate([ONCE] * 8, params, use_tqdm=False)]
    assert small.engine.scheduler.num_preemptions > 0
    assert found == expected


def test_logprobs_are_of_the_model_not_of_the_mask(llm):
    params = SamplingParams(temperature=0, logprobs=1, structured_outputs=StructuredOutputsParams(choice=["zzz"]))
    entry = llm.generate(ONCE, params)[0].outputs[0].logprobs[0]
    assert min(logprob.logprob for logprob in entry.values()) < -3


LANGUAGE = ["cat", "car", "cart", "dog", "do", " do", "é", "ça"]


def test_masks_allow_what_has_a_continuation_and_nothing_else(llm):
    """Against brute force: a token is allowed iff some text of the language begins with what there is and the token."""
    tokenizer = llm.tokenizer
    width = llm.model_config.vocab_size
    guided = GuidedDecoding(tokenizer, width, [1])
    params = SamplingParams(structured_outputs=StructuredOutputsParams(choice=LANGUAGE))
    matcher = guided.begin(Request("a", [0], params, 10)).result()
    texts = [text.encode() for text in LANGUAGE]
    for prefix in (b"", b"c", b"ca", b"do", b"car"):
        state = matcher.deep_copy()
        assert state.consume_tokens(
            [next(i for i in range(width) if tokenizer.token_bytes(i) == bytes([b])) for b in prefix]
        )
        bits = np.unpackbits(np.frombuffer(state.compute_bitmask(), np.uint8), bitorder="little")[:width]
        for token_id in range(width):
            data = tokenizer.token_bytes(token_id)
            is_special = token_id in tokenizer.special_ids
            expected = not is_special and data != b"" and any(text.startswith(prefix + data) for text in texts)
            if token_id == 1:
                expected = prefix in texts
            assert bool(bits[token_id]) == expected, (prefix, token_id, data)


ATOMS = st.sampled_from(["a", "b", "[0-9]", "[a-z]", "é", "the ", "\\."])
REGEXES = st.recursive(
    ATOMS,
    lambda inner: (
        st.tuples(inner, inner).map("".join)
        | st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})")
        | st.tuples(inner, st.sampled_from(["?", "{2}", "{0,3}", "{1,2}"])).map(lambda pair: f"({pair[0]}){pair[1]}")
    ),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None)
@given(regex=REGEXES.filter(lambda regex: not re.fullmatch(regex, "")), seed=st.integers(0, 99))
def test_random_regexes_are_matched(llm, regex, seed):
    (text,) = ask(llm, StructuredOutputsParams(regex=regex), seeds=[seed])
    assert re.fullmatch(regex, text), (regex, text)


# Schemas


def admits(asked, value):
    """Whether the schema's grammar takes the value's JSON, byte by byte, and may end there."""
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, to_grammar(StructuredOutputsParams(json=asked)), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.tokenize_str(json.dumps(value))
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
B = {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}
TO_A, TO_B = {"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B~1x"}
DEFS = {"$defs": {"A": A, "B/x": B, "chain": TO_A}}
KEYS = [
    (A, [{"a": 1}], [{"a": 1, "z": 1}]),
    ({"type": "object"}, [{}, {"z": {"y": 1}}], []),
    (A | {"additionalProperties": {"type": "string"}}, [{"a": 1, "z": "y"}], [{"a": 1, "z": 1}]),
    (A | {"patternProperties": {"^z": {}}}, [{"a": 1, "z": 1}], []),
    (A | {"required": ["z"]}, [{"z": 1}], []),
    (A | {"minProperties": 2}, [{"a": 1, "z": 1}], []),
    (DEFS | {"anyOf": [TO_A, {"type": "null"}]}, [{"a": 1}, None], [{"a": 1, "z": 1}]),
    (DEFS | {"type": "array", "items": TO_A}, [[{"a": 1}]], [[{"a": 1, "z": 1}]]),
    (DEFS | {"type": "array", "prefixItems": [TO_A]}, [[{"a": 1}]], [[{"a": 1, "z": 1}]]),
    (DEFS | {"properties": {"x": {"allOf": [TO_A], "title": "t"}}}, [{"x": {"a": 1}}], [{"x": {"a": 1, "z": 1}}]),
    ({"type": "object", "additionalProperties": A}, [{"x": {"a": 1}}], [{"x": {"a": 1, "z": 1}}]),
    # Parts of one object do not forbid each other's keys.
    ({"allOf": [A, B]}, [{"a": 1, "b": 1}], [{"a": 1}]),
    (DEFS | {"allOf": [TO_A, TO_B]}, [{"a": 1, "b": 1}], [{"b": 1}]),
    (DEFS | {"allOf": [{"$ref": "#/$defs/chain"}, B]}, [{"a": 1, "b": 1}], [{"b": 1}]),
    (DEFS | B | TO_A, [{"b": 1, "a": 1}], [{"b": 1}]),
    (A | {"anyOf": [B, {"required": ["a"]}]}, [{"a": 1, "b": 1}], []),
    # What merely looks like a schema is a value.
    ({"enum": [A, {"properties": {"a": 1}}]}, [A, {"properties": {"a": 1}}], [{}]),
    ({"const": {"format": "binary"}}, [{"format": "binary"}], []),
    ({"properties": {"properties": {"type": "string"}, "format": {"const": "x"}}}, [{"format": "x"}], [{"z": 1}]),
    # Annotations, and alternatives that may overlap.
    ({"type": "string", "format": "binary"}, ["a"], [1]),
    ({"type": "string", "format": "date"}, ["2026-01-31"], ["a"]),
    ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, [1, 1.5], ["a"]),
    ({"type": "object", "x-guidance": 3}, [{}], []),
    ({"$ref": "#/properties/a", "properties": {"a": {}}}, [{"a": 1}], []),
]


@pytest.mark.parametrize(("asked", "good", "bad"), KEYS)
def test_unlisted_keys_are_taken_where_the_schema_asks_for_them(asked, good, bad):
    for value in good:
        assert admits(asked, value), value
    for value in bad:
        assert not admits(asked, value), value


CHAIN = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i - 1}"}, {}]} for i in range(1, 900)} | {"d0": A}
MANY_NAMES = {"all": {"allOf": [{"$ref": f"#{'x' * i}/$defs"} for i in range(300)]}}


@pytest.mark.parametrize("defs", [CHAIN, MANY_NAMES, {"d": {"allOf": [{"$ref": "#"}, {"$ref": "#/$defs/d"}]}}])
def test_no_schema_is_read_over_and_over(monkeypatch, defs):
    calls, walk = [], schema._Walk.walk
    monkeypatch.setattr(schema._Walk, "walk", lambda *args, **options: calls.append(1) or walk(*args, **options))
    schema.prepared({"$defs": defs})
    assert len(calls) < 20_000


# Refusals


BAD = [
    ({}, "exactly one"),
    ({"json": "{}", "regex": "a"}, "exactly one"),
    ({"json": "{"}, "not JSON"),
    ({"json": "[1]"}, "must be a JSON schema"),
    ({"json": {"enum": list(range(1001))}}, "more than 1000"),
    ({"json": {"description": "x" * 70_000}}, "at most 65536"),
    ({"regex": ""}, "1 to 4096"),
    ({"regex": "a" * 4097}, "1 to 4096"),
    ({"choice": []}, "1 to 1000"),
    ({"choice": [""]}, "1 to 1000 characters"),
    ({"choice": [1]}, "1 to 1000 characters"),
    ({"choice": "yes"}, "must be a list"),
    ({"grammar": "x" * 70_000}, "1 to 65536"),
]


@pytest.mark.parametrize(("fields", "text"), BAD)
def test_params_check_themselves(fields, text):
    with pytest.raises(ValueError, match=text) as caught:
        StructuredOutputsParams(**fields)
    assert str(caught.value).startswith("structured_outputs")


def test_depth_is_checked_without_a_deep_stack():
    schema = {}
    for _ in range(40):
        schema = {"items": schema}
    with pytest.raises(ValueError, match="nested more than 32"):
        StructuredOutputsParams(json=schema)
    with pytest.raises(ValueError, match=r"nested|recursion"):
        StructuredOutputsParams(json='{"items":' * 50_000 + "1" + "}" * 50_000)


def test_params_survive_the_way_to_another_process():
    for structured in (StructuredOutputsParams(json=PERSON), StructuredOutputsParams(choice=["a", "b"])):
        params = SamplingParams(structured_outputs=structured, n=2)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


GRAMMARS = [
    ({"regex": "["}, "regex"),
    ({"regex": "(?<=a)b"}, "regex"),
    ({"regex": "(a{1000}){1000}"}, ""),
    ({"regex": "([a-z]{1,200}){1,200}x"}, ""),
    ({"json": {"type": "strong"}}, "Invalid type"),
    ({"json": {"$ref": "#/nowhere"}}, ""),
    ({"json": {"$ref": "http://127.0.0.1:1/schema"}}, ""),
    ({"json": {"type": "string", "pattern": "("}}, ""),
    ({"json": {"not": {"type": "string"}}}, ""),
    ({"grammar": "start: nothing"}, ""),
    ({"grammar": "nonsense"}, ""),
    ({"grammar": 'root ::= "a"'}, "must be Lark.*start"),
    ({"regex": "(?!a)b"}, r"\(\?!a\)b: look-around.* not supported"),
    ({"json": {"type": "string", "pattern": "(?!a)b"}}, r"\(\?!a\)b: look-around.* not supported"),
    ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    ({"grammar": "start: start start"}, ""),
]


@pytest.mark.parametrize(("fields", "text"), GRAMMARS)
def test_a_bad_grammar_is_one_line(checker, fields, text):
    with pytest.raises(ValueError, match=text or None) as caught:
        checker.check(StructuredOutputsParams(**fields))
    assert str(caught.value).startswith("structured_outputs: the grammar cannot be used: ")
    assert "\n" not in str(caught.value)
    checker.check(StructuredOutputsParams(regex="[a-z]+"))


def test_a_grammar_that_takes_too_long_is_killed_with_its_process(checker):
    checker.check(StructuredOutputsParams(regex="a"))
    hasty = GrammarChecker(3072, {}, timeout_s=0.0)
    try:
        with pytest.raises(ValueError, match="longer than 0 s"):
            hasty.check(StructuredOutputsParams(regex="(a{1000}){1000}"))
        assert hasty._process is None
    finally:
        hasty.close()


def test_the_checker_survives_the_death_of_its_process(checker):
    checker.check(StructuredOutputsParams(regex="b"))
    checker._process.kill()
    checker._process.wait()
    checker.check(StructuredOutputsParams(regex="c"))


def test_what_is_known_is_not_asked_again(checker, monkeypatch):
    structured = StructuredOutputsParams(regex="known")
    checker.check(structured)
    monkeypatch.setattr(checker, "_ask", lambda grammar: pytest.fail("asked again"))
    checker.check(structured)


def test_a_grammar_that_fails_in_the_engine_ends_its_request_only(llm, monkeypatch):
    monkeypatch.setattr(llm.engine, "check_grammar", lambda request: None)
    bad = SamplingParams(structured_outputs=StructuredOutputsParams(regex="["))
    good = SamplingParams(seed=1, max_tokens=5)
    outputs = llm.generate([ONCE, ONCE], [bad, good], use_tqdm=False)
    assert outputs[0].outputs[0].finish_reason == "error"
    assert "grammar" in outputs[0].outputs[0].error
    assert outputs[1].outputs[0].finish_reason == "length"
    assert not llm.engine.has_unfinished


def test_a_matcher_that_breaks_half_way_ends_its_request_only(llm, monkeypatch):
    """The k-th token is not taken, for every k until none is."""
    guided = llm.engine._guided
    good = SamplingParams(seed=1, max_tokens=12)
    alone = llm.generate(ONCE, good)[0].outputs[0].token_ids
    for k in range(8):
        original, count = guided.advance, iter(range(1000))

        def advance(plan, masks, result, k=k, original=original, count=count):
            if next(count) == k:
                result.token_ids[masks.rows[0]] = 1 if result.token_ids[masks.rows[0]] != 1 else 2
            return original(plan, masks, result)

        with monkeypatch.context() as patch:
            patch.setattr(guided, "advance", advance)
            params = SamplingParams(
                seed=2, structured_outputs=StructuredOutputsParams(regex="[a-z]{40}"), max_tokens=60
            )
            outputs = llm.generate([ONCE, ONCE], [params, good], use_tqdm=False)
        assert outputs[0].outputs[0].finish_reason == "error", k
        assert outputs[1].outputs[0].token_ids == alone
        assert not llm.engine.has_unfinished
        assert guided._matchers == {}


def test_an_abort_while_the_grammar_is_compiled(llm):
    engine = llm.engine
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="x{1,77}"))
    engine.add(Request("early", [0, 5], params, 10))
    assert engine.has_unfinished
    with pytest.raises(ValueError, match="already in use"):
        engine.add(Request("early", [0, 5], params, 10))
    engine.abort(["early"])
    assert not engine.has_unfinished
    assert engine.step() == []
    deadline = time.monotonic() + 30
    engine.add(Request("late", [0, 5], params, 10))
    while engine.has_unfinished:
        engine.step()
        assert time.monotonic() < deadline


def test_structure_needs_a_tokenizer(tmp_path, llama):
    llm = LLM(str(llama.directory), skip_tokenizer_init=True)
    with pytest.raises(ValueError, match="structured_outputs needs a tokenizer"):
        llm.generate([[5, 6]], SamplingParams(structured_outputs=StructuredOutputsParams(regex="a")))
