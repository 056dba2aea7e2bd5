"""The output pass of lightning prefill for Hopper: tensor copies and matrix instructions kept in flight by hand.

Same function and arguments as `lightning_chunks.lightning_outputs` (formulas there), for two-byte dtypes, head_dim 64 or 128 and
no mask. A chunk's four products form one queue of asynchronous matrix instructions; the arithmetic between them runs while the
queue is busy:

    scores = q·kᵀ        | output of the chunk before is stored; S rounded to shared memory; v decayed; S decayed in registers
    inter = q·S,  S += kᵀ·v'  | scores are multiplied by their decay, then inter
    o = inter + p·v      | the next chunk's scores follow at once

q, k and v come by tensor copies into a ring of `STAGES` buffers, o leaves by one. What does not fill a chunk (a sequence's
last tokens) is loaded with a mask into the first buffer.

This file needs triton alone, so that it compiles for a GPU where there is no torch.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Names that changed between the releases of triton that this runs with.
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def expm1_of_nonpositive(x):
    near = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return gl.where(x > -0.35, near, gl.exp(x) - 1)


@gluon.jit
def bounds_of(sequence, segment, segments, lengths, tokens, VARLEN: gl.constexpr):
    """As `lightning_chunks.bounds_of`."""
    GRAIN: gl.constexpr = 128
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
def state_before(
    initial, row_of_state, local_states, place, segment, size, length, begin, s, reach, column,
    D: gl.constexpr, BV: gl.constexpr, STARTED: gl.constexpr, SEGMENTED: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `lightning_chunks.state_before`, without a mask; 16 bytes a thread, two segments in flight."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [num_warps, 1], [1, 0])
    d, n = gl.arange(0, D, gl.SliceLayout(1, WIDE)), gl.arange(0, BV, gl.SliceLayout(0, WIDE))
    tile = d[:, None] * D + column + n[None, :]
    state = gl.zeros((D, BV), gl.float32, WIDE)
    if STARTED:
        state = gl.load(initial + row_of_state * D * D + tile)
        if SEGMENTED:
            state = state * gl.exp(-s * begin.to(gl.float32))
    if SEGMENTED:
        first = segment
        gap = s * 0.0
        while (first > 0) & (s * gap <= reach):
            first -= 1
            gap = (begin - gl.minimum(first * size, length)).to(gl.float32)
        for other in range(first, segment, 2):
            gap = (begin - gl.minimum((other + 1) * size, length)).to(gl.float32)
            next_gap = (begin - gl.minimum((other + 2) * size, length)).to(gl.float32)
            at = local_states + place + gl.cast(other, gl.int64) * D * D
            one, two = gl.load(at + tile), gl.load(at + D * D + tile, mask=tile < (segment - other - 1) * D * D, other=0.0)
            state += gl.exp(-s * gap) * one + gl.exp(-s * gl.maximum(next_gap, 0.0)) * two
    return state


@gluon.jit
def copy_chunk(q_rows, k_rows, v_rows, row, q_column, k_column, v_column, q_s, k_s, v_s, ready, there):
    """Start the copies of one chunk into a ring slot; `ready` completes when all bytes are there."""
    BYTES: gl.constexpr = q_rows.block_type.nbytes + k_rows.block_type.nbytes + v_rows.block_type.nbytes
    mbarrier.expect(ready, BYTES, pred=there)
    copy_in(q_rows, [row, q_column], ready, q_s, pred=there)
    copy_in(k_rows, [row, k_column], ready, k_s, pred=there)
    copy_in(v_rows, [row, v_column], ready, v_s, pred=there)


@gluon.jit
def decayed_values(v_s, decayed_s, key, ROWS: gl.constexpr):
    """v · e^(-s(m-c)) into shared memory."""
    v = v_s.load(ROWS)
    decayed_s.store((v.to(gl.float32) * key[:, None]).to(v.dtype))


@gluon.jit
def masked_rows(pointer, stride, start, stop, column, WIDTH: gl.constexpr, target, ROWS: gl.constexpr, C: gl.constexpr):
    """Rows start … stop - 1 of a tensor into a buffer of C rows; the others are zero."""
    i = gl.arange(0, C, gl.SliceLayout(1, ROWS))
    j = gl.arange(0, WIDTH, gl.SliceLayout(0, ROWS))
    base = pointer + gl.cast(start, gl.int64) * stride + column
    target.store(gl.load(base + i[:, None] * stride + j[None, :], mask=(start + i < stop)[:, None], other=0.0))


@gluon.jit
def hopper_outputs(
    q, k, v, out, q_rows, k_rows, v_rows, out_rows, rates, lengths, initial, final, slots, local_states, reach,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, tokens, heads, segments,
    D: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, VARLEN: gl.constexpr,
    STARTED: gl.constexpr, POOLED: gl.constexpr, SEGMENTED: gl.constexpr, PARTS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Outputs, and the state behind the last token. Grid (column blocks · segments / PARTS, heads, sequences).

    `*_rows` are tensor descriptors [rows, width] of the same memory as q, k, v, out.
    """
    DTYPE: gl.constexpr = q.dtype.element_ty
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 64, 16])
    SCORES: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    OF_ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    blocks: gl.constexpr = D // BV
    column = gl.program_id(0) % blocks * BV
    segment, head, sequence = gl.program_id(0) // blocks * PARTS, gl.program_id(1), gl.program_id(2)
    s = gl.load(rates + head).to(gl.float32)
    row, begin, _, length, size = bounds_of(sequence, segment, segments, lengths, tokens, VARLEN)
    stop = gl.minimum(begin + PARTS * size, length)
    row_of_state = sequence.to(gl.int64)
    if POOLED:
        row_of_state = gl.load(slots + sequence).to(gl.int64)
    padding = row_of_state < 0
    row_of_state = row_of_state * heads + head
    out_row = out + row * stride_ot + head * stride_oh + column
    d, n = gl.arange(0, D, OF_ROW), gl.arange(0, BV, gl.SliceLayout(0, MMA))
    i, i_row = gl.arange(0, C, OF_ROW), gl.arange(0, C, gl.SliceLayout(1, ROWS))
    if padding:
        j_row = gl.arange(0, BV, gl.SliceLayout(0, ROWS))
        for start in range(begin, stop, C):
            o_at = out_row + gl.cast(start, gl.int64) * stride_ot + i_row[:, None] * stride_ot + j_row[None, :]
            gl.store(o_at, gl.zeros((C, BV), DTYPE, ROWS), mask=(start + i_row < stop)[:, None])
        return
    tile = d[:, None] * D + column + n[None, :]
    place = (sequence.to(gl.int64) * heads + head) * segments * D * D
    state = state_before(
        initial, row_of_state, local_states, place, segment, size, length, begin, s, reach, column,
        D, BV, STARTED, SEGMENTED, num_warps,
    )  # fmt: skip
    state = gl.convert_layout(state, MMA)

    q_s = gl.allocate_shared_memory(DTYPE, [STAGES, C, D], q_rows.layout)
    k_s = gl.allocate_shared_memory(DTYPE, [STAGES, C, D], k_rows.layout)
    v_s = gl.allocate_shared_memory(DTYPE, [STAGES, C, BV], v_rows.layout)
    state_s = gl.allocate_shared_memory(DTYPE, [D, BV], gl.NVMMASharedLayout.get_default_for([D, BV], DTYPE))
    decayed_s = gl.allocate_shared_memory(DTYPE, [2, C, BV], gl.NVMMASharedLayout.get_default_for([C, BV], DTYPE))
    o_s = gl.allocate_shared_memory(DTYPE, [C, BV], out_rows.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for one in gl.static_range(STAGES):
        mbarrier.init(ready.index(one), count=1)
    chunks = (stop - begin) // C
    first_row = row.to(gl.int32) + begin
    q_column, k_column, v_column = head * stride_qh, head * stride_kh, head * stride_vh + column
    for one in gl.static_range(STAGES - 1):
        copy_chunk(
            q_rows, k_rows, v_rows, first_row + one * C, q_column, k_column, v_column,
            q_s.index(one), k_s.index(one), v_s.index(one), ready.index(one), one < chunks,
        )  # fmt: skip

    j = gl.arange(0, C, gl.SliceLayout(0, MMA))
    causal = i[:, None] >= j[None, :]
    pair = gl.where(causal, gl.exp(-s * gl.where(causal, i[:, None] - j[None, :], 0).to(gl.float32)), 0.0)
    across = gl.exp(-s * (i + 1).to(gl.float32))
    key = gl.exp(-s * (C - 1 - i_row).to(gl.float32))
    lost = expm1_of_nonpositive(-s * C)
    zero = gl.zeros((C, BV), gl.float32, MMA)
    scores, done = zero, zero.to(DTYPE)
    if chunks > 0:
        mbarrier.wait(ready.index(0), 0)
        scores = warpgroup_mma(q_s.index(0), k_s.index(0).permute((1, 0)), zero, use_acc=False, is_async=False)
        decayed_values(v_s.index(0), decayed_s.index(0), key, ROWS)
    for chunk in range(chunks):
        slot, following = chunk % STAGES, (chunk + 1) % STAGES
        b_q, b_k, b_v = q_s.index(slot), k_s.index(slot), v_s.index(slot)
        state_s.store(state.to(DTYPE))
        tma.store_wait(0)
        fence_async_shared()
        barrier()
        inter = warpgroup_mma(b_q, state_s, zero, use_acc=False, is_async=True)
        moving = warpgroup_mma(b_k.permute((1, 0)), decayed_s.index(chunk & 1), state + state * lost, is_async=True)
        # The barrier above says that all warps are done with the chunk before, so that its slot may be filled again.
        later = chunk + STAGES - 1
        free = later % STAGES
        copy_chunk(
            q_rows, k_rows, v_rows, first_row + later * C, q_column, k_column, v_column,
            q_s.index(free), k_s.index(free), v_s.index(free), ready.index(free), later < chunks,
        )  # fmt: skip
        # Behind the last chunk this multiplies what an earlier chunk left; nobody reads the product.
        mbarrier.wait(ready.index(following), ((chunk + 1) // STAGES) & 1, pred=chunk + 1 < chunks)
        coming = warpgroup_mma(q_s.index(following), k_s.index(following).permute((1, 0)), zero, use_acc=False, is_async=True)
        p = gl.convert_layout((scores * pair).to(DTYPE), SCORES)
        inter = warpgroup_mma_wait(2, (inter,))
        output = warpgroup_mma(p, b_v, inter * across[:, None], is_async=True)
        decayed_values(v_s.index(following), decayed_s.index((chunk + 1) & 1), key, ROWS)
        if chunk > 0:
            o_s.store(done)
            fence_async_shared()
            barrier()
            copy_out(out_rows, [first_row + (chunk - 1) * C, head * stride_oh + column], o_s)
        state, scores, o = warpgroup_mma_wait(0, (moving, coming, output))
        done = o.to(DTYPE)
    tma.store_wait(0)
    barrier()
    if chunks > 0:
        o_s.store(done)
        fence_async_shared()
        barrier()
        copy_out(out_rows, [first_row + (chunks - 1) * C, head * stride_oh + column], o_s)

    start = begin + chunks * C
    if start < stop:
        m = stop - start
        q_at, k_at, v_at = q + row * stride_qt, k + row * stride_kt, v + row * stride_vt
        b_q, b_k, b_v = q_s.index(0), k_s.index(0), v_s.index(0)
        masked_rows(q_at, stride_qt, start, stop, q_column, D, b_q, ROWS, C)
        masked_rows(k_at, stride_kt, start, stop, k_column, D, b_k, ROWS, C)
        masked_rows(v_at, stride_vt, start, stop, v_column, BV, b_v, ROWS, C)
        barrier()
        decayed_values(b_v, decayed_s.index(0), gl.exp(-s * gl.maximum(m - 1 - i_row, 0).to(gl.float32)), ROWS)
        state_s.store(state.to(DTYPE))
        fence_async_shared()
        barrier()
        scores = warpgroup_mma(b_q, b_k.permute((1, 0)), zero, use_acc=False, is_async=False)
        inter = warpgroup_mma(b_q, state_s, zero, use_acc=False, is_async=False)
        state = state + state * expm1_of_nonpositive(-s * m.to(gl.float32))
        state = warpgroup_mma(b_k.permute((1, 0)), decayed_s.index(0), state, is_async=False)
        p = gl.convert_layout((scores * pair).to(DTYPE), SCORES)
        o_tail = warpgroup_mma(p, b_v, inter * across[:, None], is_async=False)
        o_at = out_row + gl.cast(start, gl.int64) * stride_ot + i[:, None] * stride_ot + n[None, :]
        gl.store(o_at, o_tail.to(DTYPE), mask=(start + i < stop)[:, None])
    tma.store_wait(0)
    if segment == segments - PARTS:
        gl.store(final + row_of_state * D * D + tile, state)
