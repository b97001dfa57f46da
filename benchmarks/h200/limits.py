"""What a GPU could do at most: the time to move the bytes and to multiply the numbers of a piece of work.

Bytes go at the rate of a large copy, products at that of a large product, both measured in the same run ("ceilings").
The two do not overlap here: products wait for whatever takes longer, their weights or their multiplications, and
attention reads its keys and values after them. A kernel that overlapped them could be faster than this limit.

Only what the answer depends on is counted: in the last layer, prompt tokens that are not sampled from need their keys
and values, hence those two products and everything before, and neither queries nor anything after them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from shapes import SHAPES, request_lengths

BYTES = 2  # of an element in bfloat16


@dataclass(frozen=True)
class Limits:
    """model: a name of SHAPES. bytes_per_s, flops: the ceilings. num_gpus: that share weights and cache evenly."""

    model: str
    bytes_per_s: float
    flops: float
    num_gpus: int = 1

    @classmethod
    def of(cls, result: dict[str, Any], ceilings: dict[str, float]) -> "Limits":
        return cls(result["model"], ceilings["copy_bytes_per_s"], ceilings["bf16_flops"], result.get("num_gpus", 1))

    @property
    def kv_bytes(self) -> float:
        """Of a token, in all layers."""
        shape = SHAPES[self.model]
        head_dim = shape["hidden_size"] // shape["num_attention_heads"]
        return 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head_dim * BYTES / self.num_gpus

    @property
    def sampling_weights(self) -> float:
        """Weights of a layer that in the last one only sampled tokens need: all but those of keys and values."""
        hidden, inner = SHAPES[self.model]["hidden_size"], SHAPES[self.model]["intermediate_size"]
        return hidden * (2 * hidden + 3 * inner) / self.num_gpus

    @property
    def layer_weights(self) -> float:
        """Weights of all layers."""
        shape = SHAPES[self.model]
        hidden = shape["hidden_size"]
        head_dim = hidden // shape["num_attention_heads"]
        kv = hidden * 2 * shape["num_key_value_heads"] * head_dim / self.num_gpus
        return shape["num_hidden_layers"] * (self.sampling_weights + kv)

    @property
    def head_weights(self) -> float:
        return SHAPES[self.model]["vocab_size"] * SHAPES[self.model]["hidden_size"] / self.num_gpus

    def layer_flops(self, num_tokens: float, num_sampled: float) -> float:
        """Of the layers' products."""
        return 2 * (self.layer_weights * num_tokens - self.sampling_weights * (num_tokens - num_sampled))

    def products_s(self, num_tokens: float, num_sampled: float) -> float:
        """A step of num_tokens, of which num_sampled, at least one, need logits."""
        bytes_moved = BYTES * (self.layer_weights + self.head_weights)
        flops = self.layer_flops(num_tokens, num_sampled) + 2 * self.head_weights * num_sampled
        return max(bytes_moved / self.bytes_per_s, flops / self.flops)

    def decode_ms(self, batch: int, context: int, num_steps: int) -> float:
        """A step, on average over num_steps steps."""
        kv = batch * (context + num_steps / 2) * self.kv_bytes
        return 1e3 * (self.products_s(batch, batch) + kv / self.bytes_per_s)

    def prefill_ms(self, num_tokens: int, context: int) -> float:
        """Prompts of `context` tokens, num_tokens together, whole, each sampled from once.

        Of attention the pairs that the causal mask leaves; in the last layer those of each prompt's last token.
        """
        shape = SHAPES[self.model]
        num_prompts = num_tokens // context
        pairs = num_prompts * ((shape["num_hidden_layers"] - 1) * context * (context + 1) / 2 + context)
        attention = 4 * pairs * shape["hidden_size"] / self.num_gpus
        return 1e3 * (self.products_s(num_tokens, num_prompts) + attention / self.flops)

    def throughput_s(self) -> float:
        """The requests of the workload, all admitted at once: steps in which the k-th token of each is computed.

        Of prompts the layers' products are counted, of decode steps the head too; the pairs of prompts are not.
        """
        prompts, outputs = request_lengths()
        running = (outputs[:, None] > np.arange(1, outputs.max())).sum(0)
        decode = sum(self.products_s(n, n) for n in running)
        kv_tokens = float((prompts * outputs + outputs * (outputs - 1) / 2).sum())
        prefill = self.layer_flops(float(prompts.sum()), len(prompts)) / self.flops
        return prefill + decode + kv_tokens * self.kv_bytes / self.bytes_per_s
