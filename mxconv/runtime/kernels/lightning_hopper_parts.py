"""What the Hopper kernel of lightning prefill is made of: bounds and counts, states before a segment, decay of a chunk.

The first of them are `lightning_chunks`' own in gluon, which names the layout of every tensor. This file needs triton alone.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def expm1_of_nonpositive(x):
    """As `lightning_chunks.expm1_of_nonpositive`."""
    near = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return gl.where(x > -0.35, near, gl.exp(x) - 1)


@gluon.jit
def bounds_of(sequence, segment, segments, lengths, tokens, VARLEN: gl.constexpr):
    """As `lightning_chunks.bounds_of`."""
    GRAIN: gl.constexpr = 128  # that of `lightning_chunks`, whose states this pass reads
    if VARLEN:
        row = gl.load(lengths + sequence).to(gl.int64)
        length = (gl.load(lengths + sequence + 1) - row).to(gl.int32)
    else:
        row = sequence.to(gl.int64) * tokens
        length = tokens
    size = gl.cdiv(gl.cdiv(length, GRAIN), segments) * GRAIN
    begin = gl.minimum(segment * size, length)
    return row, begin, gl.minimum(begin + size, length), length, size


@gluon.jit
def count_before(counts, row, position, MASKED: gl.constexpr):
    """As `lightning_chunks.count_before`."""
    if MASKED:
        return gl.load(counts + row + position - 1, mask=position > 0, other=0)
    return position


@gluon.jit
def counted(counts, row, start, stop, before, i, MASKED: gl.constexpr):
    """(real, c_i) of the tokens start + i, whatever the layout of i: which are there, and counts up to and with them."""
    real = start + i < stop
    if MASKED:
        upto = gl.load(counts + row + start + i, mask=real, other=0)
        prior = gl.load(counts + row + start + i - 1, mask=real & (start + i > 0), other=0)
        return real & (upto > prior), gl.where(real, upto - before, 0)
    return real, i + 1


@gluon.jit
def state_before(
    initial, row_of_state, local_states, place, counts, row, segment, size, length, begin, s, reach, column,
    D: gl.constexpr, BV: gl.constexpr, MASKED: gl.constexpr, STARTED: gl.constexpr, SEGMENTED: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """As `lightning_chunks.state_before`; 16 bytes a thread, two segments in flight."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [num_warps, 1], [1, 0])
    d, n = gl.arange(0, D, gl.SliceLayout(1, WIDE)), gl.arange(0, BV, gl.SliceLayout(0, WIDE))
    tile = d[:, None] * D + column + n[None, :]
    state = gl.zeros((D, BV), gl.float32, WIDE)
    here = count_before(counts, row, begin, MASKED)
    if STARTED:
        state = gl.load(initial + row_of_state * D * D + tile)
        if SEGMENTED:
            state = state * gl.exp(-s * here.to(gl.float32))
    if SEGMENTED:
        first = segment
        gap = s * 0.0
        while (first > 0) & (s * gap <= reach):
            first -= 1
            gap = (here - count_before(counts, row, gl.minimum(first * size, length), MASKED)).to(gl.float32)
        for other in range(first, segment, 2):
            near, far = gl.minimum((other + 1) * size, length), gl.minimum((other + 2) * size, begin)
            gap = (here - count_before(counts, row, near, MASKED)).to(gl.float32)
            next_gap = (here - count_before(counts, row, far, MASKED)).to(gl.float32)
            at = local_states + place + gl.cast(other, gl.int64) * D * D
            one, two = gl.load(at + tile), gl.load(at + D * D + tile, mask=tile < (segment - other - 1) * D * D, other=0.0)
            state += gl.exp(-s * gap) * one + gl.exp(-s * next_gap) * two
    return state


@gluon.jit
def count_here(counts, row, start, stop, before, all, i, MASKED: gl.constexpr):
    """c_i of the tokens start + i; `all` for what lies beyond stop."""
    _, c = counted(counts, row, start, stop, before, i, MASKED)
    return gl.where(start + i < stop, c, all)


@gluon.jit
def pair_decay(s, c_j, c_i, j, i):
    """e^(-s(c_i-c_j)) [keys j, queries i] for j ≤ i, else 0."""
    causal = j[:, None] <= i[None, :]
    return gl.where(causal, gl.exp(-s * gl.where(causal, c_i[None, :] - c_j[:, None], 0).to(gl.float32)), 0.0)


@gluon.jit
def clear_padding(x_s, real, ROWS: gl.constexpr):
    """Zeros in the rows of a tile that are not real, in place."""
    x = x_s.load(ROWS)
    x_s.store(gl.where(real[:, None], x, gl.zeros_like(x)))


@gluon.jit
def decayed_values(values, key):
    """vᵀ · e^(-s(m-c)) in float32; `key` [C] = e^(-s(m-c))."""
    return values.to(gl.float32) * key[None, :]


@gluon.jit
def split(x, LAYOUT: gl.constexpr):
    """float32 as two bf16 operands that sum to it, with twice the bits.

    By integer arithmetic: a conversion whose result is needed as float32 again is done value by value, at an eighth of the speed.
    The first is x rounded, not cut off: else the second had the sign of x, and what the matrix unit truncates of its products
    would add up over a long sequence (2e-3 of a state in 10⁶ tokens without decay).
    """
    upper = ((x.to(gl.int32, bitcast=True) + 32768) & -65536).to(gl.float32, bitcast=True)
    return gl.convert_layout(upper.to(gl.bfloat16), LAYOUT), gl.convert_layout((x - upper).to(gl.bfloat16), LAYOUT)


@gluon.jit
def masked_rows(pointer, stride, start, stop, column, target, ROWS: gl.constexpr):
    """Rows start … stop - 1 of a tensor into a buffer; the others are zero."""
    C: gl.constexpr = target.shape[0]
    WIDTH: gl.constexpr = target.shape[1]
    i, j = gl.arange(0, C, gl.SliceLayout(1, ROWS)), gl.arange(0, WIDTH, gl.SliceLayout(0, ROWS))
    base = pointer + gl.cast(start, gl.int64) * stride + column
    target.store(gl.load(base + i[:, None] * stride + j[None, :], mask=(start + i < stop)[:, None], other=0.0))
