"""Angles of the rotary embedding for every implemented kind. The rotation itself is in kernels/rotary.py.

Sources: Su et al. 2021 (default), kaiokendev 2023 (linear), Peng et al., YaRN, arXiv 2309.00071 (yarn), and Meta's
Llama 3.1 release (llama3). "dynamic" equals "default" within the context that this engine allows it.
"""

import math

import torch
from torch import Tensor

from evenflow.model_config import RopeConfig


def cos_sin(rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of every position: two [num_positions, 1, head_dim // 2] in float32."""
    inv_freq = inverse_frequencies(rope, head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * inv_freq
    scale = _attention_scale(rope)
    return (angles.cos() * scale)[:, None].to(device), (angles.sin() * scale)[:, None].to(device)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair, [head_dim // 2] in float32."""
    inv_freq = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.kind == "linear":
        return inv_freq / rope.factor
    if rope.kind == "llama3":
        return _llama3(inv_freq, rope)
    if rope.kind == "yarn":
        return _yarn(inv_freq, rope, head_dim)
    return inv_freq


def _llama3(inv_freq: Tensor, rope: RopeConfig) -> Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between are blended."""
    wavelengths = 2 * math.pi / inv_freq
    blend = (rope.original_max_position / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * inv_freq / rope.factor + blend * inv_freq


def _yarn(inv_freq: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """Between the pairs that turn beta_slow and beta_fast times in the original context, from stretched to kept."""

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(rope.original_max_position / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    stretched = ramp.clamp(0.0, 1.0)
    return inv_freq / rope.factor * stretched + inv_freq * (1 - stretched)


def _attention_scale(rope: RopeConfig) -> float:
    """YaRN's temperature, applied to cos and sin."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
