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
from mxconv.runtime.kernels.moe_table import LARGEST_OFFSET

FEW = 16
"""Tokens up to which a program multiplies them one by one, without tensor cores: the router is read once, from many places."""
SPLITS = ((512, 16), (2048, 8), (8192, 2))
"""Tokens → how often the hidden size is cut; above the last, not at all."""


@triton.jit(do_not_specialize=["tokens"])
def few_logits_kernel(
    x, router, logits, tokens, H, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, TOGETHER: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Partial logits float32 [splits, tokens, EXPERTS] in float32: program (split of BLOCK_H, TOGETHER tokens)."""
    after_previous(OVERLAP)
    split, first = tl.program_id(0), tl.program_id(1) * TOGETHER
    e, h = tl.arange(0, BLOCK_E), split * BLOCK_H + tl.arange(0, BLOCK_H)
    r = tl.load(router + e[:, None] * H + h[None, :], mask=(e < EXPERTS)[:, None] & (h < H)[None, :], other=0.0)
    for token in tl.static_range(TOGETHER):
        t = first + token
        v = tl.load(x + t * H + h, mask=h < tl.where(t < tokens, H, 0), other=0.0).to(tl.float32)
        out = logits + (split * tokens + t) * EXPERTS + e
        tl.store(out, tl.sum(r * v[None, :], axis=1), mask=e < tl.where(t < tokens, EXPERTS, 0))


@triton.jit
def split_kernel(router, parts, SIZE, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """router float32 [SIZE] → bf16 [3, SIZE], whose sum it is."""
    after_previous(OVERLAP)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    left = tl.load(router + i, mask=i < SIZE, other=0.0)
    for part in tl.static_range(3):
        rounded = left.to(tl.bfloat16)
        tl.store(parts + part * SIZE + i, rounded, mask=i < SIZE)
        left -= rounded.to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "share"])
def many_logits_kernel(
    x, parts, logits, tokens, H, share, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Partial products float32 [splits, tokens, COLUMNS] of x [tokens, H] and parts bf16 [COLUMNS, H], `share` blocks of H a split.

    An fp16 activation is taken as the sum of two bf16 numbers, for the products to be exact as well.
    """
    after_previous(OVERLAP)
    block, split = tl.program_id(0), tl.program_id(1)
    t, c, h = block * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    x_off, r_off = t[:, None] * H + h[None, :], c[:, None] * H + h[None, :]
    for step in tl.range(split * share, tl.minimum(split * share + share, tl.cdiv(H, BLOCK_H)), num_stages=STAGES):
        at = step * BLOCK_H
        if EVEN:
            xv = tl.load(x + at + x_off, mask=(t < tokens)[:, None], other=0.0)
            rv = tl.load(parts + at + r_off, mask=(c < COLUMNS)[:, None], other=0.0)
        else:
            xv = tl.load(x + at + x_off, mask=(t < tokens)[:, None] & (h < H - at)[None, :], other=0.0)
            rv = tl.load(parts + at + r_off, mask=(c < COLUMNS)[:, None] & (h < H - at)[None, :], other=0.0)
        rv = tl.trans(rv)
        if not NATIVE:  # the interpreter cannot multiply bf16
            total += tl.dot(xv.to(tl.float32), rv.to(tl.float32))
        elif x.dtype.element_ty == tl.bfloat16:
            total = tl.dot(xv, rv, total)
        else:
            high = xv.to(tl.bfloat16)
            total = tl.dot(high, rv, total)
            total = tl.dot((xv.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16), rv, total)
    out = (split * tokens + t)[:, None] * COLUMNS + c[None, :]
    tl.store(logits + out, total, mask=(t < tokens)[:, None] & (c < COLUMNS)[None, :])


@triton.jit(do_not_specialize=["tokens", "splits"])
def top_kernel(
    logits, chosen, weights, tokens, splits, PARTS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Softmax of the sum of partial logits [splits, tokens, PARTS, EXPERTS]; chosen int32 and weights float32 [tokens, K], largest
    first, ties to the lower expert."""
    after_previous(OVERLAP)
    t, e, j = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    s = tl.arange(0, BLOCK_S)
    at = ((s // PARTS)[None, :] * tokens + t[:, None]) * PARTS + (s % PARTS)[None, :]
    there = ((t < tokens)[:, None] & (s < splits * PARTS)[None, :])[:, :, None] & (e < EXPERTS)[None, None, :]
    z = tl.sum(tl.load(logits + at[:, :, None] * EXPERTS + e[None, None, :], mask=there, other=0.0), axis=1)
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


def _few_logits(x: Tensor, router: Tensor) -> Tensor:
    (tokens, hidden), experts = x.shape, len(router)
    logits = torch.empty(triton.cdiv(hidden, 128), tokens, 1, experts, device=x.device)
    few_logits_kernel[(len(logits), triton.cdiv(tokens, 4))](
        x, router, logits, tokens, hidden, EXPERTS=experts, BLOCK_E=triton.next_power_of_2(experts), BLOCK_H=128, TOGETHER=4,
        num_warps=4, **overlap_options(x.device),
    )  # fmt: skip
    return logits


def _many_logits(x: Tensor, router: Tensor) -> Tensor:
    (tokens, hidden), experts = x.shape, len(router)
    splits = next((count for limit, count in SPLITS if tokens <= limit), 1)
    share = triton.cdiv(triton.cdiv(hidden, 64), splits)
    parts = torch.empty(3, experts, hidden, dtype=torch.bfloat16, device=x.device)
    size = router.numel()
    split_kernel[(triton.cdiv(size, 1024),)](router, parts, size, BLOCK=1024, **overlap_options(x.device))
    logits = torch.empty(triton.cdiv(triton.cdiv(hidden, 64), share), tokens, 3, experts, device=x.device)
    many_logits_kernel[(triton.cdiv(tokens, 64), len(logits))](
        x, parts, logits, tokens, hidden, share, COLUMNS=3 * experts, BLOCK_C=triton.next_power_of_2(3 * experts), BLOCK_T=64,
        BLOCK_H=64, STAGES=4, EVEN=hidden % 64 == 0, NATIVE=not triton.knobs.runtime.interpret, num_warps=4,
        **overlap_options(x.device),
    )  # fmt: skip
    return logits


def route(x: Tensor, router: Tensor, per_token: int) -> tuple[Tensor, Tensor]:
    """The experts of each token and their shares: x [T, H], router [E, H] → chosen int32, weights float32 [T, k].

    Softmax in float32 over all experts, the `per_token` largest (ties to the lower expert, largest first) divided by their sum.
    A token whose logits hold NaN gets experts 0..k-1 with NaN weights.
    """
    tokens, experts = len(x), len(router)
    chosen = torch.empty(tokens, per_token, dtype=torch.int32, device=x.device)
    weights = torch.empty(tokens, per_token, device=x.device)
    if not tokens:
        return chosen, weights
    most = LARGEST_OFFSET // x.shape[1]
    if tokens > most:
        parts = [route(part, router, per_token) for part in x.split(most)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    x, router = x.contiguous(), router.to(torch.float32).contiguous()
    few = tokens <= FEW or x.dtype == torch.float32  # whose products no two bf16 numbers hold
    logits = _few_logits(x, router) if few else _many_logits(x, router)
    block_s = triton.next_power_of_2(len(logits) * logits.shape[2])
    block_t = max(1, 64 // block_s)
    top_kernel[(triton.cdiv(tokens, block_t),)](
        logits, chosen, weights, tokens, len(logits), PARTS=logits.shape[2], EXPERTS=experts,
        BLOCK_E=triton.next_power_of_2(experts), BLOCK_S=block_s, BLOCK_T=block_t, K=per_token,
        BLOCK_K=triton.next_power_of_2(per_token), num_warps=4, **overlap_options(x.device),
    )  # fmt: skip
    return chosen, weights
