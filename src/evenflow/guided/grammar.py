"""StructuredOutputsParams -> a grammar as llguidance reads it, and the limits of what a grammar may cost."""

import json

from llguidance import LLMatcher, LLParserLimits

from evenflow.guided.schema import prepared
from evenflow.sampling_params import StructuredOutputsParams

# Half of llguidance's defaults or less: about 20 ms to build, 10 ms for the worst mask.
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=25_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)


def to_grammar(params: StructuredOutputsParams) -> str:
    """The grammar's text. Whether it is a valid one is not checked here."""
    if params.json is not None:
        schema = params.json if isinstance(params.json, dict) else json.loads(params.json)
        return LLMatcher.grammar_from_json_schema(json.dumps(prepared(schema)))
    if params.json_object:
        return LLMatcher.grammar_from_json_schema(json.dumps(prepared({"type": "object"})))
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in params.choice)
        return LLMatcher.grammar_from_lark(f"start: {texts}\n")
    assert params.grammar is not None
    return LLMatcher.grammar_from_lark(params.grammar)


def refusal(params: StructuredOutputsParams, error: str) -> str:
    """What is told of a grammar that llguidance refuses with `error`, without the field's name."""
    if params.grammar is not None and "::=" in params.grammar:
        error += "; a grammar must be Lark, with rules like `start: ...`, and this one has GBNF's `::=`"
    return f"the grammar cannot be used: {error}"
