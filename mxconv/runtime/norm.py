"""RMS norms: statistics in float32 at least, `w · x̂.to(dtype)` as the original computes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LINEAR_NORM_EPS = 1e-6
"""The lightning layers' norm over all heads takes its class's default, not the config's `rms_norm_eps`."""


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics, softmax and states are kept beside values of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last axis, in the dtype of `x`."""
    if x.dtype in (torch.float32, torch.float64):
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def scale_by_rms(x: Tensor, mean_square: Tensor, weight: Tensor) -> Tensor:
    """The lightning norm of a slice, whose mean of squares [..., 1] was taken over all slices; in the dtype of `x`."""
    return weight * (x * torch.rsqrt(mean_square + LINEAR_NORM_EPS)).to(x.dtype)
