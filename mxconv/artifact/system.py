"""The system calls that Python lacks, with what to do where they are missing, and what an OSError of writing means."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from mxconv.errors import OutputConflict, ResourceError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_RESUME = "nothing is lost: run the same command again with --resume"

# errno → what to say, what to do
_WORDS = {
    errno.ENOSPC: ("the disk is full", f"make room on it; {_RESUME}"),
    errno.EDQUOT: ("the disk quota is used up", f"make room; {_RESUME}"),
    errno.EIO: ("the disk failed (input/output error)", f"check the disk; {_RESUME}"),
    errno.EROFS: ("the filesystem is read-only", "choose another output folder"),
    errno.EACCES: ("no permission to write", "choose another output folder or change its permissions"),
    errno.EPERM: ("no permission to write", "choose another output folder or change its permissions"),
    errno.EFBIG: ("the filesystem holds no file this large", "choose an output folder on another filesystem"),
}
_TAKEN = (errno.EEXIST, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def fallocate(fd: int, size_bytes: int) -> None:
    """Reserve the bytes [0, size) of a file, so that a full disk is met now; a plain `ftruncate` where that is unsupported.

    Not `os.posix_fallocate`: where the filesystem cannot, the C library writes into every block instead.
    """
    call = getattr(_libc(), "fallocate", None)
    if call is not None and size_bytes:
        if call(ctypes.c_int(fd), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(size_bytes)) == 0:
            return
        code = ctypes.get_errno()
        if code not in _UNSUPPORTED:
            raise OSError(code, os.strerror(code))
    os.ftruncate(fd, size_bytes)


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Let the kernel begin to write a range to the disk; it only hurries what `fdatasync` will demand, so errors do not matter."""
    call = getattr(_libc(), "sync_file_range", None)
    if call is not None:
        call(ctypes.c_int(fd), ctypes.c_int64(offset), ctypes.c_int64(length), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))


def exchange(a: Path, b: Path) -> bool:
    """Swap two names atomically; False where kernel or filesystem cannot."""
    call = getattr(_libc(), "renameat2", None)
    if call is None:
        return False
    names = (ctypes.c_int(_AT_FDCWD), os.fsencode(a), ctypes.c_int(_AT_FDCWD), os.fsencode(b))
    if call(*names, ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(a))


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def try_lock(fd: int) -> bool | None:
    """Take an exclusive lock without waiting: True taken, False held by another, None where locks are not supported."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return None
        raise
    return True


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into ResourceError (disk full, quota, broken disk …) or OutputConflict (a name is taken)."""
    try:
        yield
    except OSError as error:
        if error.errno in _TAKEN:
            raise OutputConflict(f"something else is in the way: {error.strerror}", where=path) from error
        what, hint = _WORDS.get(error.errno or 0, (f"cannot write: {error.strerror}", _RESUME))
        raise ResourceError(what, where=path, hint=hint) from error
