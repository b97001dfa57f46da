"""Say what a model needs on a GPU: does it fit, how many requests at a time, how fast at most. Needs no GPU."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evenflow.plan import Plan

EXAMPLES = """examples:
  evenflow plan llama-2-7b --gpu mi210
  evenflow plan llama-2-70b --gpu a100 --gpus 4
  evenflow plan ./my-model --gpu h100 --max-model-len 8192 --kv-cache-dtype fp8
  evenflow plan qwen3-8b                  # on every GPU that is known
  evenflow plan demo --gpu l4 --json

Exit code 0: it fits; 3: it does not; 2: bad input."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from evenflow.config import DTYPES, KV_CACHE_DTYPES

    parser.add_argument("model", metavar="MODEL", help="a known name, a directory, 'demo', or a Hugging Face name")
    parser.add_argument("--gpu", metavar="NAME", help="of platforms/specs.toml, e.g. mi210, a100, h100 (default: all)")
    parser.add_argument("--gpus", type=int, choices=(1, 2, 4, 8), help="only this number of them")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="context (default: the model's)")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="of the weights")
    parser.add_argument("--kv-cache-dtype", default="auto", choices=KV_CACHE_DTYPES, help="of keys and values")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hugging Face model")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from evenflow.config import can_be_split
    from evenflow.plan import GPU_COUNTS, make_plan, read_model_config
    from evenflow.platforms.specs import all_specs, find_specs

    if args.max_model_len is not None and args.max_model_len < 1:
        raise ValueError(f"--max-model-len {args.max_model_len} must be at least 1")
    gpus = [find_specs(args.gpu)] if args.gpu is not None else list(all_specs().values())
    model = read_model_config(args.model, args.revision)
    counts = (args.gpus,) if args.gpus else tuple(n for n in GPU_COUNTS if can_be_split(model, n))
    plans = [
        make_plan(
            args.model,
            model,
            specs,
            count,
            dtype=args.dtype,
            kv_cache_dtype=args.kv_cache_dtype,
            max_model_len=args.max_model_len,
        )
        for specs in gpus
        for count in counts
    ]
    if args.json:
        print(json.dumps([plan.as_dict() for plan in plans], indent=1))
    else:
        _print(plans)
    return 0 if any(plan.fits for plan in plans) else 3


def _limits(plan: "Plan") -> tuple[float, float, float]:
    return plan.limit_one_request, plan.limit_ideal, plan.limit_no_overlap


def _print(plans: "list[Plan]") -> None:
    from rich.console import Console
    from rich.table import Table

    from evenflow.plan import COLLECTIVE_S, MEAN_REQUEST_TOKENS

    console = Console(width=None if sys.stdout.isatty() else 140)
    first, cache_dtypes = plans[0], " or ".join(sorted({plan.kv_cache_dtype for plan in plans}))
    console.print(
        f"{first.model}: {first.num_parameters / 1e9:.2f} G parameters in {first.dtype}, "
        f"{first.kv_bytes_per_token:,} KV bytes per token in {cache_dtypes}, context {first.max_model_len:,}",
        highlight=False,
    )
    table = Table(box=None, header_style="bold")
    for name in ("GPU", "fits", "weights", "KV cache", "tokens", "full-length", "requests"):
        table.add_column(name, justify="left" if name == "GPU" else "right")
    for name in ("tokens/s, 1 request", "all, ideal", "no overlap", "links"):
        table.add_column(name, justify="right")
    for plan in plans:
        table.add_row(
            f"{plan.num_gpus} x {plan.gpu}",
            "yes" if plan.fits else "[red]no[/red]",
            f"{plan.weight_bytes / 1e9:.1f} GB",
            f"{plan.cache_bytes / 1e9:.1f} GB",
            f"{plan.num_cache_tokens:,}",
            f"{plan.num_full_length_requests:.1f}",
            str(plan.num_concurrent),
            *(f"{limit:,.0f}" if plan.fits else "" for limit in _limits(plan)),
            f"{plan.link_share_one_request:.0%}, {plan.link_share:.0%}" if plan.fits and plan.num_gpus > 1 else "",
        )
    console.print(table)
    for plan in plans:
        if not plan.fits and len({p.gpu for p in plans}) == 1:
            console.print(f"{plan.num_gpus} x {plan.gpu}: {plan.reason}", highlight=False, style="red")
    console.print(
        f"weights and KV cache per GPU; full-length: requests of the whole context; requests: of {MEAN_REQUEST_TOKENS} "
        "tokens, at most 256.\n"
        "Speeds are physical limits: bytes over bandwidth, products over the matrix rate; between GPUs, bytes over "
        f"links (or PCIe 4.0)\nand {COLLECTIVE_S * 1e6:.0f} us for each sum. "
        "links: the share of sums between GPUs in the time of a step, with one request and with all.",
        highlight=False,
        style="dim",
    )
