"""e4m3 on the GPU: 128×128 blocks in one pass, and rotated weights with the scale of a whole tensor: the reference's bits.

A quotient is clamped by the conversion itself (round half to even, saturate at ±448, sign of zero kept), four rows to a word.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
from __future__ import annotations

import triton
import triton.language as tl

from mxconv.quantize.kernels.gpu_tiles import (
    divided,
    hadamard,
    interleaved,
    largest_along,
    largest_of,
    load_run,
    quotient,
    report,
    store_words,
    widened,
)

# Scales between which every quotient that decides a code is exact: codes other than 0 need |w| > scale·2^-11 (2^-80, 2^100).
LOW = tl.constexpr(8.271806125530277e-25)
HIGH = tl.constexpr(1.2676506002282294e30)
_CONVERT_FOUR = tl.constexpr(
    "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; "
    "mov.b32 $0, {low, high}; }"
)


@triton.jit
def _e4m3_byte(x):
    """The e4m3 byte of x, as int32 0 … 255, in integer arithmetic: what the conversion instruction does."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 128
    size = tl.minimum(tl.abs(x), 448.0)
    exponent = tl.maximum(size.to(tl.int32, bitcast=True) >> 23, 121)  # of 2^-6 at least: subnormals share its unit
    unit = ((exponent + 20) << 23).to(tl.float32, bitcast=True)  # size + unit rounds half to even at the code's last bit
    steps = (size + unit).to(tl.int32, bitcast=True) - unit.to(tl.int32, bitcast=True)
    return sign | (steps + ((exponent - 121) << 3))


@triton.jit
def e4m3_word(a, b, c, d, ASSEMBLY: tl.constexpr):
    """The e4m3 bytes of a, b, c, d in one word, a lowest: what is above 448 becomes 448."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(_CONVERT_FOUR, "=r,f,f,f,f", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return _e4m3_byte(a) | (_e4m3_byte(b) << 8) | (_e4m3_byte(c) << 16) | (_e4m3_byte(d) << 24)


@triton.jit
def _words(a, b, c, d, divisor, inverse, EXACT: tl.constexpr, ASSEMBLY: tl.constexpr):
    """8 tiles of each row of four, divided, as 8 tiles of words."""
    out = ()
    for v in tl.static_range(8):
        w = quotient(a[v], divisor, inverse, EXACT)
        x = quotient(b[v], divisor, inverse, EXACT)
        y = quotient(c[v], divisor, inverse, EXACT)
        z = quotient(d[v], divisor, inverse, EXACT)
        out = out + (e4m3_word(w, x, y, z, ASSEMBLY),)
    return out


@triton.jit
def _store(codes, words, column, width, first_row, rows, stride, L: tl.constexpr, WORDS: tl.constexpr, MASKED: tl.constexpr):
    """Words of 8 columns a thread, column + 8·lane + v, into the lines of the stored tensor."""
    R: tl.constexpr = words[0].shape[0]
    low = interleaved(words[0], words[1], words[2], words[3])  # [4·L, R]
    high = interleaved(words[4], words[5], words[6], words[7])
    both = tl.join(tl.reshape(low, [L, 4, R]), tl.reshape(high, [L, 4, R]))  # [L, 4, R, 2]
    block = tl.reshape(tl.permute(both, (0, 3, 1, 2)), [8 * L, R])
    store_words(codes, block, column, width, first_row, rows, stride, WORDS, MASKED)


@triton.jit
def fp8_block_kernel(
    weights, codes, scales, flags, rows, width, stride,
    BLOCK: tl.constexpr, L: tl.constexpr, WORDS: tl.constexpr, EXACT: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Codes and scale of one BLOCK × BLOCK block a program; the grid is block rows × block columns, columns fastest.

    weights: as of `load_run`, rows and width multiples of BLOCK. codes: int8 [width, rows] with lines `stride` bytes apart, seen as
    int32 with WORDS. scales: float32 [rows/BLOCK, width/BLOCK]. flags: see `report`.
    """
    R: tl.constexpr = BLOCK // 4
    STEPS: tl.constexpr = BLOCK // (8 * L)
    across = width // BLOCK
    tile = tl.program_id(0)
    first_row = tile // across * BLOCK
    column = tile % across * BLOCK
    runs = ()
    found = tl.zeros([R, L], tl.float32)
    for q in tl.static_range(4):
        n = first_row + 4 * tl.arange(0, R) + q
        for t in tl.static_range(STEPS):
            runs = runs + (load_run(weights, n, rows, column + t * 8 * L, width, L, False),)
    for each in tl.static_range(4 * STEPS):
        values = widened(runs[each], L)
        for v in tl.static_range(8):
            found = largest_of(found, tl.abs(values[v]))
    absmax = largest_along(largest_along(found, 1), 0)
    scale = tl.div_rn(absmax, tl.full([], 448.0, tl.float32))
    scale = tl.where(scale == 0, 1.0, scale)
    inverse = tl.div_rn(tl.full([], 1.0, tl.float32), scale)
    tl.store(scales + tile, scale)
    report(flags, tl.full([1], 0.0, tl.float32) + scale, tl.full([1], 0.0, tl.float32) + scale, LOW, HIGH)
    for t in tl.static_range(STEPS):
        words = _words(
            widened(runs[t], L), widened(runs[STEPS + t], L), widened(runs[2 * STEPS + t], L),
            widened(runs[3 * STEPS + t], L), scale, inverse, EXACT, ASSEMBLY,
        )  # fmt: skip
        _store(codes, words, column + t * 8 * L, width, first_row, rows, stride, L, WORDS, False)


