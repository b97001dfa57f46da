"""Text <-> token ids: a model's tokenizer.json, its special tokens and its chat template.

Owns encoding, the exact bytes of every token, and the decoding of a finished sequence. Decoding while tokens arrive is
in detokenizer.py, which uses the same bytes; rendering of chats is in chat_template.py.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken

from evenflow.chat_template import ChatTemplate, Message, check_messages
from evenflow.model_files import read_json

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TOKEN_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class ByteDecoding(NamedTuple):
    """How tokens become bytes, for the decoders where each token does so by itself.

    is_byte_level: the token is written in GPT-2's alphabet of 256 printable characters. Otherwise as in sentencepiece:
    `▁` is a space and, if has_byte_fallback, <0xNN> a byte. num_strip: leading spaces that the text's beginning loses.
    """

    is_byte_level: bool
    has_byte_fallback: bool = False
    num_strip: int = 0


class ChatPrompt(NamedTuple):
    """A conversation as the model reads it."""

    text: str
    token_ids: list[int]


class TokenBytes(dict[int, bytes]):
    """token id -> its bytes; computed at the first use of a token, since a vocabulary has 150,000 of them.

    Ids that the tokenizer does not know (the logits can be wider) and the `hidden` ones have none.
    """

    def __init__(self, backend: tokenizers.Tokenizer, decoding: ByteDecoding, hidden: frozenset[int]) -> None:
        super().__init__()
        self._backend, self._decoding, self._hidden = backend, decoding, hidden

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._hidden or token_id < 0 else self._backend.id_to_token(token_id)
        value = b"" if token is None else self._bytes(token_id, token)
        self[token_id] = value
        return value

    def _bytes(self, token_id: int, token: str) -> bytes:
        if not self._decoding.is_byte_level:
            if self._decoding.has_byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
                return bytes([int(match[1], 16)])
            return token.replace("▁", " ").encode()
        # A token added after training stands for itself: it is found in the text before the alphabet is applied.
        is_literal = self._backend.model.id_to_token(token_id) is None
        if is_literal or not _ALPHABET.keys() >= set(token):
            return token.encode()
        return bytes(_ALPHABET[c] for c in token)


class Tokenizer:
    """A model's tokenizer. Made by `from_dir`; safe to use from several threads.

    eos_token_id, bos_token_id: None where the model names none. special_ids: what skip_special_tokens leaves out.
    decoding: None if the tokenizer's decoder has rules that look at neighbouring tokens.
    """

    def __init__(self, backend: tokenizers.Tokenizer, named_tokens: dict[str, str], templates: dict[str, str]) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.named_tokens = named_tokens
        self._chat_templates = {n: ChatTemplate(source, named_tokens) for n, source in templates.items()}
        _mark_special(backend, named_tokens.values())
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.eos_token_id = self._named_id("eos_token")
        self.bos_token_id = self._named_id("bos_token")
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.decoding = _byte_decoding(backend)
        if self.decoding is not None:
            self._all_bytes = TokenBytes(backend, self.decoding, frozenset())
            self._visible_bytes = TokenBytes(backend, self.decoding, self.special_ids)

    @classmethod
    def from_dir(cls, path: str | Path) -> "Tokenizer":
        """Read a Hugging Face model directory. Raises ValueError that names the file at fault and the way out."""
        directory = Path(path)
        backend = _load_backend(directory)
        config_path = directory / "tokenizer_config.json"
        config = read_json(config_path) if config_path.is_file() else {}
        map_path = directory / "special_tokens_map.json"
        special_map = read_json(map_path) if map_path.is_file() else {}
        _add_missing_tokens(backend, config, config_path)
        named = {}
        for name in NAMED_TOKENS:
            if (content := _content(config.get(name))) or (content := _content(special_map.get(name))):
                named[name] = content
        return cls(backend, named, _chat_templates(directory, config))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; add_special_tokens puts in what the model expects around a text (often a BOS)."""
        check_text("text", text)
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        for i, text in enumerate(texts):
            check_text(f"texts[{i}]", text)
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [list(encoding.ids) for encoding in encodings]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence. Bytes that are no UTF-8 become U+FFFD; nothing is tidied up."""
        if self.decoding is None:
            return str(self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))
        table = self.bytes_table(skip_special_tokens)
        text = b"".join([table[token_id] for token_id in token_ids]).decode("utf-8", "replace")
        num_strip = min(self.decoding.num_strip, len(text) - len(text.lstrip(" ")))
        return text[num_strip:]

    def bytes_table(self, skip_special_tokens: bool) -> TokenBytes:
        """token id -> bytes. Only where `decoding` is not None."""
        return self._visible_bytes if skip_special_tokens else self._all_bytes

    def bytes_of(self, skip_special_tokens: bool) -> Callable[[int], bytes]:
        """The function from a token to what it adds to the text."""
        if self.decoding is None:
            hidden = self.special_ids if skip_special_tokens else frozenset()
            return lambda token_id: b"" if token_id in hidden else self.token_bytes(token_id)
        return self.bytes_table(skip_special_tokens).__getitem__

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, special tokens included; empty for an id that is none."""
        if self.decoding is None:
            return self.token_text(token_id).encode()
        return self._all_bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself, for display: part of a character shows as U+FFFD."""
        if self.decoding is None:
            return str(self.backend.decode([token_id], skip_special_tokens=False)) if token_id >= 0 else ""
        return self._all_bytes[token_id].decode("utf-8", "replace")

    @cached_property
    def max_token_chars(self) -> int:
        """The length of the longest token: no text is longer than its tokens times this."""
        return max(map(len, self.backend.get_vocab(with_added_tokens=True)), default=1)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        continue_final_message: bool = False,
        template_options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation. template_options: further variables that the model's template reads.

        Raises ValueError: no template, a message that cannot be used, or whatever the template itself refuses.
        """
        return self._chat_template(tools).render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            continue_final_message=continue_final_message,
            options={} if template_options is None else template_options,
        )

    def chat_prompt(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        continue_final_message: bool = False,
        template_options: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """`apply_chat_template`, encoded. The template writes the special tokens itself, so none are added.

        What reads like a special token within a message is text: nobody ends their turn by writing how turns end.
        """
        messages = check_messages(messages)  # before the marks: JSON's escapes can spell a special token
        mark = self._unused_mark([messages, tools])
        if mark is not None:
            messages = [self._marked(message, mark) for message in messages]
            tools = self._marked(tools, mark)
        text = self.apply_chat_template(
            messages, add_generation_prompt, tools, continue_final_message, template_options
        )
        pieces = [text] if mark is None else text.split(mark)
        ids = [token_id for piece in pieces for token_id in self.encode(piece, add_special_tokens=False)]
        return ChatPrompt("".join(pieces), ids)

    def _unused_mark(self, data: Any) -> str | None:
        """A character of the private use area that `data` lacks; None if nothing in it reads like a special token."""
        texts = list(_strings(data))
        if self._special_pattern is None or not any(map(self._special_pattern.search, texts)):
            return None
        used = set().union(*texts)
        return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)

    def _marked(self, data: Any, mark: str) -> Any:
        """A copy in which every text of a special token is broken by `mark` after its first character."""
        if isinstance(data, str):
            assert self._special_pattern is not None
            return self._special_pattern.sub(lambda match: match[0][0] + mark + match[0][1:], data)
        if isinstance(data, dict):
            return {key: value if key == "role" else self._marked(value, mark) for key, value in data.items()}
        return [self._marked(value, mark) for value in data] if isinstance(data, (list, tuple)) else data

    @cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        added = self.backend.get_added_tokens_decoder()
        texts = [token.content for token in added.values() if token.special and len(token.content) > 1]
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None

    @property
    def chat_template_source(self) -> str | None:
        """The Jinja source of the default template."""
        template = self._chat_templates.get("default")
        return None if template is None else template.source

    def _chat_template(self, tools: list[dict[str, Any]] | None) -> ChatTemplate:
        if tools and "tool_use" in self._chat_templates:
            return self._chat_templates["tool_use"]
        if "default" not in self._chat_templates:
            raise ValueError(
                "this model has no chat template; use generate (completions) with a prompt in the model's own format, "
                "or put a chat_template.jinja into the tokenizer's directory"
            )
        return self._chat_templates["default"]

    def _named_id(self, name: str) -> int | None:
        token = self.named_tokens.get(name)
        token_id = None if token is None else self.backend.token_to_id(token)
        return None if token_id is None else int(token_id)


