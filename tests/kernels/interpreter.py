"""Triton's interpreter for the tests: beside the compiler in one process, and exact in bfloat16 and 8-bit floats.

Triton 3.6 to 3.9 interprets where TRITON_INTERPRET=1 was set before its import, and then nothing compiles any more.
`interpreted` sends the launches of ordinary `@triton.jit` functions to the interpreter while it lasts, and leaves
nothing behind. It also mends what is silently wrong: the interpreter keeps bfloat16 and 8-bit floats as integers, adds
and compares the bit patterns, truncates where it should round, and knows no e4m3fnuz before 3.8. What has no exact
meaning (a sum of bfloat16 rounds after each addition, in an order that only the compiler knows) is refused.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

Array = Any  # np.ndarray of any type
Handle = Any  # TensorHandle

FP8 = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}
LOW_PRECISION = {tl.bfloat16, *FP8}
LANGUAGE = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # as _patch_lang finds it in a kernel's globals


@contextmanager
def interpreted() -> Iterator[None]:
    """While it lasts, kernel[grid](...) takes CPU tensors and is interpreted."""
    with ExitStack() as stack:
        for owner, name, replacement in _replacements():
            stack.enter_context(patch.object(owner, name, replacement))
        yield


def _replacements() -> Iterator[tuple[object, str, object]]:
    yield JITFunction, "run", _launch
    yield JITFunction, "__call__", _call
    yield interpreter, "_patch_lang_tensor", _patch_lang_tensor
    yield interpreter, "_patch_lang_core", _patch_lang_core
    yield interpreter.ReduceOps, "sum", _sum
    yield interpreter.ReduceOps, "min_max", _min_max
    for name, replacement in vars(_Exact).items():
        if not name.startswith("__"):
            yield InterpreterBuilder, name, replacement


def _launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """JITFunction.run. A launch patches triton.language once for all functions that the kernel calls."""
    if warmup:
        return
    scope = interpreter._patch_lang(LANGUAGE)
    try:
        with np.errstate(all="ignore"):  # as on a GPU: exp overflows to infinity, and nobody is told
            InterpretedFunction(kernel.fn).run(*args, grid=grid, warmup=False, **kwargs)
    finally:
        scope.restore()


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """JITFunction.__call__: a kernel calls another function, triton's own among them."""
    return InterpretedFunction(function.fn).rewrite()(*args, **kwargs)


_original_patch_lang_tensor = interpreter._patch_lang_tensor
_original_patch_lang_core = interpreter._patch_lang_core
_original_sum = interpreter.ReduceOps.sum
_original_min_max = interpreter.ReduceOps.min_max


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    """numpy 2.4 refuses int() of an array with one dimension, which Triton 3.6 asks for."""
    _original_patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _patch_lang_core(lang: Any, scope: Any) -> None:
    """Types that the interpreters of Triton 3.6 and 3.7 do not know."""
    _original_patch_lang_core(lang, scope)
    original = lang.dtype.to_ir
    scope.set_attr(lang.dtype, "to_ir", lambda self, builder: self if self in FP8 else original(self, builder))


def _sum(reduction: Any, values: Any) -> Any:
    if values.dtype in LOW_PRECISION:
        raise NotImplementedError(f"tl.sum of {values.dtype} rounds in an order of the compiler's: sum in float32")
    return _original_sum(reduction, values)


def _min_max(reduction: Any, values: Any, *operations: Any, **named: Any) -> Any:
    values = values[0] if isinstance(values, tuple) else values
    if (kind := values.dtype) not in LOW_PRECISION:
        return _original_min_max(reduction, values, *operations, **named)
    wide = reduction.to_tensor(_operand(values.handle), tl.float32)
    results = _original_min_max(reduction, wide, *operations, **named)
    results = results if isinstance(results, tuple) else (results,)
    return tuple(_narrowed(result, kind) if result.dtype == tl.float32 else result for result in results)


def _narrowed(tensor: Any, kind: Any) -> Any:
    handle = TensorHandle(encode(tensor.handle.data, kind), kind)
    return tl.core.tensor(handle, tl.block_type(kind, tensor.shape) if tensor.type.is_block() else kind)


