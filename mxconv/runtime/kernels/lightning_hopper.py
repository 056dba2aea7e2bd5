"""The output pass of lightning prefill for Hopper: tensor copies and matrix instructions kept in flight by hand.

Same function and arguments as `lightning_chunks.lightning_outputs` (formulas there), for bf16 and head_dim 64 or 128.
Everything is computed transposed, values before keys and tokens, so that the state never leaves the registers: it is what one
product accumulates and what the next takes as its left operand. What passes through shared memory, whose bandwidth is what the
products of 64 rows wait for, are q, k, v and the scores. Three kinds of warps share the work:

    one warp         copies chunks of q, k and v into a ring of `STAGES` slots as these come free
    one warpgroup    k·qᵀ, decayed, for the chunks ahead: the scores; and zeros in place of padding
    one warpgroup    multiplies:

        o' = S·qᵀ and S ← e^(-s·m)·S + v'ᵀ·k are issued, v' = v decayed to the chunk's end
        o' is there and decayed      o = o' + vᵀ·scores is issued; the last chunk's o is stored
        all are there                the slot is free

Scores and v' are rounded to bf16, as operands are; sums, the state and its decay are float32. Of a chunk's later half, which weighs
most in the state behind it, v' is split into two bf16 values that are both multiplied. With all of it split states were a hundred
times as exact, and a prompt took up to a tenth longer: long ones run at the GPU's power limit.

What does not fill a chunk (a sequence's last tokens) is loaded with a mask into the first slot. This file needs triton alone.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from mxconv.runtime.kernels.lightning_hopper_parts import (
    bounds_of,
    clear_padding,
    count_before,
    count_here,
    counted,
    decayed_values,
    expm1_of_nonpositive,
    masked_rows,
    pair_decay,
    split,
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
def score_chunks(
    q_s, k_s, v_s, scores_s, ready, cooked, scored, free, counts, row, begin, chunks, s,
    SCORES: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """One warpgroup: the scores [keys, queries] of chunk after chunk, decayed; before that zeros in the place of padding.

    There are two buffers for scores: a chunk's may be written when the one two before it is multiplied.
    """
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    token = gl.arange(0, C, gl.SliceLayout(1, ROWS))
    j, i = gl.arange(0, C, gl.SliceLayout(1, SCORES)), gl.arange(0, C, gl.SliceLayout(0, SCORES))
    pair = pair_decay(s, j + 1, i + 1, j, i)
    for chunk in range(chunks):
        slot, start = chunk % STAGES, begin + chunk * C
        b_q, b_k = q_s.index(slot), k_s.index(slot)
        if MASKED:
            real, _ = counted(counts, row, start, start + C, 0, token, MASKED)
            _, c_j = counted(counts, row, start, start + C, 0, j, MASKED)
            _, c_i = counted(counts, row, start, start + C, 0, i, MASKED)
            pair = pair_decay(s, c_j, c_i, j, i)
        mbarrier.wait(ready.index(slot), (chunk // STAGES) & 1)
        if MASKED:
            clear_padding(b_q, real, ROWS)
            clear_padding(b_k, real, ROWS)
            clear_padding(v_s.index(slot), real, ROWS)
            fence_async_shared()
            barrier()
            mbarrier.arrive(cooked.index(slot), count=1)
        zero = gl.zeros((C, C), gl.float32, SCORES)
        scores = warpgroup_mma(b_k, b_q.permute((1, 0)), zero, use_acc=False, is_async=False) * pair
        old = chunk - 2
        mbarrier.wait(free.index(gl.maximum(old, 0) % STAGES), (gl.maximum(old, 0) // STAGES) & 1, pred=old >= 0)
        scores_s.index(chunk & 1).store(scores.to(scores_s.dtype))
        fence_async_shared()
        barrier()
        mbarrier.arrive(scored.index(chunk & 1), count=1)


@gluon.jit
def store_chunk(o, o_s, out_rows, row, column):
    """A chunk's outputs [values, tokens], by way of shared memory when the chunk before has left it."""
    tma.store_wait(0)
    barrier()
    o_s.permute((1, 0)).store(o)
    fence_async_shared()
    barrier()
    copy_out(out_rows, [row, column], o_s)


