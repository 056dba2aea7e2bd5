"""int4 without rotation on the CPU, row-major: the reference's codes and scales bit for bit, packed and transposed.

The reference computes q = rint(fl(fl(w/s)·7)). Its passes over float32 become one, `addcdiv`:

    V = fl(M + fl(fl(7·w)/s)),  M = 1.5·2^23

Adding M rounds half to even at the unit, and the bits of V, read as an integer, are those of M plus q. This is the reference's
q when w is bf16: 7·w is then exact and s is itself a weight, so that q is decided by integers, 14·|w| against (2k+1)·s. Where
these are equal both formulas give k+½ exactly (fl(fl(m/14)·7) = m/2 for every odd m below 14) and round to even; where they
differ, they do by 2^-12 relative, far more than the roundings of either. For float32 weights, and for scales so large that 7·w
could overflow, the reference's own steps are taken, ending with the same addition of M.

Packing is arithmetic on the bits of V: even + 16·odd + 256·(the same of the next row) + … gathers 2 inputs × 4 rows in an int32.
Nibbles are in offset binary there, so that none borrows from its neighbour; XOR 0x88 in every byte makes them two's complement.
Transposing whole words then brings the rows next to one another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxconv.quantize.kernels.words import WORD_FORMATS, as_int32, magnitudes
from mxconv.quantize.schemes import INT4_MAX

MAGIC = 1.5 * 2.0**23
MAGIC_BITS = 0x4B40_0000
OFFSET = 0x88  # +8 in both nibbles
LARGE = 2.0**125  # a scale from here on lets 7·w overflow
ROWS_PER_WORD = 4
_EVERY_BYTE = 0x0101_0101
# What the four rows' M leave in a word, 17·M a row (even + 16·odd).
MAGIC_RESIDUE = as_int32(17 * MAGIC_BITS * _EVERY_BYTE)
TWOS_COMPLEMENT = as_int32(OFFSET * _EVERY_BYTE)


class RowKernel:
    """Encodes row blocks of one matrix [out, in] whose int4 scales are shared by `group` inputs of a row.

    Owns scratch memory for `tile_rows` rows (9 bytes an element): one object a thread.
    """

    def __init__(self, in_features: int, group: int, tile_rows: int) -> None:
        self.tile_rows = -(-tile_rows // ROWS_PER_WORD) * ROWS_PER_WORD
        self.group = group
        half = in_features // 2
        self._magnitudes = torch.empty(self.tile_rows * in_features, dtype=torch.int32)
        self._even = torch.zeros(self.tile_rows, half)
        self._odd = torch.zeros(self.tile_rows, half)
        self._words = torch.empty(self.tile_rows // ROWS_PER_WORD * half, dtype=torch.int32)
        self._even_magic = torch.full((1, group // 2), MAGIC + OFFSET)
        self._odd_magic = torch.full((1, group // 2), MAGIC)

    def encode(self, rows: Tensor, codes_out: Tensor, scale_out: Tensor) -> float:
        """Write packed codes and scales of up to `tile_rows` rows; returns the largest scale, not finite if any weight is not.

        rows: [n, in], as `words.readable` gives them; codes_out: int8 [in/2, n]; scale_out: float32 of n·in/group elements.
        """
        scale = self._absmax(rows)
        largest = float(scale.max())
        scale += scale == 0
        scale_out.copy_(scale.view(scale_out.shape))
        self._round(rows, scale, largest)
        self._pack(rows.shape[0], codes_out)
        return largest

    def _absmax(self, rows: Tensor) -> Tensor:
        """float32 [n·in/group, 1]; NaN or infinite where a weight of the group is."""
        largest = magnitudes(rows, self._magnitudes).view(-1, self.group).amax(dim=1, keepdim=True)
        return largest.view(rows.dtype).to(torch.float32)

    def _round(self, rows: Tensor, scale: Tensor, largest: float) -> None:
        """Leaves in the planes the float32 whose bits are those of M plus the code (plus OFFSET in the even plane)."""
        form = WORD_FORMATS[rows.dtype]
        even, odd = self._even[: rows.shape[0]], self._odd[: rows.shape[0]]
        form.split(rows.view(form.word), even.view(torch.int32), odd.view(torch.int32))
        for plane, magic in ((even, self._even_magic), (odd, self._odd_magic)):
            weights = plane.view(-1, self.group // 2)
            if form.short and largest < LARGE:
                torch.addcdiv(magic, weights, scale, value=INT4_MAX, out=weights)
            else:
                weights.div_(scale).mul_(INT4_MAX).add_(magic)

    def _pack(self, n: int, codes_out: Tensor) -> None:
        even, odd = self._even.view(torch.int32), self._odd.view(torch.int32)
        count = -(-n // ROWS_PER_WORD)
        half = even.shape[1]
        one = torch.add(even[: 4 * count], odd[: 4 * count], alpha=16, out=even[: 4 * count]).view(count, 2, 2, half)
        two = odd[: 2 * count].view(count, 2, half)  # the odd plane is spent
        torch.add(one[:, :, 0], one[:, :, 1], alpha=1 << 8, out=two)
        four = even[:count]
        torch.add(two[:, 0], two[:, 1], alpha=1 << 16, out=four)
        four.sub_(MAGIC_RESIDUE).bitwise_xor_(TWOS_COMPLEMENT)
        words = self._words[: count * half].view(half, count)
        words.copy_(four.t())
        codes_out.copy_(words.view(torch.int8)[:, :n])
