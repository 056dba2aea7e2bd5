"""One decoder layer: x = α·r + β·attention(h), then x = α·r + β·feed_forward(h), h = rms(x), r = h under postnorm, else x."""

from __future__ import annotations

import torch
from torch import Tensor

from mxconv.errors import UsageError
from mxconv.runtime.attention import attend_in_chunks, make_attention
from mxconv.runtime.batch import Batch
from mxconv.runtime.cache import Past
from mxconv.runtime.linear import ACTIVATIONS, Activations
from mxconv.runtime.loader import Weights
from mxconv.runtime.moe import FeedForward, Observer
from mxconv.runtime.norm import add, add_rms_norm, rms_norm
from mxconv.runtime.parallel import Group


class DecoderLayer:
    """Layer `index` with its attention weights widened; experts are kept too, or widened one at a time (`keep=False`)."""

    def __init__(
        self, weights: Weights, index: int, group: Group, device: torch.device, dtype: torch.dtype, *, keep: bool
    ) -> None:
        config = weights.config
        self.index, self.eps, self.postnorm, self._group = index, config.rms_norm_eps, config.postnorm, group
        self.attention_factors = config.alpha_beta(index)
        self.mlp_factors = config.mlp_alpha, config.mlp_beta
        self.attn_norm = weights.dense(index, "attn_norm", group.ranks[0], dtype).to(device)
        self.mlp_norm = weights.dense(index, "mlp_norm", group.ranks[0], dtype).to(device)
        self.attention = make_attention(weights, index, group, device, dtype, keep=keep)
        self.feed_forward = FeedForward(weights, index, group, device, dtype, keep=keep)

    @property
    def capturable(self) -> bool:
        """Whether one token a sequence can be computed without reading anything back from the device."""
        return self.attention.capturable and self.feed_forward.capturable

    def __call__(
        self, x: Tensor, batch: Batch, *, cache: Past | None = None, activations: Activations = "quantized",
        observer: Observer | None = None,
    ) -> Tensor:  # fmt: skip
        """Hidden states [B, T, H] → [B, T, H]. `observer` needs all of an activation in one place: one rank."""
        if observer is not None and self._group.size > 1:
            raise UsageError("expert inputs can be observed at tp 1 only", expected="tp 1", got=f"tp {self._group.size}")
        if activations not in ACTIVATIONS:
            raise UsageError("unknown way to treat activations", expected=" or ".join(ACTIVATIONS), got=repr(activations))
        h = rms_norm(x, self.attn_norm, self.eps)
        update = attend_in_chunks(self.attention, h, batch, cache)
        residual, keep = (h, False) if self.postnorm else (x, True)
        x, h = add_rms_norm(residual, update, self.attention_factors, self.mlp_norm, self.eps, keep=keep)
        return add(h if self.postnorm else x, self.feed_forward(h, batch.mask, activations, observer), self.mlp_factors)

    def release(self) -> None:
        """Let the weights go, whoever still holds the layer: the next one must not stand in memory beside them."""
        del self.attention, self.feed_forward
