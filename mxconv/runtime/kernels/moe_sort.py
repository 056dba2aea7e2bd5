"""The assignments of tokens to experts, sorted by expert on the device, and cut into tiles for the grouped GEMM.

An assignment a = t·k + j is token t's j-th expert. Sorted, the assignments of one expert lie together, in order of a (stable):

    order[s] = a, position[a] = s      s the place in the sorted order; padding (expert -1) comes last, with order and position -1
    tiles[i] = (expert, first, count)  `count` ≤ BLOCK_T sorted assignments from `first` on; expert -1 where there is no tile
    ends[e]                            the end of expert e's in the sorted order

There are at most min(A, A//BLOCK_T + E) tiles, known from the shapes alone, so no count ever travels to the host and all of it can
be captured in a CUDA graph. Nothing is added atomically: results do not depend on timing.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxconv.runtime.kernels.moe_overlap import after_previous, overlap_options
from mxconv.runtime.kernels.moe_table import max_tiles


@triton.jit
def sort_one(
    expert, chosen, order, position, tiles, ends, assignments, max_tiles, EXPERTS: tl.constexpr, BINS: tl.constexpr,
    BLOCK_T: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Count all assignments, then place those of `expert`; EXPERTS itself stands for the padding. BINS: 2^n > EXPERTS."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Sorted:
    """The assignments sorted by expert; see moe_route. int32: order [A], position [A], tiles [·, 3], ends [E]."""

    order: Tensor
    position: Tensor
    tiles: Tensor
    ends: Tensor


@triton.jit(do_not_specialize=["assignments", "max_tiles"])
def sort_kernel(
    chosen, order, position, tiles, ends, assignments, max_tiles, EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK_T: tl.constexpr,
    CHUNK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program an expert, and one for the padding."""
    after_previous(OVERLAP)
    sort_one(
        tl.program_id(0), chosen, order, position, tiles, ends, assignments, max_tiles, EXPERTS, BINS, BLOCK_T, CHUNK
    )  # fmt: skip


def empty_sorted(assignments: int, experts: int, block_t: int, device: torch.device) -> Sorted:
    """Room for the sort's result; each part aligned to 16 bytes, so that one compiled kernel serves all token counts."""
    sizes = (assignments, assignments, 3 * max_tiles(assignments, experts, block_t), experts)
    rounded = [-(-size // 4) * 4 for size in sizes]
    parts = torch.empty(sum(rounded), dtype=torch.int32, device=device).split(rounded)
    order, position, tiles, ends = (part[:size] for part, size in zip(parts, sizes, strict=True))
    return Sorted(order=order, position=position, tiles=tiles, ends=ends)


def sort_arguments(chosen: Tensor, ordered: Sorted, experts: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `sort_one` after `expert`: those at run time, and the constants but for BLOCK_T."""
    assignments = chosen.numel()
    constants = {
        "EXPERTS": experts, "BINS": triton.next_power_of_2(experts + 1),
        "CHUNK": 64 if assignments <= 64 else 2048,
    }  # fmt: skip
    places = (ordered.order, ordered.position, ordered.tiles, ordered.ends)
    return (chosen, *places, assignments, ordered.tiles.numel() // 3), constants


def sort_assignments(chosen: Tensor, experts: int, block_t: int) -> Sorted:
    """Sort `chosen` int [T, k] (an expert outside 0..E-1 is padding) by expert, in tiles of at most `block_t` assignments."""
    ordered = empty_sorted(chosen.numel(), experts, block_t, chosen.device)
    arguments, constants = sort_arguments(chosen, ordered, experts)
    sort_kernel[(experts + 1,)](*arguments, BLOCK_T=block_t, **constants, **overlap_options(chosen.device))
    return ordered
