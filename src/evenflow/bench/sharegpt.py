"""ShareGPT as two versions of vLLM read it: `seed` (v0.1.4, 2023, exact) and `current`. Same file, different requests.

seed: filter everything, then random.sample with seed 0. current: shuffle with seed 0, then take the first that pass;
with too few of them, repeat some. Both count a BOS token in prompt and answer where the tokenizer adds one.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from evenflow.bench.workload import MAX_PROMPT, MAX_TOTAL, MIN_TOKENS, BenchRequest, Workload

MODES = ("seed", "current")
Encode = Callable[[Sequence[str]], list[list[int]]]
BATCH = 1000  # texts per call of the tokenizer


def sharegpt(path: str | Path, encode: Encode, count: int, *, mode: str = "current", seed: int = 0) -> Workload:
    """`count` requests from a ShareGPT file. encode: texts -> token ids of each, with special tokens.

    Raises ValueError for a file that is missing, empty or something else, and in mode `seed` for too few conversations.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} must be one of {', '.join(MODES)}")
    if count < 1:
        raise ValueError(f"num_prompts={count} must be at least 1")
    pairs = first_turns(read(Path(path)))
    if mode == "seed":
        found = _sample_of_filtered(pairs, encode, count, seed, path)
    else:
        found = _first_of_shuffled(pairs, encode, count, seed, path)
    note = f"{Path(path).name} by the rules of vLLM {'v0.1.4' if mode == 'seed' else '0.33'}"
    return Workload("sharegpt", found, note, {"mode": mode, "seed": seed})


def read(path: Path) -> list[dict[str, Any]]:
    """The conversations of a ShareGPT JSON file. Raises ValueError that names the file and the fault."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"dataset file {str(path)!r} does not exist; without one, use --dataset builtin") from None
    except IsADirectoryError:
        raise ValueError(f"dataset {str(path)!r} is a directory; pass the JSON file in it") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"dataset file {str(path)!r} is not valid JSON: {error}; download it again") from None
    if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
        raise ValueError(f"dataset file {str(path)!r} must hold a list of conversations, as ShareGPT's does")
    if not data:
        raise ValueError(f"dataset file {str(path)!r} is empty: it holds no conversation")
    return data


def first_turns(data: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(first turn, second turn) of every conversation that has two."""
    found = []
    for index, entry in enumerate(data):
        turns = entry.get("conversations")
        if not isinstance(turns, list):
            raise ValueError(f"conversation {index} has no list 'conversations'; this is no ShareGPT file")
        if len(turns) < 2:
            continue
        values = [turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2]]
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"conversation {index} has a turn without text in 'value'; this is no ShareGPT file")
        found.append((str(values[0]), str(values[1])))
    return found


def passes(num_prompt: int, num_output: int) -> bool:
    """The filter, unchanged since 2023: nothing shorter than 4, no prompt over 1,024, together at most 2,048."""
    return (
        num_prompt >= MIN_TOKENS
        and num_output >= MIN_TOKENS
        and num_prompt <= MAX_PROMPT
        and num_prompt + num_output <= MAX_TOTAL
    )


def _filtered(pairs: Sequence[tuple[str, str]], encode: Encode) -> Iterator[BenchRequest]:
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        prompts, answers = encode([prompt for prompt, _ in batch]), encode([answer for _, answer in batch])
        for ids, answer in zip(prompts, answers, strict=True):
            if passes(len(ids), len(answer)):
                yield BenchRequest(ids, len(ids), len(answer))


def _sample_of_filtered(
    pairs: Sequence[tuple[str, str]], encode: Encode, count: int, seed: int, path: str | Path
) -> list[BenchRequest]:
    found = list(_filtered(pairs, encode))
    if len(found) < count:
        raise ValueError(
            f"{path} has {len(found)} conversations that pass the filter, fewer than num_prompts={count}; "
            "lower it, or use mode 'current', which repeats some"
        )
    return random.Random(seed).sample(found, count)


def _first_of_shuffled(
    pairs: Sequence[tuple[str, str]], encode: Encode, count: int, seed: int, path: str | Path
) -> list[BenchRequest]:
    shuffled = list(pairs)
    random.Random(seed).shuffle(shuffled)
    found: list[BenchRequest] = []
    for request in _filtered(shuffled, encode):
        found.append(request)
        if len(found) == count:
            return found
    if not found:
        raise ValueError(f"{path} has no conversation that passes the filter (4 to 1,024 tokens in, 2,048 together)")
    rng = random.Random(seed)
    return found + [rng.choice(found) for _ in range(count - len(found))]
