"""Rotated weights on the CPU, input-major: the reference's codes and scales bit for bit.

A tile of n rows is transposed first, as words (words.py), into two float32 planes [in/2, n], the even and the odd inputs. From
there every step is a pass over long contiguous runs: the first stage of the rotation adds and subtracts the planes, the others
rows of them, groups are reduced over rows, and codes come out in the stored orientation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from mxconv.quantize.kernels.rows import MAGIC, OFFSET
from mxconv.quantize.kernels.words import WORD_FORMATS, magnitudes
from mxconv.quantize.schemes import E4M3_MAX, INT4_MAX

Step = Callable[[], Tensor]
_OFFSET_EIGHTFOLD = OFFSET * 0x0101_0101_0101_0101 - (1 << 64)
# Runs of so many floats are read once and stay in the first-level cache while both the sums and the differences are formed.
FUSED_RUNS = range(512, 4097)
# absmax: blocks whose bound is so much of the largest bound go first; bounds are sums of `block` float32 roundings.
FIRST_BLOCKS = 0.8
BOUND_MARGIN = 1 + 2.0**-12
_SIGNS = torch.tensor([1.0, -1.0]).view(1, 2, 1)


class RotatedTile:
    """Scratch memory for tiles of up to `tile_rows` rows (8 bytes an element), and the rotation itself.

    block: of the Hadamard matrix, at least 2. divisor: what rotated weights are divided by. One object a thread.
    """

    def __init__(
        self, in_features: int, block: int, divisor: float, tile_rows: int, buffers: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.tile_rows = tile_rows
        self.half = in_features // 2
        self.block = block
        self.divisor = torch.tensor([divisor])
        self._buffers = buffers or (torch.empty(tile_rows * in_features), torch.empty(tile_rows * in_features))
        self._steps: dict[int, tuple[Step, ...]] = {}

    def of_blocks(self) -> RotatedTile:
        """The same memory for single blocks as rows: rotates [n, block], as many weights as this tile does."""
        rows = self.tile_rows * 2 * self.half // self.block
        return RotatedTile(self.block, self.block, float(self.divisor), rows, self._buffers)

    def rotate(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(H_block·rows, undivided, scratch): float32 planes [2, in/2, n] each.

        rows: [n, in], as `words.readable` gives them. Sums that leave float32 come out infinite or NaN.
        """
        n = rows.shape[0]
        values, scratch = self._planes(n)
        source, target = (values, scratch) if self._stage_count % 2 == 0 else (scratch, values)
        form = WORD_FORMATS[rows.dtype]
        words = target.view(-1).view(form.word)[: rows.numel() // 2].view(self.half, n)  # spent before a stage writes there
        words.copy_(rows.view(form.word).t())
        form.split(words, source[0].view(torch.int32), source[1].view(torch.int32))
        if n not in self._steps:
            whole = {rows: steps for rows, steps in self._steps.items() if rows == self.tile_rows}
            self._steps = {**whole, n: tuple(self._stage_steps(source, target))}  # of whole tiles and of one remainder
        for step in self._steps[n]:
            step()
        return values, scratch

    @property
    def _stage_count(self) -> int:
        return self.block.bit_length() - 1

    def _planes(self, n: int) -> tuple[Tensor, Tensor]:
        first, second = (buffer[: 2 * self.half * n].view(2, self.half, n) for buffer in self._buffers)
        return first, second

    def _stage_steps(self, source: Tensor, target: Tensor) -> Iterator[Step]:
        """Stages 1, 2, 4 … block/2 as calls that need no argument, going to and fro between the buffers."""
        n = source.shape[2]
        for run in (self.half * n, *(n << i for i in range(self._stage_count - 1))):
            a, b = source.view(-1, 2, run).unbind(1)
            both = target.view(-1, 2, run)
            if run in FUSED_RUNS:
                # a ± 1·b: the product is exact, so that a fused multiply-add rounds like the sum
                yield partial(torch.addcmul, a[:, None], b[:, None], _SIGNS, out=both)
            else:
                yield partial(torch.add, a, b, out=both[:, 0])
                yield partial(torch.sub, a, b, out=both[:, 1])
            source, target = target, source


class Int4Columns:
    """int4 with scales shared by `group` inputs of a row."""

    def __init__(self, tile: RotatedTile, group: int) -> None:
        self.tile_rows = tile.tile_rows
        self._tile = tile
        self._groups = 2 * tile.half // group
        self._magic = tuple(torch.full((tile.tile_rows,), value) for value in (MAGIC + OFFSET, MAGIC))
        self._one = torch.ones(1)

    def encode(self, rows: Tensor, codes_out: Tensor, scale_out: Tensor) -> float:
        """Write packed codes and stored scales of up to `tile_rows` rows; returns the largest absmax.

        The result is not finite if a weight is not or the rotation overflows. codes_out: int8 [in/2, n]; scale_out: float32
        of n·in/group elements, rows outermost.
        """
        n = rows.shape[0]
        divisor = self._tile.divisor
        values, scratch = self._tile.rotate(rows)
        grouped = (2, self._groups, -1, n)
        scale = torch.abs(values, out=scratch).view(grouped).amax(dim=2).amax(dim=0).div_(divisor)  # [in/group, n]
        largest = float(scale.max())
        scale += scale == 0
        scale_out.copy_((scale / divisor).t().reshape(scale_out.shape))
        values.div_(divisor).view(grouped).div_(scale[None, :, None, :])
        for plane, magic in zip(values, self._magic, strict=True):
            # fl(fl(7·x)/1) + M in one pass: the division keeps product and sum apart (no fused multiply-add)
            torch.addcdiv(magic[:n], plane, self._one, value=INT4_MAX, out=plane)
        even, odd = values.view(torch.int32)
        packed = scratch.view(-1).view(torch.int8)[: even.numel()].view(even.shape)
        packed.copy_(torch.add(even, odd, alpha=16, out=even))
        packed.view(-1).view(torch.int64).bitwise_xor_(_OFFSET_EIGHTFOLD)
        codes_out.copy_(packed)
        return largest


class E4m3Columns:
    """e4m3 with one scale for the whole tensor, found in a pass before."""

    def __init__(self, tile: RotatedTile) -> None:
        self.tile_rows = tile.tile_rows
        self._tile = tile
        self._blocks = tile.of_blocks()
        self._magnitudes = torch.empty(tile.tile_rows * 2 * tile.half, dtype=torch.int32)

    def absmax(self, rows: Tensor, at_least: float) -> float:
        """The larger of `at_least` and the absmax of up to `tile_rows` rotated rows; not finite if a weight or a sum is not.

        No output of a rotation exceeds Σ|w| over its block, so that most blocks need not be rotated once a large
        value is known: those with the largest sums go first, and then those whose sums exceed what they gave.
        """
        blocks = rows.view(-1, self._tile.block)
        sizes = magnitudes(rows, self._magnitudes).view(rows.dtype).to(torch.float32)
        bounds = sizes.view(blocks.shape).sum(dim=1)
        largest = at_least
        highest = float(bounds.max()) * BOUND_MARGIN
        for share in (FIRST_BLOCKS, 0.0):
            floor = max(share * highest if math.isfinite(highest) else 0.0, largest * float(self._tile.divisor))
            if highest <= floor:
                break
            # `not below`, so that NaN is rotated too and reported
            wanted = torch.nonzero(~(bounds * BOUND_MARGIN <= floor)).view(-1)
            for chunk in torch.split(torch.index_select(blocks, 0, wanted), self._blocks.tile_rows):
                low, high = torch.aminmax(self._blocks.rotate(chunk)[0])
                found = float(torch.maximum(high, -low) / self._tile.divisor)
                if not math.isfinite(found):
                    return found
                largest = max(largest, found)
        return largest

    def encode(self, rows: Tensor, codes_out: Tensor, scale: float) -> None:
        """Write the e4m3 bytes, int8 [in, n], of up to `tile_rows` rows."""
        values, scratch = self._tile.rotate(rows)
        values.div_(self._tile.divisor).div_(torch.tensor([scale])).clamp_(-E4M3_MAX, E4M3_MAX)
        codes = scratch.view(-1).view(torch.float8_e4m3fn)[: values.numel()].view(values.shape).copy_(values).view(torch.int8)
        codes_out[0::2].copy_(codes[0])
        codes_out[1::2].copy_(codes[1])
