"""Triton kernels of lightning prefill: a state pass over segments of a sequence, and the pass that writes outputs.

A program owns `BV` value columns of one head over one segment, and walks it in chunks of `C` tokens with S [D, BV] in float32
registers. With counts c_i of the chunk's real tokens up to and with token i, and m those of the whole chunk:

    o_i = e^(-s·c_i)·(q_i·S) + Σ_(j≤i) e^(-s(c_i-c_j))·(q_i·k_j)·v_j        S' = e^(-s·m)·S + Σ_j k_jᵀ·(e^(-s(m-c_j))·v_j)

Every exponent is at most 0. Padding and what lies beyond the end is loaded as zero and not counted, so that it neither adds
nor decays. Rows of q·S are scaled after the product, in float32. S·e^(-s·m) is S + S·expm1(-s·m): a decay so slow that it
rounds to 1 - 2⁻²⁴ would otherwise be off by the same rounding in each of 10⁵ chunks.

A segment's start needs the state behind all tokens before it. `lightning_states` writes what each segment alone leaves
(`local_states` [S, N, segments, D, D]), and a program of `lightning_outputs`, which takes `PARTS` segments, sums the decayed states
before its own. Tokens that have decayed below e^-`reach` where that program starts are left out of both: heads that decay fast read
only a short halo twice.

Tiles that pass through registers are multiplied as float32 (tf32 keeps every bit of two-byte values): triton 3.6 multiplies a
two-byte tile wrongly, or faults, where it comes from registers and is transposed. So two-byte tiles must be copied as they are,
16 bytes at a time: the caller sees to it that pointers and strides allow that.

This file needs triton alone, so that it compiles for a GPU where there is no torch.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

GRAIN = tl.constexpr(128)
SIZES = ("tokens", "heads", "segments")
"""Not specialized on: a kernel must not be compiled anew for each length of a prompt."""


@triton.jit
def expm1_of_nonpositive(x):
    """e^x - 1 of x ≤ 0 in float32, to 1e-7 relative also near 0."""
    near = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(x > -0.35, near, tl.exp(x) - 1)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 that has no more bits than a two-byte dtype, rounded by integer arithmetic.

    A conversion whose result is needed as float32 again is done value by value, at an eighth of the speed.
    """
    BITS: tl.constexpr = 65536 if dtype == tl.bfloat16 else 8192  # one in the dtype's last place
    return ((x.to(tl.int32, bitcast=True) + BITS // 2) & -BITS).to(tl.float32, bitcast=True)


@triton.jit
def load_tile(base, stride, rows, columns, real, D: tl.constexpr, DP: tl.constexpr):
    """[rows, columns] of base + row·stride + column as float32; zero where `real` [rows] is false or a column is beyond D."""
    keep = real[:, None] if D == DP else real[:, None] & (columns < D)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=keep, other=0.0).to(tl.float32)


@triton.jit
def load_whole_tile(base, stride, rows, columns, D: tl.constexpr, DP: tl.constexpr):
    """`load_tile` of rows that are all there, in their own dtype."""
    pointers = base + rows[:, None] * stride + columns[None, :]
    return tl.load(pointers) if D == DP else tl.load(pointers, mask=(columns < D)[None, :], other=0.0)


@triton.jit
def bounds_of(sequence, segment, segments, lengths, tokens, VARLEN: tl.constexpr):
    """(first row of the sequence int64, first and last + 1 token of the segment in it, its length, tokens of a full segment).

    Full segments are whole multiples of `GRAIN` tokens, whatever the chunk.
    """
    if VARLEN:
        row = tl.load(lengths + sequence).to(tl.int64)
        length = (tl.load(lengths + sequence + 1) - row).to(tl.int32)
    else:
        row = sequence.to(tl.int64) * tokens
        length = tokens
    size = tl.cdiv(tl.cdiv(length, GRAIN), segments) * GRAIN
    begin = tl.minimum(segment * size, length)
    return row, begin, tl.minimum(begin + size, length), length, size


@triton.jit
def count_before(counts, row, position, MASKED: tl.constexpr):
    """Real tokens of the sequence before `position`; `counts` int32 holds those up to and with each row."""
    if MASKED:
        return tl.load(counts + row + position - 1, mask=position > 0, other=0)
    return position


@triton.jit
def counted(counts, row, start, stop, before, C: tl.constexpr, MASKED: tl.constexpr):
    """(real [C], c_i [C], m) of the chunk at `start`, whose tokens from `stop` on are not there."""
    i = tl.arange(0, C)
    real = start + i < stop
    if MASKED:
        upto = tl.load(counts + row + start + i, mask=real, other=0)
        prior = tl.load(counts + row + start + i - 1, mask=real & (start + i > 0), other=0)
        last = tl.load(counts + row + tl.minimum(start + C, stop) - 1)
        return real & (upto > prior), tl.where(real, upto, last) - before, last - before
    m = tl.minimum(stop - start, C)
    return real, tl.minimum(i + 1, m), m


@triton.jit
def pair_decay(s, c, C: tl.constexpr):
    """e^(-s(c_i-c_j)) [C, C] for j ≤ i, else 0."""
    i = tl.arange(0, C)
    gap = tl.where(i[:, None] >= i[None, :], c[:, None] - c[None, :], 0).to(tl.float32)
    return tl.where(i[:, None] >= i[None, :], tl.exp(-s * gap), 0.0)


@triton.jit
def moved(state, k, v, s, c, m, PRECISION: tl.constexpr):
    """The state behind a chunk."""
    decayed = (v * tl.exp(-s * (m - c).to(tl.float32))[:, None]).to(v.dtype)
    kept = state + state * expm1_of_nonpositive(-s * m.to(tl.float32))
    return tl.dot(tl.trans(k), decayed, kept, input_precision=PRECISION)


@triton.jit
def attended(state, q, k, v, pair, across, PRECISION: tl.constexpr):
    """Outputs of a chunk in float32; `across` [C] = e^(-s·c_i)."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    o = tl.dot(q, state.to(q.dtype), input_precision=PRECISION) * across[:, None]
    return tl.dot((scores * pair).to(v.dtype), v, o, input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES)
def lightning_states(
    k, v, rates, lengths, counts, local_states, reach,
    stride_kt, stride_kh, stride_vt, stride_vh, tokens, heads, segments,
    D: tl.constexpr, DP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
    VARLEN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Local states of the first segments, as many as the grid has: (column blocks · those, heads, sequences).

    A segment that has decayed beyond `reach` where the next program of the output pass starts is left out: nobody reads it.
    Walks backwards, each token decayed to the segment's end at once: S itself is never scaled, and the output pass, which starts
    at the segment's first token, finds what was read last still in the cache.
    """
    blocks: tl.constexpr = (D + BV - 1) // BV
    segment, head, sequence = tl.program_id(0) // blocks, tl.program_id(1).to(tl.int64), tl.program_id(2)
    d, n, i = tl.arange(0, DP), tl.program_id(0) % blocks * BV + tl.arange(0, BV), tl.arange(0, C)
    s = tl.load(rates + head).to(tl.float32)
    row, begin, stop, length, size = bounds_of(sequence, segment, segments, lengths, tokens, VARLEN)
    behind = count_before(counts, row, stop, MASKED)
    reader = tl.minimum((segment // PARTS + 1) * PARTS * size, length)
    ahead = count_before(counts, row, reader, MASKED) - behind
    if s * ahead.to(tl.float32) > reach:
        return
    if not MASKED:
        halo = tl.minimum(reach / tl.maximum(s, 1e-30), 1e9).to(tl.int32) + 1 - ahead
        begin = tl.maximum(begin, begin + (stop - begin - halo) // C * C)
    k += row * stride_kt + head * stride_kh
    v += row * stride_vt + head * stride_vh
    state = tl.zeros((DP, BV), tl.float32)
    full = begin if MASKED else begin + (stop - begin) // C * C
    for start in tl.range(full, stop, C, num_stages=1):
        far = tl.cast(start, tl.int64)
        real, c, _ = counted(counts, row, start, stop, 0, C, MASKED)
        gap = behind - c if MASKED else behind - start - c
        b_k = load_tile(k + far * stride_kt, stride_kt, i, d, real, D, DP)
        b_v = load_tile(v + far * stride_vt, stride_vt, i, n, real, D, blocks * BV)
        decayed = b_v * tl.exp(-s * gap.to(tl.float32))[:, None]
        if PRECISION == "tf32":  # which holds a two-byte dtype's bits, and what they leave of a float32 in a second product
            upper = rounded(decayed, v.dtype.element_ty)
            state = tl.dot(tl.trans(b_k), upper, state, input_precision=PRECISION)
            decayed -= upper
        state = tl.dot(tl.trans(b_k), decayed, state, input_precision=PRECISION)
    for start in tl.range(0, full - begin, C, num_stages=STAGES):
        far = tl.cast(full - C - start, tl.int64)
        b_k = load_whole_tile(k + far * stride_kt, stride_kt, i, d, D, DP)
        b_v = load_whole_tile(v + far * stride_vt, stride_vt, i, n, D, blocks * BV)
        decayed = b_v * tl.exp(-s * (stop - 1 - full + C + start - i).to(tl.float32))[:, None]
        upper = decayed if b_v.dtype == tl.float32 else rounded(decayed, b_v.dtype)
        state = tl.dot(tl.trans(b_k), upper.to(b_v.dtype), state, input_precision=PRECISION)
        if b_v.dtype != tl.float32 and start == 0:  # the chunk that weighs most: what its rounding left as well
            state = tl.dot(tl.trans(b_k), (decayed - upper).to(b_v.dtype), state, input_precision=PRECISION)
    place = ((sequence.to(tl.int64) * heads + head) * segments + segment) * D * D
    tl.store(local_states + place + d[:, None] * D + n[None, :], state, mask=(d < D)[:, None] & (n < D)[None, :])


@triton.jit
def state_before(
    initial, row_of_state, local_states, place, counts, row, segment, size, length, begin, s, reach, d, n, inside,
    D: tl.constexpr, DP: tl.constexpr, BV: tl.constexpr, MASKED: tl.constexpr, STARTED: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """The state behind all tokens before `begin`: the initial one and the segments' own, decayed to `begin`."""
    state = tl.zeros((DP, BV), tl.float32)
    tile = d[:, None] * D + n[None, :]
    here = count_before(counts, row, begin, MASKED)
    if STARTED:
        whole = tl.load(initial + row_of_state * D * D + tile, mask=inside, other=0.0)
        state = whole * tl.exp(-s * here.to(tl.float32)) if SEGMENTED else whole
    if SEGMENTED:
        first = segment
        gap = tl.zeros((), tl.float32)
        # Walk back until what lies further has decayed away; then add from there, oldest first.
        while (first > 0) & (s * gap <= reach):
            first -= 1
            gap = (here - count_before(counts, row, tl.minimum(first * size, length), MASKED)).to(tl.float32)
        for other in range(first, segment):
            end = tl.minimum((other + 1) * size, length)
            gap = (here - count_before(counts, row, end, MASKED)).to(tl.float32)
            local = tl.load(local_states + place + tl.cast(other, tl.int64) * D * D + tile, mask=inside, other=0.0)
            state += tl.exp(-s * gap) * local
    return state


@triton.jit(do_not_specialize=SIZES)
def lightning_outputs(
    q, k, v, out, rates, lengths, counts, initial, final, slots, local_states, reach,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, tokens, heads, segments,
    D: tl.constexpr, DP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
    VARLEN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    STARTED: tl.constexpr, POOLED: tl.constexpr, SEGMENTED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Outputs, and the state behind the last token. Grid (column blocks · segments / PARTS, heads, sequences)."""
    blocks: tl.constexpr = (D + BV - 1) // BV
    column = tl.program_id(0) % blocks * BV
    segment, head, sequence = tl.program_id(0) // blocks * PARTS, tl.program_id(1).to(tl.int64), tl.program_id(2)
    d, n, i = tl.arange(0, DP), column + tl.arange(0, BV), tl.arange(0, C)
    inside = (d < D)[:, None] & (n < D)[None, :]
    s = tl.load(rates + head).to(tl.float32)
    row, begin, _, length, size = bounds_of(sequence, segment, segments, lengths, tokens, VARLEN)
    stop = tl.minimum(begin + PARTS * size, length)
    row_of_state = sequence.to(tl.int64)
    padding = False
    if POOLED:
        row_of_state = tl.load(slots + sequence).to(tl.int64)
        padding = row_of_state < 0
    row_of_state = row_of_state * heads + head
    q += row * stride_qt + head * stride_qh
    k += row * stride_kt + head * stride_kh
    v += row * stride_vt + head * stride_vh
    out += row * stride_ot + head * stride_oh
    if padding:
        for start in tl.range(begin, stop, C):
            o_pointers = out + tl.cast(start, tl.int64) * stride_ot + i[:, None] * stride_ot + n[None, :]
            tl.store(o_pointers, tl.zeros((C, BV), out.dtype.element_ty), mask=(start + i < stop)[:, None] & (n < D)[None, :])
        return
    place = (sequence.to(tl.int64) * heads + head) * segments * D * D
    state = state_before(
        initial, row_of_state, local_states, place, counts, row, segment, size, length, begin, s, reach, d, n, inside,
        D, DP, BV, MASKED, STARTED, SEGMENTED,
    )  # fmt: skip
    full = begin if MASKED else begin + (stop - begin) // C * C
    pair, across = pair_decay(s, i + 1, C), tl.exp(-s * (i + 1).to(tl.float32))
    for start in tl.range(begin, full, C, num_stages=STAGES):
        far = tl.cast(start, tl.int64)
        b_q = load_whole_tile(q + far * stride_qt, stride_qt, i, d, D, DP)
        b_k = load_whole_tile(k + far * stride_kt, stride_kt, i, d, D, DP)
        b_v = load_whole_tile(v + far * stride_vt, stride_vt, i, n, D, blocks * BV)
        o = attended(state, b_q, b_k, b_v, pair, across, PRECISION)
        state = moved(state, b_k, b_v, s, i + 1, tl.full((), C, tl.int32), PRECISION)
        o_pointers = out + far * stride_ot + i[:, None] * stride_ot + n[None, :]
        if blocks * BV == D:
            tl.store(o_pointers, o.to(out.dtype.element_ty))
        else:
            tl.store(o_pointers, o.to(out.dtype.element_ty), mask=(n < D)[None, :])
    before = count_before(counts, row, full, MASKED)
    for start in tl.range(full, stop, C, num_stages=1):
        far = tl.cast(start, tl.int64)
        real, c, m = counted(counts, row, start, stop, before, C, MASKED)
        b_q = load_tile(q + far * stride_qt, stride_qt, i, d, real, D, DP)
        b_k = load_tile(k + far * stride_kt, stride_kt, i, d, real, D, DP)
        b_v = load_tile(v + far * stride_vt, stride_vt, i, n, real, D, blocks * BV)
        o = attended(state, b_q, b_k, b_v, pair_decay(s, c, C), tl.exp(-s * c.to(tl.float32)), PRECISION)
        state = moved(state, b_k, b_v, s, c, m, PRECISION)
        before += m
        o_pointers = out + far * stride_ot + i[:, None] * stride_ot + n[None, :]
        tl.store(o_pointers, o.to(out.dtype.element_ty), mask=(start + i < stop)[:, None] & (n < D)[None, :])
    if segment == segments - PARTS:
        tl.store(final + row_of_state * D * D + d[:, None] * D + n[None, :], state, mask=inside)
