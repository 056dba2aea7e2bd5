"""How the grouped GEMM is launched: one fixed, measured configuration for each class of tokens an expert.

Classes are by the average number of assignments an expert, which the shapes alone tell. Nothing is tuned at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mxconv.runtime.kernels.moe_pack import STEP, Kind

PROGRAMS = 528
"""K is split in two until there are more programs than this: four for each multiprocessor of an H200."""
SPLIT_ASSIGNMENTS = 64
"""Up to here K may be split, and SwiGLU is left to the next kernel: reading gate and up rows from two places is slower where
programs are few (56 against 42 µs at 16 tokens). Above, partial sums would be most of the traffic."""
LARGEST_OFFSET = 2**31 - 1
"""Elements of an activation matrix that the kernels address; more tokens are taken in parts."""
MIN_STEPS = 4
"""Steps of K that a split has at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Block sizes and launch parameters of one GEMM."""

    block_n: int
    block_t: int
    warps: int
    stages: int
    splits: int = 1
    gated: bool = False
    """SwiGLU is done by the GEMM."""


def _launches(stages: int) -> tuple[tuple[int, Launch], ...]:
    return (
        (1, Launch(block_n=128, block_t=16, warps=4, stages=4)), (20, Launch(block_n=128, block_t=16, warps=4, stages=stages)),
        (48, Launch(block_n=128, block_t=32, warps=4, stages=4)), (1 << 30, Launch(block_n=128, block_t=64, warps=4, stages=4)),
    )  # fmt: skip


_BLOCKS: Mapping[Kind, tuple[tuple[int, Launch], ...]] = {
    "int4_e4m3": _launches(3), "int4_int8": _launches(3), "e4m3": _launches(4)
}  # fmt: skip
"""Inner loop → (assignments an expert up to which it holds, blocks), as measured on an H200 with benchmarks/moe_sweep.py."""


def block_tokens(kind: Kind, assignments: int, experts: int) -> int:
    """Tokens of a tile: both GEMMs of a layer share the tiles."""
    return _blocks(kind, assignments, experts).block_t


def _blocks(kind: Kind, assignments: int, experts: int) -> Launch:
    return next(launch for limit, launch in _BLOCKS[kind] if assignments <= limit * experts)


def max_tiles(assignments: int, experts: int, block_t: int) -> int:
    """Tiles that any distribution of `assignments` over `experts` needs at the most."""
    return max(1, min(assignments, assignments // block_t + experts))


def launch_of(kind: Kind, assignments: int, experts: int, n: int, k: int, *, gate: bool = False) -> Launch:
    """The launch of a GEMM of [assignments, k] with experts [n, k]; with `gate` it does SwiGLU too where that pays."""
    blocks = _blocks(kind, assignments, experts)
    block_n = next(size for size in (blocks.block_n, 128, 64) if n % size == 0 and (n // 2) % (size // 2) == 0)
    splits = 1
    if assignments <= SPLIT_ASSIGNMENTS:
        programs = -(-n // block_n) * max_tiles(assignments, experts, blocks.block_t)
        steps = k // STEP
        while programs * splits <= PROGRAMS and steps // (splits * 2) >= MIN_STEPS:
            splits *= 2
    return replace(blocks, block_n=block_n, splits=splits, gated=gate and assignments > SPLIT_ASSIGNMENTS)