@gluon.jit
def multiply_chunks(
    state, q_s, k_s, v_s, scores_s, o_s, out_rows, o_column, loaded, scored, free, counts, row, begin, chunks, s,
    OUT: gl.constexpr, STATE: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """One warpgroup: outputs of all chunks; the state [values, keys] behind them.

    Values are taken in two halves: the first is multiplied while the second is made ready. What is long done is stored when
    nothing is left to issue.
    """
    DTYPE: gl.constexpr = out_rows.dtype
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    MOVING: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    HALF: gl.constexpr = C // 2
    BV: gl.constexpr = o_s.shape[1]
    i, j = gl.arange(0, C, gl.SliceLayout(0, OUT)), gl.arange(0, HALF, gl.SliceLayout(0, LEFT))
    first_row = row.to(gl.int32) + begin
    across, lost = gl.exp(-s * (i + 1).to(gl.float32)), expm1_of_nonpositive(-s * C)
    early, late = gl.exp(-s * (C - 1 - j).to(gl.float32)), gl.exp(-s * (HALF - 1 - j).to(gl.float32))
    before = count_before(counts, row, begin, MASKED)
    zero = gl.zeros((BV, C), gl.float32, OUT)
    done = zero.to(DTYPE)
    left = gl.convert_layout(state.to(DTYPE), LEFT)
    for chunk in range(chunks):
        slot = chunk % STAGES
        b_q = q_s.index(slot)
        k_1, k_2 = k_s.index(slot).slice(0, HALF, 0), k_s.index(slot).slice(HALF, HALF, 0)
        if MASKED:
            start, middle = begin + chunk * C, begin + chunk * C + HALF
            _, c_i = counted(counts, row, start, start + C, before, i, MASKED)
            _, c_1 = counted(counts, row, start, start + C, before, j, MASKED)
            _, c_2 = counted(counts, row, middle, start + C, before, j, MASKED)
            m = gl.load(counts + row + start + C - 1) - before
            across, lost = gl.exp(-s * c_i.to(gl.float32)), expm1_of_nonpositive(-s * m.to(gl.float32))
            early, late = gl.exp(-s * (m - c_1).to(gl.float32)), gl.exp(-s * (m - c_2).to(gl.float32))
            before += m
        mbarrier.wait(loaded.index(slot), (chunk // STAGES) & 1)
        inter = warpgroup_mma(left, b_q.permute((1, 0)), zero, use_acc=False, is_async=True)
        v_1 = v_s.index(slot).slice(0, HALF, 0).permute((1, 0)).load(LEFT)
        decayed = gl.convert_layout(decayed_values(v_1, early).to(DTYPE), MOVING)
        moving = warpgroup_mma(decayed, k_1, state + state * lost, is_async=True)
        v_2 = v_s.index(slot).slice(HALF, HALF, 0).permute((1, 0)).load(LEFT)
        upper, rest = split(decayed_values(v_2, late), MOVING)
        moving = warpgroup_mma(upper, k_2, moving, is_async=True)
        moving = warpgroup_mma(rest, k_2, moving, is_async=True)
        inter = warpgroup_mma_wait(3, (inter,))
        mbarrier.wait(scored.index(chunk & 1), (chunk // 2) & 1)
        b_s = scores_s.index(chunk & 1)
        output = warpgroup_mma(v_1, b_s.slice(0, HALF, 0), inter * across[None, :], is_async=True)
        output = warpgroup_mma(v_2, b_s.slice(HALF, HALF, 0), output, is_async=True)
        if chunk > 0:
            store_chunk(done, o_s, out_rows, first_row + (chunk - 1) * C, o_column)
        state, o = warpgroup_mma_wait(0, (moving, output))
        left, done = gl.convert_layout(state.to(DTYPE), LEFT), o.to(DTYPE)
        barrier()
        mbarrier.arrive(free.index(slot), count=1)
    if chunks > 0:
        store_chunk(done, o_s, out_rows, first_row + (chunks - 1) * C, o_column)
    return (state,)


@gluon.jit
def multiply_rest(
    state, q, k, v, out, stride_qt, stride_kt, stride_vt, stride_ot, q_column, k_column, v_column, o_column,
    b_q, b_k, b_v, scores_s, counts, row, start, stop, s,
    OUT: gl.constexpr, STATE: gl.constexpr, MASKED: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Outputs of the last tokens, which do not fill a chunk; the state behind them."""
    DTYPE: gl.constexpr = q.dtype.element_ty
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    C: gl.constexpr = b_v.shape[0]
    BV: gl.constexpr = b_v.shape[1]
    masked_rows(q + row * stride_qt, stride_qt, start, stop, q_column, b_q, ROWS)
    masked_rows(k + row * stride_kt, stride_kt, start, stop, k_column, b_k, ROWS)
    masked_rows(v + row * stride_vt, stride_vt, start, stop, v_column, b_v, ROWS)
    before = count_before(counts, row, start, MASKED)
    m = count_before(counts, row, stop, MASKED) - before
    if MASKED:
        barrier()
        real, _ = counted(counts, row, start, stop, before, gl.arange(0, C, gl.SliceLayout(1, ROWS)), MASKED)
        clear_padding(b_q, real, ROWS)
        clear_padding(b_k, real, ROWS)
        clear_padding(b_v, real, ROWS)
    fence_async_shared()
    barrier()
    i, j = gl.arange(0, C, gl.SliceLayout(0, OUT)), gl.arange(0, C, gl.SliceLayout(1, OUT))
    at = gl.arange(0, C, gl.SliceLayout(0, LEFT))
    # Beyond the end a count is 0 under a mask: what is not there must not make an exponent positive.
    c_i = count_here(counts, row, start, stop, before, m, i, MASKED)
    c_j = count_here(counts, row, start, stop, before, m, j, MASKED)
    key = gl.exp(-s * (m - count_here(counts, row, start, stop, before, m, at, MASKED)).to(gl.float32))
    zero = gl.zeros((C, C), gl.float32, OUT)
    scores = warpgroup_mma(b_k, b_q.permute((1, 0)), zero, use_acc=False, is_async=False) * pair_decay(s, c_j, c_i, j, i)
    scores_s.store(scores.to(DTYPE))
    fence_async_shared()
    barrier()
    left, values = gl.convert_layout(state.to(DTYPE), LEFT), b_v.permute((1, 0)).load(LEFT)
    o = warpgroup_mma(left, b_q.permute((1, 0)), gl.zeros((BV, C), gl.float32, OUT), use_acc=False, is_async=False)
    upper, rest = split(decayed_values(values, key), gl.DotOperandLayout(0, STATE, 2))
    state = warpgroup_mma(upper, b_k, state + state * expm1_of_nonpositive(-s * m.to(gl.float32)), is_async=False)
    state = warpgroup_mma(rest, b_k, state, is_async=False)
    o = warpgroup_mma(values, scores_s, o * gl.exp(-s * c_i.to(gl.float32))[None, :], is_async=False)
    n = gl.arange(0, BV, gl.SliceLayout(1, OUT))
    rows = out + (row + start) * stride_ot + o_column + i[None, :] * stride_ot + n[:, None]
    gl.store(rows, o.to(DTYPE), mask=(start + i < stop)[None, :])
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
    STARTED: gl.constexpr, POOLED: gl.constexpr, SEGMENTED: gl.constexpr, PARTS: gl.constexpr, SCORE_REGISTERS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Outputs, and the state behind the last token. Grid (column blocks · segments / PARTS, heads, sequences).

    `*_rows` are tensor descriptors [rows, width] of the same memory as q, k, v, out.
    """
    DTYPE: gl.constexpr = q.dtype.element_ty
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
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
    state = gl.convert_layout(state.permute((1, 0)), STATE)

    q_s = gl.allocate_shared_memory(DTYPE, [STAGES, C, D], q_rows.layout)
    k_s = gl.allocate_shared_memory(DTYPE, [STAGES, C, D], k_rows.layout)
    v_s = gl.allocate_shared_memory(DTYPE, [STAGES, C, BV], v_rows.layout)
    SQUARE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], DTYPE)
    scores_s = gl.allocate_shared_memory(DTYPE, [2, C, C], SQUARE)
    o_s = gl.allocate_shared_memory(DTYPE, [C, BV], out_rows.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    cooked = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    scored = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(scored.index(slot), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(cooked.index(slot), count=1)
        mbarrier.init(free.index(slot), count=1)
    chunks, first_row = (stop - begin) // C, row.to(gl.int32) + begin
    state = gl.warp_specialize(
        [
            (multiply_chunks, (
                state, q_s, k_s, v_s, scores_s, o_s, out_rows, o_column, cooked if MASKED else ready, scored, free, counts,
                row, begin, chunks, s, OUT, STATE, C, STAGES, MASKED,
            )),
            (score_chunks, (
                q_s, k_s, v_s, scores_s, ready, cooked, scored, free, counts, row, begin, chunks, s, OUT, C, STAGES, MASKED,
            )),
            (load_chunks, (
                q_rows, k_rows, v_rows, first_row, q_column, k_column, v_column, q_s, k_s, v_s, ready, free, chunks, C, STAGES,
            )),
        ],
        [4, 1], [SCORE_REGISTERS, 24],
    )[0]  # fmt: skip
    if begin + chunks * C < stop:
        state = multiply_rest(
            state, q, k, v, out, stride_qt, stride_kt, stride_vt, stride_ot, q_column, k_column, v_column, o_column,
            q_s.index(0), k_s.index(0), v_s.index(0), scores_s.index(0), counts, row, begin + chunks * C, stop, s,
            OUT, STATE, MASKED, num_warps,
        )  # fmt: skip
    tma.store_wait(0)
    if segment == segments - PARTS:
        n, d = gl.arange(0, BV, gl.SliceLayout(1, STATE)), gl.arange(0, D, gl.SliceLayout(0, STATE))
        gl.store(final + row_of_state * D * D + d[None, :] * D + column + n[:, None], state)