def _strings(data: Any) -> Iterator[str]:
    """All strings in dicts and lists, keys and roles left out."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, dict):
        for key, value in data.items():
            if key != "role":
                yield from _strings(value)
    elif isinstance(data, (list, tuple)):
        for value in data:
            yield from _strings(value)


def check_text(name: str, text: object) -> None:
    """Raises ValueError unless `text` is a string that UTF-8 can express."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, not {type(text).__name__}")
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"{name} has a lone surrogate (U+{code:04X}) at position {error.start}, which is no character; remove it"
        ) from None


def _load_backend(directory: Path) -> tokenizers.Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        others = [name for name in ("tokenizer.model", "tekken.json", "vocab.json") if (directory / name).is_file()]
        found = f" (only {others[0]})" if others else ""
        raise ValueError(
            f"{directory} has no tokenizer.json{found}; make one with transformers: "
            f"AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every fault of the file
        raise ValueError(f"{path} is no tokenizer that the tokenizers library can read: {error}") from None


def _mark_special(backend: tokenizers.Tokenizer, named_tokens: Iterable[str]) -> None:
    """Tokens with a role (eos, ...) are special even where tokenizer.json does not say so."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    unmarked = [t for t in dict.fromkeys(named_tokens) if t not in special and backend.token_to_id(t) is not None]
    if unmarked:
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in unmarked])


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any], path: Path) -> None:
    """tokenizer_config.json's added_tokens_decoder: tokens that tokenizer.json lacks, or marks otherwise."""
    present = backend.get_added_tokens_decoder()
    listed = config.get("added_tokens_decoder") or {}
    for token_id, entry in sorted((int(key), value) for key, value in listed.items()):
        flags = {key: bool(entry.get(key, False)) for key in _TOKEN_FLAGS}
        token = AddedToken(entry["content"], **flags)
        if repr(token) == repr(present.get(token_id)):
            continue
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise ValueError(f"{path}: token {token.content!r} cannot have id {token_id} with this tokenizer.json")


def _chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name. Files win over tokenizer_config.json."""
    given = config.get("chat_template")
    if isinstance(given, list):
        templates = {entry["name"]: entry["template"] for entry in given}
    else:
        templates = {"default": given} if given else {}
    paths = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (main := directory / "chat_template.jinja").is_file():
        paths["default"] = main
    return templates | {name: path.read_text(encoding="utf-8") for name, path in paths.items()}


def _content(token: object) -> str | None:
    """A special token as configuration files give it: a string, or {"content": ...}."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _byte_decoding(backend: tokenizers.Tokenizer) -> ByteDecoding | None:
    """Recognizes byte-level BPE and sentencepiece's chain; None for any other decoder."""
    if backend.decoder is None:
        return None
    state = json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return ByteDecoding(is_byte_level=True)
    num_strip = 0
    if kinds[-2:] == ["Fuse", "Strip"] and steps[-1]["content"] == " " and steps[-1]["stop"] == 0:
        num_strip = steps[-1]["start"]
        kinds, steps = kinds[:-1], steps[:-1]
    if kinds not in (["Replace", "ByteFallback", "Fuse"], ["Replace", "Fuse"]):
        return None
    if steps[0]["pattern"] != {"String": "▁"} or steps[0]["content"] != " ":
        return None
    return ByteDecoding(is_byte_level=False, has_byte_fallback="ByteFallback" in kinds, num_strip=num_strip)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for U+0100 and up."""
    printable: Iterable[int] = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_ALPHABET = _byte_alphabet()
