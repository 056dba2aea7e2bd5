"""e4m3 in square blocks, without rotation, on the CPU, row-major: the reference's bytes and scales bit for bit.

The steps are the reference's, over a tile that stays in cache. The bytes are transposed in two moves, since byte by byte it costs
as much as everything else: two rows first exchange the off-diagonal bytes of their 2×2 blocks (64 bits at a time), which leaves
the even columns of both rows in one, the odd columns in the other, as 16-bit pairs; then these are transposed whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxconv.quantize.kernels.words import magnitudes
from mxconv.quantize.schemes import E4M3_MAX

# From this scale on fl(w/scale) stays below 464, where the cast still rounds to 448.
NORMAL_SCALE = 2.0**-100
_LOW_BYTES = 0x00FF_00FF_00FF_00FF


class BlockKernel:
    """Encodes row blocks of one matrix [out, in] whose e4m3 scales are shared by blocks of size × size weights.

    Owns scratch memory for `tile_rows` rows, a multiple of `size` (10 bytes an element): one object a thread.
    """

    def __init__(self, in_features: int, size: int, tile_rows: int) -> None:
        self.tile_rows = -(-tile_rows // size) * size
        self.size = size
        elements = self.tile_rows * in_features
        self._scratch = torch.empty(elements, dtype=torch.int32)
        self._values = torch.empty(elements)
        self._codes = torch.empty(elements, dtype=torch.float8_e4m3fn)
        self._halves = tuple(torch.empty(elements // 16, dtype=torch.int64) for _ in range(2))
        self._code_max = torch.tensor([E4M3_MAX])

    def encode(self, rows: Tensor, codes_out: Tensor, scale_out: Tensor) -> float:
        """Write e4m3 bytes and scales of up to `tile_rows` rows; returns the largest absmax, not finite if any weight is not.

        rows: [n, in], as `words.readable` gives them, n a multiple of `size`; codes_out: int8 [in, n]; scale_out: float32
        [n/size, in/size].
        """
        n, in_features = rows.shape
        blocks = (n // self.size, self.size, in_features // self.size, self.size)
        absmax = magnitudes(rows, self._scratch).view(blocks).amax(dim=3).amax(dim=1).view(rows.dtype).to(torch.float32)
        largest = float(absmax.max())
        scale = absmax.div_(self._code_max)
        scale += scale == 0
        scale_out.copy_(scale)
        values = self._values[: rows.numel()].view(rows.shape).copy_(rows)
        values.view(blocks).div_(scale[:, None, :, None])
        if not float(scale.min()) >= NORMAL_SCALE:
            values.clamp_(-E4M3_MAX, E4M3_MAX)
        codes = self._codes[: rows.numel()].view(rows.shape).copy_(values)
        self._transpose(codes, codes_out)
        return largest

    def _transpose(self, codes: Tensor, codes_out: Tensor) -> None:
        n, in_features = codes.shape
        upper, lower = codes.view(torch.int64).view(n // 2, 2, in_features // 8).unbind(1)
        even, odd = (half[: upper.numel()].view(upper.shape) for half in self._halves)
        swap = self._scratch.view(torch.int64)[: upper.numel()].view(upper.shape)
        torch.bitwise_right_shift(upper, 8, out=swap).bitwise_xor_(lower).bitwise_and_(_LOW_BYTES)
        torch.bitwise_xor(lower, swap, out=odd)
        torch.bitwise_xor(upper, swap.bitwise_left_shift_(8), out=even)
        pairs = self._scratch.view(torch.int16)[: n // 2 * in_features // 2].view(in_features // 2, n // 2)
        for column, half in enumerate((even, odd)):
            pairs.copy_(half.view(torch.int16).t())
            codes_out[column::2].copy_(pairs.view(torch.int8))
