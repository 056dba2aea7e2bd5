"""Lightning attention in float64, and inputs for it: what the kernels are held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mxconv.runtime.lightning import LightningDecay, lightning

BARS = {torch.float32: (4e-6, 4e-6), torch.float16: (1e-3, 1e-3), torch.bfloat16: (2.5e-3, 1.6e-3)}
"""Relative L2 of (outputs, states) of the worst head by dtype, for inputs behind SiLU: zero-mean inputs average no rounding away.

What bf16 may reach was computed with its rounding emulated: 2.4e-3 where a head decays within a token, 1.75e-3 where it does not.
"""
HOPPER = (2.5e-3, 1.3e-3)
"""Of bf16 by the Hopper kernel, which splits the values that weigh most in a state: emulated, states of a single head reach 1.2e-3
behind one chunk (at s = 6e-5, where nearly every other value rounds back to itself), and 7e-4 behind many."""
WHOLE = (2e-3, 1e-3)
"""Of bf16 by the Hopper kernel over the heads of a layer, or of most ranks."""
WIDENED = (5e-4, 4e-6)
"""Of fp16, which is taken as float32."""


@dataclass
class Case:
    """Packed inputs q, k, v [T, N, D], rates float64 [N], lengths of the sequences, float32 states before them."""

    q: Tensor
    k: Tensor
    v: Tensor
    rates: Tensor
    lengths: list[int]
    state: Tensor
    mask: Tensor | None = None

    @property
    def cu_seqlens(self) -> Tensor:
        ends = torch.tensor([0, *self.lengths]).cumsum(0)
        return ends.to(torch.int32).to(self.q.device)


def draw(
    lengths: list[int], heads: int, size: int, dtype: torch.dtype, device: str, *, seed: int = 0, rates: list[float] | None = None
) -> Case:
    """q, k, v are strided views of one buffer whose other columns are NaN."""
    random = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    fused = torch.full((tokens, heads, 3 * size + 16), torch.nan, dtype=torch.float32)
    fused[..., : 3 * size] = F.silu(torch.randn(tokens, heads, 3 * size, generator=random))
    fused = fused.to(device, dtype)
    q, k, v = fused[..., : 3 * size].split(size, -1)
    chosen = [2.0 ** (-8 * (head + 1) / heads) for head in range(heads)] if rates is None else rates
    before = F.silu(torch.randn(2, len(lengths), heads, 50, size, generator=random))  # a state that earlier tokens could leave
    state = (before[0].transpose(-1, -2) @ before[1]).to(device)
    return Case(q, k, v, torch.tensor(chosen, dtype=torch.float64, device=device), lengths, state)


def expected(case: Case, *, started: bool) -> tuple[Tensor, Tensor]:
    """(outputs [T, N, D], states [S, N, D, D]) in float64; where the mask is False outputs are 0."""
    outs, states, row = [], [], 0
    decay = LightningDecay(case.rates.tolist(), case.q.device, torch.float64)
    for number, length in enumerate(case.lengths):
        here = slice(row, row + length)
        q, k, v = (x[here].double().transpose(0, 1)[None] for x in (case.q, case.k, case.v))
        state = case.state[number][None].double() if started else torch.zeros_like(case.state[number][None], dtype=torch.float64)
        real = None if case.mask is None else case.mask[here][None]
        if length:
            out, state = lightning(q, k, v, decay, state, real)
            out = out[0].transpose(0, 1)
            outs.append(out if real is None else torch.where(real[0][:, None, None], out, 0.0))
        states.append(state)
        row += length
    return torch.cat(outs) if outs else case.q.double(), torch.cat(states)


def error(got: Tensor, want: Tensor) -> float:
    """Relative L2; NaN stays NaN, so that no comparison passes it."""
    scale = torch.linalg.vector_norm(want.double())
    return float(torch.linalg.vector_norm(got.double() - want) / (scale if scale > 0 else 1.0))


def worst(got: Tensor, want: Tensor, heads: int = 1) -> float:
    """The largest relative L2 of any head (axis `heads`): a head that decays at once is nothing in the sum over all."""
    return max(error(*pair) for pair in zip(got.unbind(heads), want.unbind(heads), strict=True))
