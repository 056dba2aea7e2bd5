"""How far a rounded weight may lie from its source: bounds that follow from the code and from what shares a scale.

Everything happens in the space that was rounded: u = H_b·w/b for a projection rotated by H_b, u = w without a rotation, so that
a stored weight q·scale (int4: /7) is held against u. With a the absmax of u over what shares a scale:

    int4   step a/7, so a code rounded to nearest is off by at most            a/14
    e4m3   x = 448·u/a lies in the binade [2^k, 2^(k+1)), whose step is 2^(k-3); below 2^-6 the step is 2^-9:
                                                                               a/448 · 2^(max(k, -6) - 4)

These hold for every weight of every distribution, which an average does not: rounding to nearest never exceeds them. A Gaussian
weight reaches .117 (int4, 128 to a scale), .166 (9,216) and .026 (e4m3) of its own rms; that is what the report shows beside them.

Canonical orientation is [out, in]; scales are [out, in/g], [out], [⌈out/128⌉, in/128] or [1]. Source: formats.md §2 and §5.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mxconv.quantize.schemes import E4M3_MAX, FP8_BLOCK, INT4_MAX, Scheme
from mxconv.runtime.coded import Coded, rotate

_MIN_BINADE = -6
_EXPONENT_BITS = 0x7F800000
# Two float32 evaluations of one rotation differ by a few units of the last place of the largest sum.
ROTATION_NOISE = 1e-6


def rotated(weight: Tensor, block: int) -> Tensor:
    """u [out, in] of a float32 source weight [out, in]."""
    return rotate(weight, block) / block if block else weight


def tile(scheme: Scheme, out_features: int, in_features: int) -> tuple[int, int]:
    """Rows and columns that share one scale."""
    return {
        "group": (1, scheme.group_size or in_features),
        "channel": (1, in_features),
        "block": (FP8_BLOCK, FP8_BLOCK),
        "tensor": (out_features, in_features),
    }[scheme.granularity]


def grid(x: Tensor, rows: int, columns: int) -> Tensor:
    """x [out, in] viewed [out/rows, rows, in/columns, columns], filled with zeros where it does not divide."""
    out, inner = x.shape
    if out % rows or inner % columns:
        x = F.pad(x, (0, -inner % columns, 0, -out % rows))
    return x.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))


def absmax(u: Tensor, scheme: Scheme) -> Tensor:
    """max |u| over what shares a scale, as a matrix of tiles [out/rows, in/columns]."""
    return grid(u.abs(), *tile(scheme, *u.shape)).amax((1, 3))


def runs(x: Tensor, tiles: Tensor) -> Tensor:
    """x [out, in] as [out, n, in/n], n the tiles that lie beside each other: tile values broadcast over the last axis."""
    return x.unflatten(1, (tiles.shape[1], -1))


def spread(tiles: Tensor, scheme: Scheme, out_features: int) -> Tensor:
    """A value a tile, to be broadcast over `runs`: [out or 1, n, 1]."""
    return (tiles.repeat_interleave(FP8_BLOCK, 0)[:out_features] if scheme.granularity == "block" else tiles)[:, :, None]


def half_steps(u: Tensor, tiles: Tensor, scheme: Scheme) -> Tensor:
    """The bound of each element, to be broadcast over `u` [out, n, in/n]; `tiles` are absmaxes as `spread` gives them."""
    if scheme.weight == "int4":
        return tiles / (2 * INT4_MAX)
    scale = torch.where(tiles == 0, 1.0, tiles / E4M3_MAX)
    # 2^k is u/scale without sign and mantissa; a half step is 2^(k-4)
    binade = (u / scale).view(torch.int32).bitwise_and_(_EXPONENT_BITS).view(torch.float32)
    return binade.clamp_(min=2.0**_MIN_BINADE).mul_(scale / 16)


def absmax_scale(largest: Tensor, scheme: Scheme, rotation: int) -> Tensor:
    """The scale that rounding to nearest stores for tiles of absmax `largest` (of u): a, or a/448; for zeros 1.

    The int4 scale of a rotated tile is stored as absmax(√b·u)/√b, which is absmax(u), and 1/√b for zeros.
    """
    scale = largest if scheme.weight == "int4" else largest / E4M3_MAX
    zero = rotation**-0.5 if rotation and scheme.weight == "int4" else 1.0
    return torch.where(scale == 0, zero, scale)


def stored_tiles(coded: Coded, scheme: Scheme) -> Tensor:
    """The stored weight_scale as a matrix of tiles [out/rows, in/columns]."""
    scale = coded.weight_scale
    if scheme.scale_orientation == "in,out":
        return scale.t()
    return scale.reshape(-1, 1) if scheme.scale_orientation in ("out", "one") else scale


def tile_rows(tiles: Tensor, scheme: Scheme, start: int, stop: int) -> Tensor:
    """The tiles of output rows [start, stop); both are multiples of 128 or the end."""
    if scheme.granularity == "tensor":
        return tiles
    if scheme.granularity == "block":
        return tiles[start // FP8_BLOCK : -(-stop // FP8_BLOCK)]
    return tiles[start:stop]


def coded_rows(coded: Coded, scheme: Scheme, start: int, stop: int) -> Coded:
    """The output rows [start, stop) of a projection; both are multiples of 128 or the end."""
    tiles = tile_rows(stored_tiles(coded, scheme), scheme, start, stop)
    scale = {"in,out": tiles.t(), "out,in": tiles, "out": tiles.reshape(-1), "one": coded.weight_scale}[scheme.scale_orientation]
    return Coded(codes=coded.codes[start:stop], weight_scale=scale, activation_scale=coded.activation_scale)
