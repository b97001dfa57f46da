"""The process in which foreign grammars are compiled first: `python -m evenflow.guided.worker`, started by checker.py.

Reads JSON lines from standard input: first the model's vocabulary size and special tokens, then grammars. Writes a line
with the error for each, "" if there is none. Ends with its input. What a grammar does to it, endless time or memory,
ends with it.
"""

import json
import resource
import sys
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from evenflow.guided.grammar import LIMITS

MEMORY_BYTES = 256 * 2**20
NUM_STEPS = 256


def error_of(grammar: str, tokenizer: LLTokenizer) -> str:
    """Compiles it and walks into it, over bytes: what is too complex shows within the first steps."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    for step in range(NUM_STEPS):
        if matcher.is_error() or matcher.is_stopped():
            break
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little"))
        if len(allowed) and not matcher.is_error():
            matcher.consume_token(int(allowed[-(step % 2)]))  # the first and the last in turn
    return one_line(matcher.get_error()) if matcher.is_error() else ""


def one_line(error: str) -> str:
    """The first line; of a regex that cannot be parsed also the pattern and the cause, which follow."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    if not lines:
        return "it cannot be compiled"
    causes = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if causes and lines[0].endswith("regex parse error:"):
        return f"{lines[0]:.300} {lines[1]:.100}: {causes[0]:.200}"
    return lines[0][:300]


class _Bytes:
    """A vocabulary of bytes, with the model's special tokens where the model has them: grammars name them by id."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocab_size: int, special: dict[int, str], eos_token_id: int) -> None:
        self.eos_token_id, self.special_token_ids = eos_token_id, sorted(special)
        self.tokens = [special.get(token_id, "").encode() for token_id in range(vocab_size)]
        free = [token_id for token_id in range(vocab_size) if token_id not in special][:256]
        self._id_of = dict(enumerate(free))
        for byte, token_id in self._id_of.items():
            self.tokens[token_id] = bytes([byte])

    def __call__(self, text: str) -> list[int]:
        return [self._id_of[byte] for byte in text.encode()]


def main() -> None:
    vocab_size, special, eos_token_id = json.loads(sys.stdin.readline())
    vocabulary: Any = _Bytes(vocab_size, {int(token_id): name for token_id, name in special.items()}, eos_token_id)
    tokenizer = LLTokenizer(vocabulary, n_vocab=vocab_size)
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    for line in sys.stdin:
        print(json.dumps(error_of(json.loads(line), tokenizer)), flush=True)


if __name__ == "__main__":
    main()
