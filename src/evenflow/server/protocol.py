"""The bodies that clients send: typed, closed, null-tolerant; unknown fields are accepted and ignored.

Owns names, types and the translation to SamplingParams, which checks the ranges. Field names are OpenAI's, then vLLM's.
Fields of theirs that would change an answer, and that an endpoint lacks, are declared `Annotated[Any, Absent(...)]`.
"""

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_type_hints

import msgspec

from evenflow.sampling_params import SamplingParams, StructuredOutputsParams
from evenflow.server.errors import ApiError

MAX_SEQUENCES = 256  # of one HTTP request: prompts x n
MAX_MESSAGES = 2000
MAX_TOP_LOGPROBS = 20

Prompts = str | list[str | int | list[int]]
JsonObject = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Absent:
    """A known field that is not implemented: null, false, what is empty and the neutral values pass."""

    way_out: str
    neutral: tuple[Any, ...] = ()

    def takes(self, value: Any) -> bool:
        if value is None or isinstance(value, bool):
            return not value
        return value in ("", [], *self.neutral)


@cache
def absent_fields(kind: type) -> dict[str, Absent]:
    """Of a body, by name."""
    hints = get_type_hints(kind, include_extras=True)
    marks = {name: getattr(hint, "__metadata__", (None,))[0] for name, hint in hints.items()}
    return {name: mark for name, mark in marks.items() if isinstance(mark, Absent)}


class Body(msgspec.Struct, kw_only=True):
    """Raises ApiError for a value of an absent field that would have changed the answer."""

    def __post_init__(self) -> None:
        for name, field in absent_fields(type(self)).items():
            if not field.takes(getattr(self, name)):
                raise ApiError(400, f"{name} is not implemented; {field.way_out}", param=name)


class StreamOptions(msgspec.Struct, kw_only=True):
    """include_usage: a last chunk with the usage. continuous_usage_stats: the usage so far in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(msgspec.Struct, kw_only=True):
    """What response_format of type json_schema holds."""

    name: str | None = None
    schema: JsonObject | bool | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True):
    """vLLM's extra field. Exactly one of them."""

    json: JsonObject | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class SamplingFields(Body, kw_only=True):
    """What completions, chats and responses share. A field that is absent or null takes the model's default."""

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonObject | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    cache_salt: str | None = None
    priority: int | None = None  # accepted; first come, first served
    user: str | None = None
    allowed_token_ids: Annotated[Any, Absent("use structured_outputs or logit_bias")] = None
    guided_whitespace_pattern: Annotated[Any, Absent("use a grammar")] = None
    logits_processors: Annotated[Any, Absent("use logit_bias or bad_words")] = None
    return_token_ids: Annotated[Any, Absent("use logprobs, or send the text to /tokenize")] = None
    return_tokens_as_token_ids: Annotated[Any, Absent("leave it out: logprobs name tokens by their text")] = None
    structural_tag: Annotated[Any, Absent("use a grammar")] = None
    truncate_prompt_tokens: Annotated[Any, Absent("send a shorter prompt; /tokenize counts its tokens")] = None
    use_beam_search: Annotated[Any, Absent("use LLM.beam_search in Python")] = None

    def to_params(self, defaults: SamplingParams, **fixed: Any) -> SamplingParams:
        """`defaults`, then what the body says, then `fixed`. Raises ValueError that names the field."""
        given = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        if self.logit_bias:
            given["logit_bias"] = {_token_id(key): bias for key, bias in self.logit_bias.items()}
        if (structured := self.to_structured_outputs()) is not None:
            given["structured_outputs"] = structured
        return defaults.replace(**given | fixed)

    def to_structured_outputs(self) -> StructuredOutputsParams | None:
        """From response_format, structured_outputs or guided_*; at most one of them. None: free text."""
        asked = self._asked_structures()
        if len(asked) > 1:
            raise ValueError(f"{asked[0][0]} and {asked[1][0]} cannot be combined; keep one of them")
        if not asked:
            return None
        name, fields = asked[0]
        try:
            return StructuredOutputsParams(**fields)
        except ValueError as error:
            if name == "structured_outputs":
                raise
            field = "response_format.json_schema.schema" if name == "response_format" else name
            raise ValueError(str(error).replace(f"structured_outputs.{next(iter(fields))}", field, 1)) from None

    def structure_name(self) -> str | None:
        """The field that to_structured_outputs reads."""
        return next((name for name, _ in self._asked_structures()), None)

    def _asked_structures(self) -> list[tuple[str, dict[str, Any]]]:
        asked: list[tuple[str, dict[str, Any]]] = []
        if self.response_format is not None and self.response_format.type != "text":
            asked.append(("response_format", _of_response_format(self.response_format)))
        if self.structured_outputs is not None:
            asked.append(("structured_outputs", msgspec.structs.asdict(self.structured_outputs)))
        for name in ("json", "regex", "choice", "grammar"):
            if (value := getattr(self, f"guided_{name}")) is not None:
                asked.append((f"guided_{name}", {name: value}))
        return asked