@triton.jit
def _rotated(
    weights, n, rows, column, width, divisor, inverse,
    LOG2: tl.constexpr, L: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """8·L rotated, divided columns of rows n: 8 tiles [R, L]."""
    values = hadamard(widened(load_run(weights, n, rows, column, width, L, MASKED), L), LOG2, L, 8)
    out = ()
    for v in tl.static_range(8):
        if LOG2 > 0:
            out = out + (divided(values[v], divisor, inverse, 0.0, True, EXACT),)
        else:
            out = out + (values[v],)
    return out


@triton.jit
def fp8_tensor_kernel(
    weights, codes, absmax, flags, rows, width, stride, divisor, inverse,
    LOG2: tl.constexpr, R: tl.constexpr, L: tl.constexpr, STEPS: tl.constexpr,
    WORDS: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Codes of 4·R rows × 8·L·STEPS columns a program, rotated by blocks of 2^LOG2 ≤ 8·L; the grid as in `int4_kernel`.

    weights, codes, flags: as in `fp8_block_kernel`. absmax: float32 [1], of the rotated weights, not yet divided. divisor, inverse:
    a power of two and 1 over it.
    """
    across = tl.cdiv(width, 8 * L * STEPS)
    tile = tl.program_id(0)
    first_row = tile // across * (4 * R)
    first_column = tile % across * (8 * L * STEPS)
    scale = tl.load(absmax)
    if LOG2 > 0:
        scale = tl.div_rn(scale, divisor)
    scale = tl.div_rn(scale, tl.full([], 448.0, tl.float32))
    scale = tl.where(scale == 0, 1.0, scale)
    inverse_scale = tl.div_rn(tl.full([], 1.0, tl.float32), scale)
    report(flags, tl.full([1], 0.0, tl.float32) + scale, tl.full([1], 0.0, tl.float32) + scale, LOW, HIGH)
    n = first_row + 4 * tl.arange(0, R)
    for t in tl.static_range(STEPS):
        column = first_column + t * 8 * L
        words = _words(
            _rotated(weights, n, rows, column, width, divisor, inverse, LOG2, L, MASKED, EXACT),
            _rotated(weights, n + 1, rows, column, width, divisor, inverse, LOG2, L, MASKED, EXACT),
            _rotated(weights, n + 2, rows, column, width, divisor, inverse, LOG2, L, MASKED, EXACT),
            _rotated(weights, n + 3, rows, column, width, divisor, inverse, LOG2, L, MASKED, EXACT),
            scale, inverse_scale, EXACT, ASSEMBLY,
        )  # fmt: skip
        _store(codes, words, column, width, first_row, rows, stride, L, WORDS, MASKED)
