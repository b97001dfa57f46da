"""Results of several machines beside each other: ratios of tokens/s, ratios of fractions, serving curves in one
picture.

Reads what `bench paper`, `bench throughput` and `bench serving` write. The first file is what the others are held to.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evenflow.bench import environment
from evenflow.bench.paper import latency_plot
from evenflow.bench.report import Report, Section
from evenflow.bench.tables import Table, number, percent


@dataclass(slots=True)
class Machine:
    """One file. throughput, serving: results by model."""

    name: str
    throughput: dict[str, dict[str, Any]] = field(default_factory=dict)
    serving: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def read(path: Path) -> Machine:
    """Raises ValueError that names the file, for anything but a result of ours."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a result: {error}") from None
    if not isinstance(data, dict) or "environment" not in data:
        raise ValueError(f"{path} is no result of `evenflow bench` (it has no 'environment')")
    machine = Machine(environment.machine_name(data["environment"]))
    kind = data.get("kind")
    if kind == "paper":
        for model, entry in data["models"].items():
            machine.throughput[model] = entry["throughput"]
            machine.serving[model] = entry["serving"]
    elif kind == "throughput":
        machine.throughput[data["model_id"]] = data
    elif kind == "serving":
        machine.serving[data["runs"][0]["model_id"]] = data["runs"]
    else:
        raise ValueError(f"{path} is of kind {kind!r}; compare takes results of paper, throughput and serving")
    return machine


def compare(paths: Sequence[Path]) -> Report:
    """Raises ValueError for fewer than two files, or files that have no model in common."""
    if len(paths) < 2:
        raise ValueError(f"compare needs at least two results, not {len(paths)}")
    machines = _distinct([read(path) for path in paths])
    shared = [m for m in machines[0].throughput if all(m in other.throughput for other in machines[1:])]
    served = [m for m in machines[0].serving if all(other.serving.get(m) for other in machines)]
    if not shared and not served:
        names = "; ".join(f"{one.name}: {', '.join(one.throughput or one.serving)}" for one in machines)
        raise ValueError(f"the results have no model in common ({names})")
    sections = []
    if shared:
        tables = [throughput_table(model, machines) for model in shared]
        sections.append(Section("Throughput", _differences(shared, machines), tables))
    for model in served:
        curves = {machine.name: machine.serving[model] for machine in machines}
        plot = latency_plot(f"{model}, normalized latency", f"compare-{model.replace('/', '-')}", curves)
        sections.append(Section(f"Serving {model}", tables=[serving_table(model, machines)], plots=[plot]))
    summary = (
        f"Every machine beside {machines[0].name}. Parity is a ratio of fractions of 1: equally near to its own limit."
    )
    return Report("Parity of machines", summary, sections)


def _distinct(machines: list[Machine]) -> list[Machine]:
    names = [machine.name for machine in machines]
    for index, machine in enumerate(machines):
        if names.count(machine.name) > 1:
            machine.name = f"{machine.name} [{index + 1}]"
    return machines


def throughput_table(model: str, machines: Sequence[Machine]) -> Table:
    rows = []
    base = machines[0].throughput[model]
    base_fraction = base.get("roofline", {}).get("fraction_of_ideal")
    for machine in machines:
        result = machine.throughput[model]
        fraction = result.get("roofline", {}).get("fraction_of_ideal")
        ratio = fraction / base_fraction if fraction and base_fraction else None
        rows.append(
            [
                machine.name,
                number(result["tokens_per_second"]),
                f"{result['tokens_per_second'] / base['tokens_per_second']:.2f}",
                percent(fraction),
                number(ratio, 2),
                result.get("roofline", {}).get("binding", "–"),
            ]
        )
    return Table(model, ("", "tokens/s in + out", "ratio", "of own limit", "ratio of fractions", "bound by"), rows)


def serving_table(model: str, machines: Sequence[Machine]) -> Table:
    rows = [
        [
            f"{machine.name}, {result['request_rate']} requests/s",
            number(result["total_token_throughput"]),
            number(result["mean_ttft_ms"]),
            number(result["mean_tpot_ms"]),
            number(None if result["normalized_latency_s"] is None else 1e3 * result["normalized_latency_s"], 2),
        ]
        for machine in machines
        for result in machine.serving[model]
    ]
    return Table(f"serving {model}", ("", "tokens/s in + out", "TTFT ms", "TPOT ms", "normalized ms"), rows)


def _differences(models: Sequence[str], machines: Sequence[Machine]) -> list[str]:
    """What keeps results from being the same work."""
    found = []
    for model in models:
        for key, label in (("total_num_tokens", "tokens"), ("num_requests", "requests")):
            values = [machine.throughput[model][key] for machine in machines]
            if len(set(values)) > 1:
                counts = ", ".join(f"{m.name} {v:,}" for m, v in zip(machines, values, strict=True))
                found.append(f"Not the same work for {model}: {label} differ ({counts}).")
        dtypes = {machine.throughput[model]["engine"]["settings"]["dtype"] for machine in machines}
        if len(dtypes) > 1:
            found.append(f"Types of {model} differ: {', '.join(sorted(dtypes))}; each limit is that of its own type.")
    return found
