"""The attention of both kinds of layer, rank by rank.

Letters: B sequences, T tokens, N a rank's query heads, K its KV heads, D head_dim. The rows of a rank's fused input weight are
[q_r | k_r | v_r], in lightning layers with its output gate behind them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mxconv.config import LINEAR
from mxconv.dispatch import triton_wanted
from mxconv.runtime.batch import Batch
from mxconv.runtime.cache import Past
from mxconv.runtime.lightning import LightningDecay
from mxconv.runtime.linear import arranged, project
from mxconv.runtime.loader import Weights
from mxconv.runtime.norm import scale_by_rms, statistics_dtype
from mxconv.runtime.parallel import Group
from mxconv.runtime.recurrence import recur
from mxconv.runtime.rope import rotate_heads
from mxconv.runtime.softmax import attend_batch

CHUNK_TOKENS = 4096
"""Sequences are taken a few at a time, so that projections and scores of many long ones need not be held at once."""


class LightningAttention:
    """A lightning layer: silu on q, k and v, decayed linear attention, one norm over all heads of all ranks, a sigmoid gate."""

    def __init__(
        self, weights: Weights, layer: int, group: Group, device: torch.device, dtype: torch.dtype, *, keep: bool
    ) -> None:
        config = weights.config
        self.layer, self.group, self.head_dim = layer, group, config.head_dim
        self.width = config.num_attention_heads * config.head_dim
        self.inputs, self.norms, self.outputs, self.decays = {}, {}, {}, {}
        order = arranged if keep else _as_given
        for rank in group.ranks:
            self.inputs[rank] = order(weights.fused(layer, ("q", "k", "v", "output_gate"), rank, dtype).to(device))
            self.norms[rank] = weights.dense(layer, "linear_norm", rank, dtype).to(device)
            self.outputs[rank] = order(weights.dense(layer, "attn_out", rank, dtype).to(device))
            self.decays[rank] = LightningDecay(weights.rates(layer, rank), device, statistics_dtype(dtype))

    @property
    def capturable(self) -> bool:
        """Whether a step reads nothing back from the device: the definition asks there which slots are active."""
        weight = self.inputs[self.group.ranks[0]]
        return triton_wanted("lightning_decode", weight.device, weight.dtype, head_dim=self.head_dim)

    def __call__(self, h: Tensor, batch: Batch, cache: Past | None) -> Tensor:
        """[B, T, H] → [B, T, H]."""
        heads, gates = {}, {}
        for rank in self.group.ranks:
            heads[rank], gates[rank] = self._attend(rank, h, batch, cache)
        if triton_wanted("lightning_norm", h.device, h.dtype):
            return self._finish_by_kernel(heads, gates)
        mean_square = self._mean_square(heads)

        def partial(rank: int) -> Tensor:
            normed = scale_by_rms(heads[rank], mean_square, self.norms[rank])
            return project(normed * torch.sigmoid(gates[rank]), self.outputs[rank])

        return self.group.sum(partial)

    def _mean_square(self, heads: Mapping[int, Tensor]) -> Tensor:
        """[B, T, 1] over the heads of all ranks."""
        def square_sum(rank: int) -> Tensor:
            return heads[rank].to(statistics_dtype(heads[rank].dtype)).square().sum(-1, keepdim=True)

        return self.group.sum(square_sum) / self.width

    def _finish_by_kernel(self, heads: Mapping[int, Tensor], gates: Mapping[int, Tensor]) -> Tensor:
        """Norm, gate and output projection, the first two in one kernel, which takes one rank's mean of squares itself."""
        from mxconv.runtime.kernels.lightning_norm_gate import lightning_norm_gate

        mean_square = None
        if self.group.size > 1:
            # One pass over the bf16 values, summed in float32.
            total = self.group.sum(lambda rank: torch.linalg.vector_norm(heads[rank], dim=-1, dtype=torch.float32).square_())
            mean_square = total.flatten() / self.width

        def partial(rank: int) -> Tensor:
            x, gate = heads[rank].flatten(0, 1), gates[rank].flatten(0, 1)
            normed = lightning_norm_gate(x, gate, self.norms[rank], mean_square)
            return F.linear(normed, self.outputs[rank]).unflatten(0, heads[rank].shape[:2])

        return self.group.sum(partial)

    def _attend(self, rank: int, h: Tensor, batch: Batch, cache: Past | None) -> tuple[Tensor, Tensor]:
        """(attention output, output gate before its sigmoid), both [B, T, N·D], of one rank."""
        decay = self.decays[rank]
        fused = project(h, self.inputs[rank])
        width = fused.shape[-1] // 4
        states, slots = None, None
        if cache is not None:
            states, slots = cache.recurrent(self.layer, rank, (width // self.head_dim, self.head_dim), decay.dtype)
        out = recur(fused[..., : 3 * width], self.head_dim, decay, states, slots, batch.mask)
        return out, fused[..., 3 * width :]


class SoftmaxAttention:
    """A softmax layer: grouped queries, rotary positions on the first dims, causal."""

    def __init__(
        self, weights: Weights, layer: int, group: Group, device: torch.device, dtype: torch.dtype, *, keep: bool
    ) -> None:
        config = weights.config
        self.layer, self.group, self.head_dim = layer, group, config.head_dim
        self.heads = config.num_attention_heads // group.size
        self.inputs, self.outputs = {}, {}
        order = arranged if keep else _as_given
        for rank in group.ranks:
            self.inputs[rank] = order(weights.fused(layer, ("q", "k", "v"), rank, dtype).to(device))
            self.outputs[rank] = order(weights.dense(layer, "attn_out", rank, dtype).to(device))

    @property
    def capturable(self) -> bool:
        """A step reads nothing back from the device."""
        return True

    def __call__(self, h: Tensor, batch: Batch, cache: Past | None) -> Tensor:
        """[B, T, H] → [B, T, H]."""
        return self.group.sum(lambda rank: project(self._attend(rank, h, batch, cache), self.outputs[rank]))

    def _attend(self, rank: int, h: Tensor, batch: Batch, cache: Past | None) -> Tensor:
        """[B, T, N·D] of one rank."""
        fused = project(h, self.inputs[rank]).unflatten(-1, (-1, self.head_dim))
        keys = (fused.shape[2] - self.heads) // 2
        q, k = rotate_heads(fused[:, :, : self.heads + keys], batch.rope).split((self.heads, keys), dim=2)
        v = fused[:, :, self.heads + keys :]
        out = attend_batch(q, k, v, batch) if cache is None else cache.attend(self.layer, rank, q, k, v, batch)
        return out.flatten(2)


def _as_given(weight: Tensor) -> Tensor:
    return weight


def make_attention(
    weights: Weights, layer: int, group: Group, device: torch.device, dtype: torch.dtype, *, keep: bool
) -> LightningAttention | SoftmaxAttention:
    """The attention of `layer`, its weights widened to `dtype` on `device`; `keep` if it serves many calls."""
    kind = LightningAttention if weights.config.layer_types[layer] == LINEAR else SoftmaxAttention
    return kind(weights, layer, group, device, dtype, keep=keep)


def attend_in_chunks(
    attention: LightningAttention | SoftmaxAttention, h: Tensor, batch: Batch, cache: Past | None
) -> Tensor:
    """`attention` over a few sequences at a time when there is no cache; the result does not depend on it."""
    step = max(1, CHUNK_TOKENS // batch.columns)
    if cache is not None or batch.size <= step:
        return attention(h, batch, cache)
    starts = range(0, batch.size, step)
    return torch.cat([attention(h[a : a + step], batch.rows(a, min(a + step, batch.size)), None) for a in starts])


