"""How near to the memory's and the matrix units' speed is paged attention, and with which tiles?

Each shape is timed over several layers' caches in one graph, as a model runs them, so that nothing is still in the L2
cache. GB/s count keys, values, queries and outputs once; TFLOP/s count attended pairs only. Each tile's output is
compared with the first one's, and that with PyTorch. Needs a GPU, torch and triton, and `PYTHONPATH=src` where Evenflow
is not installed. Writes benchmarks/results/attention.json.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evenflow.kernels.attention_plan import DeviceRows, launch_plan_attention, make_plan
from evenflow.kernels.language import current_arch, next_power_of_2
from evenflow.kernels.paged_attention import launch_paged_attention
from evenflow.kernels.tuning import Tile, decode_tile, prefill_tile

RESULT = Path(__file__).parent / "results" / "attention.json"
BLOCK_SIZE = 16
ROTATED_BYTES = 512 << 20  # of all layers together, several times any L2 cache
MAX_LAYERS = 32
MODELS = {"llama-2-7b": (32, 32, 128), "llama-3-8b": (32, 8, 128)}
DECODE_TILES = [
    Tile(block_n, num_warps, num_stages)
    for block_n, num_warps, stages in (
        (16, 1, (1, 2, 3, 4)),
        (32, 1, (1, 2, 3, 4)),
        (32, 2, (2, 3, 4)),
        (32, 4, (2, 3, 4, 5)),
        (64, 2, (2, 3, 4)),
        (64, 4, (1, 2, 3, 4, 5)),
        (64, 8, (3, 4)),
        (128, 4, (2, 3, 4)),
        (128, 8, (2, 3, 4)),
    )
    for num_stages in stages
]
QUICK_DECODE_TILES = [Tile(16, 1, 3), Tile(32, 2, 3), Tile(32, 4, 3), Tile(64, 4, 2), Tile(64, 4, 4), Tile(128, 8, 3)]
PREFILL_TILES = [
    Tile(block_n, num_warps, num_stages, block_m)
    for block_m, block_n, num_warps in (
        (64, 64, 4), (128, 32, 4), (128, 32, 8), (128, 64, 4), (128, 64, 8), (128, 128, 8), (128, 128, 4), (256, 64, 8),
    )
    for num_stages in (1, 2, 3, 4)
]  # fmt: skip
QUICK_PREFILL_TILES = [Tile(64, 4, 2, 128), Tile(64, 8, 2, 128), Tile(128, 8, 2, 128)]


@dataclass(frozen=True)
class Shape:
    """rows: (queries, keys) of each."""

    name: str
    rows: tuple[tuple[int, int], ...]

    @property
    def is_decode(self) -> bool:
        return max(queries for queries, _ in self.rows) == 1


def ragged(num_rows: int, mean: float, sigma: float = 0.8) -> tuple[int, ...]:
    """Log-normal lengths of that mean, in no order, at most 2,048."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(num_rows, generator=generator)
    lengths = mean * torch.exp(sigma * normal - sigma**2 / 2)
    return tuple(lengths.round().clamp(1, 2048).int().tolist())


def shapes(quick: bool) -> list[Shape]:
    contexts = (500,) if quick else (512, 2048)
    found = [
        Shape(f"decode {n} x {context}", ((1, context),) * n)
        for n in (1, 64, 256)
        for context in ((2048,) if n == 1 and quick else contexts)
    ]
    lengths = ragged(256, 400)
    found.append(Shape("decode 256, ragged", tuple((1, n) for n in lengths)))
    found += [Shape(f"prefill {n}", ((n, n),)) for n in ((2048,) if quick else (2048, 8192))]
    if not quick:
        found += [Shape("prefill 8 x 250", ((250, 250),) * 8), Shape("chunk 512 of 8192", ((512, 8192),))]
        found.append(Shape("mixed", (*((1, n) for n in lengths[:255]), (512, 512))))
    return found


