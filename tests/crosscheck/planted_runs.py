"""Operations whose kernels are right, wrong by 2%, out of bounds, or racing, for the tests of `crosscheck run`."""

import torch
import triton
import triton.language as tl


def scale(x):
    return x * 3


unmasked = inexact = dropped = scale


def add_in_place(x, y):
    x += y


@triton.jit
def _scale_kernel(x_ptr, out_ptr, num, factor, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < (num if MASKED else num + BLOCK)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    tl.store(out_ptr + offsets, (x.to(tl.float32) * factor).to(x.dtype), mask=mask)


@triton.jit
def _add_kernel(x_ptr, y_ptr, num, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < num
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets, mask=mask) + tl.load(y_ptr + offsets, mask=mask), mask=mask)


def _launch(x, factor=3.0, masked=True, num_programs=None):
    out = torch.zeros_like(x)
    grid = (num_programs or triton.cdiv(x.numel(), 128),)
    _scale_kernel[grid](x, out, x.numel(), factor, MASKED=masked, BLOCK=128, num_warps=1)
    return out


def launch_scale(x):
    return _launch(x)


def launch_inexact(x):
    return _launch(x, factor=3.06)


def launch_unmasked(x):
    return _launch(x, masked=False)


def launch_dropped(x):
    return _launch(x, num_programs=1)


def launch_add_in_place(x, y):
    _add_kernel[lambda meta: (1,)](x, y, x.numel(), BLOCK=256)
