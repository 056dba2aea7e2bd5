"""Reading boxes of tensors by `pread`: bounded memory, bounded descriptors, no mmap (a truncated mmap kills the process)."""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Iterable
from types import TracebackType
from typing import Self

import numpy as np

from mxconv.checkpoint.boxes import Bytes, ShortRead, read_box
from mxconv.checkpoint.descriptors import MAX_OPEN_FILES, Descriptors
from mxconv.checkpoint.files import OPEN_FLAGS
from mxconv.checkpoint.stored import Shards, StoredFile, StoredTensor
from mxconv.errors import IntegrityError, MxconvError, ResourceError
from mxconv.tensors import DTYPE_BYTES, Box, box_shape, whole


class ByteReader:
    """Reads boxes of the tensors of one `Shards`; thread-safe, a context manager, files opened when first needed."""

    def __init__(self, shards: Shards, *, max_open: int = MAX_OPEN_FILES) -> None:
        self._files = shards.files
        self._descriptors = Descriptors(lambda number: _open_same(self._files[number]), max_open=max_open)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close every file that no thread is reading."""
        self._descriptors.close()

    def read(self, tensor: StoredTensor, box: Box | None = None, *, out: Bytes | None = None) -> Bytes:
        """The C-contiguous bytes (uint8, 1-D) of `box` of `tensor`, all of it by default.

        `out`, when given, is filled and returned: uint8, contiguous, of exactly that many bytes. Fresh memory costs more than
        the copy out of the page cache (a page fault each 4 KiB), so a worker that reads much keeps a buffer.
        Raises IntegrityError when the file is not the one whose header was read, ResourceError when the disk fails.
        """
        itemsize = DTYPE_BYTES[tensor.dtype]
        box = whole(tensor.shape) if box is None else box
        _check_box(tensor, box)
        size = math.prod(box_shape(box)) * itemsize
        filled = np.empty(size, dtype=np.uint8) if out is None else out.reshape(size)
        if size:
            file = self._files[tensor.file]
            with self._descriptors.use(tensor.file) as fd:
                try:
                    read_box(fd, tensor.offset, tensor.shape, box, itemsize, filled)
                except ShortRead as short:
                    raise _changed(file, f"it ends at byte {short.args[0]}") from None
                except OSError as error:
                    raise _read_error(file, error) from None
        return filled

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
