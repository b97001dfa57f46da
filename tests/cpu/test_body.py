"""Bodies of requests: whole numbers in either spelling, and what is no JSON said as it is."""

import pytest

from evenflow.server.body import decode
from evenflow.server.errors import ApiError
from evenflow.server.protocol import CompletionRequest


def test_an_integer_may_be_written_as_a_float():
    body = decode(b'{"prompt": "a", "max_tokens": 4.0, "n": 2e0, "temperature": 1.0, "seed": -3.0}', CompletionRequest)
    assert (body.max_tokens, body.n, body.temperature, body.seed) == (4, 2, 1.0, -3)
    assert {type(value) for value in (body.max_tokens, body.n, body.seed)} == {int}


@pytest.mark.parametrize("number", ["4.5", "1e300", "9007199254740994.0"])
def test_other_floats_are_refused_by_name(number):
    with pytest.raises(ApiError, match="max_tokens: Expected `int . null`, got `float`") as caught:
        decode(b'{"prompt": "a", "max_tokens": %s}' % number.encode(), CompletionRequest)
    assert (caught.value.status, caught.value.param) == (400, "max_tokens")


@pytest.mark.parametrize("escape", [r"\ud800", r"\uDBFFx", r"\udc00", r"\ud800\u0041"])
def test_half_of_a_surrogate_pair_is_named(escape):
    with pytest.raises(ApiError, match="half of a surrogate pair"):
        decode(b'{"prompt": "%s"}' % escape.encode(), CompletionRequest)


def test_a_whole_pair_is_a_character():
    assert decode(rb'{"prompt": "\ud83d\ude42"}', CompletionRequest).prompt == "\N{SLIGHTLY SMILING FACE}"
