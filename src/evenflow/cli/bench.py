"""Measure throughput, latency, serving, start-up; say how far from the physical limit; compare machines."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evenflow.cli.bench_options import ADD_OPTIONS, ALIASES, KINDS
from evenflow.cli.options import given

if TYPE_CHECKING:
    from evenflow.bench.workload import Workload

EXAMPLES = """examples:
  evenflow bench throughput                          # the demo model on this machine
  evenflow bench throughput llama-2-7b --repeats 3   # that shape with random weights
  evenflow bench latency --batch-size 1 8 32 --input-len 32 512
  evenflow bench serving --request-rate 1 2 4 inf    # any OpenAI-compatible server
  evenflow bench paper                               # the seed's tables and figures, on this machine
  evenflow bench compare a.json b.json
  evenflow bench ablation
  evenflow bench startup

`evenflow bench KIND --help` says more. Exit code 0: done; 1: requests failed; 2: bad input."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, (text, examples) in KINDS.items():
        chosen = kinds.add_parser(
            name,
            aliases=ALIASES.get(name, ()),
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        ADD_OPTIONS[name](chosen)
        chosen.set_defaults(run_kind=_RUN[name])


def run(args: argparse.Namespace) -> int:
    run_kind: Callable[[argparse.Namespace], int] = args.run_kind
    return run_kind(args)


def _run_throughput(args: argparse.Namespace) -> int:
    from evenflow.bench import environment, tables
    from evenflow.bench.throughput import bench_throughput

    found = environment.manifest()
    result = bench_throughput(
        args.model,
        lambda context, vocab_size: _workload(args, context, vocab_size, _tokenizer_name(args)),
        given(args, "engine_"),
        repeats=args.repeats,
        gpu=args.gpu,
        baseline=args.baseline,
        temperature=args.temperature,
        is_shown=not args.no_progress,
    )
    tables.throughput(result).print()
    _write(args.output, {**result, "environment": found})
    return 0


def _tokenizer_name(args: argparse.Namespace) -> str:
    return str(given(args, "engine_").get("tokenizer") or args.model)


def _run_latency(args: argparse.Namespace) -> int:
    from evenflow.bench import environment, tables
    from evenflow.bench.latency import bench_latency

    found = environment.manifest()
    result = bench_latency(
        args.model,
        given(args, "engine_"),
        batch_sizes=args.batch_size,
        input_lens=args.input_len,
        output_lens=args.output_len,
        num_warmups=args.warmups,
        repeats=args.repeats,
        gpu=args.gpu,
        is_shown=not args.no_progress,
    )
    tables.latency(result).print()
    _write(args.output, {**result, "environment": found})
    return 0


def _run_serving(args: argparse.Namespace) -> int:
    from evenflow.bench import environment, tables
    from evenflow.bench.metrics import parse_goodput
    from evenflow.bench.serving import ServingOptions, bench_serving

    if args.limit_model and not args.gpu:
        raise ValueError("--limit-model needs --gpu: the limit is that of the server's GPU, which a client cannot see")
    options = ServingOptions(
        base_url=args.base_url,
        model=args.model,
        backend=args.backend,
        api_key=args.api_key,
        request_rates=(args.request_rate[0],) if args.dataset == "trace" else tuple(args.request_rate),
        mode=args.mode,
        burstiness=args.burstiness,
        max_concurrency=args.max_concurrency,
        num_warmups=args.num_warmups,
        temperature=args.temperature,
        ignore_eos=not args.no_ignore_eos,
        uses_text=args.text,
        slo_ms=parse_goodput(args.goodput),
        percentiles=_percentiles(args.metric_percentiles),
        seed=args.workload_seed,
        extra_body=_json_object("--extra-body", args.extra_body),
        has_details=args.save_detailed,
    )
    found = environment.manifest()
    workload = _workload(args, args.context, args.vocab_size, args.tokenizer)
    results = bench_serving(workload, options, is_shown=not args.no_progress)
    if args.limit_model:
        _add_limits(args, workload, results)
    tables.serving(results).print()
    _write_serving(args, results, found)
    num_failed = sum(result["failed"] for result in results)
    if num_failed:
        import sys

        sys.stderr.write(f"evenflow: {num_failed} of {sum(r['num_prompts'] for r in results)} requests failed\n")
    return 1 if num_failed else 0


def _add_limits(args: argparse.Namespace, workload: "Workload", results: list[dict[str, Any]]) -> None:
    from evenflow.bench.roofline import Work, machine_of, report
    from evenflow.plan import read_model_config
    from evenflow.platforms.specs import find_specs

    model = read_model_config(args.limit_model)
    work = Work.of(model, model.dtype if model.dtype != "float32" else "bfloat16")
    lengths = [(request.num_prompt_tokens, request.num_output_tokens) for request in workload.requests]
    for result in results:
        if result["completed"] == result["num_prompts"]:
            result["roofline"] = report(lengths, result["duration"], work, machine_of(find_specs(args.gpu), args.gpus))


def _write_serving(args: argparse.Namespace, results: list[dict[str, Any]], found: dict[str, Any]) -> None:
    if args.result_dir is not None:
        args.result_dir.mkdir(parents=True, exist_ok=True)
        for result in results:
            name = f"{result['backend']}-{result['request_rate']}qps-{result['model_id'].replace('/', '-')}.json"
            _write(args.result_dir / name, {**result, "environment": found})
    first = results[0] if len(results) == 1 else {}
    _write(args.output, {**first, "kind": "serving", "runs": results, "environment": found})


def _run_paper(args: argparse.Namespace) -> int:
    from evenflow.bench import paper, plots, report, seed

    plots.import_matplotlib()
    directory: Path = args.output_dir
    specs, num_devices = paper.this_machine()
    chosen, left_out = paper.choose_models(specs, num_devices)
    if args.record is not None:
        record = paper.load(args.record)
        left_out = {name: "not in this record" for name in seed.MODELS if name not in record["models"]}
    else:
        if args.models:
            chosen = {name: chosen.get(name, 1) for name in args.models}
            left_out = {name: "not asked for" for name in seed.MODELS if name not in chosen}
        directory.mkdir(parents=True, exist_ok=True)
        record = paper.measure(
            chosen,
            given(args, "engine_"),
            num_prompts=args.num_prompts,
            repeats=args.repeats,
            loads=args.loads,
            workload=_sharegpt_maker(args, chosen) if args.dataset_path else None,
            gpu=args.gpu,
            save=lambda partial: _write(directory / "results.json", partial, is_told=False),
            is_shown=not args.no_progress,
        )
    made = paper.make_report(record, left_out)
    for section in made.sections:
        for table in section.tables:
            table.print()
    print("written: " + ", ".join(str(path) for path in report.write(made, directory)))
    failed = sum(run["failed"] for entry in record["models"].values() for run in entry["serving"])
    return 1 if failed else 0


def _sharegpt_maker(args: argparse.Namespace, models: dict[str, int]) -> Callable[[int, int, int], "Workload"]:
    from evenflow.bench.sharegpt import sharegpt

    encode = _encoder(given(args, "engine_").get("tokenizer") or next(iter(models)))
    return lambda count, context, vocab_size: sharegpt(args.dataset_path, encode, count, mode="seed")


def _run_compare(args: argparse.Namespace) -> int:
    from evenflow.bench import report
    from evenflow.bench.compare import compare

    made = compare(args.results)
    for section in made.sections:
        for paragraph in section.paragraphs:
            print(paragraph)
        for table in section.tables:
            table.print()
    if args.output_dir is not None:
        print("written: " + ", ".join(str(path) for path in report.write(made, args.output_dir)))
    return 0


def _run_ablation(args: argparse.Namespace) -> int:
    from evenflow.bench import environment, tables
    from evenflow.bench.ablation import ablation_plot, bench_ablation

    found = environment.manifest()
    result = bench_ablation(
        args.model,
        given(args, "engine_"),
        num_requests=args.num_prompts,
        rounds=args.rounds,
        names=args.only,
        is_shown=not args.no_progress,
    )
    tables.ablation(result).print()
    _write(args.output, {**result, "environment": found})
    if args.plot is not None and result["rows"]:
        args.plot.write_text(ablation_plot(result), encoding="utf-8")
        print(f"written: {args.plot}")
    return 0


def _run_startup(args: argparse.Namespace) -> int:
    from evenflow.bench import environment, tables
    from evenflow.bench.startup import bench_startup

    found = environment.manifest()
    result = bench_startup(args.model, given(args, "engine_"), repeats=args.repeats, is_shown=not args.no_progress)
    tables.startup(result).print()
    _write(args.output, {**result, "environment": found})
    return 0


def _workload(args: argparse.Namespace, context: int, vocab_size: int, tokenizer: str | None) -> "Workload":
    """What the options ask for. Raises ValueError for a missing path or tokenizer."""
    from evenflow.bench import workload
    from evenflow.bench.sharegpt import sharegpt

    count, seed = args.num_prompts, args.workload_seed
    if args.dataset in ("sharegpt", "trace") and not args.dataset_path:
        raise ValueError(f"--dataset {args.dataset} needs --dataset-path; without the file, use --dataset builtin")
    if args.dataset == "sharegpt":
        if tokenizer is None:
            raise ValueError("--dataset sharegpt needs --tokenizer: its filter counts tokens")
        return sharegpt(args.dataset_path, _encoder(tokenizer), count, mode=args.mode, seed=seed)
    if args.dataset == "trace":
        return workload.trace(args.dataset_path, count=count, vocab_size=vocab_size, seed=seed)
    if args.dataset == "random":
        return workload.random_lengths(
            count,
            input_len=args.random_input_len,
            output_len=args.random_output_len,
            range_ratio=args.random_range_ratio,
            vocab_size=vocab_size,
            seed=seed,
        )
    if args.dataset == "prefix":
        return workload.shared_prefixes(
            count,
            num_prefixes=args.num_prefixes,
            prefix_len=args.prefix_len,
            suffix_len=args.suffix_len,
            output_len=args.prefix_output_len,
            vocab_size=vocab_size,
            seed=seed,
        )
    return workload.builtin(count, context=context, vocab_size=vocab_size, seed=seed)


def _encoder(tokenizer: str) -> Callable[..., list[list[int]]]:
    from evenflow.model_files import find_model
    from evenflow.plan import known_models
    from evenflow.tokenizer import Tokenizer

    if tokenizer.lower() in known_models():
        raise ValueError(f"{tokenizer} is a shape and has no tokenizer, which ShareGPT needs: --tokenizer DIR")
    return Tokenizer.from_dir(find_model(tokenizer, with_weights=False)).encode_batch


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--metric-percentiles {text!r} must be numbers with commas between, e.g. 50,99") from None


def _json_object(name: str, text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text) if text else {}
    except ValueError as error:
        raise ValueError(f"{name} {text!r} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} {text!r} must be a JSON object")
    return value


def _write(path: Path | None, record: dict[str, Any], *, is_told: bool = True) -> None:
    if path is None:
        return
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if is_told:
        print(f"written: {path}")


_RUN: dict[str, Callable[[argparse.Namespace], int]] = {
    "throughput": _run_throughput,
    "latency": _run_latency,
    "serving": _run_serving,
    "paper": _run_paper,
    "compare": _run_compare,
    "ablation": _run_ablation,
    "startup": _run_startup,
}
