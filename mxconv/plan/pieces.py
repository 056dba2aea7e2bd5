"""Copy units: target containers of the same parameters, cut into pieces that fit a worker.

The cut is a constant of the plan, not of the memory budget: the bytes of an artifact and the digest of its plan must not
depend on the machine that writes it. A budget too small for the largest piece is refused (6) with the number it needs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from mxconv.mapping.bind import Bound
from mxconv.mapping.containers import Container, Part
from mxconv.plan.values import Output, Piece, Unit
from mxconv.tensors import DTYPE_BYTES, Box, whole

PIECE_BYTES = 192 << 20
"""Output bytes of a unit; above it the unit is cut along its parameters' first axis."""
BLOCK_BYTES = 8 << 20
"""Source bytes that a worker reads at once."""
MINIMUM_ROWS = 2048
"""Rows of a vocabulary block: a transposed one is written in runs of rows·itemsize bytes."""


def copy_units(containers: Sequence[Container], bound: Bound, groups: Mapping[str, str]) -> Iterator[Unit]:
    """Units that fill `containers` (of every rank) from the source containers that hold the same parameters."""
    together: dict[tuple[str, int | None], list[Container]] = defaultdict(list)
    for container in containers:
        for stack in sorted({part.stack for part in container.parts}, key=lambda s: -1 if s is None else s):
            together[container.name, stack].append(container)
    for (name, stack), ranks in together.items():
        parts = [[part for part in container.parts if part.stack == stack] for container in ranks]
        suffix = "" if stack is None else f"#{stack}"
        ranges = _ranges(ranks, parts)
        for number, bounds in enumerate(ranges):
            pieces = tuple(piece for c, p in zip(ranks, parts, strict=True) for piece in _pieces(c, p, bounds, stack))
            if pieces:
                label = f"{name}{suffix}" + (f"[{number + 1}/{len(ranges)}]" if len(ranges) > 1 else "")
                yield _unit(label, groups[name], pieces, bound, 1 / len(ranges))


def _unit(label: str, group: str, pieces: tuple[Piece, ...], bound: Bound, share: float) -> Unit:
    outputs = tuple(Output(rank=p.container.rank, spec=p.container.spec, box=p.box) for p in pieces)
    names = {part.parameter: part for piece in pieces for part in piece.parts}
    reads = tuple({(c.rank, c.name): None for name in names for c, _ in bound.holders.get(name, ())})
    sizes = {(c.rank, c.name): c for name in names for c, _ in bound.holders.get(name, ())}
    stacked = {key: max(1, len({p.stack for p in c.parts})) for key, c in sizes.items()}
    read_bytes = int(sum(c.size_bytes / stacked[key] for key, c in sizes.items()) * share)
    layer = next((int(name.split(".")[1]) for name in names if name.startswith("layers.")), None)
    memory = sum(output.size_bytes for output in outputs) + 4 * BLOCK_BYTES
    return Unit(
        id=label, op="copy", group=group, layer=layer, reads=reads, outputs=outputs, pieces=pieces,
        read_bytes=read_bytes, memory_bytes=memory,
    )  # fmt: skip


def _ranges(ranks: Sequence[Container], parts: Sequence[Sequence[Part]]) -> list[tuple[int, int] | None]:
    """Bounds along the first canonical axis, padding included; [None] leaves the unit whole."""
    total = sum(math.prod(p.extent) * DTYPE_BYTES[c.dtype] for c, each in zip(ranks, parts, strict=True) for p in each)
    spans = {(part.axes[0], part.extent[0], max(each[i].origin[0] for each in parts)) for i, part in enumerate(parts[0])}
    if total <= PIECE_BYTES or len(spans) != 1:
        return [None]
    axis, each_rank, last = spans.pop()
    length = last + each_rank
    cut_by_rank = last > 0
    rows = max(1, PIECE_BYTES * length // total)
    if cut_by_rank and rows >= each_rank:
        rows -= rows % each_rank
    elif axis == "V" and rows > MINIMUM_ROWS:
        rows -= rows % MINIMUM_ROWS
    elif axis == "V":
        rows = min(MINIMUM_ROWS, length)
    return [(start, min(start + rows, length)) for start in range(0, length, rows)]


def _pieces(container: Container, parts: Sequence[Part], bounds: tuple[int, int] | None, stack: int | None) -> Iterator[Piece]:
    if bounds is None and stack is None:
        yield Piece(
            container=container, parts=tuple(parts), locals_=tuple(whole(p.extent) for p in parts), box=whole(container.shape)
        )  # fmt: skip
        return
    locals_ = [_local(part, bounds) for part in parts]
    if any(start >= stop for start, stop in (local[0] for local in locals_)):
        return
    groups = [tuple(range(len(parts)))] if container.interleaved else [(i,) for i in range(len(parts))]
    for group in groups:
        yield Piece(
            container=container,
            parts=tuple(parts[i] for i in group),
            locals_=tuple(locals_[i] for i in group),
            box=container.cover(parts[group[0]], locals_[group[0]]),
        )


def _local(part: Part, bounds: tuple[int, int] | None) -> Box:
    """`bounds` along the parameter's first axis, padding included, inside the room of this part."""
    if bounds is None:
        return whole(part.extent)
    start, stop = max(bounds[0] - part.origin[0], 0), min(bounds[1] - part.origin[0], part.extent[0])
    return ((start, stop), *whole(part.extent[1:]))
