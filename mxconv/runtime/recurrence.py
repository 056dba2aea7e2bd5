"""Lightning attention over whatever holds the states: a kernel where dispatch takes one, else the definition in lightning.py.

    qkv     [B, T, 3·N·D]: the fused projection before its SiLU, [q | k | v] of N heads; the result is [B, T, N·D] in its dtype
    states  [slots, N, D, D] float32 (float64 in a float64 model), changed in place; None computes without a past
    slots   int64 [B]: each sequence's row of `states`, -1 for a sequence that is not there; None: sequence b has row b
    mask    bool [B, T]: padded tokens are skipped; their outputs mean nothing
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mxconv.dispatch import triton_wanted
from mxconv.runtime.lightning import LightningDecay, lightning


def recur(
    qkv: Tensor, head_dim: int, decay: LightningDecay, states: Tensor | None, slots: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Outputs of the recurrence; `states` then hold what the tokens leave behind."""
    operation = "lightning_prefill" if states is None or qkv.shape[1] > 1 else "lightning_decode"
    by = by_kernel if triton_wanted(operation, qkv.device, qkv.dtype, head_dim=head_dim) else by_torch
    return by(qkv, head_dim, decay, states, slots, mask)


def by_kernel(
    qkv: Tensor, head_dim: int, decay: LightningDecay, states: Tensor | None, slots: Tensor | None, mask: Tensor | None
) -> Tensor:
    """`recur` through the kernels, which read the projection in place. A step's applies SiLU as it loads, a prompt's takes rows
    behind it: there SiLU would be computed by what its products wait for.
    """
    if states is not None and slots is None:
        slots = torch.arange(len(qkv), device=qkv.device)
    step = states is not None and qkv.shape[1] == 1
    q, k, v = (qkv if step else silu(qkv)).unflatten(-1, (3, -1, head_dim)).unbind(2)
    if step and states is not None and slots is not None:
        from mxconv.runtime.kernels.lightning_decode import lightning_decode

        rows = slots if mask is None else torch.where(mask[:, 0], slots, -1)
        return lightning_decode(q, k, v, decay.rates, states, rows, silu=True).flatten(2)
    from mxconv.runtime.kernels.lightning_prefill import lightning_prefill

    return lightning_prefill(q, k, v, decay.rates, states, slots=slots, mask=mask)[0].flatten(2)


def silu(x: Tensor) -> Tensor:
    """x · sigmoid(x), in the dtype of `x`."""
    if triton_wanted("silu", x.device, x.dtype):
        from mxconv.runtime.kernels.silu import silu_rows

        return silu_rows(x)
    return F.silu(x)


def by_torch(
    qkv: Tensor, head_dim: int, decay: LightningDecay, states: Tensor | None, slots: Tensor | None, mask: Tensor | None
) -> Tensor:
    """`recur` by its definition."""
    q, k, v = F.silu(qkv).to(decay.dtype).unflatten(-1, (3, -1, head_dim)).permute(2, 0, 3, 1, 4)
    if states is None or slots is None:
        out, after = lightning(q, k, v, decay, states, mask)
        if states is not None and after is not states:
            states.copy_(after)
        return out.transpose(1, 2).flatten(2).to(qkv.dtype)
    held = slots >= 0
    rows = slots[held]
    result = torch.zeros(*qkv.shape[:2], q.shape[1] * head_dim, dtype=qkv.dtype, device=qkv.device)
    if len(rows):
        out, states[rows] = lightning(q[held], k[held], v[held], decay, states[rows], None if mask is None else mask[held])
        result[held] = out.transpose(1, 2).flatten(2).to(qkv.dtype)
    return result
