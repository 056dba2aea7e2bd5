"""The attention of both kinds of layer, rank by rank.

Letters: B sequences, T tokens, N a rank's query heads, K its KV heads, D head_dim. The rows of a rank's fused input weight are
[q_r | k_r | v_r], in lightning layers with its output gate behind them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mxconv.config import LINEAR
from mxconv.runtime.batch import Batch
from mxconv.runtime.cache import Cache
from mxconv.runtime.lightning import LightningDecay, lightning
from mxconv.runtime.loader import Weights
from mxconv.runtime.norm import scale_by_rms, statistics_dtype
from mxconv.runtime.parallel import Group
from mxconv.runtime.rope import rotate_heads

CHUNK_TOKENS = 4096
"""Sequences are taken a few at a time, so that projections and scores of many long ones need not be held at once."""


class LightningAttention:
    """A lightning layer: silu on q, k and v, decayed linear attention, one norm over all heads of all ranks, a sigmoid gate."""

    def __init__(self, weights: Weights, layer: int, group: Group, device: torch.device, dtype: torch.dtype) -> None:
        config = weights.config
        self.layer, self.group, self.head_dim = layer, group, config.head_dim
        self.width = config.num_attention_heads * config.head_dim
        self.inputs, self.norms, self.outputs, self.decays = {}, {}, {}, {}
        for rank in group.ranks:
            self.inputs[rank] = weights.fused(layer, ("q", "k", "v", "output_gate"), rank, dtype).to(device)
            self.norms[rank] = weights.dense(layer, "linear_norm", rank, dtype).to(device)
            self.outputs[rank] = weights.dense(layer, "attn_out", rank, dtype).to(device)
            self.decays[rank] = LightningDecay(weights.rates(layer, rank), device, statistics_dtype(dtype))

    def __call__(self, h: Tensor, batch: Batch, cache: Cache | None) -> Tensor:
        """[B, T, H] → [B, T, H]."""
        heads, gates = {}, {}
        for rank in self.group.ranks:
            heads[rank], gates[rank] = self._attend(rank, h, batch, cache)
        wide = statistics_dtype(h.dtype)
        mean_square = self.group.sum(lambda rank: heads[rank].to(wide).square().sum(-1, keepdim=True)) / self.width

        def partial(rank: int) -> Tensor:
            normed = scale_by_rms(heads[rank], mean_square, self.norms[rank])
            return F.linear(normed * gates[rank], self.outputs[rank])

        return self.group.sum(partial)

    def _attend(self, rank: int, h: Tensor, batch: Batch, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """(attention output [B, T, N·D], gate [B, T, N·D]) of one rank."""
        decay = self.decays[rank]
        fused = F.linear(h, self.inputs[rank])
        width = fused.shape[-1] // 4
        qkv = F.silu(fused[..., : 3 * width]).to(decay.dtype)
        q, k, v = qkv.unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        state = None if cache is None else cache.states.get((self.layer, rank))
        out, state = lightning(q, k, v, decay, state, batch.mask)
        if cache is not None:
            cache.states[self.layer, rank] = state
        return out.transpose(1, 2).flatten(2).to(h.dtype), torch.sigmoid(fused[..., 3 * width :])


class SoftmaxAttention:
    """A softmax layer: grouped queries, rotary positions on the first dims, causal."""

    def __init__(self, weights: Weights, layer: int, group: Group, device: torch.device, dtype: torch.dtype) -> None:
        config = weights.config
        self.layer, self.group, self.head_dim = layer, group, config.head_dim
        self.heads = config.num_attention_heads // group.size
        self.inputs, self.outputs = {}, {}
        for rank in group.ranks:
            self.inputs[rank] = weights.fused(layer, ("q", "k", "v"), rank, dtype).to(device)
            self.outputs[rank] = weights.dense(layer, "attn_out", rank, dtype).to(device)

    def __call__(self, h: Tensor, batch: Batch, cache: Cache | None) -> Tensor:
        """[B, T, H] → [B, T, H]."""
        return self.group.sum(lambda rank: F.linear(self._attend(rank, h, batch, cache), self.outputs[rank]))

    def _attend(self, rank: int, h: Tensor, batch: Batch, cache: Cache | None) -> Tensor:
        """[B, T, N·D] of one rank."""
        fused = F.linear(h, self.inputs[rank]).unflatten(-1, (-1, self.head_dim))
        keys = (fused.shape[2] - self.heads) // 2
        q, k = rotate_heads(fused[:, :, : self.heads + keys], batch.rope).transpose(1, 2).split((self.heads, keys), dim=1)
        v = fused[:, :, self.heads + keys :].transpose(1, 2)
        if cache is not None:
            k, v = cache.keys(self.layer, rank).extend(k, v, batch.past)
        out = attend(q, k, v, batch.allowed, causal=batch.columns > 1 and batch.past == 0)
        return out.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, *, causal: bool) -> Tensor:
    """softmax(q·kᵀ/√D)·v: q [B, N, T, D], k and v [B, K, S, D], query head n with KV head n // (N/K); [B, N, T, D].

    `allowed` bool [B or 1, 1, T, S] says who attends whom; without it `causal` does (S = T), or every query attends all.
    """
    shared = q.shape[1] // k.shape[1]
    if q.shape[2] == 1 and shared > 1:
        # One query a head: the heads of a KV head stand in a row, and no key is copied.
        rows = attend(q.view(q.shape[0], k.shape[1], shared, -1), k, v, allowed, causal=False)
        return rows.reshape(q.shape)
    if shared > 1:
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal and allowed is None)


def make_attention(
    weights: Weights, layer: int, group: Group, device: torch.device, dtype: torch.dtype
) -> LightningAttention | SoftmaxAttention:
    """The attention of `layer`, its weights widened to `dtype` on `device`."""
    kind = LightningAttention if weights.config.layer_types[layer] == LINEAR else SoftmaxAttention
    return kind(weights, layer, group, device, dtype)


def attend_in_chunks(
    attention: LightningAttention | SoftmaxAttention, h: Tensor, batch: Batch, cache: Cache | None
) -> Tensor:
    """`attention` over a few sequences at a time when there is no cache; the result does not depend on it."""
    step = max(1, CHUNK_TOKENS // batch.columns)
    if cache is not None or batch.size <= step:
        return attention(h, batch, cache)
    starts = range(0, batch.size, step)
    return torch.cat([attention(h[a : a + step], batch.rows(a, min(a + step, batch.size)), None) for a in starts])


