"""Rotated weights on the CPU, input-major: the reference's codes and scales bit for bit.

A tile of n rows is transposed first, as words (words.py), into two float32 planes [in/2, n], the even and the odd inputs. From
there every step is a pass over long contiguous runs: the first stage of the rotation adds and subtracts the planes, the others
rows of them, groups are reduced over rows, and codes come out in the stored orientation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxconv.quantize.kernels.rows import MAGIC, OFFSET
from mxconv.quantize.kernels.words import WORD_FORMATS
from mxconv.quantize.schemes import E4M3_MAX, INT4_MAX

Stage = tuple[Tensor, Tensor, Tensor, Tensor]
_OFFSET_EIGHTFOLD = OFFSET * 0x0101_0101_0101_0101 - (1 << 64)


class RotatedTile:
    """Scratch memory for tiles of up to `tile_rows` rows (8 bytes an element), and the rotation itself.

    block: of the Hadamard matrix, at least 2. divisor: what rotated weights are divided by. One object a thread.
    """

    def __init__(self, in_features: int, block: int, divisor: float, tile_rows: int) -> None:
        self.tile_rows = tile_rows
        self.half = in_features // 2
        self.block = block
        self.divisor = torch.tensor([divisor])
        self._buffers = tuple(torch.empty(tile_rows * in_features) for _ in range(2))
        self._stages: dict[int, tuple[Stage, ...]] = {}

    def planes(self, n: int) -> tuple[Tensor, Tensor]:
        """The two buffers as [2, in/2, n]; the rotation of n rows ends in the first, the second is scratch."""
        first, second = (buffer[: 2 * self.half * n].view(2, self.half, n) for buffer in self._buffers)
        return first, second

    def rotate(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(H_block·rows, undivided, scratch): float32 planes [2, in/2, n] each.

        rows: [n, in], as `words.readable` gives them. Sums that leave float32 come out infinite or NaN.
        """
        n = rows.shape[0]
        values, scratch = self.planes(n)
        stages = self._stages.setdefault(n, self._stage_views(n)) if n == self.tile_rows else self._stage_views(n)
        form = WORD_FORMATS[rows.dtype]
        even, odd, _, other = stages[0]
        # The words lie where the first stage will write; it reads the planes of the other buffer.
        target = scratch if even.data_ptr() == values.data_ptr() else values
        words = target.view(-1).view(form.word)[: rows.numel() // 2].view(self.half, n)
        words.copy_(rows.view(form.word).t())
        form.split(words, even.view(torch.int32), odd.view(torch.int32))
        for a, b, plus, minus in stages:
            torch.add(a, b, out=plus)
            torch.sub(a, b, out=minus)
        return values, scratch

    def _stage_views(self, n: int) -> tuple[Stage, ...]:
        """(a, b, a+b, a−b) of stages 1, 2, 4 … block/2, going to and fro between the buffers so that the last ends in the first."""
        values, scratch = self.planes(n)
        count = self.block.bit_length() - 1
        source, target = (values, scratch) if count % 2 == 0 else (scratch, values)
        stages = [(source[0], source[1], target[0], target[1])]
        for distance in (1 << i for i in range(count - 1)):
            source, target = target, source
            a, b = source.view(-1, 2, distance * n).unbind(1)
            plus, minus = target.view(-1, 2, distance * n).unbind(1)
            stages.append((a, b, plus, minus))
        return tuple(stages)


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

    def absmax(self, rows: Tensor) -> float:
        """absmax of up to `tile_rows` rotated rows; not finite if a weight is not or the rotation overflows."""
        low, high = torch.aminmax(self._tile.rotate(rows)[0])
        return float(torch.maximum(high, -low) / self._tile.divisor)

    def encode(self, rows: Tensor, codes_out: Tensor, scale: float) -> None:
        """Write the e4m3 bytes, int8 [in, n], of up to `tile_rows` rows."""
        values, scratch = self._tile.rotate(rows)
        values.div_(self._tile.divisor).div_(torch.tensor([scale])).clamp_(-E4M3_MAX, E4M3_MAX)
        codes = scratch.view(-1).view(torch.float8_e4m3fn)[: values.numel()].view(values.shape).copy_(values).view(torch.int8)
        codes_out[0::2].copy_(codes[0])
        codes_out[1::2].copy_(codes[1])
