"""Mistral: LLaMA with a sliding attention window in every layer."""

import torch
from torch import Tensor, nn

from evenflow.layers.attention import LayerBatch, SelfAttention
from evenflow.layers.embedding import Embedding
from evenflow.layers.loading import Placement
from evenflow.layers.mlp import GatedMLP
from evenflow.layers.norm import RMSNorm
from evenflow.model_config import ModelConfig


class MistralLayer(nn.Module):
    def __init__(self, config: ModelConfig, window: int | None, place: Placement) -> None:
        super().__init__()
        self.self_attn = SelfAttention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            place,
            window=window,
        )
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, False, place)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, place)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, place)

    def forward(
        self, x: Tensor | None, residual: Tensor, batch: LayerBatch, kv_cache: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        x, residual = self.input_layernorm.add_and_norm(x, residual)
        x, residual = self.self_attn(x, batch, kv_cache, residual)
        x, residual = self.post_attention_layernorm.add_and_norm(x, residual)
        return self.mlp(x, residual), residual


class MistralModel(nn.Module):
    def __init__(self, config: ModelConfig, place: Placement) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, place)
        self.layers = nn.ModuleList(MistralLayer(config, window, place) for window in config.windows)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, place)

    def forward(self, token_ids: Tensor, batch: LayerBatch, kv_caches: list[Tensor]) -> Tensor:
        x = self.embed_tokens(token_ids)
        residual = torch.zeros_like(x)
        batches = batch.of_layers(len(kv_caches))
        for layer, layer_batch, kv_cache in zip(self.layers, batches, kv_caches, strict=True):
            x, residual = layer(x, residual, layer_batch, kv_cache)
        return self.norm.add_and_norm(x, residual)[0]


class MistralForCausalLM(nn.Module):
    """forward: ids [T] -> hidden [W, hidden], see LayerBatch; logits: hidden rows [R, hidden] -> [R, vocab]."""

    def __init__(self, config: ModelConfig, place: Placement) -> None:
        super().__init__()
        self.model = MistralModel(config, place)
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config.vocab_size, config.hidden_size, place)
        self.is_tied = config.tie_word_embeddings

    def forward(self, token_ids: Tensor, batch: LayerBatch, kv_caches: list[Tensor]) -> Tensor:
        return self.model(token_ids, batch, kv_caches)

    def logits(self, hidden: Tensor) -> Tensor:
        return (self.model.embed_tokens if self.is_tied else self.lm_head).logits(hidden)
