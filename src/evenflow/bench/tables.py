"""Results -> tables of text, the same for terminal, markdown and HTML. Owns the formats of numbers, no measurement."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Table:
    """header[0] names the rows, its column is set left, the others right, unless is_text. note: below it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    is_text: bool = False

    def print(self) -> None:
        """To standard output."""
        from rich.console import Console
        from rich.table import Table as RichTable

        console = Console(width=None if sys.stdout.isatty() else 160)
        table = RichTable(title=self.title, title_justify="left", box=None, header_style="bold", title_style="bold")
        for index, name in enumerate(self.header):
            table.add_column(name, justify="left" if index == 0 or self.is_text else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        if self.note:
            console.print(self.note, style="dim", highlight=False)

    def markdown(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        rule = "|---|" + ("---|" if self.is_text else "---:|") * (len(self.header) - 1)
        body = "\n".join([line(self.header), rule, *(line(row) for row in self.rows)])
        return f"**{self.title}**\n\n{body}\n" + (f"\n{self.note}\n" if self.note else "")


def number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def plus_minus(value: float, half_width: float | None, digits: int = 1) -> str:
    return number(value, digits) + (f" ± {half_width:,.{digits}f}" if half_width is not None else "")


def milliseconds(seconds: float | None, digits: int = 2) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:,.{digits}f}"


def throughput(result: dict[str, Any]) -> Table:
    """One run, beside its limit and its baseline."""
    rows = [_throughput_row(str(result["model_id"]), result)]
    limit = result.get("roofline")
    if limit:
        for name, label in (("", "limit, ideal"), ("no_overlap_", "limit, no overlap")):
            total = limit[f"limit_{name}total_tokens_per_s"]
            share = result["total_output_tokens"] / result["total_num_tokens"]
            per_token = result["num_requests"] / result["total_num_tokens"]
            fraction = limit["fraction_of_" + (name.rstrip("_") or "ideal")]
            row = [label, number(total), number(total * share), number(60 * total * per_token)]
            rows.append([*row, f"{percent(fraction)} reached"])
    if baseline := result.get("baseline"):
        rows.append(_throughput_row(str(baseline["name"]), baseline))
        rows[-1][-1] = f"{result['over_baseline']:.2f}x faster"
    return Table(
        f"throughput, {result['num_requests']} requests, {result['workload']['note'] or result['workload']['name']}",
        ("", "tokens/s in + out", "output tokens/s", "requests/min", ""),
        rows,
        _limit_note(result),
    )


def _throughput_row(name: str, result: dict[str, Any]) -> list[str]:
    return [
        name,
        plus_minus(result["tokens_per_second"], result["tokens_per_second_ci95"]),
        number(result["output_tokens_per_second"]),
        number(result["requests_per_minute"]),
        "",
    ]


def _limit_note(result: dict[str, Any]) -> str:
    limit = result.get("roofline")
    if not limit:
        return f"No limit: {result.get('roofline_missing', 'not computed')}"
    phases = limit["phases"]
    machine = limit["machine"]
    words = [f"{name} steps: {phase['num_steps']}, bound by {phase['binding']}" for name, phase in phases.items()]
    return (
        f"Limit of {machine['name']}: {machine['bandwidth_bytes_per_s'] / 1e9:,.0f} GB/s, "
        f"{machine['flops'] / 1e12:,.2f} TFLOP/s. {'; '.join(words)}."
    )


def latency(result: dict[str, Any]) -> Table:
    header = ["batch x in x out", "TTFT ms", "step ms", "ms per token", "latency ms"]
    has_limit = "machine" in result
    if has_limit:
        header += ["prefill of limit", "bound by", "decode of limit", "bound by "]
    rows = []
    for cell in result["cells"]:
        row = [
            f"{cell['batch_size']} x {cell['input_len']} x {cell['output_len']}",
            milliseconds(cell["ttft_s"]),
            milliseconds(cell["step_time_s"]),
            milliseconds(cell["time_per_token_s"], 3),
            milliseconds(cell["avg_latency"]),
        ]
        if has_limit:
            limit = cell["limit"]
            row += [percent(limit["prefill_fraction"]), limit["prefill_binding"]]
            row += [percent(limit["decode_fraction"]), limit["decode_binding"]]
        rows.append(row)
    return Table(f"latency of {result['model_id']}", header, rows, "" if has_limit else result["roofline_missing"])


def serving(results: Sequence[dict[str, Any]]) -> Table:
    header = ["requests/s", "done", "failed", "req/s", "out tokens/s", "tokens/s in + out"]
    header += ["TTFT ms", "p99", "TPOT ms", "ITL ms", "p99 ", "E2E ms", "normalized ms"]
    has_goodput = any(result["request_goodput"] is not None for result in results)
    has_limit = any("roofline" in result for result in results)
    header += ["goodput/s"] * has_goodput + ["of limit"] * has_limit
    rows = []
    for result in results:
        row = [
            f"{result['request_rate']}",
            f"{result['completed']}",
            f"{result['failed']}",
            number(result["request_throughput"], 2),
            number(result["output_throughput"]),
            number(result["total_token_throughput"]),
            *(number(result.get(name)) for name in ("mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms")),
            *(number(result.get(name)) for name in ("mean_itl_ms", "p99_itl_ms", "mean_e2el_ms")),
            milliseconds(result["normalized_latency_s"]),
        ]
        row += [number(result["request_goodput"], 2)] * has_goodput
        row += [percent(result.get("roofline", {}).get("fraction_of_ideal"))] * has_limit
        rows.append(row)
    errors = sorted({error for result in results for error in result["error_samples"]})
    note = "normalized: latency / (prompt + output tokens), mean over requests"
    return Table(
        f"serving {results[0]['model_id']}, {results[0]['num_prompts']} requests a run",
        header,
        rows,
        note + "".join(f"\nfailed: {error}" for error in errors),
    )


def ablation(result: dict[str, Any]) -> Table:
    rows = [
        [
            row["name"],
            plus_minus(row["tokens_per_s"], row["tokens_per_s_ci95"], 0),
            plus_minus(row["tokens_per_s_without"], row["tokens_per_s_without_ci95"], 0),
            f"{row['ratio']:.2f}x",
            row["claim"] or "–",
            f"{number(row['mean_running'])} / {number(row['mean_running_without'])}",
            f"{milliseconds(row['longest_step_s'], 0)} / {milliseconds(row['longest_step_s_without'], 0)}",
        ]
        for row in result["rows"]
    ]
    for entry in result["skipped"]:
        rows.append([entry["name"], "–", "–", "n/a", entry["claim"] or "–", "–", "–"])
    header = ("technique", "with, out tokens/s", "without", "ratio", "seed's claim", "mean running", "longest step ms")
    notes = ["mean running, longest step: with / without"]
    notes += [f"{entry['name']}: {entry['reason']}" for entry in result["skipped"]]
    return Table(
        f"ablation, {result['model_id']}, {result['num_requests']} requests, context {result['context']}",
        header,
        rows,
        "\n".join(notes),
    )


def startup(result: dict[str, Any]) -> Table:
    rows = []
    for name, part in result["parts"].items():
        rows.append([name, number(part["total_s"], 3), number(part["first_run_s"], 3)])
        if len(part["phases_s"]) > 1:
            rows += [[f"    {phase}", number(seconds, 3), ""] for phase, seconds in part["phases_s"].items()]
    return Table(f"start-up, {result['model_id']}", ("", "seconds, median", "first run"), rows)
