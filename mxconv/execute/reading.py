"""Reading parameters: source containers walked in runs of their files, handed on as blocks in canonical order."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mxconv.checkpoint import ByteReader
from mxconv.draw import plural
from mxconv.errors import IntegrityError, NumericError
from mxconv.execute.rawbits import Raw, nonfinite, raw_dtype
from mxconv.mapping.containers import Container, Part
from mxconv.plan.pieces import BLOCK_BYTES
from mxconv.source import Source
from mxconv.tensors import DTYPE_BYTES, Box, box_shape, intersect, whole

Room = Callable[[int], Raw]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Raw `values` of `box` (canonical coordinates and axis order) of `parameter`, a view of what was read."""

    parameter: str
    box: Box
    dtype: str
    values: Raw


@dataclass(slots=True)
class Findings:
    """What the blocks of one unit showed: the hash of the source bytes read, and Inf or NaN per tensor.

    scan: look for Inf and NaN; without it someone else does.
    """

    sha256: hashlib._Hash = field(default_factory=hashlib.sha256)
    bad: dict[str, tuple[int, str]] = field(default_factory=dict)
    scan: bool = True

    def begin_again(self) -> None:
        """The unit is read once more from its start, looked at this time."""
        self.sha256, self.bad, self.scan = hashlib.sha256(), {}, True

    def look(self, container: Container, part: Part, block: Block) -> None:
        """Count Inf and NaN, remembering where the first one is."""
        mask = nonfinite(block.values, block.dtype) if self.scan else None
        if mask is None:
            return
        first = np.unravel_index(int(np.argmax(mask)), mask.shape)
        index = ", ".join(str(int(i) + start) for i, (start, _) in zip(first, block.box, strict=True))
        count, where = self.bad.get(container.name, (0, f"({index}) of axes {' '.join(part.axes)}"))
        self.bad[container.name] = count + int(mask.sum()), where

    def raise_bad(self) -> None:
        """Raise NumericError when a weight of the unit is not finite."""
        for name, (count, where) in self.bad.items():
            raise NumericError(
                f"NaN or infinity in {plural(count, 'weight')}, the first at {where}", where=name,
                hint="the source is damaged or overflowed",
            )


class SourceReader:
    """The byte readers of every rank of a source; thread-safe. `check` is called before each read and may raise to end the run."""

    def __init__(self, source: Source, check: Callable[[], None] = lambda: None) -> None:
        self.source = source
        self._check = check
        self._readers = tuple(ByteReader(shards) for shards in source.ranks)

    def close(self) -> None:
        """Close the files."""
        for reader in self._readers:
            reader.close()

    def check_unchanged(self, reads: Sequence[tuple[int, str]]) -> None:
        """Raise IntegrityError when a file of these tensors is no longer the one that was planned with."""
        files: dict[int, set[int]] = {}
        for rank, name in reads:
            files.setdefault(rank, set()).add(self.source.stored(rank, name).file)
        for rank, indexes in files.items():
            self._readers[rank].check_unchanged(indexes)

    def raw(self, rank: int, name: str, box: Box | None = None, room: Room | None = None) -> Raw:
        """Raw values of a stored tensor or a box of it, in stored axis order; in memory of their own, or where `room` says."""
        self._check()
        tensor = self.source.stored(rank, name)
        box = whole(tensor.shape) if box is None else box
        out = None if room is None else room(math.prod(box_shape(box)) * DTYPE_BYTES[tensor.dtype])
        return self._readers[rank].read(tensor, box, out=out).view(raw_dtype(tensor.dtype)).reshape(box_shape(box))

    def blocks(
        self, parameter: str, wanted: Box, findings: Findings, multiple: int = 1, room: Room | None = None
    ) -> Iterator[Block]:
        """Blocks that cover `wanted` of `parameter`, in multiples of `multiple` along its slowest stored axis.

        Copies of it on other ranks are compared with the first one, padding with zero. `room` gives the memory to read into, uint8
        of so many bytes: a block is good until it gives the same memory again.
        """
        seen: dict[Box, tuple[Container, Part]] = {}
        for container, part in self.source.bound.holders[parameter]:
            if part.padded:
                self._check_padding(container, part)
            first = seen.setdefault(part.box, (container, part))
            box = intersect(part.box, wanted)
            if box is None:
                continue
            for block in self._walk(container, (part,), box, findings, multiple, room):
                if first[0] is container:
                    yield block
                else:
                    self._check_copy(first, container, block, findings)

    def group_blocks(self, container: Container, wanted: dict[str, Box], findings: Findings) -> Iterator[Block]:
        """Blocks of all parts of an interleaved `container` at once, so that its bytes are read a single time."""
        parts = tuple(part for part in container.parts if part.parameter in wanted)
        yield from self._walk(container, parts, wanted[parts[0].parameter], findings)

    def _walk(
        self, container: Container, parts: tuple[Part, ...], wanted: Box, findings: Findings, multiple: int = 1,
        room: Room | None = None,
    ) -> Iterator[Block]:
        """Blocks of `parts` (which alternate inside `container`, or are one) along the container's slowest axis."""
        head = parts[0]
        local = tuple((start - o, stop - o) for (start, stop), o in zip(wanted, head.origin, strict=True))
        axis = head.axes.index(container.lead(head))
        start, stop = local[axis]
        cover = container.cover(head, local)
        each = math.prod(box_shape(cover)) * DTYPE_BYTES[container.dtype] // max(1, stop - start)
        step = max(1, BLOCK_BYTES // max(1, each) // multiple) * multiple
        for begin in range(start, stop, step):
            cut = (*local[:axis], (begin, min(begin + step, stop)), *local[axis + 1 :])
            stored = self.raw(container.rank, container.name, container.cover(head, cut), room)
            findings.sha256.update(stored.data)
            for part in parts:
                box = tuple((a + o, b + o) for (a, b), o in zip(cut, part.origin, strict=True))
                block = Block(parameter=part.parameter, box=box, dtype=container.dtype, values=container.view(stored, part, cut))
                findings.look(container, part, block)
                yield block

    def _check_padding(self, container: Container, part: Part) -> None:
        """Padding rows of a vocabulary shard must be zero: they are not kept on the way back."""
        kept = part.box[0][1] - part.box[0][0]
        local = ((kept, part.extent[0]), *whole(part.extent[1:]))
        if bool(self.raw(container.rank, container.name, container.cover(part, local)).any()):
            raise IntegrityError(
                "padding of the vocabulary is not zero", where=f"rank{container.rank}: {container.name}", hint="run mxconv check"
            )

    def _check_copy(self, first: tuple[Container, Part], container: Container, block: Block, findings: Findings) -> None:
        """A parameter that several ranks hold must be the same on all of them."""
        for original in self._walk(first[0], (first[1],), block.box, findings):
            at = tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(original.box, block.box, strict=True))
            if not np.array_equal(original.values, block.values[at]):
                raise IntegrityError(
                    f"copies of {block.parameter} differ between ranks", where=f"rank{container.rank}: {container.name}",
                    expected=f"the bytes of rank{first[0].rank}", hint="run mxconv check",
                )  # fmt: skip
