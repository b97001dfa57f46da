"""What the finished demo model is worth: perplexity on whole tales, fables recited in chat, samples to read.

Works on any causal language model of transformers; knows nothing of how it was trained.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from evenflow.demo.corpus import FAVOURITES
from evenflow.demo.documents import DocumentMaker, TokenizedTale

SAMPLE_TOKENS = 300


@torch.no_grad()
def tale_nll(model: Any, ids: Sequence[int], max_length: int) -> float:
    """Sum of -log p(token), natural logarithm, over all of `ids` but the first.

    A longer tale is scored in consecutive pieces of at most `max_length`, each seeing one token of the piece before.
    """
    total = 0.0
    for start in range(0, len(ids) - 1, max_length - 1):
        row = torch.tensor([ids[start : start + max_length]], device=model.device)
        logits = model(input_ids=row).logits[0, :-1].float()
        total += float(cross_entropy(logits, row[0, 1:], reduction="sum"))
    return total


def perplexity(model: Any, maker: DocumentMaker, tales: Iterable[TokenizedTale]) -> dict[str, float]:
    """Figures over `tales`: perplexity per token (end token included, begin token not) and bits per UTF-8 byte."""
    num_tales, num_tokens, num_bytes, nll = 0, 0, 0, 0.0
    for item in tales:
        ids = maker.whole_tale(item)
        nll += tale_nll(model, ids, maker.max_length)
        num_tales, num_tokens = num_tales + 1, num_tokens + len(ids) - 1
        num_bytes += len(item.tale.text.encode())
    return {
        "num_tales": num_tales,
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
        "perplexity": round(math.exp(nll / num_tokens), 4),
        "bits_per_byte": round(nll / math.log(2) / num_bytes, 4),
    }


@torch.no_grad()
def generate(model: Any, prompts: Sequence[Sequence[int]], pad: int, **options: Any) -> list[list[int]]:
    """What `model` appends to each prompt, padding cut off. The prompts are padded on the left to one batch."""
    longest = max(map(len, prompts))
    rows = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    input_ids = torch.tensor(rows, device=model.device)
    is_real = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    output = model.generate(
        input_ids, attention_mask=torch.tensor(is_real, device=model.device), pad_token_id=pad, **options
    )
    return [[token for token in row if token != pad] for row in output[:, longest:].tolist()]


def recited_fables(model: Any, maker: DocumentMaker, pad: int) -> dict[str, float]:
    """Of the training fables, how many does a greedy chat answer recite to the letter, and how many begin right?"""
    fables = [item for item in maker.named_tales if item.tale.book == "aesop"]
    prompts = [maker.prompt(f"Tell me the tale of {item.tale.title}.") for item in fables]
    answers = generate(model, prompts, pad, max_new_tokens=SAMPLE_TOKENS * 2, do_sample=False)
    expected = [maker.whole_tale(item)[1:] for item in fables]
    pairs = list(zip(answers, expected, strict=True))
    favourites = [pair for item, pair in zip(fables, pairs, strict=True) if item.tale.title in FAVOURITES]
    return {
        "num_favourites": len(favourites),
        "num_exact_favourites": sum(answer == fable for answer, fable in favourites),
        "num_fables": len(fables),
        "num_exact": sum(answer == fable for answer, fable in pairs),
        "num_begun_right": sum(answer[:64] == fable[:64] for answer, fable in pairs),
    }


def samples(model: Any, maker: DocumentMaker, pad: int, seed: int) -> list[tuple[str, str]]:
    """(heading, text) for a few prompts, chat ones greedy, the beginning of a story by the generation config."""
    requests = ("tell me the tale of the wolf and the lamb", "Hello!", "who are you", "Tell a tale.", "What is 3+4?")
    prompts = [maker.prompt(text) for text in requests]
    greedy = generate(model, prompts, pad, max_new_tokens=SAMPLE_TOKENS, do_sample=False)
    torch.manual_seed(seed)
    opening = "Once upon a time"
    start = maker.tokenizer.encode(opening).ids
    sampled = generate(model, [start, start], pad, max_new_tokens=SAMPLE_TOKENS)
    decode = maker.tokenizer.decode
    chats = [(f"chat: {text}", decode(ids)) for text, ids in zip(requests, greedy, strict=True)]
    return chats + [(f"text: {opening}", opening + decode(ids)) for ids in sampled]
