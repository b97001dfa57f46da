"""Token ids -> text while the tokens arrive, and the search for stop strings in that text.

Owns what may be shown already: never half a character, never the beginning of what may become a stop string. What is
emitted is never taken back, and does not depend on how many tokens arrive at a time.
"""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from evenflow.tokenizer import TokenBytes, Tokenizer

NUM_CONTEXT_TOKENS = 5
MAX_WINDOW_TOKENS = 64  # reached only if every token ends within a character
_REPLACEMENT = "\ufffd"


class Detokenizer:
    """The text of a growing output. Emits decode(prompt + output) without what it shares with decode(prompt).

    For an empty prompt, and wherever no character or leading space spans the border, that is decode(output). A
    character that the prompt begins and the output completes is the output's; one that stays incomplete, the prompt's.
    """

    append: Callable[[Sequence[int]], str]  # the new text that is final
    flush: Callable[[], str]  # the rest: U+FFFD for bytes that never became a character

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool = True) -> None:
        stream: _ByteStream | _WindowStream
        if tokenizer.decoding is not None:
            table = tokenizer.bytes_table(skip_special_tokens)
            stream = _ByteStream(table, prompt_token_ids, tokenizer.decoding.num_strip)
        else:
            stream = _WindowStream(tokenizer, prompt_token_ids, skip_special_tokens)
        self.append, self.flush = stream.append, stream.flush


class _ByteStream:
    """Exact and O(1) per token: every token has its bytes, and an incremental UTF-8 decoder keeps at most three.

    `tail`: bytes since the prompt's incomplete last character, until the first text; None afterwards.
    """

    __slots__ = ("_decoder", "_num_strip", "_num_tail_chars", "_table", "_tail")

    def __init__(self, table: TokenBytes, prompt_token_ids: Sequence[int], num_strip: int) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        end = b""  # UTF-8 synchronizes itself: four bytes suffice to know what is pending
        for token_id in reversed(prompt_token_ids):
            if len(end) >= 4:
                break
            end = table[token_id] + end
        self._decoder.decode(end)
        self._tail: bytes | None = bytes(self._decoder.getstate()[0]) or None
        # Mostly 1; Python's decoder also waits after the two bytes of half a surrogate, which show as two.
        self._num_tail_chars = len((self._tail or b"").decode("utf-8", "replace"))
        # Only the very beginning of the whole text loses its spaces.
        self._num_strip = 0 if end else num_strip

    def append(self, new_ids: Sequence[int]) -> str:
        table = self._table
        data = b"".join([table[token_id] for token_id in new_ids])
        text = self._decoder.decode(data)
        if self._num_strip or self._tail is not None:
            return self._first_text(data, text)
        return text

    def flush(self) -> str:
        return self._first_text(b"", self._decoder.decode(b"", True))

    def _first_text(self, data: bytes, text: str) -> str:
        if self._tail is not None:
            self._tail += data
            if text:
                is_genuine = self._tail.startswith(_REPLACEMENT.encode())
                num_invalid = len(text) - len(text.lstrip(_REPLACEMENT))
                # What the prompt's incomplete character shows as, if it stays incomplete.
                text = text if is_genuine else text[min(num_invalid, self._num_tail_chars) :]
                self._tail = None
        if self._num_strip and text:
            count = min(self._num_strip, len(text) - len(text.lstrip(" ")))
            self._num_strip = self._num_strip - count if count == len(text) else 0
            text = text[count:]
        return text


