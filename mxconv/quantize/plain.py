"""The encoder for weights on a device without kernels: the reference itself, with the calls of gpu.GpuEncoder."""

from __future__ import annotations

import torch
from torch import Tensor

from mxconv.errors import NumericError
from mxconv.quantize import reference
from mxconv.quantize.packing import store_codes
from mxconv.quantize.schemes import FP8_BLOCK, Scheme


class PlainEncoder:
    """Encodes one projection of one expert from row blocks on any device; slow and much memory, never another bit."""

    def __init__(self, scheme: Scheme, projection: str, out_features: int, in_features: int, device: torch.device) -> None:
        """Raises UsageError when the matrix [out_features, in_features] does not divide into groups, blocks or rotations."""
        reference.check_shape(scheme, projection, out_features, in_features)
        self.scheme, self.projection = scheme, projection
        self.rows_multiple = FP8_BLOCK if scheme.granularity == "block" else 1
        self.passes = 2 if scheme.granularity == "tensor" else 1
        self._absmax = torch.zeros(1, device=device)
        self._trusted = True

    def observe(self, rows: Tensor) -> None:
        """Take rows [n, in] into the absmax that the scale of the whole tensor is made of."""
        try:
            self._absmax = torch.maximum(self._absmax, reference.weight_absmax(rows, self.scheme, self.projection))
        except NumericError:
            self._trusted = False

    def encode_into(self, rows: Tensor, codes_out: Tensor, scale_out: Tensor) -> None:
        """Codes and scales of rows [n, in] into views of the whole outputs, as `GpuEncoder.encode_into`."""
        if not self._trusted:
            return
        try:
            coded = reference.encode(rows, self.scheme, self.projection, self._absmax if self.passes == 2 else None)
        except NumericError:
            self._trusted = False
            return
        codes_out.copy_(store_codes(coded.codes, self.scheme))
        scale_out.copy_(coded.scale)

    def trusted(self) -> bool:
        """Whether everything so far could be encoded: no NaN, no infinity, no rotation that overflows."""
        return self._trusted
