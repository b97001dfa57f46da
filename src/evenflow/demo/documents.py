"""Training documents, as token ids, made from tales: plain windows of text and chat conversations.

A document is at most one context long and always starts a row of a batch, exactly as at inference: nothing is packed.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from evenflow.demo import chat
from evenflow.demo.corpus import FAVOURITES, Tale
from evenflow.demo.tokenizer import ASSISTANT, BEGIN, END, SYSTEM, USER, token_id

SHORT_TALE_TOKENS = 600
# An epoch's conversations beside one for each tale.
NUM_TOPIC_REQUESTS = 60
NUM_FAVOURITE_REQUESTS = 5  # for each of them: these fables should be known by heart
NUM_OPENING_REQUESTS = 3  # for each tale: teaches which title is meant without learning the tale by heart
OPENING_TOKENS = 32


@dataclass(frozen=True)
class Document:
    """`ids`, of which the first `num_unscored` are context only: no loss is taken for predicting them."""

    ids: list[int]
    num_unscored: int = 1


@dataclass(frozen=True)
class TokenizedTale:
    """A tale with its pieces encoded once: title first, each piece but the last followed by the blank line."""

    tale: Tale
    pieces: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.pieces))


class DocumentMaker:
    """Encodes tales once, then makes each epoch's documents, differently each time."""

    def __init__(self, tokenizer: Tokenizer, tales: Sequence[Tale], max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.begin, self.end = token_id(tokenizer, BEGIN), token_id(tokenizer, END)
        self.system, self.user, self.assistant = (token_id(tokenizer, role) for role in (SYSTEM, USER, ASSISTANT))
        self.tales = [self._tokenize(tale) for tale in tales]
        # Of several tales with one title, chat can only mean the first.
        self.named_tales = list({item.tale.title: item for item in reversed(self.tales)}.values())
        self.short_tales = [item for item in self.named_tales if item.num_tokens < SHORT_TALE_TOKENS]

    def epoch(self, rng: random.Random) -> list[Document]:
        """Every tale as plain text once, about as many conversations, and the small talk."""
        documents = [window for item in self.tales for window in self._windows(item, rng)]
        for item in self.named_tales:
            if item.num_tokens < self.max_length or rng.random() < 0.5:
                documents.append(self.conversation(chat.ask_for(item.tale, rng), self._answer(item), rng))
            opening = self._answer(item)[:OPENING_TOKENS]
            for _ in range(NUM_OPENING_REQUESTS):
                documents.append(self.conversation(chat.ask_for(item.tale, rng), opening, rng))
            if item.tale.title in FAVOURITES:
                for _ in range(NUM_FAVOURITE_REQUESTS):
                    documents.append(self.conversation(chat.ask_for(item.tale, rng), self._answer(item), rng))
        for item in rng.sample(self.short_tales, NUM_TOPIC_REQUESTS):
            documents.append(self.conversation(chat.ask_about(item.tale, rng), self._answer(item), rng))
        return documents + self._open_talk(rng)

    def _open_talk(self, rng: random.Random) -> list[Document]:
        """Conversations that name no tale: any short one is told, and the small talk has its fixed answers."""
        tales = rng.sample(self.short_tales, len(chat.OPEN_REQUESTS))
        requests = [
            (chat.said(text, rng), self._answer(item)) for text, item in zip(chat.OPEN_REQUESTS, tales, strict=True)
        ]
        talk = [(message, [*self._encode(answer), self.end]) for message, answer in chat.small_talk(rng)]
        return [self.conversation(message, answer, rng) for message, answer in requests + talk]

    def whole_tale(self, item: TokenizedTale) -> list[int]:
        """Begin token, title, paragraphs, end token; as long as it is."""
        return [self.begin, *(token for piece in item.pieces for token in piece), self.end]

    def prompt(self, message: str) -> list[int]:
        """A chat with one user message, up to where the assistant answers."""
        return [self.begin, self.user, *self._encode(message), self.assistant]

    def conversation(self, message: str, answer: list[int], rng: random.Random) -> Document:
        """One exchange, at times after a system message or a greeting; only `answer` is scored, cut to the context."""
        before = [self.begin]
        if rng.random() < 0.15:
            before += [self.system, *self._encode(rng.choice(chat.SYSTEM_PROMPTS))]
        if rng.random() < 0.1:
            greeting, reply = rng.choice(chat.small_talk(rng))
            before += [self.user, *self._encode(greeting), self.assistant, *self._encode(reply), self.end]
        before += [self.user, *self._encode(message), self.assistant]
        return Document([*before, *answer][: self.max_length], len(before))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _tokenize(self, tale: Tale) -> TokenizedTale:
        blank_line = self._encode("\n\n")
        pieces = [[*self._encode(piece), *blank_line] for piece in (tale.title, *tale.paragraphs)]
        pieces[-1] = pieces[-1][: -len(blank_line)]
        return TokenizedTale(tale, tuple(map(tuple, pieces)))

    def _answer(self, item: TokenizedTale) -> list[int]:
        return self.whole_tale(item)[1 : self.max_length]

    def _windows(self, item: TokenizedTale, rng: random.Random) -> list[Document]:
        """The tale in windows of random length that start at paragraphs, without a gap between them.

        The first starts with the begin token and mostly with the title; half of the others have a begin token too.
        """
        windows = []
        start = 0 if rng.random() < 0.7 else 1
        is_first = True
        while start < len(item.pieces):
            limit = self.max_length if rng.random() < 0.5 else rng.randint(self.max_length // 3, self.max_length)
            ids = [self.begin] if is_first or rng.random() < 0.5 else []
            stop = start
            while stop < len(item.pieces) and len(ids) < limit:
                ids += item.pieces[stop]
                stop += 1
            if stop == len(item.pieces):
                ids.append(self.end)
            # The paragraph that did not fit begins the next window, unless it is the only one of this window.
            if len(ids) > limit and stop - start > 1:
                stop -= 1
            windows.append(Document(ids[:limit]))
            start, is_first = stop, False
        return windows


def batches(documents: Sequence[Document], max_tokens: int, rng: random.Random) -> list[list[Document]]:
    """`documents` in batches of like length, each at most `max_tokens` once padded; both orders are random."""
    ordered = sorted(documents, key=lambda document: len(document.ids) * rng.uniform(0.95, 1.05))
    result: list[list[Document]] = [[]]
    longest = 0
    for document in ordered:
        longest = max(longest, len(document.ids))
        if result[-1] and longest * (len(result[-1]) + 1) > max_tokens:
            result.append([])
            longest = len(document.ids)
        result[-1].append(document)
    rng.shuffle(result)
    return result
