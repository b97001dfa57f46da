"""What `evenflow bench` can be told: its kinds, their texts and options. What they do is in bench.py."""

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from evenflow.cli.options import add_engine_options

if TYPE_CHECKING:
    pass


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


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default="demo", metavar="MODEL", help="directory, Hugging Face name, or a shape of `plan`"
    )
    parser.add_argument("--gpu", metavar="NAME", help="whose limits count, of platforms/specs.toml (default: found)")
    add_engine_options(parser, leave_out=("model",), has_explain=False)


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


def _spaced(values: Iterable[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


ADD_OPTIONS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "throughput": _add_throughput,
    "latency": _add_latency,
    "serving": _add_serving,
    "paper": _add_paper,
    "compare": _add_compare,
    "ablation": _add_ablation,
    "startup": _add_startup,
}
ALIASES = {"serving": ("serve",)}  # vLLM's name
