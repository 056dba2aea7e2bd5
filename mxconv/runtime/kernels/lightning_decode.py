"""Lightning decode on a GPU: each slot's states advance by one or a few tokens, in place.

    S ← e^(-s)·S + kᵀv        o = q·S        token by token, in float32; o rounded to the dtype of q

One program keeps a tile [D, columns] of one head's state of one slot in registers through all its tokens, so that a state is
read once and written once. Twin: `mxconv.runtime.lightning.lightning` of one token at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mxconv.errors import UsageError
from mxconv.runtime.kernels.lightning_launches import MOST_ROWS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Value columns of a program and its warps."""

    columns: int
    warps: int


FEW = 256
"""States (slots × heads) up to which programs are made smaller, so that more of the GPU works on them."""
LAUNCHES: Mapping[int, tuple[Launch, Launch]] = {
    16: (Launch(columns=16, warps=1), Launch(columns=16, warps=1)),
    32: (Launch(columns=16, warps=1), Launch(columns=32, warps=1)),
    64: (Launch(columns=16, warps=1), Launch(columns=64, warps=2)),
    128: (Launch(columns=16, warps=1), Launch(columns=64, warps=4)),
    256: (Launch(columns=16, warps=2), Launch(columns=64, warps=8)),
}
"""For few and for many states, by head_dim padded to a power of two; measured on an H200."""


def _strides(x: Tensor, name: str, like: torch.Size) -> tuple[int, int, int]:
    """(slot, token, head) strides of x [S, k, N, D] or [S, N, D]."""
    if x.shape != like or x.stride(-1) != 1:
        raise UsageError(f"{name} must be contiguous along head_dim", expected=tuple(like), got=(tuple(x.shape), x.stride()))
    return x.stride(0), 0 if x.dim() == 3 else x.stride(1), x.stride(-2)


def lightning_decode(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor, slots: Tensor, *, out: Tensor | None = None,
    silu: bool = False, launch: Launch | None = None,
) -> Tensor:  # fmt: skip
    """Outputs of the next tokens of `slots`, like q in shape and dtype; their states are updated in place.

    q, k, v: [S, N, D] (one token a slot) or [S, k, N, D] (k ≥ 1 tokens, in order); bfloat16, float16 or float32; any strides with
    D contiguous. rates: s ≥ 0, float32 or float64 [N]. state: the pool, float32 [slots, N, D, D] (k axis, v axis), contiguous.
    slots: int32 or int64 [S], rows of the pool; -1 is padding: output 0, no state touched. A slot named twice in one call is the
    caller's error: both would start from the same state, and one update would be lost. silu: q, k and v are x·sigmoid(x) of what
    is given, rounded to their dtype. Raises UsageError for shapes and dtypes that do not fit.
    """
    from mxconv.runtime.kernels.lightning_steps import lightning_steps

    heads, size = q.shape[-2:]
    if q.dim() not in (3, 4) or q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise UsageError("q, k and v must be [S, N, D] or [S, k, N, D] of one dtype", expected=DTYPES, got=(q.shape, q.dtype))
    if state.dtype != torch.float32 or tuple(state.shape[1:]) != (heads, size, size) or not state.is_contiguous():
        raise UsageError("states must be contiguous float32", expected=("slots", heads, size, size), got=tuple(state.shape))
    if slots.shape != (len(q),) or rates.shape != (heads,):
        raise UsageError("one slot for each row, one rate for each head", got=(tuple(slots.shape), tuple(rates.shape)))
    if len(q) > MOST_ROWS:
        raise UsageError("too many rows for one call", expected=f"at most {MOST_ROWS}", got=len(q))
    padded = max(16, 1 << (size - 1).bit_length())
    if padded not in LAUNCHES:
        raise UsageError("head_dim is too large for the lightning kernels", expected=f"at most {max(LAUNCHES)}", got=size)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    launch = launch or LAUNCHES[padded][len(q) * heads > FEW]
    columns = min(launch.columns, padded)
    grid = (-(-size // columns), heads, len(q))
    if 0 not in grid:
        lightning_steps[grid](
            q, k, v, out, rates, state, slots,
            *_strides(q, "q", q.shape), *_strides(k, "k", q.shape), *_strides(v, "v", q.shape), *_strides(out, "out", q.shape),
            1 if q.dim() == 3 else q.shape[1], heads, D=size, DP=padded, BV=columns, SILU=silu, num_warps=launch.warps,
        )  # fmt: skip
    return out
