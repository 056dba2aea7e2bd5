"""Opening one shard safely and reading its header: links, special files, lengths and truncation.

The file is opened once, without blocking (a FIFO would hang a plain open), must be a regular file inside its folder, and
nothing but its header is read. Lengths are checked before anything is allocated.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from mxconv.checkpoint.headers import MAX_HEADER_BYTES, Entry, parse_header
from mxconv.checkpoint.sniff import SNIFF_BYTES, sniff
from mxconv.checkpoint.stored import StoredFile
from mxconv.errors import IncompleteInput, MalformedInput, MxconvError, reading_failed

OPEN_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC

# stat type → what to call a thing that cannot be a shard
_SPECIAL = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
    stat.S_IFSOCK: "a socket",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadFile:
    """One shard as read: `file` is None when it could not be used at all."""

    file: StoredFile | None
    entries: tuple[Entry, ...]
    data_start: int
    problems: tuple[MxconvError, ...]


class HeaderBudget:
    """Bytes of headers that may still be read from one folder; thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self._left, self._lock = limit_bytes, threading.Lock()
        self.exceeded = False

    def take(self, count_bytes: int) -> bool:
        """Whether a header of this size may be read."""
        with self._lock:
            self._left -= count_bytes
            self.exceeded |= self._left < 0
            return self._left >= 0


def special_kind(path: Path) -> str | None:
    """What `path`, links followed, is if it is neither a regular file nor a folder: "a FIFO", "a socket", "a device"."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return None
    return None if stat.S_ISDIR(mode) else _SPECIAL.get(stat.S_IFMT(mode))


def check_inside(root: Path, path: Path) -> None:
    """Raise MalformedInput unless `path`, links followed, lies in `root` (a real path) or in `blobs` of the hub cache around it.

    The hub cache keeps `models--…/snapshots/<revision>/` full of links into `models--…/blobs/`; those are fine.
    """
    real = os.path.realpath(path)
    if real.startswith(os.path.join(root, "")):
        return
    snapshots = next((parent for parent in root.parents if parent.name == "snapshots"), None)
    if snapshots is not None and real.startswith(f"{snapshots.parent}/blobs/"):
        return
    raise MalformedInput(
        "a symbolic link leads out of the checkpoint folder", where=path, got=real, hint="copy the file into the folder"
    )


def _pread(fd: int, length: int, offset: int, path: Path) -> bytes:
    parts: list[bytes] = []
    while length > 0:
        part = os.pread(fd, length, offset)
        if not part:
            raise IncompleteInput("file ends inside its header", where=path)
        parts.append(part)
        length, offset = length - len(part), offset + len(part)
    return b"".join(parts)


def _length_problem(head: bytes, size: int, path: Path) -> MxconvError | None:
    """What the first bytes already say against the file: too short, no header length, or one that cannot be."""
    where = str(path)
    if size == 0:
        return IncompleteInput("file is empty", where=where, hint="download the file again")
    length = int.from_bytes(head[:8], "little")
    plausible = size >= 8 and 0 < length <= min(MAX_HEADER_BYTES, size - 8)
    if plausible and head[8:9] == b"{":
        return None
    known = sniff(head, size, where)
    if known is not None:
        return known
    if size < 8:
        return IncompleteInput("file is truncated", where=where, expected="8 bytes of header length", got=f"{size} bytes")
    if not any(head):
        return IncompleteInput("file begins with zeros: its download or copy never finished", where=where, got=f"{size} bytes")
    if length == 0:
        return MalformedInput("header length is zero", where=where)
    if length > MAX_HEADER_BYTES:
        return MalformedInput(
            "header length is beyond the format's limit", where=where, expected=f"at most {MAX_HEADER_BYTES}", got=length
        )
    if length > size - 8:
        return MalformedInput(
            "header length is beyond the end of the file", where=where, expected=f"at most {size - 8}", got=length
        )
    return None


def _read_open(fd: int, path: Path, relative: str, budget: HeaderBudget | None) -> ReadFile:
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise MalformedInput(f"shard is {_SPECIAL.get(stat.S_IFMT(info.st_mode), 'no regular file')}", where=path)
    size = info.st_size
    head = _pread(fd, min(size, SNIFF_BYTES), 0, path)
    wrong = _length_problem(head, size, path)
    if wrong is not None:
        raise wrong
    length = int.from_bytes(head[:8], "little")
    if budget is not None and not budget.take(length):
        return ReadFile(file=None, entries=(), data_start=0, problems=())  # told once, for the folder
    text = _pread(fd, length, 8, path)
    header = parse_header(text, str(path))
    problems = list(header.problems)
    expected = 8 + length + header.data_bytes
    if not problems and expected != size:
        what = "file is truncated" if size < expected else "bytes trail after the last tensor"
        problems.append(
            IncompleteInput(what, where=path, expected=f"{expected} bytes", got=f"{size} bytes", hint="download the file again")
        )
    stored = StoredFile(
        path=path, relative=relative, size_bytes=size, mtime_ns=info.st_mtime_ns, inode=info.st_ino,
        metadata=MappingProxyType(header.metadata), header_sha256=hashlib.sha256(head[:8] + text).hexdigest(),
    )  # fmt: skip
    return ReadFile(file=stored, entries=header.entries, data_start=8 + length, problems=tuple(problems))


def open_error(error: OSError, path: Path) -> MxconvError:
    """The error for an `OSError` of opening or reading `path` (not for a missing file)."""
    return reading_failed(error, path, "shard")


def _failed(problem: MxconvError) -> ReadFile:
    return ReadFile(file=None, entries=(), data_start=0, problems=(problem,))


def read_file(folder: Path, root: Path, relative: str, budget: HeaderBudget | None = None) -> ReadFile | None:
    """The header of `folder`/`relative`, problems collected; None when there is no such file; `root` is the real folder.

    `file` is None without a problem when the header is beyond the `budget`, which remembers it.
    """
    path = folder / relative
    try:
        fd = os.open(path, OPEN_FLAGS)
        try:
            check_inside(root, path)
            return _read_open(fd, path, relative, budget)
        finally:
            os.close(fd)
    except FileNotFoundError:
        return _missing(root, path)
    except MxconvError as error:
        return _failed(error)
    except OSError as error:  # a socket cannot even be opened
        special = special_kind(path)
        return _failed(MalformedInput(f"shard is {special}", where=path) if special else open_error(error, path))


def _missing(root: Path, path: Path) -> ReadFile | None:
    # a dangling link that points out of the folder is a way out, not a missing file
    if path.is_symlink():
        try:
            check_inside(root, path)
        except MalformedInput as error:
            return _failed(error)
    return None
