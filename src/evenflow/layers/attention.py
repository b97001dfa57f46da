"""Self-attention: projections, optional head norms, rotary embedding, the paged cache."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from evenflow.kernels.attention import AttentionBatch, paged_attention
from evenflow.kernels.attention_plan import DeviceRows
from evenflow.kernels.paged_attention import paged_attention as device_attention
from evenflow.kernels.rotary import rotary_, rotary_and_store, store_kv
from evenflow.layers.linear import ColumnParallelLinear, RowParallelLinear
from evenflow.layers.loading import Placement
from evenflow.layers.norm import RMSNorm


@dataclass(frozen=True, slots=True)
class LayerBatch:
    """What every layer needs of the step: the rows, and the angles of their tokens.

    cos, sin: [T, 1, D // 2] of each token where a CPU computes the step; [positions, D // 2] of all on a device.
    wanted: [W] indices of the tokens whose hidden states are needed, None for all T. In the last layer the others need
    keys and values, and nothing after attention.
    """

    cos: Tensor
    sin: Tensor
    attention: AttentionBatch | DeviceRows
    wanted: Tensor | None = None

    def of_layers(self, num_layers: int) -> list["LayerBatch"]:
        """What each layer is given: only the last may leave tokens out."""
        return [replace(self, wanted=None)] * (num_layers - 1) + [self]


class SelfAttention(nn.Module):
    """x, residual: [T, hidden] -> our share of [W, hidden], and the residual of these tokens, the batch's wanted ones.

    The share is None where it was added to the residual, see RowParallelLinear.

    kv_cache: this layer's [num_blocks, 2, Hkv, block_size, head_dim], written first. H and Hkv are this rank's heads; a
    key head that several ranks need is held by each of them. k_scale, v_scale: [1] float32, what the keys and values of
    a cache of 8 bits are to be multiplied by.
    """

    k_scale: Tensor
    v_scale: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        place: Placement,
        *,
        window: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        head_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = place.tp.split("num_attention_heads", num_heads)
        kv_ranks = place.tp.sharing("num_key_value_heads", num_kv_heads)
        self.num_kv_heads = kv_ranks.split("num_key_value_heads", num_kv_heads)
        self.head_dim, self.scale, self.window = head_dim, head_dim**-0.5, window
        kv_size = num_kv_heads * head_dim
        parts = {"q_proj": num_heads * head_dim, "k_proj": kv_size, "v_proj": kv_size}
        shared = {"k_proj": kv_ranks, "v_proj": kv_ranks}
        self.qkv_proj = ColumnParallelLinear(hidden_size, parts, qkv_bias, place, shared)
        self.o_proj = RowParallelLinear("o_proj", num_heads * head_dim, hidden_size, out_bias, place)
        self.q_norm = RMSNorm(head_dim, head_norm_eps, place) if head_norm_eps is not None else None
        self.k_norm = RMSNorm(head_dim, head_norm_eps, place) if head_norm_eps is not None else None
        for name in ("k_scale", "v_scale"):
            self.register_buffer(name, torch.ones(1, dtype=torch.float32, device=place.device), persistent=False)

    def forward(self, x: Tensor, batch: LayerBatch, kv_cache: Tensor, residual: Tensor) -> tuple[Tensor | None, Tensor]:
        H, Hkv = self.num_heads, self.num_kv_heads
        qkv = self.qkv_proj(x).view(-1, H + 2 * Hkv, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            qkv[:, :H] = self.q_norm(qkv[:, :H])
            qkv[:, H : H + Hkv] = self.k_norm(qkv[:, H : H + Hkv])
        rows = batch.attention
        if isinstance(rows, AttentionBatch):
            rotary_(qkv[:, : H + Hkv], batch.cos, batch.sin)
            store_kv(qkv[:, H:], kv_cache, rows.store_index)
            out = paged_attention(qkv[:, :H], kv_cache, rows, self.scale, self.window)
        else:
            scales = (self.k_scale, self.v_scale) if kv_cache.dtype.itemsize == 1 else (None, None)
            rotary_and_store(qkv, kv_cache, batch.cos, batch.sin, rows.positions, rows.store_index, H, Hkv, *scales)
            out = device_attention(qkv[:, :H], kv_cache, rows, self.scale, self.window, None, *scales)
        out = out.reshape(-1, H * self.head_dim)
        if batch.wanted is not None:
            out, residual = out.index_select(0, batch.wanted), residual.index_select(0, batch.wanted)
        return self.o_proj(out, residual), residual


def cache_scales(model: nn.Module) -> dict[str, Tensor]:
    """k_scale and v_scale of every layer, by the names that checkpoints give them."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, SelfAttention)}
    return {f"{path}.{name}": getattr(layer, name) for path, layer in layers.items() for name in ("k_scale", "v_scale")}


@torch.no_grad()
def fit_cache_scales(model: nn.Module, cache_dtype: torch.dtype) -> None:
    """Scales are made for e4m3fn. The same bits are half of it in e4m3fnuz: doubled, they keep the same bits there."""
    if cache_dtype == torch.float8_e4m3fnuz:
        for scale in cache_scales(model).values():
            scale.mul_(2.0)
