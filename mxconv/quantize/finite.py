"""What a checkpoint must not hold (NaN, infinity) and what its consumer will lose (scales too small for float16).

A non-finite weight has to be found before anything is cast: +Inf silently becomes 448 in an e4m3 cast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxconv.errors import NumericError

# The consumer of the int4 schemes keeps weight_scale/7 as float16, whose smallest normal number is 2^-14: below 7·2^-14 = 4.3e-4
# a stored weight_scale loses bits there.
FP16_SAFE_SCALE = 7 * 2.0**-14


@dataclass(frozen=True, slots=True, kw_only=True)
class NonFinite:
    """How many elements are NaN or infinite, and the (row, column) of the first one."""

    count: int
    first: tuple[int, int]

    def merge(self, later: NonFinite | None) -> NonFinite:
        """This finding together with one in rows further down."""
        return self if later is None else NonFinite(count=self.count + later.count, first=self.first)

    def error(self, tensor: str) -> NumericError:
        """The failure that names the tensor, the count and the first index."""
        row, column = self.first
        return NumericError(
            f"{self.count} weights are NaN or infinite, the first at [{row}, {column}]",
            where=tensor,
            hint="the source checkpoint is damaged or overflowed when it was saved",
        )


def find_nonfinite(rows: Tensor, base_row: int = 0) -> NonFinite | None:
    """The NaN and infinite elements of rows [n, in] (any float dtype), or None; `base_row` is the tensor's row that rows[0] is."""
    bad = ~torch.isfinite(rows)
    count = int(bad.sum())
    if not count:
        return None
    row, column = divmod(int(bad.reshape(-1).to(torch.uint8).argmax()), rows.shape[1])
    return NonFinite(count=count, first=(base_row + row, column))


FP16_MAX_SCALE = 7 * 65504.0


def require_fp16_scales(scale: Tensor, tensor: str) -> None:
    """Raise NumericError when a stored int4 scale overflows the consumer's float16 copy of weight_scale/7."""
    largest = float(scale.max()) if scale.numel() else 0.0
    if largest > FP16_MAX_SCALE:
        raise NumericError(
            "a weight_scale overflows float16, in which the consumer of the int4 schemes keeps weight_scale/7",
            where=tensor,
            expected=f"at most {FP16_MAX_SCALE:g}",
            got=f"{largest:g}",
            hint="keep this layer's experts unquantized with --ignore, or choose an fp8 scheme",
        )


def fp16_subnormal_scales(scale: Tensor) -> int:
    """How many stored int4 scales the consumer's float16 copy will hold as subnormals (or zero)."""
    return int((scale < FP16_SAFE_SCALE).sum())
