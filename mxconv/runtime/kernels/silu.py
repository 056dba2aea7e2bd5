"""SiLU of rows that lie apart, such as q, k and v in the fused projection, into rows that do not: x · sigmoid(x).

Twin: `torch.nn.functional.silu`, which reads such rows two bytes at a time; here they are read and written 16 bytes at a time. Both
compute x / (1 + e^-x) in float32 and round once, so that -inf is NaN in both, and what e^-x overflows for is -0.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxconv.errors import UsageError

DTYPES = (torch.bfloat16, torch.float16)
# Rows and columns of a program: four accesses of 16 bytes a thread are under way at a time. Swept on an H200, every tile but
# 1 × 4096 (.91-.95) reads and writes at .97-1.00 of a copy's speed.
ROWS, COLUMNS, WARPS = 4, 1024, 4


@triton.jit
def silu_tiles(x, out, rows, width, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of ROWS × COLUMNS; grid (tiles,), the tiles of the same rows beside each other. `stride` is that of x's rows."""
    across = tl.cdiv(width, COLUMNS)
    tile = tl.program_id(0)
    row = (tile // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tile % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < width)
    values = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    values = values / (1.0 + tl.exp(-values))
    tl.store(out + row * width + column, values.to(out.dtype.element_ty), mask=inside)


def silu_rows(x: Tensor) -> Tensor:
    """x · sigmoid(x) of x [..., W], bf16 or fp16, as a contiguous tensor; at most one unit in the last place from the twin.

    Rows that are contiguous and equally far apart, as those of a column slice are, are read where they lie; others are copied
    before. Raises UsageError for another dtype.
    """
    if x.dtype not in DTYPES:
        raise UsageError("the kernel takes", expected=" or ".join(map(str, DTYPES)), got=x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    rows, width = flat.shape
    tiles = triton.cdiv(rows, ROWS) * triton.cdiv(width, COLUMNS)
    silu_tiles[(tiles,)](flat, out, rows, width, flat.stride(0), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS)
    return out
