"""The grouped GEMM for many tokens an expert: two blocks of rows of w share every block of tokens.

The same sums as `moe_gemm`, launched where tokens fill large blocks and the L2 is what limits: a program holds two accumulators of
BLOCK_N × BLOCK_T, for rows n … and n + distance …, and the float32 sum of a step stands in registers for one of them at a time:
256 × 128 outputs fit. GATED: the second block is the up rows of the first one's gate rows, and what is stored is silu(gate)·up.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

from mxconv.runtime.kernels.moe_gemm import operand
from mxconv.runtime.kernels.moe_overlap import after_previous


@triton.jit
def _step(w_at, xv, WEIGHT: tl.constexpr, SWAP: tl.constexpr, NATIVE: tl.constexpr):
    """The sum over one step: [BLOCK_N, BLOCK_T] (or its transpose) of 128 inputs."""
    codes = operand(tl.load(w_at), WEIGHT, NATIVE)
    if SWAP:
        partial = tl.dot(codes, tl.trans(xv))
    else:
        partial = tl.dot(xv, tl.trans(codes))
    return partial


@triton.jit
def _widen(partial, n_scale, t_scale, SCALES: tl.constexpr, SWAP: tl.constexpr):
    """`partial` with a step's scales: `group` a vector over rows of w, `block` a number for them times a vector over tokens."""
    if SCALES == "group":
        partial = partial * n_scale[:, None]
    elif SCALES == "block":
        if SWAP:
            partial = partial * (n_scale * t_scale)[None, :]
        else:
            partial = partial * (n_scale * t_scale)[:, None]
    return partial


@triton.jit
def _finish(acc, row_scale, token_scale, one, SWAP: tl.constexpr, ROW_SCALE: tl.constexpr, TOKEN_SCALE: tl.constexpr):
    """[BLOCK_T, BLOCK_N] with the scales that the whole sum takes."""
    if SWAP:
        acc = tl.trans(acc)
    y = acc.to(tl.float32) * one
    if ROW_SCALE:
        y *= tl.load(row_scale)[None, :]
    if TOKEN_SCALE:
        y *= tl.load(token_scale)[:, None]
    return y


@triton.jit(do_not_specialize=["assignments"])
def wide_gemm_kernel(
    x, w, scales, token_group_scales, row_scale, token_scale, expert_scale, out, order, tiles, N, K, assignments,
    WEIGHT: tl.constexpr, SCALES: tl.constexpr, GROUP_STEPS: tl.constexpr, PER_TOKEN: tl.constexpr, ROW_SCALE: tl.constexpr,
    TOKEN_SCALE: tl.constexpr, EXPERT_SCALE: tl.constexpr, FACTOR: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr, STAGES: tl.constexpr, SWAP: tl.constexpr, NATIVE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Arguments as those of `grouped_gemm_kernel`; BLOCK_N rows of w twice, BLOCK_N and N/2 multiples of 64 (`block`: of 128)."""
    after_previous(OVERLAP)
    n_block, tile = tl.program_id(0), tl.program_id(1)
    expert = tl.load(tiles + tile * 3).to(tl.int64)
    if expert < 0:
        return
    first, count = tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    t, i = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_N)
    inside = t < count
    row = tl.where(inside, first + t, first)
    if PER_TOKEN:
        row = tl.load(order + row) // PER_TOKEN
    if GATED:
        start, distance = n_block * BLOCK_N, N // 2
    else:
        start, distance = n_block * 2 * BLOCK_N, BLOCK_N
    n = start + i
    BYTES: tl.constexpr = 128 if WEIGHT == "e4m3" else 64
    b, k128 = tl.arange(0, BYTES), tl.arange(0, 128)
    steps = K // 128
    w_base = w + (expert * (N // 64) + start // 64) * steps * (64 * BYTES)
    w_off = (i // 64)[:, None] * (steps * 64 * BYTES) + (i % 64)[:, None] * BYTES + b[None, :]
    w_apart = (distance // 64) * steps * (64 * BYTES)
    x_off = row[:, None] * K + k128[None, :]
    if SCALES == "group":
        groups = steps // GROUP_STEPS
        s_base = scales + (expert * (N // 64) + start // 64) * groups * 64
        s_apart, s_off = distance * groups, i // 64 * groups * 64 + i % 64
    else:
        s_base = scales + (expert * tl.cdiv(N, 128) + start // 128) * steps
        s_apart, s_off = (distance // 128) * steps, 0
    a_at = token_group_scales + row * steps
    SUM: tl.constexpr = tl.int32 if WEIGHT == "int4_int8" else tl.float32
    acc = tl.zeros((BLOCK_N, BLOCK_T) if SWAP else (BLOCK_T, BLOCK_N), SUM)
    other = tl.zeros((BLOCK_N, BLOCK_T) if SWAP else (BLOCK_T, BLOCK_N), SUM)
    for k in tl.range(0, steps, num_stages=STAGES):
        xv = tl.load(x + x_off)
        if WEIGHT == "int4_int8":  # exact: nothing to take out of the tensor cores before the end
            xt = tl.trans(xv)
            acc = tl.dot(operand(tl.load(w_base + w_off), WEIGHT, NATIVE), xt, acc, out_dtype=tl.int32)
            other = tl.dot(operand(tl.load(w_base + w_apart + w_off), WEIGHT, NATIVE), xt, other, out_dtype=tl.int32)
        elif SCALES == "flat":
            acc += _step(w_base + w_off, xv, WEIGHT, SWAP, NATIVE)
            other += _step(w_base + w_apart + w_off, xv, WEIGHT, SWAP, NATIVE)
        else:
            if SCALES == "block":
                a = tl.load(a_at)
            else:
                a = 1.0
            acc += _widen(_step(w_base + w_off, xv, WEIGHT, SWAP, NATIVE), tl.load(s_base + s_off), a, SCALES, SWAP)
            s = tl.load(s_base + s_apart + s_off)
            other += _widen(_step(w_base + w_apart + w_off, xv, WEIGHT, SWAP, NATIVE), s, a, SCALES, SWAP)
            if SCALES == "block":
                s_base += 1
                a_at += 1
            elif GROUP_STEPS == 1:
                s_base += 64
            else:
                s_base += tl.where((k + 1) % GROUP_STEPS == 0, 64, 0)
        w_base += 64 * BYTES
        x += 128
    if EXPERT_SCALE:
        one = FACTOR * tl.load(expert_scale + expert)
    else:
        one = FACTOR
    r_at = row_scale + expert * N + n
    y = _finish(acc, r_at, token_scale + row, one, SWAP, ROW_SCALE, TOKEN_SCALE)
    z = _finish(other, r_at + distance, token_scale + row, one, SWAP, ROW_SCALE, TOKEN_SCALE)
    width = N // 2 if GATED else N
    at = out + (first + t).to(tl.int64)[:, None] * width + n[None, :]
    if GATED:
        tl.store(at, (y / (1.0 + tl.exp(-y)) * z).to(out.dtype.element_ty), mask=inside[:, None])
    else:
        tl.store(at, y.to(out.dtype.element_ty), mask=inside[:, None])
        tl.store(at + distance, z.to(out.dtype.element_ty), mask=inside[:, None])
