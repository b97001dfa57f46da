"""Tool calls: what is refused, what each format's grammar admits, and a parser that no cut of the text confuses."""

import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from evenflow.server.tool_formats import FORMATS, ToolParser, detect_format, tool_grammar
from evenflow.server.tools import (
    TextDelta,
    ToolCallArguments,
    ToolCallStart,
    ToolChoice,
    check_tools,
    parse_tool_choice,
)

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now", "description": "the time"}},
]


def parse(name, pieces):
    """(text, [(function, arguments), ...]) of a text that arrives in pieces. Every piece's events are well formed."""
    parser, events = ToolParser(FORMATS[name]), []
    for piece in pieces:
        events += parser.feed(piece)
    events += parser.finish()
    text, calls = "", []
    for event in events:
        if isinstance(event, TextDelta):
            assert event.text
            text += event.text
        elif isinstance(event, ToolCallStart):
            assert event.index == len(calls)
            calls.append((event.name, ""))
        else:
            assert isinstance(event, ToolCallArguments)
            assert event.index == len(calls) - 1
            assert event.delta
            calls[-1] = (calls[-1][0], calls[-1][1] + event.delta)
    return text, calls


GOLDEN = {
    "hermes": [
        ('<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', ("", [("now", "{}")])),
        (
            'Sure.\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n<tool_call>\n'
            '{"name": "weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>\n',
            ("Sure.\n", [("now", "{}"), ("weather", '{"city": "Paris", "days": 3}')]),
        ),
        (
            '\n\n<tool_call>{"name":"weather","arguments":{"city":"a } \\" { </tool_call> \\\\"}}</tool_call>',
            ("", [("weather", '{"city":"a } \\" { </tool_call> \\\\"}')]),
        ),
        (
            '<tool_call>\n{"arguments": {"a": [1, {"b": "]"}]}, "name": "n\\u006fw"}\n</tool_call> done',
            (" done", [("now", '{"a": [1, {"b": "]"}]}')]),
        ),
        ('<tool_call>\n{"name": "now", "arguments": {"city": "Par', ("", [("now", '{"city": "Par')])),
        ('<tool_call>\n{"name": "no', ('<tool_call>\n{"name": "no', [])),
        *(
            # Cut after a call, or at the beginning of the next: that is no text of the answer.
            ('<tool_call>\n{"name": "now", "arguments": {}}' + rest, ("", [("now", "{}")]))
            for rest in itertools.accumulate('\n</tool_call>\n<tool_call>\n{"name": "we')
        ),
        (
            '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n<tool_call>\n{"answer": 4',
            ('\n<tool_call>\n{"answer": 4', [("now", "{}")]),
        ),
        ("<tool_call>nonsense</tool_call>", ("<tool_call>nonsense</tool_call>", [])),
        ('<tool_call>\n{"a": 1}\n</tool_call>', ('<tool_call>\n{"a": 1}\n</tool_call>', [])),
        ("1 < 2 and <tool", ("1 < 2 and <tool", [])),
        ('{"name": "now", "arguments": {}}', ('{"name": "now", "arguments": {}}', [])),
        ("", ("", [])),
        ("  \n ", ("  \n ", [])),
    ],
    "llama3_json": [
        ('{"name": "now", "parameters": {}}', ("", [("now", "{}")])),
        (
            '<|python_tag|>{"name": "weather", "parameters": {"city": "x"}}; {"name": "now", "parameters": {}}',
            ("", [("weather", '{"city": "x"}'), ("now", "{}")]),
        ),
        ('{"name": "now", "parameters": {}}; ', ("", [("now", "{}")])),
        ('{"name": "now", "parameters": {}}; {"name": "n', ("", [("now", "{}")])),
        ('{"type": "function", "name": "now", "parameters": {"a": "b"}}', ("", [("now", '{"a": "b"}')])),
        ('{"answer": 42}', ('{"answer": 42}', [])),
        ('{"answer": 42} and more', ('{"answer": 42} and more', [])),
        ('It is {"name": "now", "parameters": {}}', ('It is {"name": "now", "parameters": {}}', [])),
    ],
    "mistral": [
        ('[TOOL_CALLS] [{"name": "now", "arguments": {}}]', ("", [("now", "{}")])),
        (
            '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "]}"}}, {"name": "now", "arguments": {}}]',
            ("", [("weather", '{"city": "]}"}'), ("now", "{}")]),
        ),
        ('[TOOL_CALLS] [{"name": "now", "arguments": {}}, {"na', ("", [("now", "{}")])),
        ("see [TOOL", ("see [TOOL", [])),
        ("[TOOL_CALLS] none", ("[TOOL_CALLS] none", [])),
    ],
}
CASES = [(name, text, expected) for name, cases in GOLDEN.items() for text, expected in cases]


