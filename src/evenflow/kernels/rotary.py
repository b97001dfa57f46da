"""Rotary position embedding in LLaMA's half-split form, and the store of keys and values into the paged cache.

Shapes: T tokens, N heads (query and key heads together), D head size, B blocks of S tokens.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
from torch import Tensor

from evenflow.kernels.language import (
    arch_of,
    cdiv,
    dependent_launch,
    jit,
    next_power_of_2,
    tl,
    wait_for_previous,
)


def rotary_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate every head of x in place. x: [T, N, D]; cos, sin: [T, 1, D // 2] in float32.

    Source: Su et al., RoFormer (2021), with the two halves of the head as the pairs.
    """
    half = x.shape[-1] // 2
    first, second = x[..., :half].float(), x[..., half:].float()
    rotated = first * cos - second * sin  # kept apart: `first` may be a view of what is written next
    x[..., half:] = second * cos + first * sin
    x[..., :half] = rotated


def store_kv(kv: Tensor, kv_cache: Tensor, store_index: Tensor) -> None:
    """Write keys and values into their pages. kv: [T, 2 * Hkv, D], keys first; kv_cache: [B, 2, Hkv, S, D].

    store_index: [T * 2 * Hkv], the row of the cache seen as [B * 2 * Hkv * S, D].
    """
    rows, kv = kv_cache.view(-1, kv_cache.shape[-1]), kv.reshape(-1, kv.shape[-1]).to(kv_cache.dtype)
    if rows.dtype.itemsize == 1:  # torch copies 8-bit floats only as bytes
        rows, kv = rows.view(torch.uint8), kv.view(torch.uint8)
    rows.index_copy_(0, store_index, kv)