@dataclass
class Layers:
    """One step's rows, and as many layers as make its caches larger than what an L2 cache holds."""

    shape: Shape
    q: Tensor
    caches: list[Tensor]
    rows: DeviceRows

    @property
    def kv_bytes(self) -> int:
        keys = sum(keys for _, keys in self.shape.rows)
        return keys * 2 * self.caches[0].shape[2] * self.q.shape[2] * self.caches[0].element_size()

    @property
    def num_bytes(self) -> int:
        """What one layer must read and write."""
        return self.kv_bytes + 2 * self.q.shape[0] * self.q.shape[1] * self.q.shape[2] * self.q.element_size()

    @property
    def flops(self) -> int:
        pairs = sum(queries * keys - queries * (queries - 1) // 2 for queries, keys in self.shape.rows)
        return 4 * self.q.shape[1] * self.q.shape[2] * pairs


def make_layers(shape: Shape, model: str, cache_dtype: torch.dtype, target_items: int | None = None) -> Layers:
    num_heads, num_kv_heads, head_dim = MODELS[model]
    generator = torch.Generator().manual_seed(0)
    blocks = [-(-keys // BLOCK_SIZE) for _, keys in shape.rows]
    order = torch.randperm(sum(blocks), generator=generator)
    tables = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
    for row, part in enumerate(order.split(blocks)):
        tables[row, : len(part)] = part.int()
    starts = torch.tensor([0, *(queries for queries, _ in shape.rows)]).cumsum(0).int()
    cache_shape = (sum(blocks), 2, num_kv_heads, BLOCK_SIZE, head_dim)
    num_layers = min(max(-(-ROTATED_BYTES // (math.prod(cache_shape) * cache_dtype.itemsize)), 2), MAX_LAYERS)
    caches = [torch.randn(cache_shape, dtype=torch.bfloat16, device="cuda").to(cache_dtype) for _ in range(num_layers)]
    num_tokens = int(starts[-1])
    joint = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=torch.bfloat16, device="cuda")
    rows = DeviceRows(
        query_starts=starts.cuda(),
        seq_lens=torch.tensor([keys for _, keys in shape.rows], dtype=torch.int32, device="cuda"),
        slots=torch.arange(len(blocks), dtype=torch.int32, device="cuda"),
        block_tables=tables.cuda(),
        store_index=torch.full((num_tokens,), -1, device="cuda"),  # not read here, nor are the positions
        positions=torch.zeros(num_tokens, dtype=torch.int64, device="cuda"),
        max_query_len=max(queries for queries, _ in shape.rows),
        plan=make_plan(len(blocks), num_heads, num_kv_heads, head_dim, "cuda", target_items=target_items),
    )
    launch_plan_attention(rows)
    return Layers(shape, joint[:, :num_heads], caches, rows)


def attend(layers: Layers, layer: int, **tiles: Tile) -> Tensor:
    scale = layers.q.shape[2] ** -0.5
    return launch_paged_attention(layers.q, layers.caches[layer], layers.rows, scale, **tiles)


def expected(layers: Layers) -> Tensor:
    """The first layer's last row by PyTorch."""
    queries, keys = layers.shape.rows[-1]
    num_blocks = -(-keys // BLOCK_SIZE)
    pages = layers.caches[0][layers.rows.block_tables[-1, :num_blocks].long()].to(torch.float32)
    dense = pages.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :keys]
    group = layers.q.shape[1] // dense.shape[1]
    dense = dense.repeat_interleave(group, 1)
    q = layers.q[-queries:].transpose(0, 1).float()
    mask = torch.ones(queries, keys, dtype=torch.bool, device="cuda").tril(keys - queries)
    return F.scaled_dot_product_attention(q, dense[0], dense[1], attn_mask=mask).transpose(0, 1)


def graph_ms(run: Callable[[], object], num_calls: int, budget_s: float = 0.1) -> float:
    """Milliseconds of one of the num_calls calls that run() makes, replayed as a graph: the fastest of a few."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times: list[float] = []
    deadline = time.perf_counter() + budget_s
    while len(times) < 3 or (time.perf_counter() < deadline and len(times) < 50):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return min(times) / num_calls


def copy_bytes_per_s() -> float:
    """Bytes read and written by a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (graph_ms(lambda: [target.copy_(source) for _ in range(4)], 4, 0.5) * 1e-3)


def try_tile(layers: Layers, tile: Tile, want: Tensor) -> dict[str, Any]:
    tiles = {"decode": tile} if layers.shape.is_decode else {"prefill": tile}
    record: dict[str, Any] = {"tile": asdict(tile)}
    try:
        found = attend(layers, 0, **tiles)
        error = (found[-len(want) :].float() - want).abs().max().item()
        record["error"] = error
        numbers = range(len(layers.caches))
        record["ms"] = graph_ms(lambda: [attend(layers, n, **tiles) for n in numbers], len(numbers))
    except Exception as problem:  # a tile that does not fit is a result, whatever it raises
        record["failed"] = f"{type(problem).__name__}: {problem}"[:200]
        return record
    if not error < 0.05:
        record["failed"] = f"wrong by {error}"
    record["gb_per_s"] = layers.num_bytes / record["ms"] * 1e-6
    record["tflops"] = layers.flops / record["ms"] * 1e-9
    return record


def describe(record: dict[str, Any], copy: float) -> str:
    tile = record["tile"]
    name = f"m{tile['block_m']} n{tile['block_n']} w{tile['num_warps']} s{tile['num_stages']}"
    if "failed" in record:
        return f"  {name:20} {record['failed']}"
    share = record["gb_per_s"] * 1e9 / copy
    return (
        f"  {name:20} {record['ms'] * 1e3:9.1f} us {record['gb_per_s']:7.0f} GB/s = {share:5.1%} of copy "
        f"{record['tflops']:7.1f} TFLOP/s  error {record['error']:.1e}"
    )


def tiles_of(layers: Layers, quick: bool) -> list[Tile]:
    """The one that the tables choose first."""
    block_d = next_power_of_2(layers.q.shape[2])
    if layers.shape.is_decode:
        chosen = decode_tile(current_arch(), block_d, 2, layers.caches[0].element_size())
        others = QUICK_DECODE_TILES if quick else DECODE_TILES
    else:
        chosen = prefill_tile(current_arch(), block_d, 2, 2)
        others = QUICK_PREFILL_TILES if quick else PREFILL_TILES
    return [chosen, *(tile for tile in others if tile != chosen)]


def plan_us(layers: Layers) -> float:
    return 1e3 * graph_ms(lambda: [launch_plan_attention(layers.rows) for _ in range(20)], 20)


def sweep_targets(shape: Shape, model: str, cache_dtype: torch.dtype, tile: Tile) -> list[dict[str, Any]]:
    """How many pieces should decode rows be cut into?"""
    found = []
    usual = make_layers(shape, model, cache_dtype)
    want = expected(usual)
    for factor in (0.125, 0.25, 0.5, 1, 2):
        target = max(int(usual.rows.plan.target_items * factor), 1)
        rows = usual.rows
        rows.plan = make_plan(len(shape.rows), *MODELS[model], "cuda", target_items=target)
        launch_plan_attention(rows)
        record = try_tile(usual, tile, want) | {"target_items": target, "counts": rows.plan.counts.tolist()}
        rows.plan = make_plan(len(shape.rows), *MODELS[model], "cuda")
        print(f"  {target:6} pieces aimed at, {record['counts']} made: {record['ms'] * 1e3:9.1f} us", flush=True)
        found.append(record)
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    copy = copy_bytes_per_s()
    name = torch.cuda.get_device_name()
    print(f"{name} ({current_arch()}), torch {torch.__version__}: copies at {copy * 1e-9:.0f} GB/s", flush=True)
    cache_dtype = getattr(torch, args.cache_dtype)
    results = []
    for model in args.models:
        for shape in shapes(args.quick):
            if args.only and args.only not in shape.name:
                continue
            layers = make_layers(shape, model, cache_dtype)
            result: dict[str, Any] = {
                "model": model,
                "shape": shape.name,
                "counts": layers.rows.plan.counts.tolist(),
                "plan_us": plan_us(layers),
                "records": [],
            }
            print(
                f"{model} {shape.name}: {len(layers.caches)} layers of {layers.kv_bytes / 1e6:.1f} MB, "
                f"(pieces, split rows) = {result['counts']}, plan {result['plan_us']:.1f} us",
                flush=True,
            )
            want = expected(layers)
            for tile in tiles_of(layers, args.quick):
                record = try_tile(layers, tile, want)
                result["records"].append(record)
                print(describe(record, copy), flush=True)
            del layers
            torch.cuda.empty_cache()
            timed = [record for record in result["records"] if "failed" not in record]
            if timed:
                best = min(timed, key=lambda record: record["ms"])
                print(f"  best:{describe(best, copy)[1:]}", flush=True)
                if shape.is_decode and not args.quick:
                    result["targets"] = sweep_targets(shape, model, cache_dtype, Tile(**best["tile"]))
            results.append(result)
    return {"device": name, "arch": current_arch(), "copy_gb_per_s": copy * 1e-9, "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and tiles: under a minute")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--only", default="", help="shapes whose name has this in it, as 'decode'")
    parser.add_argument("--cache-dtype", default="bfloat16", help="as torch names it, e.g. float8_e4m3fn")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here")
    report = run(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
