"""The numeric definition of every weight format, in plain torch: the oracle that all fast paths are held to bit for bit.

Formulas (formats.md §2 and §5; fl is float32 rounding, rint rounds half to even, absmax is over what shares a scale):

    W'    = w, or fl(H_b·w / divisor) along `in` where the scheme rotates the projection (rotation.py)
    int4  ws = absmax(W'), 1 for an all-zero set;  q = rint(fl(fl(W'/ws)·7)) in −7..7;  weight_scale = ws, or fl(ws/fl(√b)) rotated
    e4m3  ws = fl(absmax(W')/448), 1 when that is zero;  q = e4m3(clamp(fl(W'/ws), ±448)), half to even;  weight_scale = ws
    decoding:  int4 w = q·weight_scale/7,  e4m3 w = q·weight_scale,  then w = H_b·w where rotated

Every division is a correctly rounded float32 division of tensors, on every device (see rotation.divide). Signed zeros: an e4m3
code keeps the sign of −0, an int4 code has none.

Canonical orientation is the source's, [out, in]. The scale of each granularity, g the group size:

    group [out, in/g] · channel [out] · block [out/128, in/128] · tensor [1]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mxconv.errors import NumericError, UsageError
from mxconv.quantize.finite import find_nonfinite
from mxconv.quantize.rotation import divide, hadamard, rotate_weight, scale_divisor
from mxconv.quantize.schemes import E4M3_MAX, FP8_BLOCK, INT4_MAX, SCHEMES, Scheme

SOURCE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """A quantized matrix in canonical orientation."""

    codes: Tensor
    """int8 [out, in]: int4 values −7..7, or e4m3 bytes viewed as int8."""
    scale: Tensor
    """float32, canonical shape of the granularity; the value that `weight_scale` stores."""


def tile_shape(scheme: Scheme, out_features: int, in_features: int) -> tuple[int, int]:
    """(rows, columns) of the weights that share one scale in a matrix [out, in]."""
    return {
        "group": (1, scheme.group_size or in_features),
        "channel": (1, in_features),
        "block": (FP8_BLOCK, FP8_BLOCK),
        "tensor": (out_features, in_features),
    }[scheme.granularity]


def check_shape(scheme: Scheme, projection: str, out_features: int, in_features: int) -> None:
    """Raise UsageError when a matrix [out, in] does not divide into what shares a scale, packs together or rotates together."""
    rows, columns = tile_shape(scheme, 1, 1)
    columns = math.lcm(columns, 2 if scheme.weight == "int4" else 1, scheme.rotation[projection] or 1)
    if out_features < 1 or in_features < 1 or out_features % rows or in_features % columns:
        raise UsageError(
            f"{scheme.name} cannot quantize {projection} of this shape",
            expected=f"[multiple of {rows}, multiple of {columns}]",
            got=[out_features, in_features],
        )


def scale_shape(scheme: Scheme, out_features: int, in_features: int) -> tuple[int, ...]:
    """The canonical shape of the scale of a matrix [out, in]."""
    rows, columns = tile_shape(scheme, out_features, in_features)
    if scheme.granularity in ("group", "block"):
        return (out_features // rows, in_features // columns)
    return (out_features,) if scheme.granularity == "channel" else (1,)


def weight_absmax(weight: Tensor, scheme: Scheme, projection: str) -> Tensor:
    """absmax of the (rotated) weight over what shares a scale: float32 in the canonical scale shape.

    weight: [out, in], bf16, f16 or f32. Raises NumericError for NaN, infinity or a rotation that overflows.
    """
    return _absmax(_rotated(weight, scheme, projection), scheme)


def encode(weight: Tensor, scheme: Scheme, projection: str, absmax: Tensor | float | None = None) -> Coded:
    """Quantize a weight, rotating it first where the scheme does.

    weight: [out, in], bf16, f16 or f32, a whole matrix or a shard of one. `absmax` replaces the weight's own (float32,
    canonical scale shape, or a number for a tensor scale): gate and up share a tensor scale, and a channel cut along `in`
    keeps the scale of the whole. It must be no smaller than the weight's own. Raises UsageError for a shape that does not
    divide or an absmax of another shape, NumericError for NaN, infinity or a rotation that overflows float32.
    """
    rotated = _rotated(weight, scheme, projection)
    shape = scale_shape(scheme, *rotated.shape)
    if absmax is None:
        largest = _absmax(rotated, scheme)
    else:
        largest = torch.as_tensor(absmax, dtype=torch.float32, device=rotated.device)
        largest = largest.reshape(1) if largest.dim() == 0 else largest
        if tuple(largest.shape) != shape:
            raise UsageError("absmax has the wrong shape", expected=list(shape), got=list(largest.shape))
    scale = unit_scale(largest, scheme)
    codes = _CODES[scheme.weight](rotated, _spread(scale, scheme, rotated.shape))
    return Coded(codes=codes, scale=divide(scale, scale_divisor(scheme, projection)))


def decode(coded: Coded, scheme: Scheme, projection: str) -> Tensor:
    """The weight that a consumer multiplies with, rotated back: float32 [out, in]."""
    values = _VALUES[scheme.weight](coded.codes)
    scaled = values * _spread(coded.scale, scheme, coded.codes.shape)
    return hadamard(scaled, scheme.rotation[projection])


def unit_scale(absmax: Tensor, scheme: Scheme) -> Tensor:
    """The scale that codes are made with: absmax (int4, not yet divided by fl(√b)) or fl(absmax/448) (e4m3); 1 where that is 0."""
    scale = absmax if scheme.weight == "int4" else divide(absmax, E4M3_MAX)
    return torch.where(scale == 0, 1.0, scale)


def tensor_scale(absmax: float) -> float:
    """The stored scale of a tensor whose rotated absmax is `absmax`: fl32(absmax/448), 1.0 when that is zero."""
    return float(unit_scale(torch.tensor([absmax], dtype=torch.float32), SCHEMES["tensor_wise_fp8"]))


def int4_codes(rotated: Tensor, scale: Tensor) -> Tensor:
    """float32 weights and the scale of each (broadcast) → int8 codes −7..7."""
    return torch.round((rotated / scale) * INT4_MAX).clamp(-INT4_MAX, INT4_MAX).to(torch.int8)


def e4m3_codes(rotated: Tensor, scale: Tensor) -> Tensor:
    """float32 weights and the scale of each (broadcast) → e4m3 bytes as int8."""
    return (rotated / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.int8)


def int4_values(codes: Tensor) -> Tensor:
    """int8 codes → fl(q/7), float32: at most 1, so that the product with a scale never overflows on its way to q·scale/7."""
    return divide(codes.to(torch.float32), INT4_MAX)


def e4m3_values(codes: Tensor) -> Tensor:
    """e4m3 bytes as int8 → float32."""
    return codes.view(torch.float8_e4m3fn).to(torch.float32)


def overflow(weight: Tensor) -> NumericError:
    """The failure of finite weights whose rotation leaves float32."""
    return NumericError("the rotation of the weights overflows float32", got=f"absmax {float(weight.abs().max()):.3g}")


def _rotated(weight: Tensor, scheme: Scheme, projection: str) -> Tensor:
    if weight.dim() != 2 or weight.dtype not in SOURCE_DTYPES:
        raise UsageError("a weight to quantize is [out, in] of bf16, f16 or f32", got=f"{weight.dtype} {list(weight.shape)}")
    check_shape(scheme, projection, *weight.shape)
    bad = find_nonfinite(weight)
    if bad is not None:
        raise bad.error(projection)
    rotated = rotate_weight(weight, scheme, projection)
    if find_nonfinite(rotated) is not None:
        raise overflow(weight)
    return rotated


def _tiles(x: Tensor, scheme: Scheme) -> Tensor:
    """x [out, in] viewed [out/rows, rows, in/columns, columns]."""
    out_features, in_features = x.shape
    rows, columns = tile_shape(scheme, out_features, in_features)
    return x.reshape(out_features // rows, rows, in_features // columns, columns)


def _absmax(rotated: Tensor, scheme: Scheme) -> Tensor:
    return _tiles(rotated.abs(), scheme).amax(dim=(1, 3)).reshape(scale_shape(scheme, *rotated.shape))


def _spread(scale: Tensor, scheme: Scheme, shape: torch.Size) -> Tensor:
    """The scale of every element: canonical scale → [out, in]."""
    out_features, in_features = shape
    rows, columns = tile_shape(scheme, out_features, in_features)
    grid = scale.reshape(out_features // rows, 1, in_features // columns, 1)
    return grid.expand(-1, rows, -1, columns).reshape(out_features, in_features)


_CODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"int4": int4_codes, "e4m3": e4m3_codes}
_VALUES: dict[str, Callable[[Tensor], Tensor]] = {"int4": int4_values, "e4m3": e4m3_values}
