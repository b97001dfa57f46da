"""Inputs and an oracle for paged attention: ragged rows in shuffled pages, on any device, without the interpreter."""

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from evenflow.kernels.attention_plan import AttentionPlan, DeviceRows, make_plan

Row = tuple[int, int]  # queries, keys (the queries' own included)


@dataclass(frozen=True)
class Case:
    """What paged_attention is asked. rows: (queries, keys) of each; (0, 0) is a padding row. padding: tokens more.

    split: (target_items, granule) of the plan. cache_dtype: None for the queries' own. per_head: scales of the cache,
    one a key head; None: no scales.
    """

    rows: tuple[Row, ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    window: int | None = None
    soft_cap: float | None = None
    cache_dtype: torch.dtype | None = None
    per_head: bool | None = None
    padding: int = 0
    split: tuple[int, int] = (4, 32)
    logit_scale: float = 1.0


@dataclass(frozen=True)
class Inputs:
    """The arguments of paged_attention, and the dense keys and values of each row as the cache keeps them."""

    q: Tensor
    kv_cache: Tensor
    rows: DeviceRows
    scale: float
    window: int | None
    soft_cap: float | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    dense: list[Tensor]  # [2, Hkv, L, D] of each row, in the cache's type

    @property
    def arguments(self) -> tuple[object, ...]:
        return (
            self.q, self.kv_cache, self.rows, self.scale, self.window, self.soft_cap, self.k_scale, self.v_scale,
        )  # fmt: skip


def make_inputs(
    case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0, plan: AttentionPlan | None = None
) -> Inputs:
    """Random inputs. q is a strided view of a joint projection; pages are shuffled, the last block is in use, block
    tables are shuffled too, and what no row owns is NaN (in 8 bits: the largest number). So is what tables end with."""
    generator = torch.Generator().manual_seed(seed)
    cache_dtype = case.cache_dtype or dtype
    heads, kv_heads, size, width = case.num_heads, case.num_kv_heads, case.block_size, case.head_dim
    blocks_of = [-(-keys // size) for _, keys in case.rows]
    num_blocks = sum(blocks_of) + 3
    kv_cache = torch.full((num_blocks, 2, kv_heads, size, width), math.nan if cache_dtype.itemsize > 1 else 448.0)
    kv_cache = kv_cache.to(cache_dtype)
    free = torch.randperm(num_blocks - 1, generator=generator).tolist()
    free.insert(0, num_blocks - 1)
    max_seqs = len(case.rows) + 2
    slots = torch.randperm(max_seqs, generator=generator)[: len(case.rows)]
    tables = torch.full((max_seqs, max(blocks_of) + 2), free.pop(), dtype=torch.int32)
    dense, store_index, positions = [], [], []
    for (queries, keys), number, slot in zip(case.rows, blocks_of, slots.tolist(), strict=True):
        values = torch.randn(2, kv_heads, keys, width, generator=generator).to(cache_dtype)
        blocks = [free.pop(0) for _ in range(number)]
        tables[slot, :number] = torch.tensor(blocks, dtype=torch.int32)
        for page, block in enumerate(blocks):
            part = values[:, :, page * size : (page + 1) * size]
            kv_cache[block, :, :, : part.shape[2]] = part
        dense.append(values)
        own = range(keys - queries, keys)
        positions += own
        store_index += [blocks[p // size] * size + p % size for p in own]
    starts = [0, *accumulate(queries for queries, _ in case.rows)]
    num_tokens = starts[-1] + case.padding
    joint = torch.randn(num_tokens, heads + 2 * kv_heads, width, generator=generator).to(dtype).to(device)
    scales = (None, None)
    if case.per_head is not None:
        shape = (kv_heads if case.per_head else 1,)
        scales = tuple((0.5 + torch.rand(shape, generator=generator)).to(device) for _ in range(2))
    int32 = {"dtype": torch.int32, "device": device}
    rows = DeviceRows(
        query_starts=torch.tensor(starts, **int32),
        seq_lens=torch.tensor([keys for _, keys in case.rows], **int32),
        slots=slots.to(torch.int32).to(device),
        block_tables=tables.to(device),
        store_index=torch.tensor(store_index + [-1] * case.padding, device=device),
        positions=torch.tensor(positions + [0] * case.padding, device=device),
        max_query_len=max(queries for queries, _ in case.rows),
        plan=plan
        or make_plan(len(case.rows), heads, kv_heads, width, device, target_items=case.split[0], granule=case.split[1]),
    )
    return Inputs(
        q=joint[:, :heads],
        kv_cache=kv_cache.to(device),
        rows=rows,
        scale=case.logit_scale / math.sqrt(width),
        window=case.window,
        soft_cap=case.soft_cap,
        k_scale=scales[0],
        v_scale=scales[1],
        dense=dense,
    )


def attend(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """Dense attention, row by row and head by head, in `dtype`: float64 is the oracle. Returns [tokens, H, D]."""
    outs = []
    starts = inputs.rows.query_starts.tolist()
    for row, dense in enumerate(inputs.dense):
        q = inputs.q[starts[row] : starts[row + 1]].cpu().to(dtype)
        keys, values = dense.to(dtype)
        if inputs.k_scale is not None:
            keys = keys * inputs.k_scale.cpu().to(dtype)[:, None, None]
        if inputs.v_scale is not None:
            values = values * inputs.v_scale.cpu().to(dtype)[:, None, None]
        outs.append(_attend_row(q, keys, values, inputs))
    return torch.cat(outs)


def _attend_row(q: Tensor, keys: Tensor, values: Tensor, inputs: Inputs) -> Tensor:
    group = q.shape[1] // len(keys)
    out = torch.empty_like(q)
    for index in range(len(q)):
        position = keys.shape[1] - len(q) + index
        first = 0 if inputs.window is None else max(position - inputs.window + 1, 0)
        for head in range(q.shape[1]):
            scores = keys[head // group, first : position + 1] @ q[index, head] * inputs.scale
            if inputs.soft_cap is not None:
                scores = inputs.soft_cap * torch.tanh(scores / inputs.soft_cap)
            out[index, head] = scores.softmax(0) @ values[head // group, first : position + 1]
    return out


CASES = {
    "one token": Case(rows=((1, 1),)),
    "decode, ragged": Case(rows=((1, 1), (1, 15), (1, 16), (1, 17), (1, 100), (1, 33))),
    "decode, no split": Case(rows=((1, 40), (1, 41)), split=(1, 256)),
    "decode, one long row": Case(rows=((1, 700), (1, 3)), split=(50, 16)),
    "prompts": Case(rows=((5, 5), (70, 70), (2, 2))),
    "prompts of whole tiles": Case(rows=((64, 64), (32, 96), (128, 128))),
    "many prompts": Case(rows=((2, 2),) * 70 + ((1, 9), (40, 70)), num_heads=2, num_kv_heads=1, head_dim=16),
    "chunks of prompts": Case(rows=((7, 40), (64, 65), (33, 130))),
    "mixed": Case(rows=((1, 50), (9, 9), (1, 1), (40, 90), (1, 129))),
    "padding rows": Case(rows=((1, 20), (6, 6), (0, 0), (0, 0)), padding=5),
    "decode, padding rows": Case(rows=((1, 20), (1, 64), (0, 0), (0, 0), (0, 0)), padding=3),
    "empty row between": Case(rows=((3, 9), (0, 0), (1, 9), (0, 0), (4, 4))),
    "window": Case(rows=((1, 200), (30, 150), (1, 5), (12, 12), (1, 64)), window=24),
    "window of one": Case(rows=((1, 70), (20, 40)), window=1),
    "soft cap": Case(rows=((1, 60), (10, 70)), soft_cap=5.0, logit_scale=6.0),
    "multi-head": Case(rows=((1, 40), (18, 30)), num_heads=3, num_kv_heads=3),
    "three queries a key": Case(rows=((1, 40), (50, 60)), num_heads=6, num_kv_heads=2),
    "eight queries a key": Case(rows=((1, 40), (20, 60)), num_heads=8, num_kv_heads=1),
    "twenty queries a key": Case(rows=((1, 40), (9, 20)), num_heads=20, num_kv_heads=1),
    "heads of 80": Case(rows=((1, 70), (9, 30)), head_dim=80),
    "heads of 96": Case(rows=((1, 70), (9, 30)), head_dim=96),
    "heads of 128": Case(rows=((1, 70), (9, 30)), head_dim=128),
    "heads of 256": Case(rows=((1, 70), (9, 30)), head_dim=256),
    "blocks of 8": Case(rows=((1, 70), (9, 30)), block_size=8),
    "blocks of 64": Case(rows=((1, 130), (9, 30)), block_size=64),
    "large logits": Case(rows=((1, 90), (20, 50)), logit_scale=60.0),
}
FP8_CASES = {
    f"{name}, {dtype}": Case(rows=((1, 100), (1, 7), (9, 30)), cache_dtype=dtype, per_head=per_head)
    for dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
    for name, per_head in (("no scale", None), ("one scale", False), ("scales by head", True))
}
