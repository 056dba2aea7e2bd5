"""Unquantized experts on a GPU: torch's grouped matrix product, between this package's own sort, SwiGLU and weighted sum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mxconv.runtime.kernels.moe_activation import combine
from mxconv.runtime.kernels.moe_sort import sort_assignments


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [A, K] sorted by expert, weight [E, N, K], ends int32 [E] of each's rows → [A, N]; rows after the last are undefined."""
    product = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm
    return product(x, weight.transpose(-2, -1), offs=ends)


class DenseExperts:
    """The unquantized experts of one layer that one rank holds, in one dtype: up_gate [E, 2I, H] (gate then up), down [E, H, I]."""

    def __init__(self, experts: int, hidden: int, intermediate: int, dtype: torch.dtype, device: torch.device) -> None:
        self.up_gate = torch.empty(experts, 2 * intermediate, hidden, dtype=dtype, device=device)
        self.down = torch.empty(experts, hidden, intermediate, dtype=dtype, device=device)

    def put(self, expert: int, up_gate: Tensor, down: Tensor) -> None:
        """One expert's weights [2I, H] and [H, I]."""
        self.up_gate[expert].copy_(up_gate)
        self.down[expert].copy_(down)

    def unpack(self, expert: int) -> tuple[Tensor, Tensor]:
        """(up_gate, down) as they were put in."""
        return self.up_gate[expert], self.down[expert]

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Σ_j weights[t, j] · down(silu(gate x) · (up x)) of the experts chosen[t, j]; see `MoeExperts.__call__`."""
        if not len(x):
            return torch.zeros_like(x)
        per_token = chosen.shape[1]
        ordered = sort_assignments(chosen.contiguous(), len(self.down), block_t=64)
        rows = ordered.order.clamp_min(0) // per_token
        gate, up = grouped_mm(x.index_select(0, rows), self.up_gate, ordered.ends).chunk(2, dim=-1)
        out = grouped_mm(F.silu(gate).mul_(up), self.down, ordered.ends)
        return combine(out[None], ordered.position, weights.contiguous(), x.dtype)
