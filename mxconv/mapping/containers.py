"""Containers: one stored tensor as the parts that it holds, and the view of each part in canonical order.

Reading and writing are the same view with the copy turned round, which is why every mapping runs backwards: a canonical
parameter is assembled from the parts that hold boxes of it, whatever the dialect, the rank or the orientation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mxconv.tensors import DTYPE_BYTES, Box, TensorSpec

Dims = tuple[tuple[str, ...], ...]
SIDE_BY_SIDE, STACK = "*", "E"


@lru_cache(maxsize=256)
def parse_axes(axes: str) -> Dims:
    """`"(N * D) H"` → (("N", "*", "D"), ("H",)): one tuple of named axes for each stored axis."""
    dims: list[tuple[str, ...]] = []
    group: list[str] | None = None
    for token in axes.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            group = []
        elif token == ")":
            dims.append(tuple(group or ()))
            group = None
        elif group is None:
            dims.append((token,))
        else:
            group.append(token)
    return tuple(dims)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A box of a canonical parameter inside a container.

    `origin` and `extent` are where its room begins and how large it is along each canonical axis; `box` is what it holds, in
    canonical coordinates: the room without the padding at its end. `slot` is the place along `*`, `stack` the place along
    E (None without such an axis).
    """

    parameter: str
    axes: tuple[str, ...]
    origin: tuple[int, ...]
    extent: tuple[int, ...]
    box: Box
    slot: int = 0
    stack: int | None = None

    @property
    def padded(self) -> bool:
        """Some of the room is padding."""
        return any(stop - start != n for (start, stop), n in zip(self.box, self.extent, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A stored tensor of rank `rank`: name, dtype, shape along `dims`, and the parts that it holds."""

    rank: int
    name: str
    dtype: str
    dims: Dims
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def spec(self) -> TensorSpec:
        """Name, dtype and shape alone."""
        return TensorSpec(name=self.name, dtype=self.dtype, shape=self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def interleaved(self) -> bool:
        """The parts alternate inside one stored axis, so that a run of bytes holds some of each."""
        return any(SIDE_BY_SIDE in group[1:] for group in self.dims)

    def lead(self, part: Part) -> str:
        """The slowest named axis inside a part: blocks along it are runs of the file."""
        return next(axis for group in self.dims for axis in group if axis in part.axes)

    def cover(self, part: Part, local: Box) -> Box:
        """The smallest stored box that holds `local` (canonical axes, relative to the part).

        Only the slowest axis of a stored axis can narrow it; the rest of `local` is cut by `view`.
        """
        bounds = dict(zip(part.axes, local, strict=True))
        room = dict(zip(part.axes, part.extent, strict=True))
        stored = []
        for group in self.dims:
            if group == (STACK,) and STACK not in part.axes:
                stored.append((part.stack or 0, (part.stack or 0) + 1))
                continue
            named = [axis for axis in group if axis != SIDE_BY_SIDE]
            inner = math.prod(room[axis] for axis in named[1:])
            inner *= len(self.parts) if SIDE_BY_SIDE in group[1:] else 1
            base = self._offset(part, named) if group[0] == SIDE_BY_SIDE else 0
            start, stop = bounds[named[0]] if named else (0, 1)
            stored.append((base + start * inner, base + stop * inner))
        return tuple(stored)

    def _offset(self, part: Part, named: list[str]) -> int:
        """Where `part` begins along a stored axis on which the parts follow each other."""
        before = [other for other in self.parts if other.stack == part.stack and other.slot < part.slot]
        return sum(math.prod(n for axis, n in zip(p.axes, p.extent, strict=True) if axis in named) for p in before)

    def view(self, stored: np.ndarray, part: Part, local: Box) -> np.ndarray:
        """The part of `stored`, an array of `cover`'s shape, as a view of shape `local` in canonical axis order.

        Stored axes are only ever split, never merged, so that the result shares memory with `stored`.
        """
        bounds = dict(zip(part.axes, local, strict=True))
        room = dict(zip(part.axes, part.extent, strict=True))
        sizes: list[int] = []
        index: list[Any] = []
        order: list[str] = []
        for group in self.dims:
            if group == (STACK,) and STACK not in part.axes:
                sizes.append(1)
                index.append(0)
                continue
            first = True
            for axis in group:
                if axis == SIDE_BY_SIDE:
                    if group[0] != SIDE_BY_SIDE:
                        sizes.append(len(self.parts))
                        index.append(part.slot)
                    continue
                start, stop = bounds[axis]
                sizes.append(stop - start if first else room[axis])
                index.append(slice(None) if first else slice(start, stop))
                order.append(axis)
                first = False
        split = stored.reshape(sizes)[tuple(index)]
        return split.transpose([order.index(axis) for axis in part.axes])
