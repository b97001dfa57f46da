"""Rotary position embedding in LLaMA's half-split form, and the store of keys and values into the paged cache.

Shapes: T tokens, N heads (query and key heads together), D head size, B blocks of S tokens.
"""

from torch import Tensor


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
    rows = kv_cache.view(-1, kv_cache.shape[-1])
    rows.index_copy_(0, store_index, kv.reshape(-1, kv.shape[-1]).to(kv_cache.dtype))
