"""Measure throughput, latency, serving, start-up; say how far from the physical limit; compare machines."""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evenflow.cli.options import add_engine_options, given

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

KINDS: dict[str, tuple[str, str]] = {
    "throughput": (
        "tokens/s of requests that all wait at the start, beside the limit of the same work",
        """examples:
  evenflow bench throughput
  evenflow bench throughput --num-prompts 64 --repeats 3 --baseline transformers
  evenflow bench throughput llama-2-7b --dataset sharegpt --dataset-path sharegpt.json --mode seed --tokenizer ./llama
  evenflow bench throughput llama-2-13b --tensor-parallel-size 2 --output 13b.json""",
    ),
    "latency": (
        "time to first token and time per step, over batch sizes and lengths",
        """examples:
  evenflow bench latency
  evenflow bench latency llama-3.1-8b --batch-size 1 16 64 --input-len 128 2048 --output-len 128""",
    ),
    "serving": (
        "load on an OpenAI-compatible server: request rates, TTFT, TPOT, ITL, goodput",
        """examples:
  evenflow bench serving --request-rate 1 2 4 inf --num-prompts 200
  evenflow bench serving --base-url http://gpu7:8000 --max-concurrency 64 --goodput ttft:500 tpot:50
  evenflow bench serving --backend openai-chat --dataset trace --dataset-path burst.csv
  evenflow bench serving --limit-model llama-2-7b --gpu a100 --output serving.json""",
    ),
    "paper": (
        "the seed's tables 1, 3, 4 and figures 1 to 5 on this machine, as a page",
        """examples:
  evenflow bench paper
  evenflow bench paper --models llama-2-7b --num-prompts 1000 --repeats 3 --output-dir h100
  evenflow bench paper --num-prompts 16 --loads 0.5 1     # a quick look""",
    ),
    "compare": (
        "results of several machines: ratios of tokens/s and of fractions, curves in one picture",
        """examples:
  evenflow bench compare mi300x/results.json h100/results.json --output-dir parity""",
    ),
    "ablation": (
        "what each technique is worth here: each is switched off alone",
        """examples:
  evenflow bench ablation
  evenflow bench ablation llama-2-7b --num-prompts 500 --only 'continuous batching' graphs""",
    ),
    "startup": (
        "from process start until it answers, by phase",
        """examples:
  evenflow bench startup
  evenflow bench startup llama-3.1-8b --repeats 5""",
    ),
}
LOADS = (0.25, 0.5, 0.75, 1.0, 1.25)
DATASETS = ("builtin", "sharegpt", "random", "prefix", "trace")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, (text, examples) in KINDS.items():
        chosen = kinds.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        _ADD[name](chosen)
        chosen.set_defaults(run_kind=_RUN[name])


def run(args: argparse.Namespace) -> int:
    run_kind: Callable[[argparse.Namespace], int] = args.run_kind
    return run_kind(args)


def _add_engine(parser: argparse.ArgumentParser) -> None:
    from evenflow.config import EngineConfig

    parser.add_argument(
        "model", nargs="?", default="demo", metavar="MODEL", help="directory, Hugging Face name, or a shape of `plan`"
    )
    parser.add_argument("--gpu", metavar="NAME", help="whose limits count, of platforms/specs.toml (default: found)")
    add_engine_options(parser, leave_out=("model",), has_explain=False)
    if "tensor_parallel_size" not in {field.name for field in dataclasses.fields(EngineConfig)}:
        parser.add_argument(
            "--tensor-parallel-size",
            dest="engine_tensor_parallel_size",
            type=int,
            metavar="N",
            default=argparse.SUPPRESS,
            help="GPUs to split the model over",
        )


def _add_workload(parser: argparse.ArgumentParser, *, count: int, has_tokenizer: bool) -> None:
    group = parser.add_argument_group("workload")
    group.add_argument("--dataset", choices=DATASETS, default="builtin", help="what is asked (%(default)s)")
    group.add_argument("--dataset-path", metavar="FILE", help="ShareGPT's JSON, or a trace's CSV")
    group.add_argument("--num-prompts", type=int, default=count, metavar="N", help="requests (%(default)s)")
    group.add_argument(
        "--mode",
        choices=("seed", "current"),
        default="current",
        help="rules of vLLM v0.1.4 or of today, for ShareGPT and arrivals (%(default)s)",
    )
    group.add_argument("--random-input-len", type=int, default=1024, metavar="N", help="of random (%(default)s)")
    group.add_argument("--random-output-len", type=int, default=128, metavar="N", help="of random (%(default)s)")
    group.add_argument(
        "--random-range-ratio", type=float, default=0.0, metavar="X", help="spread of both (%(default)s)"
    )
    group.add_argument("--num-prefixes", type=int, default=8, metavar="N", help="of prefix (%(default)s)")
    group.add_argument("--prefix-len", type=int, default=512, metavar="N", help="of prefix (%(default)s)")
    group.add_argument("--suffix-len", type=int, default=64, metavar="N", help="of prefix (%(default)s)")
    group.add_argument("--prefix-output-len", type=int, default=64, metavar="N", help="of prefix (%(default)s)")
    group.add_argument("--workload-seed", type=int, default=0, metavar="N", help="draws the same again (%(default)s)")
    if has_tokenizer:
        group.add_argument("--tokenizer", metavar="DIR", help="counts ShareGPT's tokens: directory or model name")
        group.add_argument(
            "--context", type=int, default=2048, metavar="N", help="longest request of builtin (%(default)s)"
        )
        group.add_argument("--vocab-size", type=int, default=3000, metavar="N", help="ids below are used (%(default)s)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help="write everything as JSON, with the environment")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars on standard error")


