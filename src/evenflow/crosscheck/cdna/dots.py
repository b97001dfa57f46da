"""Dot products of the few narrow numbers in one register of each lane, added to a third source. Owns the v_dot* table.

Float sums are rounded once here; the order in which the hardware rounds is not published.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from evenflow.crosscheck.cdna.floats import Array, bf16_to_f32
from evenflow.crosscheck.cdna.operation import Operation
from evenflow.crosscheck.cdna.vector import alu


def _halves(bits: Array) -> Array:
    return np.ascontiguousarray(bits).view(np.float16).reshape(*bits.shape, 2).astype(np.float64)


def _bfloats(bits: Array) -> Array:
    return bf16_to_f32(np.ascontiguousarray(bits).view(np.uint16).reshape(*bits.shape, 2)).astype(np.float64)


def _bytes(dtype: type) -> Callable[[Array], Array]:
    return lambda bits: np.ascontiguousarray(bits).view(dtype).reshape(*bits.shape, 4).astype(np.int64)


def _dot(parts: Callable[[Array], Array], dtype: type) -> Callable[[Array, Array, Array], Array]:
    def compute(a: Array, b: Array, total: Array) -> Array:
        return ((parts(a) * parts(b)).sum(-1) + total).astype(dtype)

    return compute


def _dot_operation(kind: str, compute: Callable[..., Array], updates: bool) -> Operation:
    # op_sel would mean something else here than in the instructions that `alu` was made for.
    return replace(alu(kind, f"u32 u32 {kind}", compute, updates=updates), modifiers=frozenset())


# mnemonic's end: (type of the sum, what it computes); with "c" the destination is the third source.
_KINDS = {
    ("2", "f32_f16"): ("f32", _dot(_halves, np.float32)),
    ("2", "f32_bf16"): ("f32", _dot(_bfloats, np.float32)),
    ("4", "i32_i8"): ("i32", _dot(_bytes(np.int8), np.int32)),
    ("4", "u32_u8"): ("u32", _dot(_bytes(np.uint8), np.uint32)),
}
DOTS: dict[str, Operation] = {}
for (_count, _name), (_kind, _compute) in _KINDS.items():
    DOTS[f"v_dot{_count}_{_name}"] = _dot_operation(_kind, _compute, updates=False)
    DOTS[f"v_dot{_count}c_{_name}"] = _dot_operation(_kind, _compute, updates=True)