def rotary_and_store(
    qkv: Tensor,
    kv_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    store_index: Tensor,
    num_heads: int,
    num_kv_heads: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Rotate queries and keys in place, then write keys and values into their pages.

    qkv: [T, (H + 2 * Hkv) * D] or [T, H + 2 * Hkv, D], rows may be strided. kv_cache: [B, 2, Hkv, S, D].
    cos, sin: [max_position, D // 2] float32. positions: [T]. store_index: [T], block * S + offset, -1 stores nothing.
    k_scale, v_scale: [1] or [Hkv] float32; the cache gets value / scale, at most its type's largest number.
    """
    if qkv.is_cuda:
        launch_rotary_and_store(
            qkv, kv_cache, cos, sin, positions, store_index, num_heads, num_kv_heads, k_scale, v_scale
        )
        return
    size, block_size = kv_cache.shape[-1], kv_cache.shape[-2]
    heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, size)
    rotary_(heads[:, : num_heads + num_kv_heads], cos[positions][:, None], sin[positions][:, None])
    stored = torch.nonzero(store_index >= 0)[:, 0]
    keys, values = heads[stored, num_heads:].chunk(2, dim=1)
    keys, values = _quantized(keys, kv_cache, k_scale), _quantized(values, kv_cache, v_scale)
    blocks, offsets = store_index[stored] // block_size, store_index[stored] % block_size
    kv_heads = torch.arange(2 * num_kv_heads, device=qkv.device)
    rows = (blocks[:, None] * 2 * num_kv_heads + kv_heads) * block_size + offsets[:, None]
    store_kv(torch.cat([keys, values], dim=1), kv_cache, rows.flatten())


def _quantized(x: Tensor, kv_cache: Tensor, scale: Tensor | None) -> Tensor:
    """x: [T, Hkv, D] as the cache keeps it."""
    if kv_cache.dtype.itemsize > 1:
        return x.to(kv_cache.dtype)
    most = torch.finfo(kv_cache.dtype).max
    x = x.float() if scale is None else x.float() / scale[:, None]
    return x.clamp(-most, most).to(kv_cache.dtype)


@jit
def _rotary_and_store_kernel(
    qkv_ptr, kv_cache_ptr, cos_ptr, sin_ptr, positions_ptr, store_index_ptr, k_scale_ptr, v_scale_ptr, token_stride,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, S: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    LARGEST: tl.constexpr, HAS_SCALE: tl.constexpr, SCALE_STRIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A token's heads, HEADS of them: halves of D // 2, padded to BLOCK. LARGEST: of the cache's type, 0: no clamp."""
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    cols = tl.arange(0, BLOCK)
    mask = (heads < H + 2 * HKV)[:, None] & (cols < HALF)[None, :]
    starts = token * token_stride + heads * D
    wait_for_previous(PDL)
    first_ptr = qkv_ptr + starts[:, None] + cols[None, :]
    first = tl.load(first_ptr, mask=mask, other=0.0)
    second = tl.load(first_ptr + HALF, mask=mask, other=0.0)
    angles = tl.load(positions_ptr + token) * HALF + cols
    cos = tl.load(cos_ptr + angles, mask=cols < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + angles, mask=cols < HALF, other=0.0)[None, :]
    first32, second32 = first.to(tl.float32), second.to(tl.float32)
    is_rotated = (heads < H + HKV)[:, None]
    first = tl.where(is_rotated, (first32 * cos - second32 * sin).to(first.dtype), first)
    second = tl.where(is_rotated, (second32 * cos + first32 * sin).to(first.dtype), second)
    tl.store(first_ptr, first, mask=mask & is_rotated)
    tl.store(first_ptr + HALF, second, mask=mask & is_rotated)
    index = tl.load(store_index_ptr + token)
    if index < 0:
        return
    kv_heads = heads - H
    if LARGEST > 0:
        first, second = first.to(tl.float32), second.to(tl.float32)
        if HAS_SCALE:
            is_key = kv_heads < HKV
            scale_heads = tl.where(is_key, kv_heads, kv_heads - HKV) * SCALE_STRIDE
            is_kept = (kv_heads >= 0) & (kv_heads < 2 * HKV)
            scale = tl.load(k_scale_ptr + scale_heads, mask=is_kept & is_key, other=1.0)
            scale = tl.where(is_key, scale, tl.load(v_scale_ptr + scale_heads, mask=is_kept & ~is_key, other=1.0))
            first, second = tl.div_rn(first, scale[:, None]), tl.div_rn(second, scale[:, None])
        first = tl.clamp(first, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        second = tl.clamp(second, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    rows = (index // S * (2 * HKV) + kv_heads) * S + index % S
    cache_ptr = kv_cache_ptr + rows[:, None] * D + cols[None, :]
    is_stored = mask & (heads >= H)[:, None]
    tl.store(cache_ptr, first.to(kv_cache_ptr.dtype.element_ty), mask=is_stored)
    tl.store(cache_ptr + HALF, second.to(kv_cache_ptr.dtype.element_ty), mask=is_stored)


def rotary_tile(num_heads: int, head_size: int) -> tuple[int, int, int]:
    """(heads a program, padded half head, num_warps) for a token of num_heads: at most 2,048 elements a program.

    Two warps at most, so that a thread has the 8 neighbours of a 16-byte access whether a warp is 32 or 64 wide.
    """
    block = next_power_of_2(head_size // 2)
    heads = min(max(1024 // block, 1), next_power_of_2(num_heads))
    return heads, block, min(max(heads * block // 512, 1), 2)


def launch_rotary_and_store(
    qkv: Tensor,
    kv_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    store_index: Tensor,
    num_heads: int,
    num_kv_heads: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    arch: str | None = None,
) -> None:
    """The kernel of rotary_and_store. arch: None for that of qkv."""
    num_tokens, num_all = len(qkv), num_heads + 2 * num_kv_heads
    block_size, size = kv_cache.shape[-2:]
    assert qkv.stride(-1) == 1
    assert qkv.ndim == 2 or qkv.stride(1) == size
    assert qkv[:1].numel() == num_all * size or num_tokens == 0
    assert kv_cache.is_contiguous()
    assert kv_cache.shape[1:3] == (2, num_kv_heads)
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    assert cos.shape[1] == sin.shape[1] == size // 2
    assert (k_scale is None) == (v_scale is None)
    assert k_scale is None or v_scale is None or k_scale.shape == v_scale.shape
    if num_tokens == 0:
        return
    heads, block, num_warps = rotary_tile(num_all, size)
    is_small = kv_cache.dtype.itemsize == 1
    _rotary_and_store_kernel[(num_tokens, cdiv(num_all, heads))](
        qkv, kv_cache, cos, sin, positions, store_index, k_scale, v_scale, qkv.stride(0),
        H=num_heads, HKV=num_kv_heads, D=size, S=block_size, HEADS=heads, BLOCK=block,
        LARGEST=torch.finfo(kv_cache.dtype).max if is_small else 0.0, HAS_SCALE=is_small and k_scale is not None,
        SCALE_STRIDE=int(k_scale is not None and k_scale.numel() > 1), num_warps=num_warps,
        **dependent_launch(arch_of(qkv, arch)),
    )  # fmt: skip
