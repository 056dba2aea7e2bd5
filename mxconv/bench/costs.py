"""The least work that a rank must do: bytes through memory and arithmetic operations, counted from the config.

Every weight is read once, with experts as many as `tokens` are expected to touch under even routing; a state is read and written
once; keys and values are read once; hidden states, which stay in caches at these sizes, are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mxconv.config import LINEAR, ModelConfig
from mxconv.quantize.schemes import Scheme

if TYPE_CHECKING:
    from mxconv.runtime.model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One of `tp` ranks of a model whose dense weights have `item_bytes` each and whose experts `scheme` holds."""

    config: ModelConfig
    tp: int
    item_bytes: int
    scheme: Scheme | None

    @classmethod
    def of(cls, model: Model) -> Cut:
        """What one rank of `model` holds."""
        return cls(config=model.config, tp=model.tp, item_bytes=model.dtype.itemsize, scheme=model.weights.scheme)

    @property
    def expert_bits(self) -> float:
        """Bits an expert weight takes."""
        return 8.0 * self.item_bytes if self.scheme is None else self.scheme.bits_per_weight

    @property
    def kv_heads(self) -> int:
        """KV heads of the rank."""
        return max(1, self.config.num_key_value_heads // self.tp)

    def attention_weights(self, layer: int) -> int:
        """Weights of the projections of a layer's attention."""
        c, width = self.config, self.config.num_attention_heads // self.tp * self.config.head_dim
        fused = 4 * width if c.layer_types[layer] == LINEAR else width + 2 * self.kv_heads * c.head_dim
        return c.hidden_size * (fused + width)

    @property
    def expert_weights(self) -> int:
        """Weights of one expert."""
        return 3 * self.config.hidden_size * self.config.intermediate_size // self.tp

    def shared_weights(self, layer: int) -> int:
        """Weights of the shared expert of a layer, 0 without one."""
        return 3 * self.config.hidden_size * self.config.shared_intermediate_sizes[layer] // self.tp

    @property
    def head_weights(self) -> int:
        """Weights of the output head."""
        return self.config.vocab_size * self.config.hidden_size // self.tp

    def experts_bytes(self, tokens: int) -> float:
        """Bytes of the experts that `tokens` tokens touch in one layer."""
        experts = self.config.num_experts
        touched = experts * (1 - (1 - self.config.experts_per_token / experts) ** tokens)
        return touched * self.expert_weights * self.expert_bits / 8

    def experts_operations(self, tokens: int) -> float:
        """Operations of the experts of one layer for `tokens` tokens."""
        return 2.0 * tokens * self.config.experts_per_token * self.expert_weights

    def past_bytes(self, layer: int, slots: int, context: int) -> float:
        """Bytes of states (read and written) or of keys and values (read) for one token in each of `slots`."""
        c = self.config
        if c.layer_types[layer] == LINEAR:
            return 2.0 * slots * c.num_attention_heads // self.tp * c.head_dim**2 * 4
        return 2.0 * slots * context * self.kv_heads * c.head_dim * self.item_bytes

    def attention_operations(self, layer: int, tokens: int) -> float:
        """Operations of a prompt's attention without its projections: linear in `tokens`, or causal and quadratic."""
        c, heads = self.config, self.config.num_attention_heads // self.tp
        if c.layer_types[layer] == LINEAR:
            return 4.0 * tokens * heads * c.head_dim**2
        return 2.0 * tokens**2 * heads * c.head_dim

    def weights_bytes(self, tokens: int) -> float:
        """Bytes of the weights of the whole model that `tokens` tokens touch."""
        c = self.config
        total = float(self.head_weights * self.item_bytes)
        for layer in range(c.num_layers):
            total += (self.attention_weights(layer) + self.shared_weights(layer)) * self.item_bytes
            total += self.experts_bytes(tokens) + 4 * c.num_experts * c.hidden_size
        return total

    def step_bytes(self, slots: int, context: int) -> float:
        """Bytes of one decoding step of the whole model."""
        past = sum(self.past_bytes(layer, slots, context) for layer in range(self.config.num_layers))
        return self.weights_bytes(slots) + past

    def prompt_operations(self, tokens: int) -> tuple[float, float]:
        """(operations in the model's dtype, those of routed experts) of a prompt of `tokens`, logits of its last token alone."""
        dense = 2.0 * self.head_weights
        for layer in range(self.config.num_layers):
            dense += 2.0 * tokens * (self.attention_weights(layer) + self.shared_weights(layer))
            dense += self.attention_operations(layer, tokens)
        return dense, self.config.num_layers * self.experts_operations(tokens)