class _WindowStream:
    """For decoders that look at neighbouring tokens: decodes the last few tokens again with each new one.

    ids: the window. ids[:read] is context, emitted before; `context` is its text. num_emitted: characters of the
    window's text, context included, that are out.
    """

    __slots__ = ("_context", "_hidden", "_ids", "_num_emitted", "_read", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        # Special tokens are sorted out here, so that the context never consists of tokens without text.
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        visible = (token_id for token_id in reversed(prompt_token_ids) if token_id not in self._hidden)
        self._begin(list(islice(visible, NUM_CONTEXT_TOKENS))[::-1])

    def append(self, new_ids: Sequence[int]) -> str:
        return "".join([self._append_one(token_id) for token_id in new_ids if token_id not in self._hidden])

    def flush(self) -> str:
        text = self._decode()
        return self._take(text, len(text))

    def _append_one(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode()
        # An incomplete character shows as one U+FFFD, or as one per byte.
        num_held = min(3, len(text) - len(text.rstrip(_REPLACEMENT)))
        if len(self._ids) >= MAX_WINDOW_TOKENS:
            num_held = 0
        piece = self._take(text, len(text) - num_held)
        if num_held == 0 and len(text) > len(self._context):
            self._begin(self._ids[self._read :])
        return piece

    def _begin(self, context_ids: list[int]) -> None:
        self._ids, self._read, self._num_emitted = context_ids, len(context_ids), 0
        self._context = self._decode()

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=False)

    def _take(self, text: str, end: int) -> str:
        """text[:end] without what is out. The context may end with half a character, which `text` completes."""
        pairs = enumerate(zip(self._context, text, strict=False))
        num_shared = next((i for i, (a, b) in pairs if a != b), min(len(self._context), len(text)))
        start = max(self._num_emitted, num_shared)
        if start >= end:
            return ""
        self._num_emitted = end
        return text[start:end]


@dataclass(frozen=True, slots=True)
class StopMatch:
    """Which stop string ended the text, and where it ends, in characters from the text's beginning."""

    stop: str
    end: int


class StopChecker:
    """Cuts a text at the first stop string: the one that begins first, of those the one that ends first.

    Holds back only what may be part of it. `match` is set once the text has ended; everything later is dropped.
    `pending` is a match that counts unless an earlier, longer one is completed.
    """

    __slots__ = ("_held", "_include", "_min_end", "_offset", "_stops", "match", "pending")

    def __init__(self, stops: Sequence[str], include_stop_str: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include_stop_str
        self._held = ""
        self._offset = 0  # characters before `_held`
        self._min_end = 0  # a match must end after this character
        self.match: StopMatch | None = None
        self.pending: StopMatch | None = None

    def append(self, text: str, counts: bool = True) -> str:
        """New text -> the text that may be shown now. Without `counts`, no stop string may end in or before `text`."""
        if self.match is not None:
            return ""
        self._held += text
        if not counts:
            self._min_end = self._offset + len(self._held)
        live = min([self._live_start(stop) for stop in self._stops], default=len(self._held))
        found = self._find()
        if found is None:
            return self._release(live)
        start, end, stop = found
        self.pending = StopMatch(stop, self._offset + end)
        return self._finish(start, end) if start <= live else self._release(live)

    def flush(self) -> str:
        """The generation has ended: decides a pending match, or gives out what was held back."""
        if self.match is not None:
            return ""
        found = self._find()
        return self._finish(found[0], found[1]) if found is not None else self._release(len(self._held))

    def _find(self) -> tuple[int, int, str] | None:
        """The earliest complete stop string in `_held`: start, end, string."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            first = max(0, self._min_end - self._offset - len(stop) + 1)
            start = self._held.find(stop, first)
            if start >= 0 and (best is None or (start, start + len(stop)) < best[:2]):
                best = (start, start + len(stop), stop)
        return best

    def _live_start(self, stop: str) -> int:
        """Where the longest suffix of `_held` begins that is a proper prefix of `stop`."""
        held = self._held
        start = held.find(stop[0], max(0, len(held) - len(stop) + 1))
        while start >= 0:
            if stop.startswith(held[start:]):
                return start
            start = held.find(stop[0], start + 1)
        return len(held)

    def _finish(self, start: int, end: int) -> str:
        self.match = self.pending = StopMatch(self._held[start:end], self._offset + end)
        return self._release(end if self._include else start)

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        self._offset += count
        return text
