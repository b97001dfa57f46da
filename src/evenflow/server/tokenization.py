"""POST /tokenize and /detokenize, GET /tokenizer_info: what evaluation harnesses ask of a server."""

from collections.abc import Sequence
from typing import Any

from evenflow.server.errors import ApiError
from evenflow.server.front import Front
from evenflow.server.protocol import ChatCompletionRequest, DetokenizeRequest, JsonObject, TokenizeRequest
from evenflow.server.tools import check_tools
from evenflow.tokenizer import Tokenizer, check_text

MAX_TOKENS = 1_000_000  # of one detokenization
MAX_TEMPLATE_OPTIONS = 32


def encode_messages(
    tokenizer: Tokenizer,
    body: ChatCompletionRequest | TokenizeRequest,
    messages: Sequence[JsonObject],
    tools: list[JsonObject] | None,
) -> list[int]:
    """The prompt of a conversation, as the body says. tools: those that the model is shown. Raises ValueError."""
    options = body.chat_template_kwargs or {}
    if len(options) > MAX_TEMPLATE_OPTIONS:
        raise ValueError(f"chat_template_kwargs has {len(options)} entries; at most {MAX_TEMPLATE_OPTIONS} are taken")
    return tokenizer.chat_prompt(
        messages,
        tools=tools,
        add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
        continue_final_message=bool(body.continue_final_message),
        template_options=options,
    ).token_ids


def tokenize(front: Front, body: TokenizeRequest) -> dict[str, Any]:
    """Raises ValueError. Long texts: to be called in a thread."""
    tokenizer = front.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise ValueError("prompt or messages: give exactly one of them")
    if body.prompt is not None:
        check_text("prompt", body.prompt)
        token_ids = tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    else:
        check_tools(body.tools or [])
        token_ids = encode_messages(tokenizer, body, body.messages or [], body.tools)
    answer: dict[str, Any] = {"count": len(token_ids), "max_model_len": front.max_model_len, "tokens": token_ids}
    answer["token_strs"] = [tokenizer.token_text(i) for i in token_ids] if body.return_token_strs else None
    return answer


def detokenize(front: Front, body: DetokenizeRequest) -> dict[str, Any]:
    """Raises ValueError."""
    width = front.opened.model_config.vocab_size
    if len(body.tokens) > MAX_TOKENS:
        raise ValueError(f"tokens: {len(body.tokens)} ids; at most {MAX_TOKENS} are taken")
    for token_id in body.tokens:
        if not 0 <= token_id < width:
            raise ValueError(f"tokens: id {token_id} is outside this model's vocabulary, 0 to {width - 1}")
    return {"prompt": front.tokenizer.decode(body.tokens, skip_special_tokens=bool(body.skip_special_tokens))}


def tokenizer_info(front: Front) -> dict[str, Any]:
    """The names that lm-eval reads."""
    tokenizer = front.tokenizer
    if not tokenizer.named_tokens and tokenizer.chat_template_source is None:
        raise ApiError(404, "this model's tokenizer names no special tokens")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": front.max_model_len,
        "chat_template": tokenizer.chat_template_source,
        **{name: tokenizer.named_tokens.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")},
    }
