"""Expert weights as the grouped GEMM reads them: a lossless rearrangement of the artifact's codes and scales, made once at load.

    codes    [N/64, K/128, 64, bytes]: tiles of 64 outputs by 128 inputs, so that a step of the GEMM is one contiguous run
    e4m3     byte (n, k): the code of input k of the tile
    int4_int8  byte (n, j < 64): low nibble q[j], high nibble q[64 + j], two's complement
    int4_e4m3  byte (n, j < 64): bits 0-2 |q[j]|, bit 7 its sign; bits 4-6 |q[64 + j]|, whose sign is bit 3 of the next byte of its
             four-byte word (of the first for the last): `w & 0x87878787` are then the low codes as e4m3 subnormals, and
             `rotr(w, 4) & 0x87878787` the high ones
    scales   float32 as stored, in the order of the tiles: group [N/64, K/g, 64], block [⌈N/128⌉, K/128], channel [N], tensor [1]

N counts outputs (up_gate: gate then up), K inputs. `unpack_codes` and `unpack_scale` give back what was packed, bit for bit.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mxconv.errors import MalformedInput
from mxconv.quantize.schemes import INT4_MAX, Scheme

STEP, ROWS = 128, 64
"""Inputs and outputs of a tile."""

Kind = Literal["int4_e4m3", "int4_int8", "e4m3"]
"""Weight code and the code of the activations that it multiplies: the three inner loops of the GEMM."""


def kind_of(scheme: Scheme) -> Kind:
    """The inner loop that computes `scheme`."""
    if scheme.weight == "e4m3":
        return "e4m3"
    return "int4_int8" if scheme.activation.code == "int8" else "int4_e4m3"


def tile_bytes(kind: Kind) -> int:
    """Bytes of a tile's row: 128 codes."""
    return STEP if kind == "e4m3" else STEP // 2


def pack_codes(codes: Tensor, kind: Kind) -> Tensor:
    """int8 codes [N, K] → int8 [N/64, K/128, 64, 64 or 128]. N a multiple of 64, K of 128.

    Raises MalformedInput for an int4 code outside -7..7, which the subnormal form cannot hold and no scheme writes.
    """
    n, k = codes.shape
    tiles = codes.reshape(n // ROWS, ROWS, k // STEP, STEP).transpose(1, 2).contiguous()
    if kind == "e4m3":
        return tiles
    if bool((codes < -INT4_MAX).any() | (codes > INT4_MAX).any()):
        found = f"{int(codes.min())}..{int(codes.max())}"
        raise MalformedInput("an int4 code is out of range", expected=f"-{INT4_MAX}..{INT4_MAX}", got=found)
    low, high = tiles[..., :64], tiles[..., 64:]
    if kind == "int4_int8":
        return (low & 15) | (high << 4)
    signs = (high < 0).unflatten(-1, (16, 4)).roll(1, dims=-1).flatten(-2)
    packed = low.abs() | (high.abs() << 4) | (signs.to(torch.int8) << 3)
    return torch.where(low < 0, packed | -128, packed)


def unpack_codes(packed: Tensor, kind: Kind) -> Tensor:
    """The inverse of `pack_codes`: int8 [N, K]."""
    if kind == "e4m3":
        tiles = packed
    elif kind == "int4_int8":
        tiles = torch.cat(((packed << 4) >> 4, packed >> 4), dim=-1)
    else:
        low, high = packed & 7, (packed >> 4) & 7
        signs = ((packed & 8) != 0).unflatten(-1, (16, 4)).roll(-1, dims=-1).flatten(-2)
        tiles = torch.cat((torch.where(packed < 0, -low, low), torch.where(signs, -high, high)), dim=-1)
    return tiles.transpose(1, 2).reshape(packed.shape[0] * ROWS, packed.shape[1] * STEP)


def pack_scale(weight_scale: Tensor, scheme: Scheme) -> Tensor:
    """The stored scale as the GEMM walks it: group [N/64, K/g, 64], block [⌈N/128⌉, K/128], else as it is."""
    if scheme.granularity == "group":
        by_row = weight_scale if scheme.scale_orientation == "out,in" else weight_scale.t()
        return by_row.unflatten(0, (-1, ROWS)).transpose(1, 2).contiguous()
    return weight_scale.t().contiguous() if scheme.granularity == "block" else weight_scale


def unpack_scale(packed: Tensor, scheme: Scheme) -> Tensor:
    """The inverse of `pack_scale`."""
    if scheme.granularity == "group":
        by_row = packed.transpose(1, 2).flatten(0, 1)
        return by_row if scheme.scale_orientation == "out,in" else by_row.t()
    return packed.t() if scheme.granularity == "block" else packed
