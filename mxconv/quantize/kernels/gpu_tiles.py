"""What the GPU kernels share: weights as tuples of register tiles, the rotation on them, exactly rounded division.

A program takes 4·R rows and a run of columns. Each row is spread over L neighbouring threads of a warp; a thread holds 8 inputs
that follow each other, then the 8 that come 8·L further on, and so on. Such a piece of a row is a tuple of float32 tiles [R, L],
one a register, so that input `k` of the run is

    values[8·(k // 8L) + k % 8][i, (k // 8) % L]

and neighbours 1, 2, 4 and from 8·L on lie in the same thread, the others in the neighbouring ones. Rows are taken in fours
(row 4i+q, q = 0…3) since four code bytes make the 32-bit word in which everything is transposed and stored.

Constants: R rows of fours, L threads a row, STEPS runs of 8·L columns, COUNT = 8·STEPS tiles.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def largest_of(a, b):
    """The larger number; NaN when one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def quotient(x, divisor, inverse, EXACT: tl.constexpr):
    """x / divisor in float32, correctly rounded; `inverse` is the correctly rounded 1 / divisor.

    EXACT takes the hardware's division. Otherwise one residual step (Markstein 1990; Brisebarre, Muller and Raina 2004) gives
    the same bits as long as |x| ≥ 2^-100 and 2^-100 ≤ divisor ≤ 2^126, so that neither the residual nor the inverse is rounded
    below the normal numbers. A smaller x gives a quotient that is off by no more than the smallest subnormals or a few units of
    its last place, with the right sign: callers check that codes do not depend on it. The sign of zero is kept.
    """
    if EXACT:
        return tl.div_rn(x, divisor)
    else:
        first = x * inverse
        rest = tl.fma(first, divisor, x * -1.0)
        return tl.fma(rest, inverse * -1.0, first)


@triton.jit
def divided(x, divisor, inverse, remainder, POWER: tl.constexpr, EXACT: tl.constexpr):
    """x / divisor for a rotation's divisor, correctly rounded; `inverse` is fl(1/divisor), `remainder` fl(1/divisor − inverse).

    EXACT as in `quotient`. Otherwise, as long as |x| ≥ 2^-90: by a power of two (POWER) x·inverse; by fl(√128) and fl(√512), which
    share a significand, x·remainder + x·inverse in two roundings, exact for each of the 2^23 significands of x (Brisebarre, Muller
    and Raina 2004; all are tried in the tests).
    """
    if EXACT:
        return tl.div_rn(x, divisor)
    elif POWER:
        return x * inverse
    else:
        return tl.fma(x, inverse, x * remainder)


