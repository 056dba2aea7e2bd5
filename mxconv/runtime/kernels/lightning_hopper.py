"""The output pass of lightning prefill for Hopper: tensor copies and matrix instructions kept in flight by hand.

Same function and arguments as `lightning_chunks.lightning_outputs` (formulas there), for two-byte dtypes and head_dim 64 or 128.
Three kinds of warps share the work:

    one warp         copies chunks of q, k and v into a ring of `STAGES` slots as these come free
    `COOK_WARPS`     make of a loaded chunk what is multiplied: SiLU, zeros for padding, v' = v decayed to the chunk's end
    one warpgroup    multiplies; the products of a chunk are a queue of asynchronous instructions, and the arithmetic between
                     them runs while the queue is busy:

        S in shared memory      inter = q·S,  S ← e^(-s·m)·S + kᵀ·v',  and the next chunk's scores = q·kᵀ are issued
        scores decayed; inter is there and decayed      o = inter + scores·v is issued; the last chunk's o is stored
        all are there           the slot is free

v' and the decayed scores are split into two values of their dtype each, and both are multiplied: the matrix unit has the time, as
this pass waits for memory. So the state is as good as float32 makes it, and outputs carry little more than their own rounding.

What does not fill a chunk (a sequence's last tokens) is loaded with a mask into the first slot. This file needs triton alone.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from mxconv.runtime.kernels.lightning_hopper_parts import (
    bounds_of,
    count_before,
    counted,
    decay_values,
    decays,
    expm1_of_nonpositive,
    masked_rows,
    prepare,
    state_before,
)

# Names that changed between the releases of triton that this runs with.
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def load_chunks(
    q_rows, k_rows, v_rows, row, q_column, k_column, v_column, q_s, k_s, v_s, ready, free, chunks,
    C: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: copy chunk after chunk into the slots that are free."""
    BYTES: gl.constexpr = q_rows.block_type.nbytes + k_rows.block_type.nbytes + v_rows.block_type.nbytes
    for chunk in range(chunks):
        slot = chunk % STAGES
        mbarrier.wait(free.index(slot), ((chunk // STAGES) & 1) ^ 1)
        mbarrier.expect(ready.index(slot), BYTES)
        copy_in(q_rows, [row + chunk * C, q_column], ready.index(slot), q_s.index(slot))
        copy_in(k_rows, [row + chunk * C, k_column], ready.index(slot), k_s.index(slot))
        copy_in(v_rows, [row + chunk * C, v_column], ready.index(slot), v_s.index(slot))


@gluon.jit
def cook_chunks(
    q_s, k_s, v_s, decayed_s, rest_s, ready, cooked, decayed, free, counts, row, begin, chunks, s,
    C: gl.constexpr, STAGES: gl.constexpr, SILU: gl.constexpr, MASKED: gl.constexpr, COOK_WARPS: gl.constexpr,
):  # fmt: skip
    """`COOK_WARPS` warps: what must be done to loaded chunks before they are multiplied.

    There are two buffers for v': a chunk's may be written when the one two before it is multiplied.
    """
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [COOK_WARPS, 1], [1, 0])
    i = gl.arange(0, C, gl.SliceLayout(1, ROWS))
    real, key = i >= 0, gl.exp(-s * (C - 1 - i).to(gl.float32))
    for chunk in range(chunks):
        slot, start = chunk % STAGES, begin + chunk * C
        if MASKED:
            real, upto = counted(counts, row, start, start + C, 0, i, MASKED)
            key = gl.exp(-s * (gl.load(counts + row + start + C - 1) - upto).to(gl.float32))
        mbarrier.wait(ready.index(slot), (chunk // STAGES) & 1)
        prepare(q_s.index(slot), real, ROWS, SILU, MASKED)
        prepare(k_s.index(slot), real, ROWS, SILU, MASKED)
        prepare(v_s.index(slot), real, ROWS, SILU, MASKED)
        fence_async_shared()
        barrier()
        mbarrier.arrive(cooked.index(slot), count=1)
        old = chunk - 2
        mbarrier.wait(free.index(gl.maximum(old, 0) % STAGES), (gl.maximum(old, 0) // STAGES) & 1, pred=old >= 0)
        decay_values(v_s.index(slot), decayed_s.index(chunk & 1), rest_s.index(chunk & 1), key, ROWS)
        fence_async_shared()
        barrier()
        mbarrier.arrive(decayed.index(chunk & 1), count=1)


@gluon.jit
def multiply_chunks(
    state, q_s, k_s, v_s, decayed_s, rest_s, state_s, o_s, out_rows, o_column, cooked, decayed, free, counts, row, begin, chunks, s,
    MMA: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """One warpgroup: outputs of all chunks; the state behind them."""
    DTYPE: gl.constexpr = out_rows.dtype
    SCORES: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    BV: gl.constexpr = o_s.shape[1]
    i, j = gl.arange(0, C, gl.SliceLayout(1, MMA)), gl.arange(0, C, gl.SliceLayout(0, MMA))
    first_row = row.to(gl.int32) + begin
    pair, across = decays(s, i + 1, j + 1, i, j)
    lost = expm1_of_nonpositive(-s * C)
    before = count_before(counts, row, begin, MASKED)
    zero = gl.zeros((C, BV), gl.float32, MMA)
    scores, done = zero, zero.to(DTYPE)
    if chunks > 0:
        mbarrier.wait(cooked.index(0), 0)
        scores = warpgroup_mma(q_s.index(0), k_s.index(0).permute((1, 0)), zero, use_acc=False, is_async=False)
    for chunk in range(chunks):
        slot, following = chunk % STAGES, (chunk + 1) % STAGES
        b_q, b_k, b_v = q_s.index(slot), k_s.index(slot), v_s.index(slot)
        state_s.store(state.to(DTYPE))
        if MASKED:
            start = begin + chunk * C
            _, c_i = counted(counts, row, start, start + C, before, i, MASKED)
            _, c_j = counted(counts, row, start, start + C, before, j, MASKED)
            m = gl.load(counts + row + start + C - 1) - before
            pair, across = decays(s, c_i, c_j, i, j)
            lost = expm1_of_nonpositive(-s * m.to(gl.float32))
            before += m
        tma.store_wait(0)
        fence_async_shared()
        barrier()
        inter = warpgroup_mma(b_q, state_s, zero, use_acc=False, is_async=True)
        mbarrier.wait(decayed.index(chunk & 1), (chunk // 2) & 1)
        moving = warpgroup_mma(b_k.permute((1, 0)), decayed_s.index(chunk & 1), state + state * lost, is_async=True)
        moving = warpgroup_mma(b_k.permute((1, 0)), rest_s.index(chunk & 1), moving, is_async=True)
        # Behind the last chunk this multiplies what an earlier chunk left; nobody reads the product.
        mbarrier.wait(cooked.index(following), ((chunk + 1) // STAGES) & 1, pred=chunk + 1 < chunks)
        coming = warpgroup_mma(q_s.index(following), k_s.index(following).permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = scores * pair
        p = scores.to(DTYPE)
        rest = gl.convert_layout((scores - p.to(gl.float32)).to(DTYPE), SCORES)
        inter = warpgroup_mma_wait(3, (inter,))
        output = warpgroup_mma(gl.convert_layout(p, SCORES), b_v, inter * across[:, None], is_async=True)
        output = warpgroup_mma(rest, b_v, output, is_async=True)
        if chunk > 0:
            o_s.store(done)
            fence_async_shared()
            barrier()
            copy_out(out_rows, [first_row + (chunk - 1) * C, o_column], o_s)
        state, scores, o = warpgroup_mma_wait(0, (moving, coming, output))
        barrier()
        mbarrier.arrive(free.index(slot), count=1)
        done = o.to(DTYPE)
    tma.store_wait(0)
    barrier()
    if chunks > 0:
        o_s.store(done)
        fence_async_shared()
        barrier()
        copy_out(out_rows, [first_row + (chunks - 1) * C, o_column], o_s)
    return (state,)


@gluon.jit
def multiply_rest(
    state, q, k, v, out, stride_qt, stride_kt, stride_vt, stride_ot, q_column, k_column, v_column, o_column,
    b_q, b_k, b_v, decayed_s, rest_s, state_s, counts, row, start, stop, s,
    MMA: gl.constexpr, SILU: gl.constexpr, MASKED: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Outputs of the last tokens, which do not fill a chunk; the state behind them."""
    DTYPE: gl.constexpr = q.dtype.element_ty
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    C: gl.constexpr = b_v.shape[0]
    BV: gl.constexpr = b_v.shape[1]
    masked_rows(q + row * stride_qt, stride_qt, start, stop, q_column, b_q, ROWS)
    masked_rows(k + row * stride_kt, stride_kt, start, stop, k_column, b_k, ROWS)
    masked_rows(v + row * stride_vt, stride_vt, start, stop, v_column, b_v, ROWS)
    barrier()
    before = count_before(counts, row, start, MASKED)
    m = count_before(counts, row, stop, MASKED) - before
    i_row = gl.arange(0, C, gl.SliceLayout(1, ROWS))
    real, c_row = counted(counts, row, start, stop, before, i_row, MASKED)
    prepare(b_q, real, ROWS, SILU, MASKED)
    prepare(b_k, real, ROWS, SILU, MASKED)
    prepare(b_v, real, ROWS, SILU, MASKED)
    decay_values(b_v, decayed_s, rest_s, gl.exp(-s * gl.maximum(m - c_row, 0).to(gl.float32)), ROWS)
    state_s.store(state.to(DTYPE))
    fence_async_shared()
    barrier()
    i, j = gl.arange(0, C, gl.SliceLayout(1, MMA)), gl.arange(0, C, gl.SliceLayout(0, MMA))
    _, c_i = counted(counts, row, start, stop, before, i, MASKED)
    _, c_j = counted(counts, row, start, stop, before, j, MASKED)
    # Beyond the end c_j is 0 under a mask: what is not there must not make an exponent positive.
    pair, across = decays(s, gl.where(start + i < stop, c_i, m), gl.where(start + j < stop, c_j, m), i, j)
    zero = gl.zeros((C, BV), gl.float32, MMA)
    scores = warpgroup_mma(b_q, b_k.permute((1, 0)), zero, use_acc=False, is_async=False)
    inter = warpgroup_mma(b_q, state_s, zero, use_acc=False, is_async=False)
    kept = state + state * expm1_of_nonpositive(-s * m.to(gl.float32))
    state = warpgroup_mma(b_k.permute((1, 0)), decayed_s, kept, is_async=False)
    state = warpgroup_mma(b_k.permute((1, 0)), rest_s, state, is_async=False)
    SCORES: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    scores = scores * pair
    p = scores.to(DTYPE)
    o = warpgroup_mma(gl.convert_layout(p, SCORES), b_v, inter * across[:, None], is_async=False)
    o = warpgroup_mma(gl.convert_layout((scores - p.to(gl.float32)).to(DTYPE), SCORES), b_v, o, is_async=False)
    n = gl.arange(0, BV, gl.SliceLayout(0, MMA))
    at = out + (row + start) * stride_ot + o_column + i[:, None] * stride_ot + n[None, :]
    gl.store(at, o.to(DTYPE), mask=(start + i < stop)[:, None])
    return state


@gluon.jit
def write_zeros(out, stride, start, stop, ROWS: gl.constexpr, C: gl.constexpr, BV: gl.constexpr):
    """Rows start … stop - 1 of a padding sequence."""
    i, j = gl.arange(0, C, gl.SliceLayout(1, ROWS)), gl.arange(0, BV, gl.SliceLayout(0, ROWS))
    for first in range(start, stop, C):
        at = out + gl.cast(first, gl.int64) * stride + i[:, None] * stride + j[None, :]
        gl.store(at, gl.zeros((C, BV), out.dtype.element_ty, ROWS), mask=(first + i < stop)[:, None])


@gluon.jit(do_not_specialize=("tokens", "heads", "segments"))
def hopper_outputs(
    q, k, v, out, q_rows, k_rows, v_rows, out_rows, rates, lengths, counts, initial, final, slots, local_states, reach,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, tokens, heads, segments,
    D: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, VARLEN: gl.constexpr, MASKED: gl.constexpr,
    SILU: gl.constexpr, STARTED: gl.constexpr, POOLED: gl.constexpr, SEGMENTED: gl.constexpr, PARTS: gl.constexpr,
    COOK_WARPS: gl.constexpr, COOK_REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Outputs, and the state behind the last token. Grid (column blocks · segments / PARTS, heads, sequences).

    `*_rows` are tensor descriptors [rows, width] of the same memory as q, k, v, out.
    """
    DTYPE: gl.constexpr = q.dtype.element_ty
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 64, 16])
    blocks: gl.constexpr = D // BV
    column = gl.program_id(0) % blocks * BV
    segment, head, sequence = gl.program_id(0) // blocks * PARTS, gl.program_id(1), gl.program_id(2)
    s = gl.load(rates + head).to(gl.float32)
    row, begin, _, length, size = bounds_of(sequence, segment, segments, lengths, tokens, VARLEN)
    stop = gl.minimum(begin + PARTS * size, length)
    q_column, k_column, v_column = head * stride_qh, head * stride_kh, head * stride_vh + column
    o_column = head * stride_oh + column
    row_of_state = sequence.to(gl.int64)
    if POOLED:
        row_of_state = gl.load(slots + sequence).to(gl.int64)
        if row_of_state < 0:
            ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
            write_zeros(out + row * stride_ot + o_column, stride_ot, begin, stop, ROWS, C, BV)
            return
    row_of_state = row_of_state * heads + head
    place = (sequence.to(gl.int64) * heads + head) * segments * D * D
    state = state_before(
        initial, row_of_state, local_states, place, counts, row, segment, size, length, begin, s, reach, column,
        D, BV, MASKED, STARTED, SEGMENTED, num_warps,
    )  # fmt: skip
    state = gl.convert_layout(state, MMA)

    q_s = gl.allocate_shared_memory(DTYPE, [STAGES, C, D], q_rows.layout)
    k_s = gl.allocate_shared_memory(DTYPE, [STAGES, C, D], k_rows.layout)
    v_s = gl.allocate_shared_memory(DTYPE, [STAGES, C, BV], v_rows.layout)
    decayed_s = gl.allocate_shared_memory(DTYPE, [2, C, BV], v_rows.layout)
    rest_s = gl.allocate_shared_memory(DTYPE, [2, C, BV], v_rows.layout)
    state_s = gl.allocate_shared_memory(DTYPE, [D, BV], gl.NVMMASharedLayout.get_default_for([D, BV], DTYPE))
    o_s = gl.allocate_shared_memory(DTYPE, [C, BV], out_rows.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    cooked = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    decayed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(decayed.index(slot), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(cooked.index(slot), count=1)
        mbarrier.init(free.index(slot), count=1)
    chunks, first_row = (stop - begin) // C, row.to(gl.int32) + begin
    state = gl.warp_specialize(
        [
            (multiply_chunks, (
                state, q_s, k_s, v_s, decayed_s, rest_s, state_s, o_s, out_rows, o_column, cooked, decayed, free, counts, row,
                begin, chunks, s, MMA, C, STAGES, MASKED,
            )),
            (cook_chunks, (
                q_s, k_s, v_s, decayed_s, rest_s, ready, cooked, decayed, free, counts, row, begin, chunks, s,
                C, STAGES, SILU, MASKED, COOK_WARPS,
            )),
            (load_chunks, (
                q_rows, k_rows, v_rows, first_row, q_column, k_column, v_column, q_s, k_s, v_s, ready, free, chunks, C, STAGES,
            )),
        ],
        [COOK_WARPS, 1], [COOK_REGISTERS, 24],
    )[0]  # fmt: skip
    if begin + chunks * C < stop:
        state = multiply_rest(
            state, q, k, v, out, stride_qt, stride_kt, stride_vt, stride_ot, q_column, k_column, v_column, o_column,
            q_s.index(0), k_s.index(0), v_s.index(0), decayed_s.index(0), rest_s.index(0), state_s, counts, row, begin + chunks * C,
            stop, s, MMA, SILU, MASKED, num_warps,
        )  # fmt: skip
    tma.store_wait(0)
    if segment == segments - PARTS:
        d, n = gl.arange(0, D, gl.SliceLayout(1, MMA)), gl.arange(0, BV, gl.SliceLayout(0, MMA))
        gl.store(final + row_of_state * D * D + d[:, None] * D + column + n[None, :], state)
