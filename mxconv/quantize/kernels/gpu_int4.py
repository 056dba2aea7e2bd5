"""int4 on the GPU, group or channel scales, rotated or not, in one pass over the weights: the reference's bits.

The steps are the reference's; only rint is an addition of M = 1.5·2^23, which rounds half to even at the unit: the bits of the sum,
read as an integer, are those of M plus the code. Nibbles are gathered in offset binary (+8, so that none borrows from its
neighbour), byte = even + 16·odd, four rows to a word; what M left there is subtracted, and XOR 0x88 makes them two's complement.

Where the scale of a set cannot be found within a program (channels, groups that are no power of two) it comes from gpu_absmax.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
from __future__ import annotations

import triton
import triton.language as tl

from mxconv.quantize.kernels.gpu_tiles import (
    absmax_of,
    divided,
    hadamard,
    interleaved,
    largest_of,
    load_run,
    quotient,
    report,
    store_words,
    widened,
)

MAGIC = tl.constexpr(12582912.0)
OFFSET = tl.constexpr(136.0)  # 0x88: +8 in both nibbles
MAGIC_RESIDUE = tl.constexpr(1061158912)
TWOS_COMPLEMENT = tl.constexpr(-2004318072)
# Scales between which every quotient that decides a code is exact: codes other than 0 need |w| ≥ scale/15 (2^-80, 2^100).
LOW = tl.constexpr(8.271806125530277e-25)
HIGH = tl.constexpr(1.2676506002282294e30)


@triton.jit
def _codes(
    values, scale, inverse_scale, root, inverse, remainder,
    LOG2: tl.constexpr, EXACT: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Tiles FIRST … LAST−1 as bytes (even + 16·odd) in int32 that still hold what M left: (LAST − FIRST)/2 tiles [R, L]."""
    out = ()
    for i in tl.static_range(FIRST, LAST, 2):
        even, odd = values[i], values[i + 1]
        if LOG2 > 0:
            even = divided(even, root, inverse, remainder, LOG2 % 2 == 0, EXACT)
            odd = divided(odd, root, inverse, remainder, LOG2 % 2 == 0, EXACT)
        even = quotient(even, scale, inverse_scale, EXACT) * 7.0 + (MAGIC + OFFSET)
        odd = quotient(odd, scale, inverse_scale, EXACT) * 7.0 + MAGIC
        out = out + (even.to(tl.int32, bitcast=True) + odd.to(tl.int32, bitcast=True) * 16,)
    return out


@triton.jit
def _gathered(words, bytes_, COUNT: tl.constexpr):
    out = ()
    for i in tl.static_range(COUNT):
        out = out + ((words[i] << 8) + bytes_[i],)
    return out


@triton.jit
def _store_scale(scales, scale, n, rows, k, width, group, groups, root, LOG2: tl.constexpr):
    """Store what belongs to a scale [R]; of a group that several programs see the one with its first column does."""
    if LOG2 > 0:
        scale = tl.div_rn(scale, tl.zeros_like(scale) + root)
    limit = tl.where(k % group == 0, tl.where(k < width, rows, 0), 0)
    tl.store(scales + (n * groups + k // group), scale, mask=n < limit)


@triton.jit
def int4_kernel(
    weights, codes, scales, absmax, flags, rows, width, group, groups, stride, root, inverse, remainder,
    LOG2: tl.constexpr, CHUNK: tl.constexpr, R: tl.constexpr, L: tl.constexpr, STEPS: tl.constexpr,
    WORDS: tl.constexpr, GIVEN: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Codes and scales of 4·R rows × 8·L·STEPS columns a program; the grid is row tiles × column tiles, columns fastest.

    weights: as of `load_run`. codes: int8 [width/2, rows] with lines `stride` bytes apart, seen as int32 with WORDS. scales:
    float32 [rows, groups], what is stored. absmax: with GIVEN, float32 [rows, groups], of the rotated weights before they are
    divided by `root`; else unused. flags: see `report`. root, inverse, remainder: of fl(√b), b = 2^LOG2, for `divided`. CHUNK:
    columns that share a scale for certain, the group, or with GIVEN a divisor of it. MASKED: the columns do not divide into runs.
    """
    SPAN: tl.constexpr = 8 * L * STEPS
    COUNT: tl.constexpr = 8 * STEPS
    EACH: tl.constexpr = CHUNK // L  # tiles of a chunk
    across = tl.cdiv(width, SPAN)
    tile = tl.program_id(0)
    first_row = tile // across * (4 * R)
    column = tile % across * SPAN
    CHUNKS: tl.constexpr = COUNT // EACH
    i = tl.arange(0, R)
    words = ()
    for _ in tl.static_range(COUNT // 2):
        words = words + (tl.zeros([R, L], tl.int32),)
    least = tl.full([R], 1.0, tl.float32)  # all scales of a program; 1 is one that any may have
    most = tl.full([R], 1.0, tl.float32)
    for q in range(4):
        n = first_row + 4 * i + (3 - q)  # the last row first: its byte is the highest
        values = ()
        for t in tl.static_range(STEPS):
            values = values + widened(load_run(weights, n, rows, column + t * 8 * L, width, L, MASKED), L)
        values = hadamard(values, LOG2, L, COUNT)
        bytes_ = ()
        for g in tl.static_range(CHUNKS):
            k = column + g * CHUNK
            if GIVEN:
                scale = tl.load(absmax + (n * groups + k // group), mask=n < tl.where(k < width, rows, 0), other=0.0)
            else:
                scale = absmax_of(values, g * EACH, (g + 1) * EACH)
            if LOG2 > 0:
                scale = tl.div_rn(scale, tl.zeros([R], tl.float32) + root)
            scale = tl.where(scale == 0, 1.0, scale)
            inverse_scale = tl.div_rn(tl.full([R], 1.0, tl.float32), scale)
            least, most = tl.minimum(least, scale), largest_of(most, scale)
            _store_scale(scales, scale, n, rows, k, width, group, groups, root, LOG2)
            bytes_ = bytes_ + _codes(
                values, scale[:, None], inverse_scale[:, None], root, inverse, remainder, LOG2, EXACT, g * EACH, (g + 1) * EACH
            )
        words = _gathered(words, bytes_, COUNT // 2)
    report(flags, least, most, LOW, HIGH)
    for t in tl.static_range(STEPS):
        block = interleaved(words[4 * t], words[4 * t + 1], words[4 * t + 2], words[4 * t + 3])
        block = (block - MAGIC_RESIDUE) ^ TWOS_COMPLEMENT
        store_words(codes, block, column // 2 + t * 4 * L, width // 2, first_row, rows, stride, WORDS, MASKED)
