"""Reading boxes of tensors by `pread`: bounded memory, bounded descriptors, no mmap (a truncated mmap kills the process)."""

from __future__ import annotations

import errno
import math
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from mxconv.checkpoint.files import OPEN_FLAGS
from mxconv.checkpoint.stored import Shards, StoredFile, StoredTensor
from mxconv.errors import IntegrityError, MxconvError, ResourceError
from mxconv.tensors import DTYPE_BYTES, Box, box_shape, whole

MAX_OPEN_FILES = 64
PIECE_BYTES = 64 << 20  # a signal is noticed between two of these
WINDOW_BYTES = 4 << 20  # scratch for boxes whose runs lie close together
GAP_BYTES = 32 << 10  # a gap up to this size is cheaper to read than to seek over (a pread costs what ~30 KB of copying costs)

Bytes = NDArray[np.uint8]


class _OpenFile:
    __slots__ = ("fd", "users")

    def __init__(self, fd: int) -> None:
        self.fd, self.users = fd, 0


class ByteReader:
    """Reads boxes of the tensors of one `Shards`; thread-safe, a context manager, files opened when first needed."""

    def __init__(self, shards: Shards, *, max_open: int = MAX_OPEN_FILES) -> None:
        self._files = shards.files
        self._max_open = max_open
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close every file that no thread is reading."""
        with self._lock:
            self._evict(0)

    def read(self, tensor: StoredTensor, box: Box | None = None, *, out: Bytes | None = None) -> Bytes:
        """The C-contiguous bytes (uint8, 1-D) of `box` of `tensor`, all of it by default.

        `out`, when given, is filled and returned: uint8, contiguous, of exactly that many bytes. Fresh memory costs more than
        the copy out of the page cache (a page fault each 4 KiB), so a worker that reads much keeps a buffer.
        Raises IntegrityError when the file is not the one whose header was read, ResourceError when the disk fails.
        """
        itemsize = DTYPE_BYTES[tensor.dtype]
        box = whole(tensor.shape) if box is None else box
        _check_box(tensor, box)
        shape = (*box_shape(box), itemsize)
        filled = np.empty(shape, dtype=np.uint8) if out is None else out.reshape(shape)
        if filled.size:
            file = self._files[tensor.file]
            with self._descriptor(tensor.file) as fd:
                _read_box(_Source(fd, file), tensor.offset, (*tensor.shape, itemsize), (*box, (0, itemsize)), filled)
        return filled.reshape(-1)

    def check_unchanged(self, files: Iterable[int] | None = None) -> None:
        """Raise IntegrityError when size, mtime or inode of a file (of `files`, or of all) moved since its header was read."""
        for index in range(len(self._files)) if files is None else files:
            file = self._files[index]
            try:
                info = os.stat(file.path)
            except FileNotFoundError:
                raise _changed(file, "it is gone") from None
            except OSError as error:
                raise ResourceError(f"cannot look at the file: {error.strerror}", where=file.path) from None
            _check_same(file, info)

    @contextmanager
    def _descriptor(self, index: int) -> Iterator[int]:
        with self._lock:
            entry = self._open.get(index)
            if entry is None:
                entry = self._open[index] = _OpenFile(_open_same(self._files[index]))
            self._open.move_to_end(index)
            entry.users += 1
            self._evict(self._max_open)
        try:
            yield entry.fd
        finally:
            with self._lock:
                entry.users -= 1

    def _evict(self, keep: int) -> None:
        for index in list(self._open):
            if len(self._open) <= keep:
                return
            if self._open[index].users == 0:
                os.close(self._open.pop(index).fd)


def _check_box(tensor: StoredTensor, box: Box) -> None:
    if len(box) != len(tensor.shape) or any(not 0 <= a <= b <= n for (a, b), n in zip(box, tensor.shape, strict=True)):
        raise MxconvError("a box does not lie in its tensor", where=tensor.name, expected=tensor.shape, got=box)


def _changed(file: StoredFile, how: str) -> IntegrityError:
    return IntegrityError(
        f"source changed while it was being read: {how}", where=file.path, hint="leave the source alone and run again with --resume"
    )


def _check_same(file: StoredFile, info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise _changed(file, "it is no regular file any more")
    for word, then, now in (
        ("size", file.size_bytes, info.st_size), ("mtime", file.mtime_ns, info.st_mtime_ns), ("inode", file.inode, info.st_ino)
    ):  # fmt: skip
        if then != now:
            raise _changed(file, f"its {word} was {then} and is {now}")


def _open_same(file: StoredFile) -> int:
    try:
        fd = os.open(file.path, OPEN_FLAGS)
    except FileNotFoundError:
        raise _changed(file, "it is gone") from None
    except OSError as error:
        raise _read_error(file, error) from None
    try:
        _check_same(file, os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _read_error(file: StoredFile, error: OSError) -> ResourceError:
    what = "the disk cannot read the file (input/output error)" if error.errno == errno.EIO else f"cannot read: {error.strerror}"
    return ResourceError(what, where=file.path, hint="check the disk, then run again with --resume")


class _Source:
    """One open file: `fill` reads exactly as many bytes as a buffer holds."""

    __slots__ = ("fd", "file")

    def __init__(self, fd: int, file: StoredFile) -> None:
        self.fd, self.file = fd, file

    def fill(self, out: Bytes, offset: int) -> None:
        view = out.reshape(-1).data
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self.fd, [view[done : done + PIECE_BYTES]], offset + done)
            except OSError as error:
                raise _read_error(self.file, error) from None
            if got == 0:
                raise _changed(self.file, f"it ends at byte {offset + done}")
            done += got


def _read_box(source: _Source, offset: int, shape: Sequence[int], box: Box, out: Bytes) -> None:
    """Fill `out` (its shape is the box's) from the C-contiguous tensor of `shape` at byte `offset`.

    The last axis of all is the bytes of an element. Rows that lie close together are read with what is between them, in windows.
    """
    start, stop = box[0]
    inner = shape[1:]
    row_bytes = math.prod(inner)
    offset += start * row_bytes
    if all(part == (0, n) for part, n in zip(box[1:], inner, strict=True)):
        source.fill(out, offset)
        return
    if row_bytes <= WINDOW_BYTES and row_bytes - math.prod(out.shape[1:]) <= GAP_BYTES:
        step = WINDOW_BYTES // row_bytes
        scratch = np.empty((min(step, stop - start), *inner), dtype=np.uint8)
        cut = (slice(None), *(slice(a, b) for a, b in box[1:]))
        for first in range(0, stop - start, step):
            rows = min(step, stop - start - first)
            source.fill(scratch[:rows], offset + first * row_bytes)
            out[first : first + rows] = scratch[:rows][cut]
        return
    for row in range(stop - start):
        _read_box(source, offset + row * row_bytes, inner, box[1:], out[row])
