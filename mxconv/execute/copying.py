"""The `copy` operation: canonical blocks from source containers, laid into the pieces of target containers, bit for bit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from mxconv.execute.job import Done, Job
from mxconv.execute.rawbits import Raw, convert, raw_dtype
from mxconv.execute.reading import Block, Findings, SourceReader
from mxconv.execute.transposing import assign
from mxconv.mapping.containers import Part
from mxconv.mapping.minimax import permuted_order
from mxconv.plan.values import Piece, Plan, Unit
from mxconv.tensors import Box, box_shape, intersect


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a part's values go: `view` is a window on a piece, `room` the canonical box (padding included) that it shows."""

    view: Raw
    room: Box
    valid: Box
    dtype: str


def run_copy(unit: Unit, job: Job, findings: Findings) -> Done:
    """The stored values of each piece of `unit`, in the order of its outputs."""
    reader = job.reader
    arrays = [np.zeros(box_shape(piece.box), raw_dtype(piece.container.dtype)) for piece in unit.pieces]
    places: dict[str, list[_Place]] = defaultdict(list)
    for piece, array in zip(unit.pieces, arrays, strict=True):
        for part, local in zip(piece.parts, piece.locals_, strict=True):
            places[part.parameter].append(_place(piece, array, part, local))
    orders = _rope_orders(job.plan, reader)
    for block in _source_blocks(places, reader, findings):
        order = orders.get(block.parameter)
        values = block.values if order is None else np.take(block.values, order, axis=1)
        for place in places[block.parameter]:
            both = intersect(place.valid, block.box)
            if both is not None:
                source = values[tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(both, block.box, strict=True))]
                target = place.view[tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(both, place.room, strict=True))]
                assign(target, convert(source, block.dtype, place.dtype))
    findings.raise_bad()
    return Done(arrays=arrays)


def _place(piece: Piece, array: Raw, part: Part, local: Box) -> _Place:
    cover = piece.container.cover(part, local)
    window = array[tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(cover, piece.box, strict=True))]
    room = tuple((a + o, b + o) for (a, b), o in zip(local, part.origin, strict=True))
    valid = tuple((min(a, end), min(b, end)) for (a, b), (_, end) in zip(room, part.box, strict=True))
    return _Place(view=piece.container.view(window, part, local), room=room, valid=valid, dtype=piece.container.dtype)


def _source_blocks(places: Mapping[str, list[_Place]], reader: SourceReader, findings: Findings) -> Iterator[Block]:
    """Blocks of every parameter that the places want; parameters that alternate in one source container come together."""
    wanted = {name: _hull([place.valid for place in each]) for name, each in places.items()}
    done: set[str] = set()
    for name, box in wanted.items():
        if name in done or any(start >= stop for start, stop in box):
            continue
        container = reader.source.bound.holders[name][0][0]
        together = {part.parameter for part in container.parts} & set(wanted)
        if container.interleaved and len(reader.source.bound.holders[name]) == 1 and all(wanted[n] == box for n in together):
            done |= together
            yield from reader.group_blocks(container, {n: wanted[n] for n in together}, findings)
        else:
            done.add(name)
            yield from reader.blocks(name, box, findings)


def _hull(boxes: list[Box]) -> Box:
    """The smallest box around those that hold anything."""
    filled = [box for box in boxes if all(start < stop for start, stop in box)] or boxes[:1]
    return tuple((min(box[axis][0] for box in filled), max(box[axis][1] for box in filled)) for axis in range(len(filled[0])))


def _rope_orders(plan: Plan, reader: SourceReader) -> dict[str, np.ndarray]:
    """Parameter → order of its head_dim axis, for q and k of softmax layers whose order differs between source and target."""
    before, after = reader.source.config, plan.target
    if before.rope_permuted == after.rope_permuted:
        return {}
    order = permuted_order(after.head_dim, after.rotary_dim)
    if before.rope_permuted:
        order = np.argsort(order)
    softmax = [p for p in reader.source.parameters if p.full_attention and p.role in ("layers.{l}.q", "layers.{l}.k")]
    return {param.name: order for param in softmax}