@triton.jit
def load_run(weights, n, rows, column, width, L: tl.constexpr, MASKED: tl.constexpr):
    """8·L columns from `column` on of rows n [R], as they are stored: a tuple of one or two tiles, for `widened`.

    weights: pointer to [rows, width], contiguous: float16, float32, or int32 words of two bf16. Outside are zeros; only with MASKED
    may that be beyond `width`.
    """
    if weights.dtype.element_ty == tl.int32:
        at = weights + (n.to(tl.int64) * (width // 2))[:, None] + column // 2
        return (_load(at, n, rows, tl.arange(0, 4 * L), (width - column) // 2, MASKED),)
    elif weights.dtype.element_ty == tl.float32:  # 16 bytes are 4 columns: what a thread holds takes two loads
        at = weights + (n.to(tl.int64) * width)[:, None] + column
        k = tl.arange(0, 4 * L) // 4 * 8 + tl.arange(0, 4 * L) % 4
        return _load(at, n, rows, k, width - column, MASKED), _load(at, n, rows, k + 4, width - column, MASKED)
    else:
        at = weights + (n.to(tl.int64) * width)[:, None] + column
        return (_load(at, n, rows, tl.arange(0, 8 * L), width - column, MASKED),)


@triton.jit
def _load(at, n, rows, k, width, MASKED: tl.constexpr):
    limit = tl.where(k < width, rows, 0)[None, :] if MASKED else rows
    return tl.load(at + k[None, :], mask=n[:, None] < limit, other=0)


@triton.jit
def _quarters(x, L: tl.constexpr):
    """[R, 4·L] → 4 tiles [R, L]."""
    R: tl.constexpr = x.shape[0]
    even, odd = tl.split(tl.reshape(x, [R, L, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _low(word):
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(word):
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def widened(run, L: tl.constexpr):
    """What `load_run` gave as 8 float32 tiles [R, L]."""
    if run[0].dtype == tl.int32:
        a, b, c, d = _quarters(run[0], L)
        return _low(a), _high(a), _low(b), _high(b), _low(c), _high(c), _low(d), _high(d)
    elif run[0].dtype == tl.float32:
        return _quarters(run[0], L) + _quarters(run[1], L)
    else:
        R: tl.constexpr = run[0].shape[0]
        even, odd = tl.split(tl.reshape(run[0].to(tl.float32), [R, 4 * L, 2]))
        x0, x2, x4, x6 = _quarters(even, L)
        x1, x3, x5, x7 = _quarters(odd, L)
        return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _between_tiles(values, DISTANCE: tl.constexpr, COUNT: tl.constexpr):
    out = ()
    for i in tl.static_range(COUNT):
        if i & DISTANCE == 0:
            out = out + (values[i] + values[i + DISTANCE],)
        else:
            out = out + (values[i - DISTANCE] - values[i],)
    return out


@triton.jit
def _between_threads(values, DISTANCE: tl.constexpr, COUNT: tl.constexpr):
    R: tl.constexpr = values[0].shape[0]
    L: tl.constexpr = values[0].shape[1]
    lane = tl.arange(0, L)[None, :]
    partner = tl.broadcast_to(lane ^ DISTANCE, (R, L))
    sign = tl.broadcast_to(tl.where(lane & DISTANCE == 0, 1.0, -1.0), (R, L))
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (tl.fma(values[i], sign, tl.gather(values[i], partner, 1)),)  # ±1·x is exact: a + b, or a − b
    return out


@triton.jit
def hadamard(values, LOG2: tl.constexpr, L: tl.constexpr, COUNT: tl.constexpr):
    """H_b·values for blocks of b = 2^LOG2 columns, unnormalised, in the reference's order: stages 1, 2, 4 … b/2."""
    for stage in tl.static_range(LOG2):
        if (1 << stage) < 8:
            values = _between_tiles(values, 1 << stage, COUNT)
        elif (1 << stage) < 8 * L:
            values = _between_threads(values, (1 << stage) // 8, COUNT)
        else:
            values = _between_tiles(values, (1 << stage) // L, COUNT)
    return values


@triton.jit
def largest_along(x, axis: tl.constexpr):
    """The largest of magnitudes along an axis, as integers: bits of numbers without a sign order like them, NaN largest."""
    return tl.max(x.to(tl.int32, bitcast=True), axis).to(tl.float32, bitcast=True)


@triton.jit
def absmax_of(values, FIRST: tl.constexpr, LAST: tl.constexpr):
    """absmax of the tiles FIRST … LAST−1 over each row: [R], NaN where an element is."""
    found = tl.abs(values[FIRST])
    for i in tl.static_range(FIRST + 1, LAST):
        found = largest_of(found, tl.abs(values[i]))
    return largest_along(found, 1)


@triton.jit
def interleaved(x0, x1, x2, x3):
    """4 tiles [R, L] as [4·L, R], row 4·lane + j from x_j."""
    R: tl.constexpr = x0.shape[0]
    L: tl.constexpr = x0.shape[1]
    both = tl.join(tl.join(x0, x2), tl.join(x1, x3))  # [R, L, j // 2, j % 2]
    return tl.reshape(tl.permute(both, (1, 2, 3, 0)), [4 * L, R])


@triton.jit
def store_words(codes, words, line, lines, first_row, rows, stride, WORDS: tl.constexpr, MASKED: tl.constexpr):
    """Store words [K, R] of four code bytes (rows first_row + 4i … + 3) into lines line … line+K−1 of the stored tensor's `lines`.

    codes: pointer to words with WORDS (first_row, rows and stride are then multiples of 4), else to bytes; stride in bytes.
    MASKED: some of these lines may not exist.
    """
    K: tl.constexpr = words.shape[0]
    R: tl.constexpr = words.shape[1]
    k = (line + tl.arange(0, K)).to(tl.int64)[:, None]
    if WORDS:
        n = first_row // 4 + tl.arange(0, R)[None, :]
        limit = tl.where(k < lines, rows // 4, 0) if MASKED else rows // 4
        tl.store(codes + k * (stride // 4) + n, words, mask=n < limit)
    else:
        n = first_row + 4 * tl.arange(0, R)[None, :]
        limit = tl.where(k < lines, rows, 0) if MASKED else rows
        for q in tl.static_range(4):
            tl.store(codes + k * stride + (n + q), (words >> (8 * q)).to(tl.int8), mask=n + q < limit)


@triton.jit
def report(flags, least, most, LOW: tl.constexpr, HIGH: tl.constexpr):
    """flags[0] = 1 when a scale is NaN or infinite, flags[1] = 1 when one leaves LOW … HIGH, between which `quotient` is exact.

    least, most: the bounds of the scales that each element of the tiles stands for; `most` NaN where one is.
    """
    nowhere = tl.zeros_like(most).to(tl.int32)
    tl.store(flags + nowhere, 1, mask=(most < float("inf")) == 0)
    tl.store(flags + 1 + nowhere, 1, mask=((least >= LOW) & (most <= HIGH)) == 0)
