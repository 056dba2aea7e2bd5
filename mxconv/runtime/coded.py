"""Quantized weights as files hold them, and back: unpacking, scales and rotation in the runtime's own few lines.

    int4   byte[k, n] = (q[2k, n] & 15) | ((q[2k+1, n] & 15) << 4), q in -7..7 two's complement, packed along in; w' = q·scale/7
    e4m3   byte[k, n] is the e4m3 code of w'/scale; w' = e4m3·scale
    scale  axes as `Scheme.scale_orientation` says; group and block scales cover group_size or 128 inputs (and 128 outputs)
    w      = H_b·w' along in, b = Scheme.rotation[projection]: the unnormalised natural-order Sylvester matrix, block-diagonal

Source: formats.md §2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mxconv.quantize.schemes import FP8_BLOCK, INT4_MAX, Scheme

PROJECTION = {"up_gate": "up_gate_proj", "down": "down_proj"}
PACKED_CODES = {"int4": 2, "e4m3": 1}
"""Codes a stored byte holds, along in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """One quantized projection of one rank.

    `codes` int8 [out, in] (int4 values, or e4m3 bytes viewed as int8; a transposed view); `weight_scale` float32 as stored;
    `activation_scale` float32 [1] as stored, None in dynamic schemes.
    """

    codes: Tensor
    weight_scale: Tensor
    activation_scale: Tensor | None

    def to(self, device: torch.device) -> Coded:
        """The same on `device`."""
        activation = None if self.activation_scale is None else self.activation_scale.to(device)
        return Coded(codes=self.codes.to(device), weight_scale=self.weight_scale.to(device), activation_scale=activation)


def scale_shape(scheme: Scheme, out_features: int, in_features: int) -> tuple[int, ...]:
    """Shape of the stored `weight_scale` of a projection [out, in]."""
    groups = -(-in_features // (scheme.group_size or FP8_BLOCK))
    columns = -(-out_features // FP8_BLOCK) if scheme.granularity == "block" else out_features
    return {"in,out": (groups, columns), "out,in": (columns, groups), "out": (out_features,), "one": (1,)}[scheme.scale_orientation]


def unpack(stored: Tensor, scheme: Scheme) -> Tensor:
    """Codes int8 [out, in] of stored bytes int8 [in/2, out] (int4) or [in, out] (e4m3)."""
    if scheme.weight == "e4m3":
        return stored.t()
    low, high = (stored << 4) >> 4, stored >> 4
    return torch.stack((low, high), dim=1).reshape(2 * stored.shape[0], stored.shape[1]).t()


@lru_cache(maxsize=16)
def hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The unnormalised natural-order Sylvester matrix H [size, size]: H_2n = [[H_n, H_n], [H_n, -H_n]]."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), dim=1), torch.cat((matrix, -matrix), dim=1)))
    return matrix


def rotate(x: Tensor, block: int) -> Tensor:
    """H_block applied block-diagonally along the last axis of `x`; `block` 0 leaves it alone."""
    if not block:
        return x
    return (x.unflatten(-1, (-1, block)) @ hadamard(block, x.dtype, x.device)).flatten(-2)


def rotated_weight(coded: Coded, scheme: Scheme, dtype: torch.dtype = torch.float32) -> Tensor:
    """w' [out, in]: the weight that multiplies the rotated activation, codes times scales in `dtype`."""
    codes = coded.codes.t()  # [in, out], contiguous
    if scheme.weight == "e4m3":
        codes = codes.view(torch.float8_e4m3fn)
    w = codes.to(dtype)
    scale = coded.weight_scale.to(dtype)
    if scheme.weight == "int4":
        scale = scale / INT4_MAX
    if scheme.scale_orientation == "out,in":
        scale = scale.t()
    if scheme.granularity in ("group", "block"):
        run = scheme.group_size or FP8_BLOCK
        if scheme.granularity == "block":
            scale = scale.repeat_interleave(FP8_BLOCK, dim=1)[:, : w.shape[1]]
        w.unflatten(0, (-1, run)).mul_(scale[:, None])
    else:
        w.mul_(scale)
    return w.t()


def decode(coded: Coded, scheme: Scheme, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """w [out, in] in `dtype`, in the space of the unquantized model; `name` is the logical `up_gate` or `down`."""
    w = rotated_weight(coded, scheme, dtype)
    block = scheme.rotation[PROJECTION[name]]
    if not block:
        return w
    stored = w.t()
    return torch.matmul(hadamard(block, dtype, w.device), stored.unflatten(0, (-1, block))).flatten(0, 1).t()
