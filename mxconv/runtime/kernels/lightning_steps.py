"""Triton kernels of lightning decode: steps of the recurrence on a pool of states, and the norm and gate behind it.

This file needs triton alone, so that it compiles for a GPU where there is no torch.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def load_wide(pointers, mask, SILU: tl.constexpr):
    """Values as float32, behind SiLU (rounded to their dtype) if asked."""
    x = tl.load(pointers, mask=mask, other=0.0)
    wide = x.to(tl.float32)
    return (wide / (1 + tl.exp(-wide))).to(x.dtype).to(tl.float32) if SILU else wide


@triton.jit
def lightning_steps(
    q, k, v, out, rates, states, slots,
    stride_qs, stride_qt, stride_qh, stride_ks, stride_kt, stride_kh,
    stride_vs, stride_vt, stride_vh, stride_os, stride_ot, stride_oh, tokens, heads,
    D: tl.constexpr, DP: tl.constexpr, BV: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """`tokens` steps of one slot's head and columns. Grid (column blocks, heads, rows of q)."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    d, n = tl.arange(0, DP), tl.program_id(0) * BV + tl.arange(0, BV)
    in_d, in_n = d < D, n < D
    slot = tl.load(slots + row).to(tl.int64)
    q += row * stride_qs + head * stride_qh
    k += row * stride_ks + head * stride_kh
    v += row * stride_vs + head * stride_vh
    out += row * stride_os + head * stride_oh
    if slot < 0:
        for t in range(tokens):
            tl.store(out + t * stride_ot + n, tl.zeros((BV,), out.dtype.element_ty), mask=in_n)
        return
    tile = states + (slot * heads + head) * D * D + d[:, None] * D + n[None, :]
    inside = in_d[:, None] & in_n[None, :]
    state = tl.load(tile, mask=inside, other=0.0)
    step = tl.exp(-tl.load(rates + head).to(tl.float32))
    for t in range(tokens):
        b_q = load_wide(q + t * stride_qt + d, in_d, SILU)
        b_k = load_wide(k + t * stride_kt + d, in_d, SILU)
        b_v = load_wide(v + t * stride_vt + n, in_n, SILU)
        state = state * step + b_k[:, None] * b_v[None, :]
        o = tl.sum(b_q[:, None] * state, axis=0)
        tl.store(out + t * stride_ot + n, o.to(out.dtype.element_ty), mask=in_n)
    tl.store(tile, state, mask=inside)


@triton.jit
def norm_gate_rows(
    x, gate, weight, out, mean_squares, eps, stride_x, stride_gate, stride_out, width,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """One row of `norm_gate`; grid (rows,). `mean_squares` float32 [rows] is read where GIVEN."""
    row = tl.program_id(0).to(tl.int64)
    x += row * stride_x
    gate += row * stride_gate
    out += row * stride_out
    i = tl.arange(0, BLOCK)
    if GIVEN:
        mean_square = tl.load(mean_squares + row)
    else:
        squares = tl.zeros((BLOCK,), tl.float32)
        for part in tl.static_range(PARTS):
            wide = tl.load(x + part * BLOCK + i, mask=part * BLOCK + i < width, other=0.0).to(tl.float32)
            squares += wide * wide
        mean_square = tl.sum(squares, axis=0) / width
    inverse = 1 / tl.sqrt(mean_square + eps)
    dtype = out.dtype.element_ty
    for part in tl.static_range(PARTS):
        inside = part * BLOCK + i < width
        wide = tl.load(x + part * BLOCK + i, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + part * BLOCK + i, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gate + part * BLOCK + i, mask=inside, other=0.0).to(tl.float32)
        # Rounded where the plain twin rounds, so that the two differ by sums alone.
        normed = (w * (wide * inverse).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        opened = (1 / (1 + tl.exp(-g))).to(dtype).to(tl.float32)
        tl.store(out + part * BLOCK + i, (normed * opened).to(dtype), mask=inside)
