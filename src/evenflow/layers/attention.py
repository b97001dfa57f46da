"""Self-attention: projections, optional head norms, rotary embedding, the paged cache."""

from dataclasses import dataclass

from torch import Tensor, nn

from evenflow.kernels.attention import AttentionBatch, paged_attention
from evenflow.kernels.rotary import rotary_, store_kv
from evenflow.layers.linear import ColumnParallelLinear, RowParallelLinear
from evenflow.layers.loading import Placement
from evenflow.layers.norm import RMSNorm


@dataclass(frozen=True, slots=True)
class LayerBatch:
    """What every layer needs of the step: the angles of the tokens' positions ([T, 1, D // 2]) and the rows."""

    cos: Tensor
    sin: Tensor
    attention: AttentionBatch


class SelfAttention(nn.Module):
    """[T, hidden] -> our share of [T, hidden].

    kv_cache: this layer's [num_blocks, 2, Hkv, block_size, head_dim], written first. H and Hkv are this rank's heads; a
    key head that several ranks need is held by each of them.
    """

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

    def forward(self, x: Tensor, batch: LayerBatch, kv_cache: Tensor) -> Tensor:
        H, Hkv = self.num_heads, self.num_kv_heads
        qkv = self.qkv_proj(x).view(-1, H + 2 * Hkv, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            qkv[:, :H] = self.q_norm(qkv[:, :H])
            qkv[:, H : H + Hkv] = self.k_norm(qkv[:, H : H + Hkv])
        rotary_(qkv[:, : H + Hkv], batch.cos, batch.sin)
        store_kv(qkv[:, H:], kv_cache, batch.attention.store_index)
        out = paged_attention(qkv[:, :H], kv_cache, batch.attention, self.scale, self.window)
        return self.o_proj(out.reshape(-1, H * self.head_dim))
