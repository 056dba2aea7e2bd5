"""The stored forms of codes and scales in the `fastdeploy` layout, and their exact inverses (formats.md §2).

Matrices are stored [in, out] (Paddle's orientation). Every stored code tensor is int8 bytes:

    int4  [in/2, out]   byte[k, n] = (q[2k, n] & 15) | ((q[2k+1, n] & 15) << 4), two's complement, low nibble = even input
    e4m3  [in, out]     the e4m3 byte itself

Scales: canonical orientation (reference.py) or its transpose, as `scheme.scale_orientation` says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxconv.errors import UsageError
from mxconv.quantize.schemes import Scheme


def pack_int4(codes: Tensor) -> Tensor:
    """int8 codes [out, in] in −8..7 → int8 bytes [in/2, out]. Raises UsageError for an odd `in`."""
    if codes.shape[1] % 2:
        raise UsageError("int4 packs pairs of inputs", expected="an even number of inputs", got=codes.shape[1])
    low, high = codes[:, 0::2], codes[:, 1::2]
    return ((low & 15) | (high << 4)).t().contiguous()


def unpack_int4(packed: Tensor) -> Tensor:
    """int8 bytes [in/2, out] → int8 codes [out, in]."""
    low = (packed << 4) >> 4  # arithmetic shifts carry the sign
    high = packed >> 4
    return torch.stack((low, high), dim=1).reshape(2 * packed.shape[0], packed.shape[1]).t().contiguous()


def store_codes(codes: Tensor, scheme: Scheme) -> Tensor:
    """int8 codes [out, in] → the stored int8 bytes, [in/2, out] (int4) or [in, out] (e4m3)."""
    return pack_int4(codes) if scheme.weight == "int4" else codes.t().contiguous()


def load_codes(stored: Tensor, scheme: Scheme) -> Tensor:
    """The inverse of `store_codes`."""
    return unpack_int4(stored) if scheme.weight == "int4" else stored.t().contiguous()


def stored_codes_shape(scheme: Scheme, out_features: int, in_features: int) -> tuple[int, int]:
    """The shape of `quant_weight` of a matrix [out, in]."""
    return (in_features // 2 if scheme.weight == "int4" else in_features, out_features)


def store_scale(scale: Tensor, scheme: Scheme) -> Tensor:
    """Canonical scale → `weight_scale` in the scheme's stored orientation, contiguous."""
    return scale_view(scale, scheme).contiguous()


def load_scale(stored: Tensor, scheme: Scheme) -> Tensor:
    """The inverse of `store_scale`."""
    return scale_view(stored, scheme).contiguous()


def scale_view(scale: Tensor, scheme: Scheme) -> Tensor:
    """Canonical ↔ stored as a view of the same memory: the way to let an encoder write into a stored tensor."""
    return scale.t() if scheme.scale_orientation == "in,out" else scale
