"""The seed's tables 1, 3 and 4 and figures 1 to 5, measured on this machine, beside the seed's and the limits.

Owns what is run and what the report says. The seed's table 2, and the points of its curves, are in no source that we
have: they are left out, and the report says so. Figure numbers are known for figure 4 only (13B, latency over rate).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evenflow.bench import engines, environment, plots, seed, tables
from evenflow.bench.plots import Series
from evenflow.bench.report import Plot, Report, Section
from evenflow.bench.roofline import Machine, Work, alone_s
from evenflow.bench.server_process import ServerProcess
from evenflow.bench.serving import ServingOptions, bench_serving
from evenflow.bench.tables import Table, number, percent, plus_minus
from evenflow.bench.throughput import bench_throughput
from evenflow.bench.workload import Workload, builtin
from evenflow.plan import make_plan, read_model_config
from evenflow.platforms import inventory
from evenflow.platforms.specs import Specs, all_specs, match_device

CPU_PROMPTS, GPU_PROMPTS = 64, seed.NUM_REQUESTS
SERVING_PROMPTS = {True: 64, False: 400}
LATENCY_FIGURES = {"llama-2-7b": 3, "llama-2-13b": 4, "llama-2-70b": 5}


def choose_models(specs: Specs | None, num_devices: int) -> tuple[dict[str, int], dict[str, str]]:
    """(model -> GPUs to use, model -> why it is left out). Without a GPU: the demo model.

    Each model takes the fewest GPUs that hold it and that the engine can use together.
    """
    if specs is None:
        return {"demo": 1}, dict.fromkeys(seed.MODELS, "this machine has no GPU that platforms/specs.toml lists")
    counts = [n for n in (1, 2, 4, 8) if n <= num_devices]
    chosen, left_out = {}, {}
    for name in seed.MODELS:
        plans = [make_plan(name, read_model_config(name), specs, n, max_model_len=2048) for n in counts]
        fitting = [plan.num_gpus for plan in plans if plan.fits]
        if fitting:
            chosen[name] = fitting[0]
        else:
            left_out[name] = f"on {counts[-1]} x {specs.key}: {plans[-1].reason}"
    return chosen, left_out


def measure(
    models: dict[str, int],
    options: dict[str, Any],
    *,
    loads: Sequence[float],
    num_prompts: int | None = None,
    repeats: int = 3,
    workload: Any = None,
    gpu: str | None = None,
    save: Any = None,
    is_shown: bool = True,
) -> dict[str, Any]:
    """Run everything. workload: (count, context, vocabulary size) -> Workload, else the built-in sample.

    loads: request rates of figures 3 to 5, in parts of the measured throughput; none: nothing is served.
    save: called with what is there after every part, so that an interrupted run is not lost.
    """
    record: dict[str, Any] = {"kind": "paper", "environment": environment.manifest(), "models": {}}
    make = workload or (lambda count, context, vocab: builtin(count, context=context, vocab_size=vocab))
    for model, num_devices in models.items():
        chosen = dict(options)
        if num_devices > 1:
            chosen["tensor_parallel_size"] = num_devices
        is_cpu = engines.resolved(model, chosen)[1].device == "cpu"
        count = num_prompts or (CPU_PROMPTS if is_cpu else GPU_PROMPTS)
        context_options = {"max_model_len": 2048, **chosen} if not is_cpu else chosen

        def sized(context: int, vocab: int, count: int = count) -> Workload:
            return make(count, context, vocab)

        offline = bench_throughput(model, sized, context_options, repeats=repeats, gpu=gpu, is_shown=is_shown)
        entry: dict[str, Any] = {"num_devices": num_devices, "throughput": offline, "serving": []}
        record["models"][model] = entry
        if save:
            save(record)
        engines.release_memory()
        if loads:
            served = min(count, num_prompts or SERVING_PROMPTS[is_cpu])
            entry["serving"] = _serve(model, context_options, offline, sized, served, loads, is_shown)
        if save:
            save(record)
    return record


def _serve(
    model: str,
    options: dict[str, Any],
    offline: dict[str, Any],
    sized: Any,
    count: int,
    loads: Sequence[float],
    is_shown: bool,
) -> list[dict[str, Any]]:
    """Normalized latency over request rates around what the engine can do offline."""
    settings = offline["engine"]["settings"]
    model_config = engines.resolved(model, options)[0]
    workload = sized(settings["max_model_len"], model_config.vocab_size, count)
    rates = tuple(float(f"{load * offline['requests_per_second']:.3g}") for load in loads)
    serving = {"enable_prefix_caching": False, **options}
    with ServerProcess(engines.engine_options(model, serving)) as server:
        asked = ServingOptions(base_url=server.url, request_rates=rates, mode="seed")
        results = bench_serving(workload, asked, is_shown=is_shown)
    if "roofline" in offline:
        alone = _alone_normalized_s(workload, model_config, settings, offline["roofline"]["machine"])
        for result in results:
            result["normalized_latency_limit_s"] = alone
    return results


def _alone_normalized_s(
    workload: Workload, model_config: Any, settings: dict[str, Any], machine: dict[str, Any]
) -> float:
    """The mean normalized latency if every request had the machine to itself and met its limit."""
    work = Work.of(model_config, settings["dtype"], settings["kv_cache_dtype"])
    found = [
        alone_s(r.num_prompt_tokens, r.num_output_tokens, work, Machine(**machine))
        / (r.num_prompt_tokens + r.num_output_tokens)
        for r in workload.requests[:100]
    ]
    return sum(found) / len(found)


def this_machine() -> tuple[Specs | None, int]:
    """(the GPU of this machine by specs.toml, how many)."""
    names = [str(entry.get("name", "")) for entry in inventory.gpus()]
    return (match_device(names[0]), len(names)) if names else (None, 0)


def make_report(record: dict[str, Any], left_out: dict[str, str]) -> Report:
    """The report of a record; needs no machine, so an old record can be reported again."""
    name = environment.machine_name(record["environment"])
    models = record["models"]
    has_random = any(entry["throughput"]["engine"]["has_random_weights"] for entry in models.values())
    summary = (
        f"Measured on {name}, {record['environment']['date']}. tokens/s counts prompt and output tokens, as the seed "
        "did (EmbeddedLLM's port of vLLM v0.1.4 to ROCm, October 2023). A result is told as tokens/s and as the "
        "fraction of the physical limit of the same work on its own machine."
    )
    sections = [
        _conditions(record, has_random, left_out),
        Section("Table 1: the machines", tables=[table_1(record)]),
        _throughput_section(models, name),
        _latency_section(models),
        _parity_section(models, name),
    ]
    return Report("Evenflow beside the seed's tables and figures", summary, sections)


def _conditions(record: dict[str, Any], has_random: bool, left_out: dict[str, str]) -> Section:
    found = record["environment"]
    workloads = sorted({entry["throughput"]["workload"]["note"] for entry in record["models"].values()})
    paragraphs = [f"Workload: {'; '.join(workloads)}. temperature 1, ends of sequence ignored."]
    if has_random:
        paragraphs.append("Models of named shapes have random weights: the work is the same, the text means nothing.")
    paragraphs += [f"Not run: {model}: {reason}." for model, reason in left_out.items()]
    paragraphs.append(
        "Not here: the seed's table 2 and the points of its latency curves, which no source at hand gives as numbers. "
        "Their figures' numbers other than 4 are our reading."
    )
    rows = [
        ["date", found["date"]],
        ["command", found["command"]],
        ["commit", str(found["commit"] or "installed package")],
        ["system", f"{found['system']}, Python {found['python']}"],
        ["versions", ", ".join(f"{package} {version}" for package, version in found["versions"].items())],
        ["CPU", ", ".join(f"{key} {value}" for key, value in found["cpu"].items())],
    ]
    for index, gpu in enumerate(found["gpus"]):
        rows.append([f"GPU {index}", ", ".join(f"{key} {value}" for key, value in gpu.items())])
    return Section("Conditions", paragraphs, [Table("environment", ("", "as found"), rows, is_text=True)])


def table_1(record: dict[str, Any]) -> Table:
    rows = []
    for gpu, (tflops, memory, bandwidth, link, watts, price) in seed.TABLE_1.items():
        link_text = "none" if link is None else str(link)
        rows.append([f"{gpu} (seed)", f"{tflops:g}", str(memory), f"{bandwidth:g}", link_text, str(watts), price])
    for machine in _machines(record):
        devices = machine["num_devices"]
        row = [
            f"{machine['name']} (this machine)",
            number(machine["flops"] / 1e12, 2),
            number(machine["memory_bytes"] / 1e9, 0),
            number(machine["bandwidth_bytes_per_s"] / 1e9),
        ]
        sheet = all_specs().get(machine["name"].split(" x ")[-1])
        rows.append([*row, *_link_and_watts(sheet, devices), "–"])
    note = (
        "TFLOP/s: dense, 16-bit; of a CPU in the type that ran, measured, as its GB/s. "
        "This machine: all devices together; its price is not known here."
    )
    return Table("Table 1", ("", "TFLOP/s", "memory GB", "GB/s", "link GB/s", "W", "price"), rows, note)


def _link_and_watts(sheet: Specs | None, num_devices: int) -> list[str]:
    if sheet is None:
        return ["–", "–"]
    link = number(sheet.link_bytes_per_s / 1e9, 0) if sheet.link_bytes_per_s else "none"
    return [link, str(sheet.watts * num_devices)]


def _machines(record: dict[str, Any]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for entry in record["models"].values():
        if limit := entry["throughput"].get("roofline"):
            found[limit["machine"]["name"]] = limit["machine"]
    return list(found.values())


def _throughput_section(models: dict[str, Any], name: str) -> Section:
    names = [*seed.MODELS, *(model for model in models if model not in seed.MODELS)]
    cells = {key: seed.cell(*key) for key in seed.CELLS}
    section = Section("Tables 3 and 4, figures 1 and 2: throughput")
    for title, key, unit in (("Table 3: tokens/s", 0, "tokens/s"), ("Table 4: requests/min", 1, "requests/min")):
        rows = []
        for model in names:
            row = [f"{model}, {_devices(model, models)}"]
            for gpu in seed.GPUS:
                cell = cells.get((model, gpu))
                row.append("–" if cell is None else _told(seed.CELLS[model, gpu][key], cell.fraction))
            row.append(_own_cell(models.get(model), key))
            rows.append(row)
        note = "in brackets: fraction of the ideal limit of the same work on the same GPUs" if not key else ""
        section.tables.append(Table(title, ("", *(f"{gpu} (seed)" for gpu in seed.GPUS), name), rows, note))
        section.plots.append(
            _bars(f"Figure {key + 1}: throughput, {unit}", f"figure-{key + 1}", names, models, name, key)
        )
    section.plots.append(_fraction_bars(names, cells, models, name))
    return section


def _devices(model: str, models: dict[str, Any]) -> str:
    theirs, ours = seed.MODELS.get(model), models.get(model, {}).get("num_devices")
    if theirs is None or ours is None or ours == theirs:
        return f"{theirs or ours} GPU" if theirs else "1 machine"
    return f"{theirs} GPU (here {ours})"


def _told(value: float, fraction: float) -> str:
    return f"{number(value)} ({percent(fraction)})"


def _own_cell(entry: dict[str, Any] | None, key: int) -> str:
    if entry is None:
        return "not run"
    result = entry["throughput"]
    if key:
        return number(result["requests_per_minute"])
    fraction = result.get("roofline", {}).get("fraction_of_ideal")
    text = plus_minus(result["tokens_per_second"], result["tokens_per_second_ci95"])
    return text + (f" ({percent(fraction)})" if fraction is not None else " (no limit known)")


def _bars(title: str, name: str, names: Sequence[str], models: dict[str, Any], machine: str, key: int) -> Plot:
    series = [
        Series(f"{gpu} (seed)", [seed.CELLS.get((model, gpu), (None, None))[key] for model in names])
        for gpu in seed.GPUS
    ]
    field = ("tokens_per_second", "requests_per_minute")[key]
    own = [models[model]["throughput"][field] if model in models else None for model in names]
    errors = [
        models[model]["throughput"]["tokens_per_second_ci95"] if model in models and not key else None
        for model in names
    ]
    series.append(Series(machine, own, errors=errors))
    unit = ("tokens/s, prompt + output", "requests/min")[key]
    figure = plots.bars(title, list(names), series, unit)
    return Plot(name, plots.svg(figure), f"{title}. Bars by model; the seed's three GPUs and {machine}.")


def _fraction_bars(
    names: Sequence[str], cells: dict[tuple[str, str], seed.Cell], models: dict[str, Any], machine: str
) -> Plot:
    series = [
        Series(f"{gpu} (seed)", [cells[model, gpu].fraction if (model, gpu) in cells else None for model in names])
        for gpu in seed.GPUS
    ]
    own = [models[m]["throughput"].get("roofline", {}).get("fraction_of_ideal") if m in models else None for m in names]
    series.append(Series(machine, own))
    title = "Figures 1 and 2 as fractions of each machine's own limit"
    figure = plots.bars(title, list(names), series, "fraction of the ideal limit", percent=True)
    return Plot("figure-1-fractions", plots.svg(figure), f"{title}: 100% is the physical limit of the same work.")


def _latency_section(models: dict[str, Any]) -> Section:
    section = Section(
        "Figures 3 to 5: normalized latency over request rate",
        ["Normalized latency: mean over requests of latency / (prompt + output tokens); Poisson arrivals, first at 0."],
    )
    for model, entry in models.items():
        if not entry["serving"]:
            section.paragraphs.append(f"{model}: not served in this run.")
            continue
        figure = LATENCY_FIGURES.get(model)
        title = (f"Figure {figure}: " if figure else "") + f"{model}, normalized latency"
        section.tables.append(tables.serving(entry["serving"]))
        section.plots.append(latency_plot(title, f"latency-{model.replace('/', '-')}", {model: entry["serving"]}))
    if absent := [f"{number} ({model})" for model, number in LATENCY_FIGURES.items() if model not in models]:
        section.paragraphs.append(f"Figures not run here: {', '.join(absent)}.")
    return section


def latency_plot(title: str, name: str, curves: dict[str, list[dict[str, Any]]]) -> Plot:
    series = []
    for label, results in curves.items():
        points = [r for r in results if r["request_rate"] != "inf"]
        rates = [float(r["request_rate"]) for r in points]
        latencies = [r["normalized_latency_s"] for r in points]
        series.append(Series(label, [None if v is None else 1e3 * v for v in latencies], rates))
        limits = [r.get("normalized_latency_limit_s") for r in points]
        if any(limits):
            values = [None if v is None else 1e3 * v for v in limits]
            series.append(Series(f"limit, {label} alone", values, rates, is_limit=True))
    figure = plots.lines(title, series, "requests/s", "normalized latency, ms per token", log_y=True)
    caption = f"{title}, logarithmic. Dashed: if every request had the machine to itself and met its physical limit."
    return Plot(name, plots.svg(figure), caption)


def _parity_section(models: dict[str, Any], name: str) -> Section:
    rows = []
    for model in seed.MODELS:
        cells = {gpu: seed.cell(model, gpu) for gpu in seed.GPUS}
        base = cells["A100"]
        for gpu in ("L40", "MI210"):
            one = cells[gpu]
            ratio, fractions = one.tokens_per_s / base.tokens_per_s, one.fraction / base.fraction
            rows.append([f"{model}: {gpu} over A100 (seed)", f"{ratio:.2f}", f"{fractions:.2f}"])
        own = models.get(model)
        if own is not None and "roofline" in own["throughput"]:
            result = own["throughput"]
            fraction = result["roofline"]["fraction_of_ideal"]
            for gpu, one in cells.items():
                ratios = result["tokens_per_second"] / one.tokens_per_s, fraction / one.fraction
                rows.append([f"{model}: {name} over {gpu} (seed)", *(f"{ratio:.2f}" for ratio in ratios)])
    note = "1.00 in the last column: both machines come equally near to what they can do."
    return Section("Parity", tables=[Table("Parity", ("", "tokens/s", "fraction of own limit"), rows, note)])


def load(path: Path) -> dict[str, Any]:
    """A record that `bench paper` wrote. Raises ValueError."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(record, dict) or record.get("kind") != "paper":
        raise ValueError(f"{path} is no record of `evenflow bench paper`")
    return record
