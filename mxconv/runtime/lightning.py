"""Lightning attention: causal linear attention with a fixed decay for each head, in blocks.

    S_t = e^(-s)·S_(t-1) + k_tᵀ v_t        o_t = q_t·S_t        (the current token is not decayed)

In a block of m tokens whose first token follows state S, with i, j counting from 1:

    o_i = e^(-s·i)·q_i·S + Σ_(j≤i) e^(-s(i-j))·(q_i·k_j)·v_j        S' = e^(-s·m)·S + Σ_j e^(-s(m-j))·k_jᵀ v_j

A padded token is skipped: it adds nothing and decays nothing, so that i, j and m count real tokens only. Every exponent is
at most 0. Decay factors are computed in float64; states are float32, or float64 in a float64 model.

Shapes: q, k, v, out [B, heads, T, D]; state [B, heads, D, D] (k axis, v axis); rates float64 [heads]; mask bool [B, T].
Source: MiniMax-Text-01's modeling code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256


def head_slopes(heads: int) -> list[float]:
    """Slope of each head: 2^(-8(h+1)/heads) for a power of two; else those of the power below, then every other of twice it."""
    below = 1 << (heads.bit_length() - 1)
    if heads == below:
        return [2.0 ** (-8.0 * (head + 1) / heads) for head in range(heads)]
    return head_slopes(below) + head_slopes(2 * below)[0::2][: heads - below]


def decay_rates(heads: int, layer: int, layers: int) -> list[float]:
    """s of each head in `layer` (absolute index) of `layers`: slope · (1 - layer/(layers-1) + 1e-5)."""
    depth = layer / (layers - 1) if layers > 1 else 0.0
    return [slope * (1.0 - depth + 1e-5) for slope in head_slopes(heads)]


@dataclass(frozen=True, slots=True)
class Decay:
    """Factors of one block: `query` and `key` [B, heads, m, 1], `pair` [B, heads, m, m], `whole` [B, heads, 1, 1]; B may be 1."""

    query: Tensor
    key: Tensor
    pair: Tensor
    whole: Tensor


def block_decay(rates: Tensor, counts: Tensor, real: Tensor | None, dtype: torch.dtype) -> Decay:
    """Factors for tokens whose real-token counts in the block are `counts` int64 [B, m]; `real` bool [B, m] drops padded keys."""
    s = rates[:, None]
    count = counts[:, None, :].to(torch.float64)
    last = count[..., -1:]
    gap = count[..., :, None] - count[..., None, :]
    causal = torch.ones(counts.shape[1], counts.shape[1], dtype=torch.bool, device=counts.device).tril()
    kept = causal if real is None else causal & real[:, None, None, :]
    pair = torch.where(kept, torch.exp(-s[..., None] * gap.clamp(min=0)), 0.0)
    key = torch.exp(-s * (last - count))
    if real is not None:
        key = torch.where(real[:, None], key, 0.0)
    return Decay(
        query=torch.exp(-s * count)[..., None].to(dtype), key=key[..., None].to(dtype),
        pair=pair.to(dtype), whole=torch.exp(-s * last)[..., None].to(dtype),
    )  # fmt: skip


class LightningDecay:
    """The decay of one layer's heads: rates, and the factors of unpadded blocks by length."""

    def __init__(self, rates: Sequence[float], device: torch.device, dtype: torch.dtype) -> None:
        self.rates = torch.tensor(rates, dtype=torch.float64, device=device)
        self.dtype = dtype
        self.step = torch.exp(-self.rates)[:, None, None].to(dtype)
        self._full: Decay | None = None

    def block(self, length: int) -> Decay:
        """Factors of `length` ≤ `BLOCK` real tokens; full blocks share one."""
        if length == BLOCK and self._full is not None:
            return self._full
        counts = torch.arange(1, length + 1, device=self.rates.device)[None]
        decay = block_decay(self.rates, counts, None, self.dtype)
        if length == BLOCK:
            self._full = decay
        return decay

    def masked_block(self, real: Tensor) -> Decay:
        """Factors of a block whose real tokens are `real` bool [B, m]."""
        return block_decay(self.rates, real.cumsum(1), real, self.dtype)


def lightning(
    q: Tensor, k: Tensor, v: Tensor, decay: LightningDecay, state: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, state after the last token) of q, k, v in `decay.dtype`; `state` is None at the start of a sequence.

    `state` may be changed in place. Outputs at padded positions are finite and mean nothing.
    """
    batch, heads, tokens, size = q.shape
    if state is None:
        state = q.new_zeros(batch, heads, size, size)
    if tokens == 1 and mask is None:
        state.mul_(decay.step).addcmul_(k.transpose(-1, -2), v)
        return q @ state, state
    out = torch.empty(batch, tokens, heads, size, dtype=q.dtype, device=q.device).transpose(1, 2)
    for start in range(0, tokens, BLOCK):
        stop = min(start + BLOCK, tokens)
        factors = decay.block(stop - start) if mask is None else decay.masked_block(mask[:, start:stop])
        qb, kb, vb = q[:, :, start:stop], k[:, :, start:stop], v[:, :, start:stop]
        scores = (qb @ kb.transpose(-1, -2)).mul_(factors.pair)
        torch.add(scores @ vb, (qb * factors.query) @ state, out=out[:, :, start:stop])
        state = torch.add(state * factors.whole, (kb * factors.key).transpose(-1, -2) @ vb)
    return out, state


def lightning_naive(
    q: Tensor, k: Tensor, v: Tensor, rates: Sequence[float], state: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence itself, token by token: what `lightning` must equal. Same shapes; outputs at padded positions are 0."""
    step = torch.exp(-torch.tensor(rates, dtype=torch.float64)).to(q)[None, :, None, None]
    state = q.new_zeros(*q.shape[:2], q.shape[3], q.shape[3]) if state is None else state
    out = torch.zeros_like(q)
    for t in range(q.shape[2]):
        here = torch.ones(q.shape[0], dtype=torch.bool) if mask is None else mask[:, t]
        moved = step * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        state = torch.where(here[:, None, None, None], moved, state)
        out[:, :, t] = torch.where(here[:, None, None], (q[:, :, t, None, :] @ state)[:, :, 0], 0.0)
    return out, state
