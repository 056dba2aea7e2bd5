"""RMS norms: statistics in float32 at least, `w · x̂.to(dtype)` as the original computes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mxconv.dispatch import triton_wanted

LINEAR_NORM_EPS = 1e-6
"""The lightning layers' norm over all heads takes its class's default, not the config's `rms_norm_eps`."""


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics, softmax and states are kept beside values of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last axis, in the dtype of `x`."""
    if triton_wanted("residual_norm", x.device, x.dtype, hidden=x.shape[-1]):
        from mxconv.runtime.kernels.residual_norm import residual_norm

        return residual_norm(x, None, (1.0, 1.0), weight, eps, keep=False)[1]
    if x.dtype in (torch.float32, torch.float64):
        if x.numel() == len(weight) and x.device.type == "cpu":
            # One token: torch's norm takes twice as long in its parts as this does in all.
            row = x.flatten()
            return (x * weight).mul_((float(torch.dot(row, row)) / len(weight) + eps) ** -0.5)
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add(residual: Tensor, update: Tensor, factors: tuple[float, float]) -> Tensor:
    """alpha·residual + beta·update; `factors` are (alpha, beta)."""
    alpha, beta = factors
    if beta != 1.0:
        update = update * beta
    return torch.add(update, residual, alpha=alpha)


def add_rms_norm(
    residual: Tensor, update: Tensor, factors: tuple[float, float], weight: Tensor, eps: float, *, keep: bool
) -> tuple[Tensor, Tensor]:
    """(x, its norm) of x = alpha·residual + beta·update; without `keep` the first means nothing."""
    if triton_wanted("residual_norm", update.device, update.dtype, hidden=update.shape[-1]):
        from mxconv.runtime.kernels.residual_norm import residual_norm

        return residual_norm(residual, update, factors, weight, eps, keep=keep)
    x = add(residual, update, factors)
    return x, rms_norm(x, weight, eps)


def scale_by_rms(x: Tensor, mean_square: Tensor, weight: Tensor) -> Tensor:
    """The lightning norm of a slice, whose mean of squares [..., 1] was taken over all slices; in the dtype of `x`."""
    return weight * (x * torch.rsqrt(mean_square + LINEAR_NORM_EPS)).to(x.dtype)