@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_each_format_is_read(name, text, expected):
    assert parse(name, [text]) == expected
    assert parse(name, text) == expected  # character by character


FRAGMENTS = st.sampled_from(
    """
    <tool_call>|</tool_call>|<|python_tag|>|[TOOL_CALLS]|[|]|, |; |<|text|é|{|}|"|\\|
    {"name": "now", "arguments": {}}|{"name": "w", "parameters": {"a": "}\\""}}|{"name": "x"|{"name": 3}|
    {"arguments": {"k": [1]}, "name": "late"}|{"a": {"name": "inner"}}|{"name": ""}|
    """.replace("\n    ", "")
    .replace("<|python_tag|>", "<python_tag>")
    .split("|")
).map(lambda fragment: fragment.replace("<python_tag>", "<|python_tag|>") or "\n")


@settings(max_examples=300)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    fragments=st.lists(FRAGMENTS, max_size=8),
    cuts=st.lists(st.integers(0, 120), max_size=8),
)
@example(name="hermes", fragments=["<tool_call>", '{"name": "now", "arguments": {}}', "</tool_call>", "\n"], cuts=[70])
def test_any_cut_reads_the_same_and_no_text_is_lost(name, fragments, cuts):
    text = "".join(fragments)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    whole = parse(name, [text])
    assert parse(name, pieces) == whole
    assert parse(name, text) == whole
    if not whole[1]:
        assert whole[0] == text


@settings(max_examples=200)
@given(
    text=st.text(alphabet="ab \n", max_size=12),
    calls=st.lists(
        st.dictionaries(
            st.text(max_size=5), st.text(max_size=8) | st.integers() | st.lists(st.text(max_size=3)), max_size=3
        ),
        min_size=1,
        max_size=3,
    ),
    size=st.integers(1, 9),
)
def test_calls_are_told_as_they_were_written(text, calls, size):
    arguments = [json.dumps(call, ensure_ascii=False) for call in calls]
    written = "\n".join(f'<tool_call>\n{{"name": "f", "arguments": {each}}}\n</tool_call>' for each in arguments)
    whole = text + written
    pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
    found_text, found = parse("hermes", pieces)
    assert found == [("f", each) for each in arguments]
    assert found_text.strip() == text.strip()


def test_only_what_may_be_a_marker_is_held_back():
    parser = ToolParser(FORMATS["hermes"])
    assert parser.feed("a <to") == [TextDelta("a ")]
    assert parser.feed("ad") == [TextDelta("<toad")]
    assert parser.feed(" b<tool_call>") == [TextDelta(" b")]
    assert parser.feed('{"name": "f", "arguments": {"x": ') == [ToolCallStart(0, "f"), ToolCallArguments(0, '{"x": ')]


# Grammars


def admits(grammar, text):
    """Whether llguidance takes the text, byte by byte, and may end there."""
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


GOOD_CALL = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>',
    "llama3_json": '{"name": "weather", "parameters": {"city": "Paris", "days": 3}}',
    "mistral": '{"name": "weather", "arguments": {"city": "Paris", "days": 3}}',
}


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_grammar_admits_valid_calls_only(name):
    tool_format, functions, call = FORMATS[name], check_tools(TOOLS), GOOD_CALL[name]
    other = call.replace("weather", "now").replace('{"city": "Paris", "days": 3}', "{}")
    required = tool_grammar(tool_format, functions, ToolChoice("required"), parallel=False)
    assert admits(required, call)
    assert admits(required, other)
    for broken in (
        "",
        "text",
        call[:-1],
        call + call,
        call.replace("weather", "whether"),
        call.replace("3", '"3"'),
        call.replace('"city": "Paris", ', ""),
        call.replace("days", "nights"),
    ):
        assert not admits(required, broken), broken
    for parallel in (False, True):
        named = tool_grammar(tool_format, functions, ToolChoice("named", "now"), parallel=parallel)
        assert admits(named, other)
        assert not admits(named, call)
        assert not admits(named, tool_format.separator.join([other, other]))
    several = tool_grammar(tool_format, functions, ToolChoice("required"), parallel=True)
    assert admits(several, tool_format.separator.join([call, other, call]))
    assert parse(name, [call])[1] == [("weather", '{"city": "Paris", "days": 3}')]


ODD = [
    {"type": "array", "uniqueItems": True},
    {"not": {"type": "string"}},
    {"type": "array", "contains": {"type": "string"}},
    {"type": "object", "propertyNames": {"pattern": "a"}},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"oneOf": [{"type": "number"}, {"type": "integer"}]},
    {"if": {"type": "object"}, "then": {"type": "object"}},
    {"type": "string", "format": "binary"},
    {"type": "string", "format": "uuid4"},
    {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"},
    {"type": "string", "pattern": r"\bword\b"},
    {"type": "string", "pattern": r"(a)\1"},
    {"type": "object", "patternProperties": {"(?=a)": {"type": "string"}}},
    {"type": "object", "properties": None, "required": None, "additionalProperties": None},
    {"const": None},
]


