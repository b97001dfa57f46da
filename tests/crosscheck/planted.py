"""Kernels with known faults, and sound ones, for the tests of the compile gate. Imported by the compiling child."""

import os
import signal
from dataclasses import dataclass

import triton
import triton.language as tl


@triton.jit
def copy_kernel(x_ptr, out_ptr, num, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < num, other=0.0), mask=offsets < num)


@triton.jit
def paged_dot_kernel(q_ptr, k_cache_ptr, block_table_ptr, out_ptr, num, stride, D: tl.constexpr, BLOCK: tl.constexpr):
    """Reads a paged cache through a block table, so addresses depend on loaded values and go round a loop."""
    d, m = tl.arange(0, D), tl.arange(0, 16)
    q = tl.load(q_ptr + m[:, None] * D + d[None, :])
    acc = tl.zeros((16, BLOCK), tl.float32)
    for start in range(0, num, BLOCK):
        positions = start + tl.arange(0, BLOCK)
        blocks = tl.load(block_table_ptr + positions // 16, mask=positions < num, other=0).to(tl.int64)
        rows = blocks * stride + (positions % 16) * D
        k = tl.load(k_cache_ptr + rows[:, None] + d[None, :], mask=(positions < num)[:, None], other=0.0)
        acc = tl.dot(q, tl.trans(k), acc, input_precision="ieee")
    n = tl.arange(0, BLOCK)
    tl.store(out_ptr + m[:, None] * BLOCK + n[None, :], acc)


@triton.jit
def big_dot_kernel(a_ptr, b_ptr, out_ptr, num, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """With large tiles it spills, or takes more shared memory than there is."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, num, K):
        a = tl.load(a_ptr + m[:, None] * num + (start + k)[None, :])
        b = tl.load(b_ptr + n[:, None] * num + (start + k)[None, :])
        acc = tl.dot(a, tl.trans(b), acc)
    tl.store(out_ptr + m[:, None] * N + n[None, :], acc)


@triton.jit
def refused_kernel(x_ptr, out_ptr, num, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK < 1000, "the tile is too large")
    tl.store(out_ptr, tl.load(x_ptr))


class _Aborts:
    """Looks like a kernel until its arguments are asked for, and then does what LLVM does."""

    @property
    def arg_names(self):
        os.write(2, b"LLVM ERROR: Cannot select: intrinsic\n")
        os.abort()


class _Noisy:
    """A sound kernel whose compilation writes to standard error past Python."""

    @property
    def arg_names(self):
        os.write(2, b"warning: loop not unrolled\n")
        return copy_kernel.arg_names

    def __getattr__(self, name):
        return getattr(copy_kernel, name)


class _Hangs:
    @property
    def arg_names(self):
        signal.pause()


aborting_kernel, noisy_kernel, hanging_kernel = _Aborts(), _Noisy(), _Hangs()


@dataclass(frozen=True)
class Specialization:
    kernel: str
    signature: dict
    constexprs: dict
    aligned: tuple
    num_warps: int
    num_stages: int
    name: str


def copy(kernel: str = "copy", name: str = "fp32") -> Specialization:
    """Of a kernel with the arguments of copy_kernel."""
    arguments = {"x_ptr": "*fp32", "out_ptr": "*fp32", "num": "i32"}
    return Specialization(f"planted:{kernel}_kernel", arguments, {"BLOCK": 1024}, tuple(arguments), 4, 1, name)


def paged_dot(name: str, aligned: bool = True) -> Specialization:
    pointers = {"q_ptr": "*bf16", "k_cache_ptr": "*bf16", "block_table_ptr": "*i32", "out_ptr": "*fp32"}
    names = (*pointers, "stride") if aligned else ()
    signature = {**pointers, "num": "i32", "stride": "i32"}
    return Specialization("planted:paged_dot_kernel", signature, {"D": 64, "BLOCK": 32}, names, 4, 2, name)


def big_dot(name: str, m: int, n: int, k: int, num_warps: int, num_stages: int) -> Specialization:
    signature = {"a_ptr": "*fp16", "b_ptr": "*fp16", "out_ptr": "*fp32", "num": "i32"}
    sizes = {"M": m, "N": n, "K": k}
    return Specialization("planted:big_dot_kernel", signature, sizes, tuple(signature), num_warps, num_stages, name)


SOUND = [copy(), paged_dot("bf16"), big_dot("64x64", 64, 64, 32, 4, 2)]
DEFECTS = [
    big_dot("spills", 256, 128, 32, num_warps=1, num_stages=1),
    big_dot("too-much-lds", 128, 128, 128, num_warps=8, num_stages=3),
    big_dot("no-matrix", 8, 16, 16, num_warps=1, num_stages=1),
    paged_dot("narrow", aligned=False),
    copy("noisy"),
    copy("aborting"),
    copy("missing"),
    copy("refused"),
    Specialization("planted:copy_kernel", {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {"BLOCK": 64}, (), 4, 1, "misnamed"),
    copy("copy", "after-the-abort"),
]
