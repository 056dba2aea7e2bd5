"""The sum of residual and update and the RMS norm behind it as one pass over the hidden states.

    x = residual·alpha + update·beta        h = w · (x / rms(x))

Twin: `mxconv.runtime.norm.add_rms_norm` and `rms_norm`, rounded at the same places, so that the two differ by sums alone.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def residual_norm_rows(
    residual, update, weight, out_x, out_h, alpha, beta, eps, width,
    BLOCK: tl.constexpr, ADD: tl.constexpr, SCALE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One row; grid (rows,). ADD: there is an update, SCALE: its beta is not 1, KEEP: x is written as well."""
    row = tl.program_id(0).to(tl.int64) * width
    i = tl.arange(0, BLOCK)
    inside = i < width
    dtype = out_h.dtype.element_ty
    x = tl.load(residual + row + i, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        u = tl.load(update + row + i, mask=inside, other=0.0).to(tl.float32)
        if SCALE:
            u = (u * beta).to(dtype).to(tl.float32)
        x = (u + x * alpha).to(dtype)
        if KEEP:
            tl.store(out_x + row + i, x, mask=inside)
        x = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    w = tl.load(weight + i, mask=inside, other=0.0)
    h = (x * inverse).to(dtype).to(tl.float32) * w.to(tl.float32)
    tl.store(out_h + row + i, h.to(dtype), mask=inside)


def residual_norm(
    residual: Tensor, update: Tensor | None, factors: tuple[float, float], weight: Tensor, eps: float, *, keep: bool
) -> tuple[Tensor, Tensor]:
    """(x, h) of residual and update [..., H], contiguous, and weight [H], of one dtype; `factors` are (alpha, beta).

    H is at most `dispatch.WIDEST_NORM`. Without an update x is the residual; without `keep` it is not written, and what is returned
    for it means nothing.
    """
    width = residual.shape[-1]
    residual = residual.contiguous()
    update = residual if update is None else update.contiguous()
    added = update is not residual
    x = torch.empty_like(residual) if added and keep else residual
    h = torch.empty_like(residual)
    rows = residual.numel() // width
    if rows:
        block = triton.next_power_of_2(width)
        residual_norm_rows[(rows,)](
            residual, update, weight, x, h, factors[0], factors[1], eps, width, BLOCK=block, ADD=added,
            SCALE=factors[1] != 1.0, KEEP=keep, num_warps=max(1, min(16, block // 1024)),
        )  # fmt: skip
    return x, h
