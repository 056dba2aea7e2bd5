"""Linear layers: plain ones, and quantized ones that compute what serving kernels compute.

A quantized projection multiplies the rotated input H_b·x with the rotated weight w'. With `activations="none"` that is all,
and equals w·x; with "quantized" the rotated input is first rounded to the codes that the kernels feed to the tensor cores:

    w4a8             int8   xq = rint(127·x/as), x ≈ xq·as/127
    w4afp8_static    e4m3   xq = 448·x/as, for down_proj rint(448·x/as); x ≈ xq·as/448
    w4afp8           e4m3   a = absmax/440 of each token (over the rank's own slice), xq = x/a
    block_wise_fp8   e4m3   a = absmax/448 of each token's runs of 128
    tensor_wise_fp8  e4m3   xq = x/as, as is stored divided

Rounding is half to even; codes are clamped before an e4m3 cast; an absmax of 0 gives scale 1. The products are then summed in
float32 (float64), where the kernels sum in int32 or float32. Source: formats.md §2 and the scheme table.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mxconv.quantize.schemes import FP8_BLOCK, ActivationRule, Scheme
from mxconv.runtime.coded import PROJECTION, Coded, rotate, rotated_weight
from mxconv.runtime.loader import Weights
from mxconv.runtime.norm import statistics_dtype

Activations = Literal["quantized", "none"]
ACTIVATIONS = ("quantized", "none")


class Projection(Protocol):
    """[tokens, in] → [tokens, out]."""

    def __call__(self, x: Tensor, activations: Activations) -> Tensor:
        """The projection of `x`, in its dtype."""
        ...


def arranged(weight: Tensor) -> Tensor:
    """`weight` [out, in] in the memory order in which a CPU multiplies one token fastest, for weights that are kept.

    Rows that are shorter than columns are laid out column by column: a row's dot product is over before it is fast (measured on
    4096×256: 20 GB/s instead of 7). On a GPU the order as given is as good.
    """
    if weight.device.type != "cpu":
        return weight
    return weight.t().contiguous().t() if weight.shape[0] > weight.shape[1] else weight.contiguous()


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, T, in] · weightᵀ [B, T, out] as one product of all tokens; torch may multiply sequence by sequence when T is 1."""
    batch, tokens, width = x.shape
    return F.linear(x.reshape(-1, width), weight).view(batch, tokens, -1)


class Linear:
    """x·wᵀ with an unquantized weight [out, in]; activations are never quantized."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor, activations: Activations) -> Tensor:
        """See `Projection`."""
        return F.linear(x, self.weight)


def _codes(scaled: Tensor, rule: ActivationRule, rint: bool) -> Tensor:
    """`scaled` rounded to the rule's code and back; the e4m3 cast rounds its float32 value, also in a float64 model."""
    if rule.code == "int8" or rint:
        scaled = scaled.round()
    scaled = scaled.clamp(-rule.code_max, rule.code_max)
    return scaled if rule.code == "int8" else scaled.to(torch.float8_e4m3fn).to(scaled.dtype)


def quantize_activation(x: Tensor, rule: ActivationRule, stored_scale: Tensor | None = None, *, rint: bool = False) -> Tensor:
    """The values that the consumer's codes of `x` [tokens, in] (float32 or float64, rotated already) stand for.

    `stored_scale` [1] is the file's activation_scale, for static rules; `rint` rounds to integers before an e4m3 cast.
    """
    if stored_scale is not None:
        absmax = stored_scale.to(x.dtype) * (rule.divisor if rule.stored_divided else 1.0)
        return _codes(x * rule.divisor / absmax, rule, rint) * (absmax / rule.divisor)
    runs = x.unflatten(-1, (-1, FP8_BLOCK)) if rule.scale == "token_group" else x
    scale = runs.abs().amax(-1, keepdim=True) / rule.divisor
    scale = torch.where(scale == 0, 1.0, scale)
    return (_codes(runs / scale, rule, rint) * scale).view(x.shape)


class QuantizedLinear:
    """A quantized projection of one rank, widened once: w' [out, in] in float32 at least."""

    def __init__(self, coded: Coded, scheme: Scheme, name: str, dtype: torch.dtype, *, keep: bool = False) -> None:
        projection = PROJECTION[name]
        self.rule = scheme.activation
        self.rotation = scheme.rotation[projection]
        self.rint = self.rule.rint_down_input and projection == "down_proj"
        weight = rotated_weight(coded, scheme, statistics_dtype(dtype))
        self.weight = arranged(weight) if keep else weight
        self.activation_scale = coded.activation_scale

    def __call__(self, x: Tensor, activations: Activations) -> Tensor:
        """See `Projection`."""
        rotated = rotate(x.to(self.weight.dtype), self.rotation)
        if activations == "quantized":
            rotated = quantize_activation(rotated, self.rule, self.activation_scale, rint=self.rint)
        return F.linear(rotated, self.weight).to(x.dtype)


def projection(
    weights: Weights, layer: int, name: str, rank: int, device: torch.device, dtype: torch.dtype, *, keep: bool
) -> Projection:
    """The projection `name` of `layer` as `rank` computes it, widened to `dtype` on `device`; `keep` if it serves many calls."""
    coded = weights.coded(layer, name, rank)
    if coded is None or weights.scheme is None:
        weight = weights.dense(layer, name, rank, dtype).to(device)
        return Linear(arranged(weight) if keep else weight)
    return QuantizedLinear(coded.to(device), weights.scheme, name.rsplit(".", 1)[-1], dtype, keep=keep)
