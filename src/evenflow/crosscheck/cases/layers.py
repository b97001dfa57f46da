"""Norms, the gated activation, and rotary with its store: shapes that do not fill a tile, strides, several heads."""

from functools import partial
from types import ModuleType
from typing import Any

import torch

from evenflow.crosscheck.cases.case import EIGHT_BITS, FLOATS, SIXTEEN_BITS, Case, cache_types, normal
from evenflow.kernels.linear import gated_linear, linear

HEAD_SIZES = (64, 80, 96, 128, 256)
BLOCK_SIZE, NUM_BLOCKS, MAX_POSITION = 4, 5, 32
POSITIONS = (0, 5, 31, 2, 17)
STORE_INDEX = (3, -1, 19, 8, 0)  # into blocks 0 to 4; -1 is padding
NORM, ROTARY = "evenflow.kernels.rms_norm", "evenflow.kernels.rotary"
LINEAR = "evenflow.kernels.linear"


def _norm_rows(dtype: torch.dtype, num_rows: int, size: int) -> tuple[Any, ...]:
    return normal(num_rows, size, dtype=dtype), 1 + 0.1 * normal(size, dtype=dtype, seed=1), 1e-5


def _norm_heads(dtype: torch.dtype) -> tuple[Any, ...]:
    """Keys in the middle of a joint projection: rows are strided and start past the storage's beginning."""
    joint = normal(5, 4, 3 * 128, dtype=dtype)
    return joint[:, :, 128:256], 1 + 0.1 * normal(128, dtype=dtype, seed=1), 1e-6


def _add_norm(dtype: torch.dtype) -> tuple[Any, ...]:
    x, residual = normal(3, 512, dtype=dtype)[:, :256], normal(3, 256, dtype=dtype, seed=1)
    return x, residual, 1 + 0.1 * normal(256, dtype=dtype, seed=2), 1e-5


def _product(dtype: torch.dtype, num_outs: int, size: int, num_rows: int = 1) -> tuple[Any, ...]:
    return normal(num_rows, size, dtype=dtype), normal(num_outs, size, dtype=dtype, seed=1)


def _launch_product(module: ModuleType, *arguments: Any, arch: str, gated: bool) -> torch.Tensor:
    found: torch.Tensor = module.launch_own_product(*arguments, gated=gated, arch=arch)
    return found


def _product_case(num_rows: int, num_outs: int, size: int, *, gated: bool) -> Case:
    return Case(
        LINEAR,
        "linear" if num_rows == 1 else "few_row_linear",
        f"{num_rows} rows, {'gated, ' if gated else ''}{num_outs} x {size}",
        partial(_product, num_outs=num_outs, size=size, num_rows=num_rows),
        SIXTEEN_BITS,
        gated_linear if gated else linear,
        partial(_launch_product, gated=gated),
    )


def _rotary(
    dtype: torch.dtype, size: int, num_heads: int = 3, num_kv_heads: int = 2, scales: tuple[tuple[float, ...], ...] = ()
) -> tuple[Any, ...]:
    """Rows with a gap between them. scales: of keys and of values."""
    dtype, cache_dtype = cache_types(dtype)
    width = (num_heads + 2 * num_kv_heads) * size
    qkv = normal(len(POSITIONS), width + 16, dtype=dtype)[:, :width]
    cache = torch.ones(NUM_BLOCKS, 2, num_kv_heads, BLOCK_SIZE, size).to(cache_dtype)
    angles = 3 * normal(MAX_POSITION, size // 2, seed=1)
    indices = torch.tensor(POSITIONS), torch.tensor(STORE_INDEX)
    tensors = [torch.tensor(scale) for scale in scales]
    return qkv, cache, angles.cos(), angles.sin(), *indices, num_heads, num_kv_heads, *tensors


CASES = (
    *(
        Case(LINEAR, "linear", f"{n} x {size}", partial(_product, num_outs=n, size=size), SIXTEEN_BITS)
        for n, size in ((4, 4096), (8, 2048), (6, 3072), (4, 512), (8, 1192))
    ),
    *(_product_case(*shape, gated=False) for shape in ((3, 128, 256), (17, 64, 320), (33, 64, 256))),
    *(_product_case(*shape, gated=True) for shape in ((1, 6, 3072), (1, 8, 1192), (17, 128, 256))),
    Case(NORM, "rms_norm", "3 rows of 256", partial(_norm_rows, num_rows=3, size=256)),
    Case(NORM, "rms_norm", "2 rows of 200", partial(_norm_rows, num_rows=2, size=200)),
    Case(NORM, "rms_norm", "4 heads of 128, strided", _norm_heads),
    Case(NORM, "add_rms_norm", "3 rows of 256, strided", _add_norm),
    Case("evenflow.kernels.silu_and_mul", "silu_and_mul", "3 rows of 2 x 1100", lambda t: (normal(3, 2200, dtype=t),)),
    *(
        Case(ROTARY, "rotary_and_store", f"heads of {size}", partial(_rotary, size=size), (*FLOATS, *EIGHT_BITS))
        for size in HEAD_SIZES
    ),
    Case(ROTARY, "rotary_and_store", "multi-head", partial(_rotary, size=64, num_heads=9, num_kv_heads=9)),
    Case(
        ROTARY,
        "rotary_and_store",
        "one scale, values clipped",
        partial(_rotary, size=64, scales=((0.5,), (0.005,))),
        EIGHT_BITS,
    ),
    Case(
        ROTARY,
        "rotary_and_store",
        "scales by head",
        partial(_rotary, size=80, scales=((0.25, 2.0), (0.01, 4.0))),
        EIGHT_BITS,
    ),
)