@pytest.mark.parametrize("schema", ODD)
def test_what_cannot_be_constrained_is_left_open(schema):
    parameters = {"type": "object", "properties": {"odd": schema, "days": {"type": "integer"}}, "required": ["days"]}
    (function,) = check_tools([tool(parameters=parameters)])
    grammar = tool_grammar(FORMATS["mistral"], [function], ToolChoice("required"), parallel=True)
    assert admits(grammar, '{"name": "f", "arguments": {"days": 3}}')
    assert not admits(grammar, '{"name": "f", "arguments": {"days": "3"}}')
    assert not admits(grammar, '{"name": "f", "arguments": {"days": 3, "more": 3}}')
    assert function.parameters["properties"]["odd"] is schema  # the template shows the client's own


def test_a_strict_function_keeps_its_pattern():
    parameters = {"type": "object", "properties": {"odd": {"type": "string", "pattern": "(?=a)b"}}}
    (function,) = check_tools([tool(parameters=parameters, strict=True)])
    assert "(?=a)b" in tool_grammar(FORMATS["hermes"], [function], ToolChoice("auto"), parallel=True)


@pytest.mark.parametrize("name", ["hermes", "llama3_json"])
def test_with_auto_text_is_free_and_calls_are_valid(name):
    functions, call = check_tools(TOOLS), GOOD_CALL[name]
    grammar = tool_grammar(FORMATS[name], functions, ToolChoice("auto"), parallel=True)
    for text in ("", "Hello, world <3\n{", call):
        assert admits(grammar, text), text
    assert not admits(grammar, call.replace("3", '"3"'))
    if name == "hermes":
        assert admits(grammar, "Let me see.\n" + call + "\n" + call)
        assert not admits(grammar, "Let me see. <tool_call>\nnonsense")


def test_an_opening_token_is_used_where_the_model_has_it():
    functions = check_tools(TOOLS)
    assert tool_grammar(FORMATS["mistral"], functions, ToolChoice("auto"), parallel=True) is None
    assert "<[5]>" in tool_grammar(FORMATS["mistral"], functions, ToolChoice("auto"), parallel=True, opening_token_id=5)
    assert tool_grammar(FORMATS["hermes"], functions, ToolChoice("none"), parallel=True) is None
    assert tool_grammar(FORMATS["hermes"], [], ToolChoice("auto"), parallel=True) is None


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (None, "hermes"),
        ("{{ messages }}", "hermes"),
        ("... <tool_call>\\n ...", "hermes"),
        ("... [TOOL_CALLS] ...", "mistral"),
        ("... <|python_tag|> ...", "llama3_json"),
    ],
)
def test_the_format_is_the_templates(template, name):
    assert detect_format(template).name == name


# What a client sends


def tool(**function):
    return {"type": "function", "function": {"name": "f"} | function}


@pytest.mark.parametrize(
    ("tools", "text"),
    [
        ([{"type": "retrieval"}], r"tools\[0\] must be"),
        ([{"type": "function"}], r"tools\[0\] must be"),
        ([tool(), tool(name="")], r"tools\[1\].function.name"),
        ([tool(name="a b")], r"tools\[0\].function.name='a b'"),
        ([tool(name="a" * 65)], r"tools\[0\].function.name"),
        ([tool(parameters=[])], r"tools\[0\].function.parameters"),
        ([tool(parameters={"type": "string"})], r"tools\[0\].function.parameters"),
        ([tool(), tool()], "'f' twice"),
        ([tool(name=f"f{i}") for i in range(129)], "129 entries"),
        ([tool(parameters={"description": "x" * 70_000})], "65536 characters"),
    ],
)
def test_bad_tools_are_named(tools, text):
    with pytest.raises(ValueError, match=text):
        check_tools(tools)


NAMED = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize(
    ("value", "kind"),
    [(None, "auto"), ("auto", "auto"), ("none", "none"), ("required", "required"), (NAMED, "named")],
)
def test_choices(value, kind):
    assert parse_tool_choice(value, check_tools(TOOLS)).kind == kind


@pytest.mark.parametrize(
    "value", ["any", {"type": "function"}, {"type": "function", "function": {"name": "then"}}, {"type": "x"}, {}]
)
def test_bad_choices_are_named(value):
    with pytest.raises(ValueError, match="tool_choice"):
        parse_tool_choice(value, check_tools(TOOLS))


def test_choices_need_tools():
    assert parse_tool_choice(None, []).kind == parse_tool_choice("auto", []).kind == "none"
    with pytest.raises(ValueError, match="needs tools"):
        parse_tool_choice("required", [])