def _add_throughput(parser: argparse.ArgumentParser) -> None:
    _add_engine(parser)
    _add_workload(parser, count=128, has_tokenizer=False)
    parser.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="runs; from 2 on with an interval (%(default)s)"
    )
    parser.add_argument("--baseline", choices=("transformers",), help="run this too, on the same requests")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="(%(default)s)")
    _add_output(parser)


def _add_latency(parser: argparse.ArgumentParser) -> None:
    _add_engine(parser)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8], metavar="N", help="(8)")
    parser.add_argument("--input-len", type=int, nargs="+", default=[32], metavar="N", help="prompt tokens (32)")
    parser.add_argument("--output-len", type=int, nargs="+", default=[128], metavar="N", help="output tokens (128)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="the median is told (%(default)s)")
    parser.add_argument("--warmups", type=int, default=1, metavar="N", help="runs before (%(default)s)")
    _add_output(parser)


def _add_serving(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="the server (%(default)s)")
    parser.add_argument("--model", metavar="NAME", help="as the server calls it (default: its first)")
    parser.add_argument("--backend", choices=("openai", "openai-chat"), default="openai", help="endpoint (%(default)s)")
    parser.add_argument("--api-key", metavar="KEY", help="sent as bearer token")
    parser.add_argument(
        "--request-rate", type=float, nargs="+", default=[math.inf], metavar="R", help="requests/s, a run each (inf)"
    )
    parser.add_argument(
        "--burstiness", type=float, default=1.0, metavar="X", help="1: Poisson; below: bursts (%(default)s)"
    )
    parser.add_argument("--max-concurrency", type=int, metavar="N", help="most requests at a time")
    parser.add_argument("--goodput", nargs="+", default=[], metavar="NAME:MS", help="limits on ttft, tpot, e2el")
    parser.add_argument(
        "--metric-percentiles", default="50,90,99", metavar="P,P", help="of every latency (%(default)s)"
    )
    parser.add_argument("--num-warmups", type=int, default=1, metavar="N", help="requests before (%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="(%(default)s)")
    parser.add_argument("--no-ignore-eos", action="store_true", help="let the model end by itself")
    parser.add_argument("--text", action="store_true", help="send words instead of token ids")
    parser.add_argument("--extra-body", metavar="JSON", help="more fields for every request")
    parser.add_argument("--save-detailed", action="store_true", help="every request's numbers in the JSON")
    parser.add_argument(
        "--result-dir", type=Path, metavar="DIR", help="one JSON per rate, as `vllm bench serve` writes"
    )
    parser.add_argument("--limit-model", metavar="MODEL", help="config of the served model, for its physical limit")
    parser.add_argument("--gpu", metavar="NAME", help="the server's GPU, for the limit, e.g. h100")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="how many of them (%(default)s)")
    _add_workload(parser, count=100, has_tokenizer=True)
    _add_output(parser)


def _add_paper(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", nargs="+", metavar="MODEL", help="default: the seed's that fit; without a GPU, demo"
    )
    parser.add_argument("--num-prompts", type=int, metavar="N", help="default: 1000 on a GPU, 64 on a CPU")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of throughput (%(default)s)")
    parser.add_argument(
        "--loads",
        type=float,
        nargs="*",
        default=list(LOADS),
        metavar="X",
        help=f"request rates of figures 3 to 5, in parts of the throughput; none: do not serve ({_spaced(LOADS)})",
    )
    parser.add_argument("--dataset-path", metavar="FILE", help="ShareGPT's JSON, read by the seed's rules")
    parser.add_argument("--output-dir", type=Path, default=Path("paper"), metavar="DIR", help="(%(default)s)")
    parser.add_argument(
        "--from", type=Path, dest="record", metavar="FILE", help="only report on results.json of an earlier run"
    )
    parser.add_argument("--gpu", metavar="NAME", help="whose limits count, of platforms/specs.toml (default: found)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars on standard error")
    add_engine_options(parser, leave_out=("model",), has_explain=False)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE", help="JSON of paper, throughput or serving")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="write the report there, with the picture")


def _add_ablation(parser: argparse.ArgumentParser) -> None:
    _add_engine(parser)
    parser.add_argument("--num-prompts", type=int, default=128, metavar="N", help="requests (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these techniques")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the bar chart as SVG")
    _add_output(parser)


def _add_startup(parser: argparse.ArgumentParser) -> None:
    _add_engine(parser)
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="after one that is reported apart (%(default)s)"
    )
    _add_output(parser)


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


def _spaced(values: Iterable[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


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


_ADD: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "throughput": _add_throughput,
    "latency": _add_latency,
    "serving": _add_serving,
    "paper": _add_paper,
    "compare": _add_compare,
    "ablation": _add_ablation,
    "startup": _add_startup,
}
_RUN: dict[str, Callable[[argparse.Namespace], int]] = {
    "throughput": _run_throughput,
    "latency": _run_latency,
    "serving": _run_serving,
    "paper": _run_paper,
    "compare": _run_compare,
    "ablation": _run_ablation,
    "startup": _run_startup,
}
