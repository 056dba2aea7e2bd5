"""How far a weight lies from its source, added up over blocks of rows: as a whole, and by row, column and block of 128 × 128."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mxconv.quantize.schemes import FP8_BLOCK
from mxconv.verify.bounds import grid

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """How far one rank's weight lies from its source. Errors are relative to the source's rms."""

    rel_rms: float
    bound: float
    """Its own rms half step: what rounding to nearest can reach at most."""
    peak: float
    """Largest deviation of an element in units of its half step."""


class Totals:
    """Root sums of squares of errors, half steps and source, and the largest error in half steps; NaN anywhere shows in all."""

    def __init__(self) -> None:
        self.error, self.half, self.source, self.peak = 0.0, 0.0, 0.0, 0.0

    def add(self, u: Tensor, error: Tensor, half: Tensor) -> None:
        """Rows of a weight, [rows, n, in/n]; `half` may be broadcast."""
        self.error = math.hypot(self.error, _norm(error))
        self.half = math.hypot(self.half, _norm(half) * (u.numel() / half.numel()) ** 0.5)
        self.source = math.hypot(self.source, _norm(u))
        peak = float((error / half.clamp(min=_TINY)).amax())
        self.peak = peak if math.isnan(peak) else max(self.peak, peak)

    def deviation(self) -> Deviation:
        """Of all rows."""
        source = self.source or 1.0
        return Deviation(rel_rms=self.error / source, bound=self.half / source, peak=self.peak)


def _norm(x: Tensor) -> float:
    """Euclidean norm; float64 where float32 squares leave their range."""
    norm = float(torch.linalg.vector_norm(x))
    if 1e-15 < norm < 1e15:
        return norm
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


class Sums:
    """Squares of errors and half steps by row, column and block, and which blocks hold an element out of bounds.

    In units of `unit`, the tensor's largest weight, where squares of the weights would leave float32.
    """

    def __init__(self, out_features: int, in_features: int, unit: float, device: torch.device) -> None:
        self.unit = 1.0 if unit == 0 or 1e-12 < unit < 1e12 else unit
        tiles = (-(-out_features // FP8_BLOCK), -(-in_features // FP8_BLOCK))
        self.rows = torch.zeros(2, out_features, dtype=torch.float64, device=device)
        self.columns = torch.zeros(2, in_features, dtype=torch.float64, device=device)
        self.tiles = torch.zeros(2, *tiles, dtype=torch.float64, device=device)
        self.beyond = torch.zeros(tiles, dtype=torch.bool, device=device)
        self.count = 0

    def add(self, start: int, error: Tensor, half: Tensor, limit: float) -> None:
        """Rows [rows, in] from `start`, a multiple of 128; `limit` in half steps."""
        out = ~(error <= limit * half)
        first, last = start // FP8_BLOCK, start // FP8_BLOCK + -(-len(error) // FP8_BLOCK)
        self.beyond[first:last] = grid(out, FP8_BLOCK, FP8_BLOCK).any(3).any(1)
        self.count += int(out.sum())
        for index, x in enumerate((error, half)):
            squares = x.square() if self.unit == 1.0 else (x / self.unit).square()
            self.rows[index, start : start + len(x)] = squares.sum(1, dtype=torch.float64)
            self.columns[index] += squares.sum(0, dtype=torch.float64)
            self.tiles[index, first:last] = grid(squares, FP8_BLOCK, FP8_BLOCK).sum((1, 3), dtype=torch.float64)
