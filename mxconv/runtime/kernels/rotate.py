"""Rotary positions on the first dims of each head, in place in the fused projection.

    (a, b) → (a·cos - b·sin, b·cos + a·sin)        a, b the halves of the first rotary_dim dims

Twin: `mxconv.runtime.rope.rotate_heads`, with the same roundings, so that both give the same bits.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl
from torch import Tensor

HEADS = 8
"""Heads of a program."""


@triton.jit
def _product(x, y):
    """x·y, rounded to their dtype."""
    return (x.to(tl.float32) * y.to(tl.float32)).to(x.dtype).to(tl.float32)


@triton.jit
def rotate_rows(
    x, cos, sin, stride, positions, heads, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    """Some heads of one row of x [rows, heads, D]; grid (rows, head blocks). Row r has the position r % `positions`."""
    row = tl.program_id(0).to(tl.int64)
    head, i = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    inside = (head < heads)[:, None] & (i < HALF)[None, :]
    at = x + row * stride + head[:, None] * D + i[None, :]
    a, b = tl.load(at, mask=inside, other=0.0), tl.load(at + HALF, mask=inside, other=0.0)
    angle = (row % positions) * HALF + i
    c = tl.load(cos + angle, mask=i < HALF, other=0.0)[None, :]
    s = tl.load(sin + angle, mask=i < HALF, other=0.0)[None, :]
    tl.store(at, (_product(a, c) - _product(b, s)).to(a.dtype), mask=inside)
    tl.store(at + HALF, (_product(b, c) + _product(a, s)).to(a.dtype), mask=inside)


def rotate_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate x [B, T, heads, D], heads and dims contiguous, by cos and sin [B or 1, T, 1, rotary_dim/2], all of one dtype."""
    batch, tokens, heads, size = x.shape
    half, positions = cos.shape[-1], cos.shape[0] * tokens
    if batch * tokens == 0:
        return
    rows = x.view(batch * tokens, heads, size)
    grid = (batch * tokens, -(-heads // HEADS))
    rotate_rows[grid](
        rows, cos.contiguous(), sin.contiguous(), rows.stride(0), positions, heads, D=size, HALF=half,
        BLOCK=triton.next_power_of_2(half), HEADS=HEADS, num_warps=1,
    )  # fmt: skip
