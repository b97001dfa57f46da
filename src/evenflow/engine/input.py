"""Prompt + SamplingParams -> Requests that the engine can run, or a ValueError before anything is queued.

Owns every check that needs the model, the tokenizer or the settings; ranges alone are checked by SamplingParams. Token
ids are bounded by the width of the logits: they index tensors of that width.
"""

import itertools
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np

from evenflow.config import Settings
from evenflow.model_config import ModelConfig, token_ids
from evenflow.request import Request
from evenflow.sampling_params import SamplingParams
from evenflow.tokenizer import Tokenizer, check_text

Prompt = str | list[int] | tuple[int, ...] | dict[str, Any]  # an array of ids is taken too
_PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
_NO_OTHER_INPUT = ("multi_modal_data", "mm_processor_kwargs", "multi_modal_uuids")  # vLLM's names: None at most


def prompt_text(prompt: Prompt) -> str | None:
    """The text of a prompt that was given as one."""
    text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
    return text if isinstance(text, str) else None


def eos_token_ids(
    model: ModelConfig, tokenizer: Tokenizer | None, generation_defaults: Mapping[str, Any]
) -> frozenset[int]:
    """The tokens that end a sequence, by generation_config.json, config.json and the tokenizer."""
    ids = [*token_ids(generation_defaults.get("eos_token_id")), *model.eos_token_ids]
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    # One beyond the logits can never be sampled.
    return frozenset(token_id for token_id in ids if token_id < model.vocab_size)


class InputProcessor:
    """Checks and completes requests. `tokenizer` None: prompts must be token ids.

    generation_defaults: generation_config.json, for its end-of-sequence ids. The same settings.seed and order of
    calls give the same seeds.
    """

    def __init__(
        self,
        settings: Settings,
        model: ModelConfig,
        tokenizer: Tokenizer | None,
        generation_defaults: Mapping[str, Any],
    ) -> None:
        self._settings, self._model, self._tokenizer = settings, model, tokenizer
        self.eos_token_ids = eos_token_ids(model, tokenizer, generation_defaults)
        self._draws = itertools.count()

    def process(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        cache_salt: str = "",
        add_special_tokens: bool = True,
    ) -> list[Request]:
        """The request's `n` children, whose ids are `request_id` for n=1, else `request_id-i`.

        cache_salt: a prompt dict's own goes first. add_special_tokens: for a text prompt; False if the text already has
        them. Raises ValueError that names the field, its value and the way out.
        """
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params must be SamplingParams, not {type(params).__name__}")
        params = params.clone()  # fields may have been assigned since they were checked, or be while this runs
        self._check_params(params)
        prompt_ids = self._prompt_ids(prompt, add_special_tokens)
        room = self._settings.max_model_len - len(prompt_ids)
        if params.min_tokens > room:
            raise ValueError(
                f"min_tokens={params.min_tokens} exceeds the {room} tokens that the prompt leaves of "
                f"max_model_len={self._settings.max_model_len}; lower it or shorten the prompt"
            )
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        stop_token_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids)
        bad_words_ids = self._bad_words_ids(params.bad_words)
        seed = params.seed if params.seed is not None else derive_seed(self._settings.seed, next(self._draws))
        return [
            Request(
                request_id=request_id if params.n == 1 else f"{request_id}-{i}",
                token_ids=list(prompt_ids),
                params=_child_params(params, i, seed),
                max_tokens=max_tokens,
                stop_token_ids=stop_token_ids,
                bad_words_ids=bad_words_ids,
                cache_salt=_salt_of(prompt) or cache_salt,
            )
            for i in range(params.n)
        ]

    def _prompt_ids(self, prompt: Prompt, add_special_tokens: bool) -> list[int]:
        """The prompt's token ids, 1 to max_model_len - 1 of them, each within the logits."""
        content = _content_of(prompt)
        if isinstance(content, str):
            ids = self._encode(content, add_special_tokens)
            name = "the prompt's tokens"
        else:
            ids, name = content, "prompt_token_ids"
        limit = self._settings.max_model_len - 1
        if not ids and not content:
            raise ValueError("the prompt is empty; pass at least one character or one token id (for example the BOS)")
        if not ids:
            raise ValueError(f"the prompt {content!r:.80} has no tokens; pass a longer text or token ids")
        if len(ids) > limit:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, but at most {limit} fit with max_model_len="
                f"{self._settings.max_model_len}; shorten the prompt or raise max_model_len"
            )
        self._check_ids(name, ids)
        return ids

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        tokenizer, max_model_len = self._tokenizer, self._settings.max_model_len
        if tokenizer is None:
            raise ValueError("the prompt is a text, but no tokenizer is loaded; pass token ids as prompt_token_ids")
        # Before tokenizing, which takes seconds for megabytes. A token has at least one character or is part of one.
        if len(text) > max_model_len and len(text) > max_model_len * tokenizer.max_token_chars:
            raise ValueError(
                f"the prompt has {len(text)} characters, more than max_model_len={max_model_len} tokens can "
                "hold; shorten the prompt or raise max_model_len"
            )
        check_text("prompt", text)
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _check_ids(self, name: str, ids: Iterable[object]) -> None:
        """Every id is an int (no bool) and a row of the logits."""
        width, values = self._model.vocab_size, list(ids)
        if not values or (set(map(type, values)) == {int} and min(values) >= 0 and max(values) < width):  # type: ignore[type-var, operator]
            return
        for value in values:
            if type(value) is not int:
                kind = type(value).__name__
                raise ValueError(f"{name}: {value!r:.80} is of type {kind}; token ids are Python integers (int(x))")
            if not 0 <= value < width:
                raise ValueError(f"{name}: token id {value} is outside this model's vocabulary, 0 to {width - 1}")

    def _check_params(self, params: SamplingParams) -> None:
        most = self._settings.max_logprobs
        for name, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
            if count is not None and count > most:
                raise ValueError(
                    f"{name}={count} exceeds max_logprobs={most}; lower it, or raise max_logprobs at start"
                )
            if count is not None and count > self._model.vocab_size:
                raise ValueError(f"{name}={count} exceeds this model's vocabulary of {self._model.vocab_size} tokens")
        self._check_ids("logit_bias", params.logit_bias)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        if self._tokenizer is None and params.stop:
            raise ValueError(f"stop={params.stop!r:.80} needs a tokenizer, and none is loaded; use stop_token_ids")
        if self._tokenizer is None and params.structured_outputs is not None:
            raise ValueError("structured_outputs needs a tokenizer, and none is loaded; leave it out")
        if self._tokenizer is None and params.bad_words:
            raise ValueError(
                f"bad_words={params.bad_words!r:.80} needs a tokenizer, and none is loaded; use logit_bias"
            )
        for name, texts in (("stop", params.stop), ("bad_words", params.bad_words)):
            for text in texts:
                check_text(name, text)

    def _bad_words_ids(self, bad_words: list[str]) -> list[list[int]]:
        """The token sequences of each word at the beginning of a text and after a space."""
        sequences: list[list[int]] = []
        for word in bad_words:
            assert self._tokenizer is not None  # _check_params
            bare = word.lstrip(" ") or word
            found = [self._tokenizer.encode(text, add_special_tokens=False) for text in (bare, " " + bare)]
            if not found[0]:
                raise ValueError(f"bad_words entry {word!r:.80} has no tokens; remove it")
            self._check_ids(f"bad_words entry {word!r:.80}", found[0] + found[1])
            sequences += [ids for ids in found if ids not in sequences]
        return sequences


