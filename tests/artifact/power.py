"""Power loss in a model: what a run did to its disk is logged, and disks that a cut may have left are made from the log.

The model is POSIX at its meanest within reason. Of a file's writes, truncations and reservations since its last fsync or fdatasync
any subset may be missing. Of the names that were made, moved or removed in a folder since its last fsync, a prefix in order has
happened (a journalling filesystem keeps the order of names, it does not keep data before names).
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mxconv.artifact import output, parts, system


@dataclass
class _Inode:
    """A file: its changes in order, as (offset, bytes) or a new size, and how many of them are on the disk."""

    changes: list[tuple[int, bytes] | int] = field(default_factory=list)
    durable: int = 0


@dataclass
class Event:
    """One step of the log; `kind` is change, sync, names or sync-names."""

    kind: str
    inode: int = -1
    change: tuple[int, bytes] | int = 0
    folder: str = ""
    names: tuple[tuple[str, int | None], ...] = ()


class Disk:
    """Logs what the store does below `root` while `recording`, and makes the disks that a cut may leave."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.events: list[Event] = []
        self._fds: dict[int, int] = {}
        self._inodes: dict[int, int] = {}
        self._numbers = itertools.count()

    def stand(self) -> int:
        """Log what lies below `root` already as safely on the disk; the number of events that says it."""
        for path in sorted(path for path in self.root.rglob("*") if path.is_file()):
            inode = self._inode(path)
            self.events += [Event("change", inode, (0, path.read_bytes())), Event("sync", inode)]
            self._name((path, inode))
            self.events.append(Event("sync-names", folder=str(path.parent)))
        return len(self.events)

    def _below(self, path: object) -> bool:
        return str(path).startswith(str(self.root))

    def _inode(self, fd_or_path: int | str | Path) -> int:
        info = os.stat(fd_or_path, follow_symlinks=False) if not isinstance(fd_or_path, int) else os.fstat(fd_or_path)
        if info.st_ino not in self._inodes:
            self._inodes[info.st_ino] = next(self._numbers)
        return self._inodes[info.st_ino]

    def _name(self, *entries: tuple[object, int | None]) -> None:
        """Names change, all in one step; they lie in one folder."""
        names = tuple((os.path.basename(str(path)), inode) for path, inode in entries)
        self.events.append(Event("names", folder=os.path.dirname(str(entries[0][0])), names=names))

    @contextmanager
    def recording(self, patch: pytest.MonkeyPatch) -> Iterator[None]:
        real = {
            name: getattr(os, name)
            for name in ("open", "pwrite", "write", "ftruncate", "fsync", "fdatasync", "link", "unlink", "mkdir")
        }
        real["replace"], real["rename"] = os.replace, os.rename

        def open_(path: object, flags: int, mode: int = 0o777, **more: object) -> int:
            fresh = self._below(path) and flags & os.O_CREAT and not os.path.lexists(str(path))
            fd = real["open"](path, flags, mode, **more)
            if fresh:  # a number that a removed file had is given again, its content is not
                self._inodes.pop(os.fstat(fd).st_ino, None)
            if self._below(path):
                self._fds[fd] = self._inode(fd)
            if fresh:
                self._name((path, self._fds[fd]))
            return fd

        def pwrite(fd: int, data: bytes, offset: int) -> int:
            done = real["pwrite"](fd, data, offset)
            self.events.append(Event("change", self._fds[fd], (offset, bytes(data[:done]))))
            return done

        def write(fd: int, data: bytes) -> int:
            if fd not in self._fds:
                return real["write"](fd, data)
            offset = os.fstat(fd).st_size  # journal, small files and run.log only ever grow
            done = real["write"](fd, data)
            self.events.append(Event("change", self._fds[fd], (offset, bytes(data[:done]))))
            return done

        def ftruncate(fd: int, size: int) -> None:
            real["ftruncate"](fd, size)
            self.events.append(Event("change", self._fds[fd], size))

        def sync(fd: int) -> None:
            path = os.readlink(f"/proc/self/fd/{fd}")
            self.events.append(Event("sync-names", folder=path) if os.path.isdir(path) else Event("sync", self._fds[fd]))

        def link(a: object, b: object, **more: object) -> None:
            real["link"](a, b, **more)
            self._name((b, self._inode(str(b))))

        def unlink(path: object, **more: object) -> None:
            real["unlink"](path, **more)
            self._name((path, None))

        def move(a: object, b: object) -> None:
            real["replace"](a, b)
            self._name((a, None), (b, self._inode(str(b))))

        patch.setattr(parts, "fallocate", lambda fd, size: os.ftruncate(fd, size))
        patch.setattr(parts, "start_writeback", lambda *_: None)
        patch.setattr(output, "exchange", system.exchange)
        for name, wrapped in {
            "open": open_, "pwrite": pwrite, "write": write, "ftruncate": ftruncate, "fsync": sync, "fdatasync": sync, "link": link,
            "unlink": unlink, "replace": move, "rename": move,
        }.items():  # fmt: skip
            patch.setattr(os, name, wrapped)
        yield

    def cut(self, at: int, random_: random.Random, target: Path) -> None:
        """Write to `target` a tree that a power cut after the first `at` events may leave of `root`."""
        inodes: dict[int, _Inode] = {}
        folders: dict[str, dict[str, int | None]] = {}
        pending: dict[str, list[tuple[tuple[str, int | None], ...]]] = {}
        for event in self.events[:at]:
            if event.kind == "change":
                inodes.setdefault(event.inode, _Inode()).changes.append(event.change)
            elif event.kind == "sync":
                inode = inodes.setdefault(event.inode, _Inode())
                inode.durable = len(inode.changes)
            elif event.kind == "names":
                pending.setdefault(event.folder, []).append(event.names)
            else:
                for names in pending.pop(event.folder, []):
                    folders.setdefault(event.folder, {}).update(names)
        for folder, steps in pending.items():
            for names in steps[: random_.randint(0, len(steps))]:
                folders.setdefault(folder, {}).update(names)
        for folder, names in folders.items():
            place = target / os.path.relpath(folder, self.root)
            place.mkdir(parents=True, exist_ok=True)
            for name, number in names.items():
                if number is not None:
                    (place / name).write_bytes(_content(inodes.get(number, _Inode()), random_))


def _content(inode: _Inode, random_: random.Random) -> bytes:
    keep = random_.choice([0.0, 0.5, 1.0])
    content = bytearray()
    for i, change in enumerate(inode.changes):
        if i >= inode.durable and random_.random() >= keep:
            continue
        if isinstance(change, int):
            content = content[:change] + bytes(max(0, change - len(content)))
        else:
            offset, data = change
            content += bytes(max(0, offset + len(data) - len(content)))
            content[offset : offset + len(data)] = data
    return bytes(content)
