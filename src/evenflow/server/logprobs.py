"""Log-probabilities in the three shapes that clients read: completions, chat, and vLLM's prompt_logprobs."""

import codecs
from collections.abc import Sequence
from typing import Any

from evenflow.request import Logprob
from evenflow.tokenizer import Tokenizer

SMALLEST_LOGPROB = -9999.0  # JSON has no infinity

Entry = dict[int, Logprob] | None


class TextOffsets:
    """Where in a choice's text its tokens begin, in their order. Tokens that the text leaves out have no length."""

    def __init__(self, tokenizer: Tokenizer | None, skip_special_tokens: bool) -> None:
        self._bytes = tokenizer.bytes_of(skip_special_tokens) if tokenizer is not None else lambda token_id: b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def add(self, token_id: int) -> int:
        """The offset of the next token."""
        offset = self._offset
        self._offset += len(self._decoder.decode(self._bytes(token_id)))
        return offset


def completion_logprobs(
    token_ids: Sequence[int], entries: Sequence[Entry], count: int, tokenizer: Tokenizer | None, offsets: TextOffsets
) -> dict[str, Any]:
    """OpenAI's parallel lists. A token's own number is the one in its list of the best, which holds the best one.

    entries: aligned with token_ids; None for a prompt's first token, which nothing precedes.
    """
    tokens, text_offset = [], []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        name = token_name(token_id, tokenizer)
        tokens.append(name)
        text_offset.append(offsets.add(token_id))
        if entry is None:
            token_logprobs.append(None)
            top_logprobs.append(None)
            continue
        own = finite(entry[token_id].logprob)
        token_logprobs.append(own)
        best = {name: own}
        for other_id, logprob in ranked(entry, count):
            other, value = token_name(other_id, tokenizer), finite(logprob.logprob)
            best[other] = max(value, best.get(other, value))  # different tokens can read the same
        top_logprobs.append(best)
    return {
        "tokens": tokens,
        "token_logprobs": token_logprobs,
        "top_logprobs": top_logprobs,
        "text_offset": text_offset,
    }


def chat_logprobs(
    token_ids: Sequence[int], entries: Sequence[Entry], count: int, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """OpenAI's list of tokens, each with its bytes and the `count` best in its place."""
    content = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        assert entry is not None  # only a prompt's first token has none
        best = [_chat_token(other_id, logprob, tokenizer) for other_id, logprob in ranked(entry, count)]
        content.append(_chat_token(token_id, entry[token_id], tokenizer) | {"top_logprobs": best})
    return {"content": content}


def plain_prompt_logprobs(entries: Sequence[Entry]) -> list[dict[str, Any] | None]:
    """vLLM's: for every prompt token, token id -> logprob, rank, decoded_token."""
    return [
        None
        if entry is None
        else {
            str(token_id): {
                "logprob": finite(logprob.logprob),
                "rank": logprob.rank,
                "decoded_token": logprob.decoded_token,
            }
            for token_id, logprob in entry.items()
        }
        for entry in entries
    ]


def ranked(entry: dict[int, Logprob], count: int) -> list[tuple[int, Logprob]]:
    """The `count` best, best first. The token that stands there is among them only if it is one of them."""
    best = [(token_id, logprob) for token_id, logprob in entry.items() if (logprob.rank or 0) <= count]
    return sorted(best, key=lambda pair: pair[1].rank or 0)


def token_name(token_id: int, tokenizer: Tokenizer | None) -> str:
    """The token's text; one that is part of a character reads bytes:\\xe2\\x80, so that different ones differ."""
    if tokenizer is None:
        return f"token_id:{token_id}"
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(logprob: float) -> float:
    return logprob if logprob > SMALLEST_LOGPROB else SMALLEST_LOGPROB


def _chat_token(token_id: int, logprob: Logprob, tokenizer: Tokenizer | None) -> dict[str, Any]:
    data = None if tokenizer is None else list(tokenizer.token_bytes(token_id))
    text = f"token_id:{token_id}" if tokenizer is None else logprob.decoded_token
    return {"token": text, "logprob": finite(logprob.logprob), "bytes": data}
