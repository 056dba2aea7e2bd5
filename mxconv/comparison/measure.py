"""How far two weights are apart: exact first, in float64 where they differ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 22
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One weight that is not the same on both sides.

    `name` is logical (`layers.3.experts.5.down`), `stored` the tensors of the first folder that hold it (of the second where the
    first has none). `differing` of `elements` values differ; `max_abs` and `relative_l2` (over the first side's norm) are
    infinite where one side has a NaN or only one side is infinite. `first` is the [out, in] index of the first difference.
    `reason` says in words what cannot be said in numbers, and the numbers are then zero.
    """

    name: str
    stored: tuple[str, ...] = ()
    elements: int = 0
    differing: int = 0
    max_abs: float = 0.0
    relative_l2: float = 0.0
    first: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    reason: str | None = None

    @property
    def rank(self) -> tuple[bool, float, float, str]:
        """Sort key, the worst first."""
        return self.reason is None, -self.relative_l2, -self.max_abs, self.name

    def document(self) -> dict[str, Any]:
        """JSON values; a number that is not finite becomes null."""
        keys = ("name", "stored", "elements", "differing", "max_abs", "relative_l2", "first", "dtypes", "reason")
        return {key: getattr(self, key) for key in keys}


class Measure:
    """Sums over row blocks of two weights of one shape; `differing` stays 0 for weights that are the same."""

    def __init__(self) -> None:
        self.elements = self.differing = 0
        self.max_abs = 0.0
        self.first: tuple[int, ...] = ()
        self.dtypes: tuple[str, ...] = ()
        self._squares = self._norm = 0.0

    @property
    def relative_l2(self) -> float:
        """‖a − b‖ / ‖a‖ over the blocks seen so far."""
        if not self._squares:
            return 0.0
        return math.sqrt(self._squares / self._norm) if self._norm else math.inf

    def add(self, a: Tensor, b: Tensor, row: int = 0) -> None:
        """Take rows [row, row + n) of both sides, same shape.

        Weights of one dtype are compared by their bits (so that −0 and 0 differ, and a NaN equals itself), others by value.
        """
        self.dtypes = tuple(str(x.dtype).removeprefix("torch.") for x in (a, b))
        step = max(1, BLOCK_ELEMENTS // max(1, a[0].numel() if a.dim() > 1 and len(a) else 1))
        for start in range(0, len(a), step):
            self._block(a[start : start + step].contiguous(), b[start : start + step].contiguous(), row + start)

    def _block(self, a: Tensor, b: Tensor, row: int) -> None:
        self.elements += a.numel()
        unequal = _unequal(a, b)
        count = int(unequal.sum())
        wide = a.to(torch.float64)
        self._norm += float(wide.square().nan_to_num(nan=0.0, posinf=0.0).sum())
        if not count:
            return
        if not self.differing:
            place = divmod(int(unequal.flatten().to(torch.uint8).argmax()), a[0].numel()) if a.dim() > 1 else None
            self.first = (row + place[0], place[1]) if place else (row + int(unequal.to(torch.uint8).argmax()),)
        self.differing += count
        apart = torch.where(unequal, wide - b.to(torch.float64), 0.0).abs_().nan_to_num_(nan=math.inf, posinf=math.inf)
        self.max_abs = max(self.max_abs, float(apart.max()))
        self._squares += float(apart.square_().sum())


def _unequal(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == b.dtype:
        bits = _BITS[a.element_size()]
        return a.view(bits) != b.view(bits)
    x, y = a.to(torch.float64), b.to(torch.float64)
    return (x != y) & ~(x.isnan() & y.isnan())
