"""The matrix products of a layer, as cuBLASLt or hipBLASLt do them, and as the engine: time, and fraction of the limit.

    python benchmarks/h200/products.py [--models llama-2-7b llama-3.1-8b] [--out products.json]
    python benchmarks/h200/products.py --sizes     # a layer's together, at many numbers of rows
    python benchmarks/h200/products.py --gated     # gates and ups with the activation, above 64 rows

Weights take turns, so that none is found in the cache of the GPU; launches are replayed as a graph. The engine's own
kernels are timed where it takes them (kernels/linear.py).

--sustained: bursts of some ms are faster than what a card keeps up: under its power limit clocks fall.

--sizes: as the engine computes them above 64 rows, the activation included. Marked are numbers of rows at which no
larger one is faster: what steps of decode rows are padded to (runner/graphs.py) is chosen from them.

--gated: by the library with the activation after it, and as the engine does it, taking turns.
"""

import argparse
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from measure import ceilings
from shapes import SHAPES
from torch import Tensor

from evenflow.kernels.language import current_arch
from evenflow.kernels.linear import gated_linear, linear
from evenflow.kernels.silu_and_mul import silu_and_mul
from evenflow.kernels.tuning import adding_product_rows, own_product_rows

Product = Callable[[Tensor, Tensor], Tensor]

ROWS = (1, 4, 16, 32, 64, 128, 192, 256, 512, 1024, 2048, 8192)
SIZES = (*range(72, 256, 8), *range(256, 1025, 16))
GATED_ROWS = (128, 256, 384, 512, 640, 768, 880, 1024, 2048, 4096, 16384)


def products(model: str) -> dict[str, tuple[int, int]]:
    """(out, in) of each product of a layer, and the head."""
    shape = SHAPES[model]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    head_dim = hidden // shape["num_attention_heads"]
    qkv = hidden + 2 * shape["num_key_value_heads"] * head_dim
    return {
        "qkv": (qkv, hidden),
        "o": (hidden, hidden),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
        "head": (shape["vocab_size"], hidden),
    }


def seconds(
    rows: int, out_features: int, in_features: int, product: Product = F.linear, *, sustained_s: float = 0.0
) -> float:
    """One launch. sustained_s: of the second half of so many seconds, in which the card comes to its power limit."""
    count = max(2, 400_000_000 // (2 * out_features * in_features))
    weights = [torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(count)]
    x = torch.randn(rows, in_features, device="cuda", dtype=torch.bfloat16)
    for weight in weights:
        product(x, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            product(x, weight)
    graph.replay()
    found = _replay_seconds(graph, 10)
    if sustained_s:
        repeats = max(10, round(sustained_s / 2 / found))
        _replay_seconds(graph, repeats)
        found = _replay_seconds(graph, repeats)
    return found / count


def _replay_seconds(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def added(x: Tensor, weight: Tensor) -> Tensor:
    """A product that is added to the residual in place."""
    return residual_like(x.shape[0], weight.shape[0]).addmm_(x, weight.t())


@cache
def residual_like(rows: int, features: int) -> Tensor:
    return torch.zeros(rows, features, device="cuda", dtype=torch.bfloat16)


def library_gated(x: Tensor, weight: Tensor) -> Tensor:
    return silu_and_mul(F.linear(x, weight))


def layer_seconds(model: str, rows: int, sustained_s: float) -> float:
    """The products of one layer, and the activation."""
    adding = added if rows >= adding_product_rows(current_arch()) else F.linear
    how = {"qkv": F.linear, "o": adding, "gate_up": gated_linear, "down": adding}
    shapes = products(model)
    return sum(seconds(rows, *shapes[name], product, sustained_s=sustained_s) for name, product in how.items())


def measure_gated(model: str, sustained_s: float) -> list[dict[str, Any]]:
    """Of each number of rows, medians of three turns."""
    shape = products(model)["gate_up"]
    found = []
    for rows in GATED_ROWS:
        times: dict[Product, list[float]] = {library_gated: [], gated_linear: []}
        for product in (*times,) * 3:
            times[product].append(seconds(rows, *shape, product, sustained_s=sustained_s))
        library, engine = (median(taken) * 1e6 for taken in times.values())
        found.append({"model": model, "rows": rows, "us": library, "engine_us": engine})
        print(f"{model} {rows} rows: {library:.1f} us, engine {engine:.1f} us, {library / engine:.3f}x", flush=True)
    return found


def measure_sizes(model: str, sustained_s: float) -> list[dict[str, Any]]:
    """Of each number of rows, by size: a layer's time, and whether it is no more than that of any larger number."""
    found: list[dict[str, Any]] = [
        {"model": model, "rows": rows, "layer_us": layer_seconds(model, rows, sustained_s) * 1e6} for rows in SIZES
    ]
    least = float("inf")
    for cell in reversed(found):
        cell["is_least"] = cell["layer_us"] <= least
        least = min(least, cell["layer_us"])
    print(model, *(f"{cell['rows']}:{cell['layer_us']:.0f}us{'*' * cell['is_least']}" for cell in found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-2-7b", "llama-3.1-8b"], choices=list(SHAPES))
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--sizes", action="store_true", help="a layer's products together, by number of rows")
    parts.add_argument("--gated", action="store_true", help="gates and ups with the activation, by number of rows")
    parser.add_argument("--sustained", type=float, default=0.0, metavar="SECONDS", help="run each product for so long")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here")
    peak = ceilings()
    results: list[dict[str, Any]] = []
    for model in args.models:
        if args.sizes or args.gated:
            results += (measure_sizes if args.sizes else measure_gated)(model, args.sustained)
            continue
        for name, (out_features, in_features) in products(model).items():
            cells = []
            for rows in ROWS:
                if name == "head" and rows > 1024:
                    continue
                s = seconds(rows, out_features, in_features, sustained_s=args.sustained)
                moved = 2 * (out_features * in_features + rows * (out_features + in_features))
                flops = 2 * rows * out_features * in_features
                limit = max(moved / peak["copy_bytes_per_s"], flops / peak["bf16_flops"])
                found = {"model": model, "product": name, "rows": rows, "us": s * 1e6, "of_limit": limit / s}
                cells.append(f"{rows}:{s * 1e6:.1f}us({limit / s:.2f})")
                if rows <= own_product_rows(current_arch()):
                    ours = seconds(rows, out_features, in_features, linear, sustained_s=args.sustained)
                    found |= {"engine_us": ours * 1e6, "engine_of_limit": limit / ours}
                    cells[-1] += f" engine:{ours * 1e6:.1f}us({limit / ours:.2f})"
                results.append(found)
            print(model, name, *cells, flush=True)
    if args.out:
        args.out.write_text(json.dumps({"ceilings": peak, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
