"""Self-attention: projections, optional head norms, rotary embedding, the paged cache."""

from dataclasses import dataclass

from torch import Tensor, nn

from evenflow.kernels.attention import AttentionBatch, paged_attention
from evenflow.kernels.paged_attention import DeviceRows
from evenflow.kernels.paged_attention import paged_attention as device_attention
from evenflow.kernels.rotary import rotary_, rotary_and_store, store_kv
from evenflow.layers.linear import ColumnParallelLinear, RowParallelLinear
from evenflow.layers.loading import Placement
from evenflow.layers.norm import RMSNorm


@dataclass(frozen=True, slots=True)
class LayerBatch:
    """What every layer needs of the step: the rows, and the angles of their tokens.

    cos, sin: [T, 1, D // 2] of each token where a CPU computes the step; [positions, D // 2] of all on a device.
    """

    cos: Tensor
    sin: Tensor
    attention: AttentionBatch | DeviceRows


class SelfAttention(nn.Module):
    """[T, hidden] -> [T, hidden]. kv_cache: this layer's [num_blocks, 2, Hkv, block_size, head_dim], written first."""

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
        self.num_kv_heads = place.tp.split("num_key_value_heads", num_kv_heads)
        self.head_dim, self.scale, self.window = head_dim, head_dim**-0.5, window
        kv_size = num_kv_heads * head_dim
        parts = {"q_proj": num_heads * head_dim, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv_proj = ColumnParallelLinear(hidden_size, parts, qkv_bias, place)
        self.o_proj = RowParallelLinear("o_proj", num_heads * head_dim, hidden_size, out_bias, place)
        self.q_norm = RMSNorm(head_dim, head_norm_eps, place) if head_norm_eps is not None else None
        self.k_norm = RMSNorm(head_dim, head_norm_eps, place) if head_norm_eps is not None else None

    def forward(self, x: Tensor, batch: LayerBatch, kv_cache: Tensor) -> Tensor:
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
            rotary_and_store(qkv, kv_cache, batch.cos, batch.sin, rows.positions, rows.store_index, H, Hkv)
            out = device_attention(qkv[:, :H], kv_cache, rows, self.scale, self.window)
        return self.o_proj(out.reshape(-1, H * self.head_dim))
