"""The journal of a run: one JSON line a record, each with the CRC-32 of its own canonical text.

    {"crc32": "89abcdef", "record": {"kind": "unit", "unit": "layers.0.experts.3", "source_sha256": "…", "outputs": ["…"], …}}

The first record names format and plan, the second ("files") every path that the run will write, so that what lies in the folder of
a dead run can be told from what somebody else put there. Reading stops at the first line that is torn, damaged or out of place, and
the file is cut there: what follows a damaged line proves nothing. Only the process that holds the lock writes it.
"""

from __future__ import annotations

import json
import os
import threading
import time
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxconv.artifact.failpoints import reach
from mxconv.artifact.names import JOURNAL_NAME
from mxconv.artifact.system import sync_directory, try_lock, writing
from mxconv.artifact.tree import file_digest
from mxconv.checkpoint.folder import path_problem
from mxconv.errors import MalformedInput, MxconvError, OutputConflict
from mxconv.jsonfiles import read_regular

FORMAT = "mxconv-journal/1"
SYNC_SECONDS = 1.0
MAX_BYTES = 1 << 30

_BEGINNING = b'{"crc32":"'

Record = Mapping[str, Any]


def _canonical(record: Record) -> str:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)


def encode_line(record: Record) -> bytes:
    """One line of the journal; canonical, so that equal records are equal bytes."""
    text = _canonical(record)
    return b'{"crc32":"%08x","record":%s}\n' % (zlib.crc32(text.encode()), text.encode())


