"""How one request is sampled. Owns the parameters and their ranges; knows no model, tokenizer or tensor.

Names and defaults are vLLM's. Every value is checked here, with comparisons that a NaN cannot pass.
"""

import json
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

import numpy as np

MAX_SEED = 2**64 - 1
MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1000
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 1024
MIN_REPETITION_PENALTY = 0.01  # logits are divided by it, and must stay finite
MAX_REPETITION_PENALTY = 100.0
MAX_GRAMMAR_CHARS = 64 * 1024
MAX_REGEX_CHARS = 4096
MAX_SCHEMA_DEPTH = 32
MAX_ENUM = 1000
STRUCTURED_OUTPUTS = ("json", "json_object", "regex", "choice", "grammar")


def _as_list(values: object) -> object:
    """None is empty; a tuple, set or array becomes a list, a list is copied. Others are left to the caller's check."""
    if values is None:
        return []
    if isinstance(values, (set, frozenset)):
        return sorted(values, key=str)
    if isinstance(values, np.ndarray):
        return values.tolist()
    return list(values) if isinstance(values, (list, tuple)) else values


def _number(name: str, value: object, low: float, high: float, *, above: bool = False) -> float:
    """`low <= value <= high` (`low < value` if `above`), as a Python number; a NaN, a bool or a string is refused."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (above and value == low):  # type: ignore[operator]
        bracket = "(" if above else "["
        raise ValueError(f"{name}={value!r} must be a number in {bracket}{low:g}, {high:g}]")
    return value if isinstance(value, int) else float(value)  # type: ignore[arg-type]


def _integer(name: str, value: object, low: int, high: int) -> int:
    number = int(value) if isinstance(value, (int, np.integer)) and not isinstance(value, bool) else None
    if number is None or not low <= number <= high:
        raise ValueError(f"{name}={value!r} must be an integer from {low} to {high}")
    return number


def _strings(name: str, values: object, max_count: int) -> list[str]:
    values = _as_list(values)
    if not isinstance(values, list) or len(values) > max_count:
        raise ValueError(f"{name} must be a list of at most {max_count} strings")
    for value in values:
        if not isinstance(value, str) or not 0 < len(value) <= MAX_STOP_LENGTH:
            raise ValueError(f"{name} entry {value!r:.80} must be a string of 1 to {MAX_STOP_LENGTH} characters")
    return values


def _token_ids(name: str, values: object, max_count: int) -> list[int]:
    values = _as_list(values)
    if not isinstance(values, list) or len(values) > max_count:
        raise ValueError(f"{name} must be a list of at most {max_count} token ids")
    return [_integer(f"{name} entry", value, 0, 2**31 - 1) for value in values]


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputsParams:
    """What the text must be. Exactly one of them, or ValueError.

    json: a JSON schema, as a dict or as text. json_object: any JSON object. regex: the whole text matches it. choice:
    one of these texts. grammar: a Lark grammar as llguidance reads it. Names are vLLM's.
    """

    json: str | dict[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if self.choice is not None:
            object.__setattr__(self, "choice", _as_list(self.choice))
        given = [name for name in STRUCTURED_OUTPUTS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            what = " and ".join(given) or "none"
            raise ValueError(f"structured_outputs takes exactly one of {', '.join(STRUCTURED_OUTPUTS)}; given: {what}")
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        for name, limit in (("regex", MAX_REGEX_CHARS), ("grammar", MAX_GRAMMAR_CHARS)):
            text = getattr(self, name)
            if text is not None and not (isinstance(text, str) and 0 < len(text) <= limit):
                raise ValueError(f"structured_outputs.{name} must be a string of 1 to {limit} characters")
        if self.choice is not None:
            _check_choice(self.choice)


def _schema_text(schema: object) -> str:
    """The schema as JSON text, within its limits."""
    name = "structured_outputs.json"
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON schema, an object; not {type(value).__name__}")
    if len(text) > MAX_GRAMMAR_CHARS:
        raise ValueError(f"{name} has {len(text)} characters; at most {MAX_GRAMMAR_CHARS} are taken")
    level: list[Any] = [value]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [child for part in level for child in _children(part)]
        if any(isinstance(part, list) and len(part) > MAX_ENUM for part in level):
            raise ValueError(f"{name} has a list of more than {MAX_ENUM} entries; make its enum shorter")
        if not level:
            return text
    raise ValueError(f"{name} is nested more than {MAX_SCHEMA_DEPTH} levels deep")


def _children(value: Any) -> list[Any]:
    children = value.values() if isinstance(value, dict) else value
    return [child for child in children if isinstance(child, (dict, list))]


def _check_choice(choice: object) -> None:
    name = "structured_outputs.choice"
    if not isinstance(choice, list) or not 0 < len(choice) <= MAX_ENUM:
        raise ValueError(f"{name} must be a list of 1 to {MAX_ENUM} strings")
    for text in choice:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
            raise ValueError(f"{name} entry {text!r:.80} must be a string of 1 to {MAX_STOP_LENGTH} characters")


@dataclass(kw_only=True, slots=True)
class SamplingParams:
    """Sampling parameters of one request. Raises ValueError that names the field, its value and the range.

    Fields may be assigned; what is assigned is checked when the request is taken in, which keeps a copy of its own.
    Lists may be given as tuples, sets or numpy arrays, numbers as numpy's; None is an empty list.

    n: completions per prompt. temperature: 0 is greedy. top_k: 0 or -1 keeps all. min_p: relative to the best token.
    presence_penalty, frequency_penalty: OpenAI's, over output tokens. repetition_penalty: over prompt and output.
    seed: with a seed the tokens depend on the prompt, the parameters and the weights, not on the rest of the batch; -1
    is None, as in vLLM.
    stop: strings that end the text and are left out of it (`include_stop_str_in_output` keeps them).
    structured_outputs: what the text must be. When it is complete the text ends, whatever min_tokens or ignore_eos say.
    max_tokens: None means up to the context. logprobs / prompt_logprobs: how many alternatives to return per token.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: list[str] = field(default_factory=list)  # one string is taken as a list of one
    stop_token_ids: list[int] = field(default_factory=list)
    bad_words: list[str] = field(default_factory=list)
    ignore_eos: bool = False
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_lists()

    def _check_ranges(self) -> None:
        self.n = _integer("n", self.n, 1, MAX_N)
        self.temperature = _number("temperature", self.temperature, 0.0, 100.0)
        self.top_p = _number("top_p", self.top_p, 0.0, 1.0, above=True)
        self.top_k = 0 if self.top_k == -1 else _integer("top_k", self.top_k, 0, 2**31 - 1)
        self.min_p = _number("min_p", self.min_p, 0.0, 1.0)
        self.presence_penalty = _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        self.frequency_penalty = _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        self.repetition_penalty = _number(
            "repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY
        )
        if self.seed is not None:
            seed = _integer("seed", self.seed, -(2**63), MAX_SEED)
            self.seed = None if seed == -1 else seed
        if self.max_tokens is not None:
            self.max_tokens = _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        self.min_tokens = _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} must be at most max_tokens={self.max_tokens}")
        if self.logprobs is not None:
            self.logprobs = _integer("logprobs", self.logprobs, 0, 2**31 - 1)
        if self.prompt_logprobs is not None:
            self.prompt_logprobs = _integer("prompt_logprobs", self.prompt_logprobs, 0, 2**31 - 1)

    def _check_lists(self) -> None:
        stop: Any = self.stop
        self.stop = _strings("stop", [stop] if isinstance(stop, str) else stop, MAX_STOP_STRINGS)
        self.bad_words = _strings("bad_words", self.bad_words, MAX_BAD_WORDS)
        self.stop_token_ids = _token_ids("stop_token_ids", self.stop_token_ids, MAX_LOGIT_BIAS)
        biases: Any = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(biases, dict) or len(biases) > MAX_LOGIT_BIAS:
            raise ValueError(f"logit_bias must map at most {MAX_LOGIT_BIAS} token ids to numbers")
        self.logit_bias = {
            _integer("logit_bias key", token_id, 0, 2**31 - 1): _number(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
            for token_id, bias in biases.items()
        }
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        if not isinstance(self.structured_outputs, (StructuredOutputsParams, type(None))):
            raise ValueError(
                f"structured_outputs must be StructuredOutputsParams, not {type(self.structured_outputs).__name__}"
            )
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need detokenize=True; use stop_token_ids with detokenize=False")

    def replace(self, **changes: Any) -> "SamplingParams":
        """A copy with `changes`, checked again."""
        return SamplingParams(**{f.name: getattr(self, f.name) for f in fields(self)} | changes)

    def clone(self) -> "SamplingParams":
        """A copy that shares no list with this one, checked again."""
        return self.replace()

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(kw_only=True, slots=True)
class BeamSearchParams:
    """Beam search of one prompt: the `beam_width` best continuations by log-probability / length ** length_penalty.

    The length counts generated tokens, the end-of-sequence token included.
    """

    beam_width: int
    max_tokens: int = 16
    ignore_eos: bool = False
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        self.beam_width = _integer("beam_width", self.beam_width, 1, 64)
        self.max_tokens = _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        self.length_penalty = _number("length_penalty", self.length_penalty, -10.0, 10.0)
