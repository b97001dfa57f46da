"""The process in which foreign grammars are compiled first: `python -m evenflow.guided.worker`, started by checker.py.

Reads one line of JSON a grammar from standard input, writes one line of JSON with the error, "" if there is none. Ends
with its input. What a grammar does to it, endless time or memory, ends with it.
"""

import json
import resource
import sys

from llguidance import LLMatcher, LLTokenizer

from evenflow.guided.grammar import LIMITS

MEMORY_BYTES = 256 * 2**20


def error_of(grammar: str, tokenizer: LLTokenizer) -> str:
    """Compiles it, and computes its first mask; over bytes, since what a grammar costs is its own."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return first_line(matcher.get_error()) if matcher.is_error() else ""


def first_line(error: str) -> str:
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return lines[0][:300] if lines else "it cannot be compiled"


def main() -> None:
    tokenizer = LLTokenizer("byte")
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with open("/proc/self/statm") as statm:
        used = max(used, int(statm.read().split()[0]) * resource.getpagesize())
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    for line in sys.stdin:
        print(json.dumps(error_of(json.loads(line), tokenizer)), flush=True)


if __name__ == "__main__":
    main()