def _child_params(params: SamplingParams, index: int, seed: int) -> SamplingParams:
    """Child 0 keeps the seed, and alone computes the prompt's log-probabilities. params: our own copy."""
    if params.n == 1:
        params.seed = seed
        return params
    if index == 0:
        return params.replace(n=1, seed=seed)
    return params.replace(n=1, seed=derive_seed(seed, index), prompt_logprobs=None)


def derive_seed(seed: int, number: int) -> int:
    """The `number`-th seed that follows from `seed`: 64 bits of blake2b, equal on every machine."""
    return int.from_bytes(blake2b(f"{seed}:{number}".encode(), digest_size=8).digest(), "little")


def _content_of(prompt: Prompt) -> str | list[int]:
    """The text or the token ids within a prompt; the ids where it has both."""
    content: object = prompt
    if isinstance(prompt, dict):
        _check_keys(prompt)
        key = "prompt" if prompt.get("prompt_token_ids") is None else "prompt_token_ids"
        content = prompt.get(key)
        if isinstance(content, str) != (key == "prompt"):
            wanted = "a string" if key == "prompt" else "a list of token ids"
            raise ValueError(f"{key} must be {wanted}, not {type(content).__name__}")
    if isinstance(content, str):
        return content
    if isinstance(content, np.ndarray):
        content = content.tolist()
    if not isinstance(content, (list, tuple)):
        raise ValueError(
            f"a prompt is a string, a list of token ids, {{'prompt': ...}} or {{'prompt_token_ids': ...}}, "
            f"not {type(content).__name__}"
        )
    if set(map(type, content)) == {int}:  # takes a quarter of the time of what follows
        return list(content)
    return [int(token_id) if isinstance(token_id, np.integer) else token_id for token_id in content]


def _check_keys(prompt: dict[str, Any]) -> None:
    given = {key for key, value in prompt.items() if value is not None}
    if other := sorted(map(str, given & set(_NO_OTHER_INPUT))):
        raise ValueError(f"the prompt dict has {other[0]!r}; models here read text only, leave it out")
    unknown = prompt.keys() - {*_PROMPT_KEYS, *_NO_OTHER_INPUT}
    if unknown or not given & {"prompt", "prompt_token_ids"}:
        raise ValueError(f"a prompt dict has either 'prompt' or 'prompt_token_ids', not {sorted(map(str, prompt))}")


def _salt_of(prompt: Prompt) -> str:
    salt = prompt.get("cache_salt") if isinstance(prompt, dict) else None
    if not isinstance(salt, (str, type(None))):
        raise ValueError(f"cache_salt must be a string, not {type(salt).__name__}")
    return salt or ""