_SAMPLING = (
    *("n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("seed", "stop", "stop_token_ids", "bad_words", "min_tokens", "ignore_eos", "skip_special_tokens"),
    "include_stop_str_in_output",
)


class CompletionRequest(SamplingFields, kw_only=True):
    """POST /v1/completions."""

    prompt: Prompts
    max_tokens: int | None = None
    logprobs: int | bool | None = None  # true, a chat's form of it: one alternative
    prompt_logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None
    prompt_embeds: Annotated[Any, Absent("send texts or token ids as prompt")] = None
    suffix: Annotated[Any, Absent("leave it out")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.logprobs, bool):
            self.logprobs = 1 if self.logprobs else None


class ChatFields(SamplingFields, kw_only=True):
    """What chats and responses share beside the sampling."""

    top_logprobs: int | None = None
    tools: list[JsonObject] | None = None
    tool_choice: str | JsonObject | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None
    add_special_tokens: Annotated[Any, Absent("the chat template writes them; use /v1/completions")] = None
    best_of: Annotated[Any, Absent("use /v1/completions", (1,))] = None
    chat_template: Annotated[Any, Absent("render the prompt yourself and use /v1/completions")] = None
    documents: Annotated[Any, Absent("write them into a message")] = None
    echo: Annotated[Any, Absent("use /v1/completions")] = None
    function_call: Annotated[Any, Absent("use tool_choice", ("none", "auto"))] = None
    functions: Annotated[Any, Absent("use tools")] = None
    prompt_logprobs: Annotated[Any, Absent("use /v1/completions")] = None


class ChatCompletionRequest(ChatFields, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[JsonObject]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    audio: Annotated[Any, Absent("answers are text; leave it out")] = None
    modalities: Annotated[Any, Absent("answers are text; leave it out", (["text"],))] = None
    web_search_options: Annotated[Any, Absent("this server searches nothing; leave it out")] = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize, of a text or of a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[JsonObject] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    tools: list[JsonObject] | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None
    skip_special_tokens: bool | None = None


def split_prompts(prompts: Prompts) -> list[str | list[int]]:
    """The four forms of OpenAI's `prompt` (text, texts, token ids, lists of token ids) as a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    kinds = {type(part) for part in prompts}
    if kinds == {int}:
        return [prompts]  # type: ignore[list-item]
    if kinds in ({str}, {list}):
        return prompts  # type: ignore[return-value]
    what = "is empty" if not prompts else "mixes texts, token ids and lists"
    raise ApiError(
        400, f"prompt {what}; it is a text, a list of texts, a list of token ids, or a list of those", param="prompt"
    )


def check_num_sequences(num_prompts: int, n: int) -> None:
    """Before any fan-out."""
    if num_prompts * n > MAX_SEQUENCES:
        raise ApiError(
            400,
            f"{num_prompts} prompts x n={n} are {num_prompts * n} completions; one request may ask for at most "
            f"{MAX_SEQUENCES}; send several requests",
            param="n" if num_prompts == 1 else "prompt",
        )


def _of_response_format(response_format: ResponseFormat) -> dict[str, Any]:
    if response_format.type == "json_object":
        return {"json_object": True}
    json_schema = response_format.json_schema
    if json_schema is None or json_schema.schema is None:
        raise ValueError("response_format.json_schema.schema is missing; give the JSON schema, or use json_object")
    if isinstance(json_schema.schema, bool):
        return {"json_object": True}
    return {"json": json_schema.schema}


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit()) or len(key) > 10:
        raise ValueError(f"logit_bias key {key!r:.80} is not a token id; keys are numbers such as '50256'")
    return int(key)
