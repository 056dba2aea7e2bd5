"""Routing: router logits → softmax → the k largest, renormalised.

The router is float32 and its logits are exact to float32: a float32 weight is the sum of three bf16 numbers, a bf16 activation is
one, and the tensor cores' products of two bf16 numbers are exact in their float32 sum. Nothing comes back to the host.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxconv.runtime.kernels.moe_overlap import after_previous, overlap_options

SMALL = 64
"""Tokens up to which the logits kernel takes 16 tokens a program and cuts the hidden size finely."""


@triton.jit(do_not_specialize=["tokens", "share"])
def logits_kernel(
    x, router, logits, tokens, H, share, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr, EXACT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Partial logits float32 [splits, tokens, EXPERTS] of x [tokens, H] and router float32 [EXPERTS, H], `share` of H a split.

    EXACT: x is bf16 and the router is split into three bf16 parts; else the product is taken in float32, without tensor cores.
    """
    after_previous(OVERLAP)
    block, split = tl.program_id(0), tl.program_id(1)
    t, e, h = block * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    x_at = x + t[:, None].to(tl.int64) * H
    for start in range(split * share, tl.minimum(split * share + share, H), BLOCK_H):
        at = start + h
        xv = tl.load(x_at + at[None, :], mask=(t < tokens)[:, None] & (at < H)[None, :], other=0.0)
        rv = tl.load(router + e[None, :] * H + at[:, None], mask=(e < EXPERTS)[None, :] & (at < H)[:, None], other=0.0)
        if EXACT:
            for _ in tl.static_range(3):
                part = rv.to(tl.bfloat16)
                total = tl.dot(xv, part, total)
                rv -= part.to(tl.float32)
        else:
            total = tl.dot(xv.to(tl.float32), rv, total, input_precision="ieee")
    out = (split.to(tl.int64) * tokens + t)[:, None] * EXPERTS + e[None, :]
    tl.store(logits + out, total, mask=(t < tokens)[:, None] & (e < EXPERTS)[None, :])


@triton.jit(do_not_specialize=["tokens", "splits"])
def top_kernel(
    logits, chosen, weights, tokens, splits, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Softmax of the summed partial logits; chosen int32, weights float32 [tokens, K], largest first, ties to the lower expert."""
    after_previous(OVERLAP)
    t, e, j = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    there = (t < tokens)[:, None] & (e < EXPERTS)[None, :]
    z = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for split in range(splits):
        z += tl.load(logits + (split * tokens + t)[:, None].to(tl.int64) * EXPERTS + e[None, :], mask=there, other=0.0)
    z = tl.where((e < EXPERTS)[None, :], z, float("-inf"))
    p = tl.exp(z - tl.max(z, axis=1)[:, None])
    p = p / tl.sum(p, axis=1)[:, None]
    left = tl.where((e < EXPERTS)[None, :], p, -1.0)
    ids, tops = tl.zeros((BLOCK_T, BLOCK_K), tl.int32), tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for i in tl.static_range(K):
        # A row of NaN has no largest: it keeps the NaN as its weight and takes expert i.
        best, at = tl.max(left, axis=1, return_indices=True, return_indices_tie_break_left=True)
        lost = tl.sum(p, axis=1) != tl.sum(p, axis=1)
        at = tl.where(lost, i, at)
        ids = tl.where((j == i)[None, :], at[:, None], ids)
        tops = tl.where((j == i)[None, :], tl.where(lost, float("nan"), best)[:, None], tops)
        left = tl.where(e[None, :] == at[:, None], -2.0, left)
    tops = tops / tl.sum(tops, axis=1)[:, None]
    out = t[:, None] * K + j[None, :]
    inside = (t < tokens)[:, None] & (j < K)[None, :]
    tl.store(chosen + out, ids, mask=inside)
    tl.store(weights + out, tops, mask=inside)


def route(x: Tensor, router: Tensor, per_token: int) -> tuple[Tensor, Tensor]:
    """The experts of each token and their shares: x [T, H], router float32 [E, H] → chosen int32 [T, k], weights float32 [T, k].

    Softmax in float32 over all experts, the `per_token` largest (ties to the lower expert, largest first) divided by their sum.
    A token whose logits hold NaN gets experts 0..k-1 with NaN weights.
    """
    (tokens, hidden), experts = x.shape, len(router)
    x, router = x.contiguous(), router.to(torch.float32).contiguous()
    block_t = 16 if tokens <= SMALL else 64
    blocks = triton.cdiv(tokens, block_t)
    share = 256 if tokens <= SMALL else triton.cdiv(hidden, max(1, 128 // blocks) * 64) * 64
    splits, block_e = triton.cdiv(hidden, share), max(16, triton.next_power_of_2(experts))
    logits = torch.empty(splits, tokens, experts, device=x.device)
    chosen = torch.empty(tokens, per_token, dtype=torch.int32, device=x.device)
    weights = torch.empty(tokens, per_token, device=x.device)
    if not tokens:
        return chosen, weights
    logits_kernel[(blocks, splits)](
        x, router, logits, tokens, hidden, share, EXPERTS=experts, BLOCK_E=block_e, BLOCK_T=block_t, BLOCK_H=64,
        EXACT=x.dtype == torch.bfloat16 and not triton.knobs.runtime.interpret, num_warps=4, **overlap_options(x.device),
    )  # fmt: skip
    top_kernel[(triton.cdiv(tokens, 16),)](
        logits, chosen, weights, tokens, splits, EXPERTS=experts, BLOCK_E=block_e, K=per_token,
        BLOCK_K=triton.next_power_of_2(per_token), BLOCK_T=16, num_warps=4, **overlap_options(x.device),
    )  # fmt: skip
    return chosen, weights
