"""What the Hopper kernel of lightning prefill is made of: bounds and counts, states before a segment, SiLU, decay of a chunk.

The first of them are `lightning_chunks`' own in gluon, which names the layout of every tensor. This file needs triton alone.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# x·sigmoid(x) of two packed values with one division. e^-x stays below 2^62, so that the product of both denominators is finite:
# under -43, where SiLU is under 1e-17, the result is that small but not exact.
_SILU = """{{
.reg .f32 x, y, a, b, r;
{unpack}
mul.f32 a, x, 0fBFB8AA3B;
mul.f32 b, y, 0fBFB8AA3B;
min.f32 a, a, 0f42780000;
min.f32 b, b, 0f42780000;
ex2.approx.ftz.f32 a, a;
ex2.approx.ftz.f32 b, b;
add.f32 a, a, 0f3F800000;
add.f32 b, b, 0f3F800000;
mul.f32 r, a, b;
rcp.approx.ftz.f32 r, r;
mul.f32 b, b, r;
mul.f32 a, a, r;
mul.f32 x, x, b;
mul.f32 y, y, a;
{pack}
}}"""
SILU_BF16 = gl.constexpr(
    _SILU.format(
        unpack=".reg .b32 lo, hi; shl.b32 lo, $1, 16; and.b32 hi, $1, 0xffff0000; mov.b32 x, lo; mov.b32 y, hi;",
        pack="cvt.rn.bf16x2.f32 $0, y, x;",
    )
)
SILU_FP16 = gl.constexpr(
    _SILU.format(
        unpack=".reg .b16 lo, hi; mov.b32 {lo, hi}, $1; cvt.f32.f16 x, lo; cvt.f32.f16 y, hi;", pack="cvt.rn.f16x2.f32 $0, y, x;"
    )
)


@gluon.jit
def silu_of(x):
    """x·sigmoid(x), computed in float32 and rounded to the dtype of x."""
    ASM: gl.constexpr = SILU_BF16 if x.dtype == gl.bfloat16 else SILU_FP16
    return gl.inline_asm_elementwise(ASM, "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2)


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
def decays(s, c_i, c_j, i, j):
    """e^(-s(c_i-c_j)) [C, C] for j ≤ i, else 0, and e^(-s·c_i) [C]."""
    causal = i[:, None] >= j[None, :]
    pair = gl.where(causal, gl.exp(-s * gl.where(causal, c_i[:, None] - c_j[None, :], 0).to(gl.float32)), 0.0)
    return pair, gl.exp(-s * c_i.to(gl.float32))


@gluon.jit
def prepare(x_s, real, ROWS: gl.constexpr, SILU: gl.constexpr, MASKED: gl.constexpr):
    """A tile behind SiLU, its padding zero, in place."""
    if SILU or MASKED:
        x = x_s.load(ROWS)
        if SILU:
            x = silu_of(x)
        if MASKED:
            x = gl.where(real[:, None], x, gl.zeros_like(x))
        x_s.store(x)


@gluon.jit
def decay_values(v_s, decayed_s, rest_s, key, ROWS: gl.constexpr):
    """v · e^(-s(m-c)) as two tiles that sum to it with twice the bits of their dtype; `key` [C] = e^(-s(m-c))."""
    decayed = v_s.load(ROWS).to(gl.float32) * key[:, None]
    rounded = decayed.to(v_s.dtype)
    decayed_s.store(rounded)
    rest_s.store((decayed - rounded.to(gl.float32)).to(v_s.dtype))


@gluon.jit
def masked_rows(pointer, stride, start, stop, column, target, ROWS: gl.constexpr):
    """Rows start … stop - 1 of a tensor into a buffer; the others are zero."""
    C: gl.constexpr = target.shape[0]
    WIDTH: gl.constexpr = target.shape[1]
    i, j = gl.arange(0, C, gl.SliceLayout(1, ROWS)), gl.arange(0, WIDTH, gl.SliceLayout(0, ROWS))
    base = pointer + gl.cast(start, gl.int64) * stride + column
    target.store(gl.load(base + i[:, None] * stride + j[None, :], mask=(start + i < stop)[:, None], other=0.0))
