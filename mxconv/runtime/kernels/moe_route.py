"""Routing: router logits → softmax → the k largest, renormalised; then the assignments sorted by expert, all on the device.

An assignment a = t·k + j is token t's j-th expert. Sorted, the assignments of one expert lie together, in order of a (stable):

    order[s] = a, position[a] = s      s the place in the sorted order; padding (expert -1) comes last, with order and position -1
    tiles[i] = (expert, first, count)  `count` ≤ BLOCK_T sorted assignments from `first` on; expert -1 where there is no tile
    ends[e]             the end of expert e's in the sorted order

There are at most min(A, A//BLOCK_T + E) tiles, known from the shapes alone, so no count ever travels to the host and all of it can
be captured in a CUDA graph. Nothing is added atomically: results do not depend on timing.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def logits_kernel(
    x, router, logits, H, tokens, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, SHARE: tl.constexpr
):
    """Partial logits float32 [splits, tokens, EXPERTS] of x [tokens, H] and router float32 [EXPERTS, H]; program (token, split)."""
    token, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    e, h = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_E,), tl.float32)
    for start in range(split * SHARE, tl.minimum(split * SHARE + SHARE, H), BLOCK_H):
        at = start + h
        xv = tl.load(x + token * H + at, mask=at < H, other=0.0).to(tl.float32)
        rv = tl.load(router + e[:, None] * H + at[None, :], mask=(e < EXPERTS)[:, None] & (at < H)[None, :], other=0.0)
        total += tl.sum(rv * xv[None, :], axis=1)
    tl.store(logits + (split * tokens + token) * EXPERTS + e, total, mask=e < EXPERTS)


@triton.jit(do_not_specialize=["tokens"])
def top_kernel(
    logits, chosen, weights, tokens, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Softmax of the summed partial logits; chosen int32, weights float32 [tokens, K], largest first, ties to the lower expert."""
    t, e, j = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    there = (t < tokens)[:, None] & (e < EXPERTS)[None, :]
    z = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for split in tl.static_range(SPLITS):
        z += tl.load(logits + (split * tokens + t)[:, None] * EXPERTS + e[None, :], mask=there, other=0.0)
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


@triton.jit(do_not_specialize=["assignments", "max_tiles"])
def sort_kernel(
    chosen, order, position, tiles, ends, assignments, max_tiles, EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK_T: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One program an expert and one for the padding: each counts all assignments, then places its own. BINS: 2^n > EXPERTS."""
    expert = tl.program_id(0)
    bins, lane = tl.arange(0, BINS), tl.arange(0, CHUNK)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, assignments, CHUNK):
        a = start + lane
        ids = tl.load(chosen + a, mask=a < assignments, other=0).to(tl.int32)
        ids = tl.where((ids < 0) | (ids >= EXPERTS), EXPERTS, ids)
        counts += tl.histogram(ids, BINS, mask=a < assignments)
    parts = tl.where(bins < EXPERTS, (counts + BLOCK_T - 1) // BLOCK_T, 0)
    first = tl.sum(tl.where(bins < expert, counts, 0))
    own = tl.sum(tl.where(bins == expert, counts, 0))
    tile = tl.sum(tl.where(bins < expert, parts, 0))
    tl.store(ends + expert, first + own, mask=expert < EXPERTS)
    placed = first
    for start in range(0, assignments, CHUNK):
        a = start + lane
        ids = tl.load(chosen + a, mask=a < assignments, other=0).to(tl.int32)
        ids = tl.where((ids < 0) | (ids >= EXPERTS), EXPERTS, ids)
        mine = (ids == expert) & (a < assignments)
        at = placed + tl.cumsum(mine.to(tl.int32), axis=0) - 1
        if expert == EXPERTS:
            tl.store(order + at, -1, mask=mine)
            tl.store(position + a, -1, mask=mine)
        else:
            tl.store(order + at, a, mask=mine)
            tl.store(position + a, at, mask=mine)
        placed += tl.sum(mine.to(tl.int32))
    i = tl.arange(0, 64)
    last = tl.where(expert == EXPERTS, max_tiles - tile, (own + BLOCK_T - 1) // BLOCK_T)
    for start in range(0, last, 64):
        n = start + i
        at = tiles + (tile + n) * 3
        tl.store(at, tl.where(expert == EXPERTS, -1, expert), mask=n < last)
        tl.store(at + 1, first + n * BLOCK_T, mask=n < last)
        tl.store(at + 2, tl.minimum(own - n * BLOCK_T, BLOCK_T), mask=n < last)