def decode_line(line: bytes) -> Record | None:
    """The record of a whole line, None when it is torn or damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
        record = value["record"]
        return record if isinstance(record, dict) and encode_line(record) == line else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def read_records(data: bytes) -> tuple[list[Record], int]:
    """Records up to the first bad line, and the bytes that they take."""
    records: list[Record] = []
    position = 0
    for line in data.splitlines(keepends=True):
        record = decode_line(line)
        if record is None:
            break
        records.append(record)
        position += len(line)
    return records, position


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """What the journal that a run left behind says of it: its plan, and the `files` that it set out to write.

    `plan` is None when the first line is not whole: the run died before it wrote anything else.
    """

    plan: str | None
    files: frozenset[str]
    small: Mapping[str, frozenset[str]]
    """SHA-256 (hex) of what the run put, or was about to put, at the path of a small file."""
    whole: bool
    """No line is torn or damaged."""


def read_remains(folder: Path) -> Remains | None:
    """The journal that lies in `folder`, None when there is none that mxconv can have written."""
    path = folder / JOURNAL_NAME
    try:
        data = b"" if path.is_symlink() else read_regular(path, MAX_BYTES)
    except MxconvError:
        return None
    records, good = read_records(data)
    first: Record = records[0] if records else {}
    plan = first.get("plan") if first.get("kind") == "plan" and first.get("format") == FORMAT else None
    if not isinstance(plan, str):
        torn = not records and not path.is_symlink() and data[: len(_BEGINNING)] == _BEGINNING[: len(data)]
        return Remains(plan=None, files=frozenset(), small={}, whole=not data) if torn else None
    named = [record.get("paths") for record in records if record.get("kind") == "files"]
    files = frozenset(path for paths in named if isinstance(paths, list) for path in paths if path_problem(path) is None)
    return Remains(plan=plan, files=files, small=small_digests(records), whole=good == len(data))


def small_digests(records: Iterable[Record]) -> dict[str, frozenset[str]]:
    """Path of each small file on record → the SHA-256 (hex) of all that a run gave it."""
    found: dict[str, frozenset[str]] = {}
    for record in records:
        if record.get("kind") == "small":
            path = str(record.get("path"))
            found[path] = found.get(path, frozenset()) | {str(record.get("sha256"))}
    return found


def put_by_a_run(place: Path, known: Collection[str], data: bytes) -> bool:
    """Whether the file `place` holds what is on record, or `data` as far as it goes: a disk that lied may have lost its end."""
    if place.is_symlink() or not place.is_file():
        return False
    return file_digest(place).hex() in known or (place.stat().st_size <= len(data) and data.startswith(place.read_bytes()))


def held(folder: Path) -> bool:
    """Whether a run at work holds the journal of `folder`: what tells where folders cannot be locked."""
    try:
        fd = os.open(folder / JOURNAL_NAME, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return try_lock(fd) is False
    finally:
        os.close(fd)


class Journal:
    """The open, locked journal of one output folder; `append` may be called from any thread."""

    def __init__(self, folder: Path, plan_digest: str) -> None:
        """Open or create the journal of `folder`.

        Raises OutputConflict when another process holds it or when it belongs to another plan.
        """
        self.path = folder / JOURNAL_NAME
        self._lock = threading.Lock()
        self._synced = time.monotonic()
        self.whole = True
        """Nothing had to be cut off: all that a run put on record is known."""
        with writing(self.path):
            self._fd = os.open(
                self.path, os.O_RDWR | os.O_APPEND | os.O_NONBLOCK | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666
            )
        try:
            self.records = self._open(plan_digest)
        except BaseException:
            os.close(self._fd)
            raise

    def _open(self, plan_digest: str) -> list[Record]:
        if try_lock(self._fd) is False:
            raise busy(self.path.parent)
        info = os.fstat(self._fd)
        if info.st_nlink == 0:
            raise busy(self.path.parent)
        if info.st_size > MAX_BYTES:
            raise MalformedInput("journal is too large to be one", where=self.path, got=f"{info.st_size} bytes")
        data = b"".join(iter(lambda: os.read(self._fd, 1 << 20), b""))
        records, good = read_records(data)
        self.whole = good == len(data)
        if records and (records[0].get("kind") != "plan" or records[0].get("format") != FORMAT):
            raise OutputConflict("the journal is of another version of mxconv", where=self.path, expected=FORMAT)
        if records and records[0].get("plan") != plan_digest:
            raise OutputConflict(
                "the folder holds an unfinished run of another plan", where=self.path.parent,
                expected=f"plan {plan_digest}", got=f"plan {records[0].get('plan')}",
                hint="repeat that run's settings with --resume, replace it with --overwrite, or choose another folder",
            )  # fmt: skip
        with writing(self.path):
            os.ftruncate(self._fd, good)
            if not records:
                self._write(encode_line({"kind": "plan", "format": FORMAT, "plan": plan_digest}))
                os.fsync(self._fd)
                sync_directory(self.path.parent)
        reach("journal-created")
        return records[1:]

    def append(self, record: Record) -> None:
        """Write one record; it is on the disk after at most `SYNC_SECONDS` of further records, or after `sync`."""
        line = encode_line(record)
        with self._lock, writing(self.path):
            self._write(line)
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self._sync()

    def sync(self) -> None:
        """Make every record durable."""
        with self._lock, writing(self.path):
            self._sync()

    def remove(self) -> None:
        """The run is over and published: the journal goes, durably."""
        with writing(self.path):
            os.unlink(self.path)
            sync_directory(self.path.parent)

    def close(self) -> None:
        """Close, and so unlock."""
        os.close(self._fd)

    def _write(self, line: bytes) -> None:
        # a short write (disk full) leaves a torn line; it is cut off so that a later record does not follow it
        end = os.fstat(self._fd).st_size
        try:
            done = 0
            while done < len(line):
                done += os.write(self._fd, line[done:])
        except OSError:
            os.ftruncate(self._fd, end)
            raise

    def _sync(self) -> None:
        os.fdatasync(self._fd)
        self._synced = time.monotonic()


def busy(folder: Path) -> OutputConflict:
    """The error of a second writer."""
    return OutputConflict("another run is writing into this folder", where=folder, hint="wait for it, or choose another folder")
