"""The norm and output gate behind lightning attention as one kernel: w · (x / rms(x)) · sigmoid(gate).

Twin: `mxconv.runtime.norm.scale_by_rms` times `torch.sigmoid(gate)`, rounded at the same places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxconv.errors import UsageError
from mxconv.runtime.norm import LINEAR_NORM_EPS

BLOCK = 4096
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def lightning_norm_gate(
    x: Tensor, gate: Tensor, weight: Tensor, mean_square: Tensor | None = None, *, eps: float = LINEAR_NORM_EPS,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """weight · (x · rsqrt(mean_square + eps)) · sigmoid(gate) over rows [T, N·D], in the dtype of x.

    x, gate: [T, W], each contiguous along W (gate may be a slice of the fused projection); weight [W]. mean_square: float32 [T] or
    [T, 1], taken over the heads of all ranks; None takes it over the row, which is right where one rank holds all heads.
    Raises UsageError for shapes and dtypes that do not fit.
    """
    from mxconv.runtime.kernels.lightning_steps import norm_gate_rows

    if x.dim() != 2 or gate.shape != x.shape or weight.shape != x.shape[1:] or not x.dtype == gate.dtype == weight.dtype:
        raise UsageError("x and gate must be [T, W], weight [W], of one dtype", got=(x.shape, gate.shape, weight.shape))
    if x.dtype not in DTYPES or x.stride(1) != 1 or gate.stride(1) != 1 or not weight.is_contiguous():
        raise UsageError("rows must be contiguous, of", expected=" or ".join(map(str, DTYPES)), got=x.dtype)
    given = mean_square is not None
    if mean_square is not None and (mean_square.numel() != len(x) or mean_square.dtype != torch.float32):
        got = tuple(mean_square.shape), mean_square.dtype
        raise UsageError("one mean square for each row, float32", expected=len(x), got=got)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    rows, width = x.shape
    if rows and width:
        block = min(BLOCK, 1 << (width - 1).bit_length())
        norm_gate_rows[(rows,)](
            x, gate, weight, out, x if mean_square is None else mean_square.contiguous(), eps,
            x.stride(0), gate.stride(0), out.stride(0), width, BLOCK=block, PARTS=-(-width // block), GIVEN=given, num_warps=8,
        )  # fmt: skip
    return out
