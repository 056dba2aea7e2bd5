"""The CPU path that the executor calls on row blocks; bit for bit the reference's results (tests/quantize/test_fast.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from mxconv.errors import UsageError
from mxconv.quantize import reference
from mxconv.quantize.packing import store_codes
from mxconv.quantize.schemes import FP8_BLOCK, Scheme


class ProjectionEncoder:
    """Encodes one projection of one expert, row block by row block; one object a worker (it owns scratch memory).

    rows_multiple: every block's row count is a multiple of it: 128 for fp8 blocks, else 1.
    passes: 2 when the scale is the whole tensor's: `observe` every block first, then `encode` with `tensor_scale`.
    """

    def __init__(self, scheme: Scheme, projection: str, out_features: int, in_features: int) -> None:
        reference.tile_shape(scheme, out_features, in_features)
        self.scheme = scheme
        self.projection = projection
        self.in_features = in_features
        self.rows_multiple = FP8_BLOCK if scheme.granularity == "block" else 1
        self.passes = 2 if scheme.granularity == "tensor" else 1

    def observe(self, rows: Tensor) -> float:
        """absmax of the rotated rows [n, in]; the caller takes the largest over all blocks of gate and up."""
        return float(reference.weight_absmax(rows, self.scheme, self.projection).max())

    def encode(self, rows: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """Codes in stored orientation, int8 [in/2, n] (int4) or [in, n] (e4m3), and the scale in canonical orientation.

        rows: [n, in], bf16, f16 or f32, n a multiple of `rows_multiple`. scale: the tensor scale
        (`reference.tensor_scale` of the observed absmax), for tensor granularity only.
        Raises NumericError for NaN, infinity and a rotation that overflows float32.
        """
        if (scale is None) == (self.passes == 2):
            raise UsageError("a tensor scale, and only that, is given from outside", got=scale)
        if scale is not None:
            rotated = reference.rotate_weight(rows, self.scheme, self.projection)
            unit = torch.tensor([scale], dtype=torch.float32)
            return store_codes(reference.e4m3_codes(rotated, unit), self.scheme), unit
        coded = reference.encode(rows, self.scheme, self.projection)
        return store_codes(coded.codes, self.scheme), coded.scale

    def encode_into(self, rows: Tensor, codes_out: Tensor, scale_out: Tensor, scale: float | None = None) -> None:
        """`encode` straight into views: codes_out [in/2 or in, n] (columns of the stored tensor), scale_out canonical.

        scale_out: [n, in/g], [n], [n/128, in/128] or [1]; `packing.scale_view` makes it from a tensor in stored orientation.
        """
        codes, scales = self.encode(rows, scale)
        codes_out.copy_(codes)
        scale_out.copy_(scales)