class _Exact:
    """The methods of InterpreterBuilder through which every operation on low precision goes."""

    def cast_impl(self: Any, source: Handle, target: Any) -> Handle:
        kind = target.scalar
        if source.dtype.scalar == kind or not {source.dtype.scalar, kind} & LOW_PRECISION:
            return _original["cast_impl"](self, source, target)
        return TensorHandle(encode(decode(source), kind), kind)

    def create_fp_to_fp(self: Any, source: Handle, target: Any, rounding: Any) -> Handle:
        if not {source.dtype.scalar, target.scalar} & LOW_PRECISION:
            return _original["create_fp_to_fp"](self, source, target, rounding)
        if str(rounding).endswith("RTZ"):
            raise NotImplementedError("rounding towards zero to bfloat16 or an 8-bit float")
        return self.cast_impl(source, target)

    def binary_op(self: Any, left: Handle, right: Handle, operation: Callable[..., Array]) -> Handle:
        """Rounding the float32 result is exact: 24 bits hold more than twice the 8 of bfloat16, and 2 more."""
        if not _is_low(left, right):
            return _original["binary_op"](self, left, right, operation)
        result = operation(_operand(left), _operand(right))
        return TensorHandle(result, tl.int1) if result.dtype == np.bool_ else _bfloat16(result)

    def create_minnumf(self: Any, left: Handle, right: Handle) -> Handle:
        """Of NaN and a number the number, which Triton 3.6 and 3.7 forget."""
        return self.binary_op(left, right, np.fmin)

    def create_maxnumf(self: Any, left: Handle, right: Handle) -> Handle:
        return self.binary_op(left, right, np.fmax)

    def unary_op(self: Any, source: Handle, operation: Callable[..., Array]) -> Handle:
        if not _is_low(source):
            return _original["unary_op"](self, source, operation)
        return _bfloat16(operation(_operand(source)))

    def ternary_op(self: Any, a: Handle, b: Handle, c: Handle, operation: Callable[..., Array]) -> Handle:
        if operation is np.where or not _is_low(a, b, c):  # a choice moves bits
            return _original["ternary_op"](self, a, b, c, operation)
        return _bfloat16(operation(_operand(a), _operand(b), _operand(c)))

    def create_fma(self: Any, a: Handle, b: Handle, c: Handle) -> Handle:
        if not _is_low(a, b, c):
            return _original["create_fma"](self, a, b, c)
        return _bfloat16(_fused_multiply_add(*(_operand(x).astype(np.float64) for x in (a, b, c))))

    def create_dot(self: Any, a: Handle, b: Handle, total: Handle, precision: Any, imprecise: Any) -> Handle:
        if not _is_low(a, b):
            return _original["create_dot"](self, a, b, total, precision, imprecise)
        if total.dtype.scalar != tl.float32:
            raise NotImplementedError(f"tl.dot of {a.dtype} into {total.dtype}")
        product = np.matmul(decode(a).astype(np.float32), decode(b).astype(np.float32))
        return TensorHandle(product + total.data, tl.float32)

    def create_atomic_rmw(self: Any, operation: Any, at: Handle, value: Handle, *rest: Any) -> Handle:
        if _is_low(value):
            raise NotImplementedError(f"atomic operations on {value.dtype}")
        return _original["create_atomic_rmw"](self, operation, at, value, *rest)


_original: dict[str, Callable[..., Any]] = {
    name: vars(InterpreterBuilder)[name] for name in vars(_Exact) if not name.startswith("__")
}


def _is_low(*handles: Handle) -> bool:
    return any(handle.dtype.scalar in LOW_PRECISION for handle in handles)


def _operand(handle: Handle) -> Array:
    if handle.dtype.scalar in FP8:
        raise NotImplementedError(f"arithmetic on {handle.dtype}: no GPU has it, convert first")
    return decode(handle)


def _bfloat16(values: Array) -> Handle:
    return TensorHandle(encode(values, tl.bfloat16), tl.bfloat16)


def decode(handle: Handle) -> Array:
    """The numbers that a handle means: its own type, or float32 where the data are bit patterns."""
    kind = handle.dtype.scalar
    if kind == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    if kind in FP8:
        codes = torch.arange(256, dtype=torch.uint8).view(FP8[kind])
        return codes.float().numpy()[handle.data.view(np.uint8)]
    return handle.data


def encode(values: Array, kind: Any) -> Array:
    """Numbers as the data of a handle of this type, rounded once, to nearest and ties to even.

    8-bit floats saturate, as with the conversions of GPUs that have one for them; NaN stays NaN.
    """
    if kind not in LOW_PRECISION:
        return values.astype(interpreter._get_np_dtype(kind))
    values = values if values.dtype == np.float32 else _round_to_odd(values.astype(np.float64))
    if kind == tl.bfloat16:
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
    largest = torch.finfo(FP8[kind]).max
    return torch.from_numpy(np.clip(values, -largest, largest)).to(FP8[kind]).view(torch.uint8).numpy()


def _round_to_odd(values: Array) -> Array:
    """float64 in float32 so that a second rounding, to at most 22 bits, is as if it were the only one.

    What is not exact is truncated and gets a last bit of 1: it is never a tie of the second rounding.
    """
    narrow = values.astype(np.float32)
    is_too_large = np.abs(narrow) > np.abs(values)
    bits = narrow.view(np.uint32) - is_too_large.astype(np.uint32)
    is_inexact = (narrow != values) & ~np.isnan(values)
    return np.where(is_inexact, bits | 1, bits).astype(np.uint32).view(np.float32)


def _fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of bfloat16 values in float64, rounded to odd: the product is exact, the sum may not be."""
    product, c = np.broadcast_arrays(a * b, c)
    total = product + c
    # Knuth's two-sum: total + error is exact
    virtual = total - product
    error = (product - (total - virtual)) + (c - virtual)
    is_even = total.view(np.int64) & 1 == 0
    nudged = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where(np.isfinite(total) & (error != 0) & is_even, nudged, total)
