"""Moving a box of a C-contiguous tensor between a file and memory, whatever its runs look like."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mxconv.tensors import Box, box_shape, runs

PIECE_BYTES = 64 << 20  # a signal is noticed between two of these
WINDOW_BYTES = 4 << 20  # scratch for boxes whose runs lie close together
GAP_BYTES = 32 << 10  # a gap up to this size is cheaper to read than to seek over (a pread costs what ~30 KB of copying costs)

Bytes = NDArray[np.uint8]


class ShortRead(Exception):
    """The file ends at byte `args[0]`, before what was to be read."""


def fill(fd: int, out: Bytes, offset: int) -> None:
    """Read exactly as many bytes as `out` (contiguous) holds, from byte `offset`; ShortRead when the file ends before."""
    view = out.reshape(-1).data
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done : done + PIECE_BYTES]], offset + done)
        if got == 0:
            raise ShortRead(offset + done)
        done += got


def read_box(fd: int, offset: int, shape: Sequence[int], box: Box, itemsize: int, out: Bytes) -> None:
    """Fill `out` (contiguous) with the bytes of `box` of the tensor of `shape` that begins at byte `offset`."""
    if out.size:
        _read(fd, offset, (*shape, itemsize), (*box, (0, itemsize)), out.reshape((*box_shape(box), itemsize)))


def _read(fd: int, offset: int, shape: Sequence[int], box: Box, out: Bytes) -> None:
    """Fill `out` (its shape is the box's); the last axis of all is the bytes of an element.

    Rows that lie close together are read with what is between them, in windows.
    """
    start, stop = box[0]
    inner = shape[1:]
    row_bytes = math.prod(inner)
    offset += start * row_bytes
    if all(part == (0, n) for part, n in zip(box[1:], inner, strict=True)):
        fill(fd, out, offset)
        return
    if row_bytes <= WINDOW_BYTES and row_bytes - math.prod(out.shape[1:]) <= GAP_BYTES:
        step = WINDOW_BYTES // row_bytes
        scratch = np.empty((min(step, stop - start), *inner), dtype=np.uint8)
        cut = (slice(None), *(slice(a, b) for a, b in box[1:]))
        for first in range(0, stop - start, step):
            rows = min(step, stop - start - first)
            fill(fd, scratch[:rows], offset + first * row_bytes)
            out[first : first + rows] = scratch[:rows][cut]
        return
    for row in range(stop - start):
        _read(fd, offset + row * row_bytes, inner, box[1:], out[row])


def write_box(fd: int, offset: int, shape: Sequence[int], box: Box, itemsize: int, data: memoryview) -> None:
    """Write `data`, the C-contiguous bytes of `box`, into the tensor of `shape` at byte `offset`."""
    done = 0
    for start, length in runs(shape, box, itemsize):
        end, position = done + length, offset + start
        while done < end:
            put = os.pwrite(fd, data[done : min(end, done + PIECE_BYTES)], position)
            done, position = done + put, position + put
