"""A table of results beside each other: what was measured, the limit of that GPU, the fraction of it, and the ratio.

    python benchmarks/h200/table.py evenflow.json [vllm.json] [--out table.md]

Both files are measure.py's, of the same model on the same machine; the ceilings are those in the first.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from limits import Limits
from measure import DECODE_STEPS

# what, ours, the other's, limit (None: no figure), whether more is better
Row = tuple[str, float, float | None, float | None, bool]


def _by_shape(result: dict[str, Any] | None, part: str, keys: tuple[str, ...], value: str) -> dict[tuple, float]:
    return {tuple(entry[key] for key in keys): entry[value] for entry in (result or {}).get(part, [])}


def _joules(result: dict[str, Any] | None) -> float | None:
    """Of the fastest run of the workload, where its power was watched."""
    if not result or not result.get("throughput"):
        return None
    fastest = min(result["throughput"], key=lambda run: run["s"])
    return fastest["watts"] * fastest["s"] if "watts" in fastest else None


def rows(ours: dict[str, Any], other: dict[str, Any] | None) -> Iterator[Row]:
    limits = Limits.of(ours, ours["ceilings"])
    if ours.get("throughput"):
        best = min(entry["s"] for entry in ours["throughput"])
        theirs = min((entry["s"] for entry in (other or {}).get("throughput", [])), default=None)
        tokens = ours["throughput"][0]["total_tokens_per_s"] * ours["throughput"][0]["s"]
        limit = tokens / limits.throughput_s()
        yield "1,000 requests, tokens/s in and out", tokens / best, theirs and tokens / theirs, limit, True
        joules, their_joules = _joules(ours), _joules(other)
        if joules is not None:
            yield "the same, tokens a joule", tokens / joules, their_joules and tokens / their_joules, None, True
    theirs_by = _by_shape(other, "decode", ("batch", "context"), "ms_per_step")
    for (batch, context), ms in _by_shape(ours, "decode", ("batch", "context"), "ms_per_step").items():
        limit = limits.decode_ms(batch, context, DECODE_STEPS)
        yield f"decode, {batch} x {context}, ms a step", ms, theirs_by.get((batch, context)), limit, False
    theirs_by = _by_shape(other, "prefill", ("tokens",), "ms")
    for (tokens,), ms in _by_shape(ours, "prefill", ("tokens",), "ms").items():
        yield f"prefill, {tokens} tokens, ms", ms, theirs_by.get((tokens,)), limits.prefill_ms(tokens, 2048), False


def markdown(ours: dict[str, Any], other: dict[str, Any] | None) -> str:
    name = f"vLLM {other['start']['version']}" if other else ""
    head = [ours["model"], "limit", "Evenflow", "of limit"] + ([name, "of limit", "ratio"] if other else [])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for what, mine, theirs, limit, more_is_better in rows(ours, other):
        cells = [what, _number(limit), _number(mine), _percent(mine, limit, more_is_better)]
        if other and theirs:
            ratio = mine / theirs if more_is_better else theirs / mine
            cells += [_number(theirs), _percent(theirs, limit, more_is_better), f"{ratio:.2f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def _percent(value: float, limit: float | None, more_is_better: bool) -> str:
    if limit is None:
        return ""
    return f"{100 * (value / limit if more_is_better else limit / value):.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours", type=Path)
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    table = markdown(json.loads(args.ours.read_text()), json.loads(args.other.read_text()) if args.other else None)
    print(table)
    if args.out:
        args.out.write_text(table + "\n")


if __name__ == "__main__":
    main()
