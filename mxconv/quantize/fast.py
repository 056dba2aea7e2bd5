"""The CPU path that the executor calls on row blocks: the twin of reference.py, held to it bit for bit.

Every step works on tiles that stay in cache, with torch operations that release the interpreter lock; run it with one torch
thread a worker (threads inside an operation on a small tile make it slower). kernels/ holds the ways a tile is encoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mxconv.errors import UsageError
from mxconv.quantize import reference
from mxconv.quantize.finite import find_nonfinite
from mxconv.quantize.kernels.blocks import BlockKernel
from mxconv.quantize.kernels.columns import E4m3Columns, Int4Columns, RotatedTile
from mxconv.quantize.kernels.rows import RowKernel
from mxconv.quantize.kernels.words import readable
from mxconv.quantize.packing import stored_codes_shape
from mxconv.quantize.rotation import rotation_divisor
from mxconv.quantize.schemes import FP8_BLOCK, Scheme

# Weights a tile: many enough that calling torch costs little, few enough for a core's share of the cache.
ROW_TILE = 3 << 18
COLUMN_TILE = 1 << 19
TILE_ROWS_STEP = 32
MAX_TILE_ROWS = 1024

Kernel = RowKernel | BlockKernel | Int4Columns | E4m3Columns


def _tile_rows(elements: int, out_features: int, in_features: int) -> int:
    wanted = max(1, round(elements / in_features / TILE_ROWS_STEP)) * TILE_ROWS_STEP
    return min(wanted, MAX_TILE_ROWS, -(-out_features // TILE_ROWS_STEP) * TILE_ROWS_STEP)


def _rows(scheme: Scheme, projection: str, out_features: int, in_features: int) -> RowKernel:
    group = reference.tile_shape(scheme, out_features, in_features)[1]
    return RowKernel(in_features, group, _tile_rows(ROW_TILE, out_features, in_features))


def _blocks(scheme: Scheme, projection: str, out_features: int, in_features: int) -> BlockKernel:
    return BlockKernel(in_features, FP8_BLOCK, _tile_rows(ROW_TILE, out_features, in_features))


def _rotated(scheme: Scheme, projection: str, out_features: int, in_features: int) -> RotatedTile:
    rows = _tile_rows(COLUMN_TILE, out_features, in_features)
    return RotatedTile(in_features, scheme.rotation[projection], rotation_divisor(scheme, projection), rows)


def _int4_columns(scheme: Scheme, projection: str, out_features: int, in_features: int) -> Int4Columns:
    group = reference.tile_shape(scheme, out_features, in_features)[1]
    return Int4Columns(_rotated(scheme, projection, out_features, in_features), group)


def _e4m3_columns(scheme: Scheme, projection: str, out_features: int, in_features: int) -> E4m3Columns:
    return E4m3Columns(_rotated(scheme, projection, out_features, in_features))


# (weight code, granularity, rotated) → kernel.
_KERNELS: dict[tuple[str, str, bool], Callable[[Scheme, str, int, int], Kernel]] = {
    ("int4", "group", False): _rows,
    ("int4", "channel", False): _rows,
    ("int4", "group", True): _int4_columns,
    ("int4", "channel", True): _int4_columns,
    ("e4m3", "block", False): _blocks,
    ("e4m3", "tensor", True): _e4m3_columns,
}


class ProjectionEncoder:
    """Encodes one projection of one expert, row block by row block. Owns scratch memory: one object a thread.

    rows_multiple: a block's row count is a multiple of it: 128 for fp8 blocks, else 1.
    passes: 2 when the scale is the whole tensor's: `observe` every block first, then `encode` with `reference.tensor_scale`
    of the value observed over gate and up.
    tile_rows: blocks of a multiple of it are fastest; 64 to 1024.
    """

    def __init__(self, scheme: Scheme, projection: str, out_features: int, in_features: int) -> None:
        """Raises UsageError when the matrix [out_features, in_features] does not divide into groups, blocks or rotations."""
        reference.check_shape(scheme, projection, out_features, in_features)
        self.scheme = scheme
        self.projection = projection
        self.in_features = in_features
        self.rows_multiple = FP8_BLOCK if scheme.granularity == "block" else 1
        self.passes = 2 if scheme.granularity == "tensor" else 1
        key = (scheme.weight, scheme.granularity, scheme.rotation[projection] > 1)
        self._kernel = _KERNELS[key](scheme, projection, out_features, in_features)
        self.tile_rows = self._kernel.tile_rows

    def observe(self, rows: Tensor, at_least: float = 0.0) -> float:
        """The larger of `at_least` and the absmax of the rotated rows [n, in], for the schemes of two passes.

        Handing on the largest value observed so far makes it fast: only blocks that could exceed it are rotated. Raises
        like `encode`.
        """
        if not isinstance(self._kernel, E4m3Columns):
            raise UsageError(f"{self.scheme.name} needs no pass over the weights before encoding")
        self._check_rows(rows)
        for tile, _ in self._tiles(rows):
            at_least = self._checked(self._kernel.absmax(tile, at_least), rows)
        return at_least

    def encode(self, rows: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """Codes in stored orientation, int8 [in/2, n] (int4) or [in, n] (e4m3), and scales in canonical orientation.

        rows: [n, in], bf16, f16 or f32, n a multiple of `rows_multiple`. scale: of the tensor, when `passes` is 2.
        Raises NumericError for NaN or infinite weights (count, and first index within `rows`) and for a rotation that overflows
        float32, UsageError for rows of another shape or a scale that is missing or not called for.
        """
        n = rows.shape[0]
        codes = torch.empty(stored_codes_shape(self.scheme, n, self.in_features), dtype=torch.int8)
        scales = torch.empty(reference.scale_shape(self.scheme, n, self.in_features))
        self.encode_into(rows, codes, scales, scale)
        return codes, scales

    def encode_into(self, rows: Tensor, codes_out: Tensor, scale_out: Tensor, scale: float | None = None) -> None:
        """`encode` straight into views of the whole outputs.

        codes_out: int8 [in/2, n] or [in, n], columns of the stored tensor; scale_out: float32 in canonical orientation, [n, in/g],
        [n], [n/128, in/128] or [1] (`packing.scale_view` makes it from a tensor in stored orientation).
        """
        self._check_rows(rows)
        if isinstance(self._kernel, E4m3Columns):
            if scale is None:
                raise UsageError(f"{self.scheme.name} encodes with the scale of the whole tensor", got=None)
            for tile, columns in self._tiles(rows):
                self._kernel.encode(tile, codes_out[:, columns], scale)
            scale_out.fill_(scale)
            return
        if scale is not None:
            raise UsageError(f"{self.scheme.name} finds its scales itself", got=scale)
        for tile, columns in self._tiles(rows):
            lines = slice(columns.start // self.rows_multiple, columns.stop // self.rows_multiple)
            self._checked(self._kernel.encode(tile, codes_out[:, columns], scale_out[lines]), rows)

    def _tiles(self, rows: Tensor) -> Iterator[tuple[Tensor, slice]]:
        for start in range(0, rows.shape[0], self.tile_rows):
            tile = rows[start : start + self.tile_rows]
            yield readable(tile), slice(start, start + tile.shape[0])

    def _check_rows(self, rows: Tensor) -> None:
        if rows.dim() != 2 or rows.shape[1] != self.in_features or rows.shape[0] % self.rows_multiple:
            expected = f"[multiple of {self.rows_multiple}, {self.in_features}]"
            raise UsageError("rows do not fit this encoder", expected=expected, got=list(rows.shape))
        if rows.dtype not in reference.SOURCE_DTYPES:
            raise UsageError("weights to quantize are bf16, f16 or f32", got=rows.dtype)

    def _checked(self, largest: float, rows: Tensor) -> float:
        if math.isfinite(largest):
            return largest
        bad = find_nonfinite(rows)
        raise bad.error(self.projection) if bad else reference.overflow(rows)
