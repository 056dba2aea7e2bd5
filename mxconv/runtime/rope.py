"""Rotary positions of the softmax layers: neox halves over the first `rotary_dim` dims of a head, the others pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rope:
    """cos and sin [B, T, 1, rotary_dim/2] of a batch's positions; B may be 1."""

    cos: Tensor
    sin: Tensor


def frequencies(rotary_dim: int, theta: float, device: torch.device) -> Tensor:
    """float32 [rotary_dim/2]: theta^(-2j/rotary_dim), rounded to float32 as the original keeps them."""
    exponent = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float32) / rotary_dim
    return 1.0 / (theta**exponent)


def rope_of(positions: Tensor, inverse: Tensor, dtype: torch.dtype) -> Rope:
    """The rotation of `positions` int64 [B, T] by frequencies `inverse`; angles in float64, cos and sin rounded to `dtype`."""
    angles = positions[..., None, None].to(torch.float64) * inverse.to(torch.float64)
    return Rope(cos=angles.cos().to(dtype), sin=angles.sin().to(dtype))


def rotate_heads(x: Tensor, rope: Rope) -> Tensor:
    """`x` [B, T, heads, D] with (a, b) → (a·cos - b·sin, b·cos + a·sin) on the halves of its first rotary_dim dims."""
    half = rope.cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * rope.cos - b * rope.sin, b * rope.cos + a * rope.sin, rest), dim=-1)
