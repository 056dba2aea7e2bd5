"""One digest for a whole folder: names and contents, not modes, times or run.log."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from mxconv.artifact.names import RUN_LOG_NAME

_CHUNK_BYTES = 4 << 20


def walk(root: Path) -> Iterator[str]:
    """Paths below `root` of everything that is no plain folder, sorted, with forward slashes; links are not followed."""
    yield from sorted(_look(root)[0])


def strays(root: Path, listed: Collection[str]) -> list[str]:
    """Sorted paths below `root` that are neither `listed` files nor folders on the way to one.

    A folder is named, with a slash, when nothing in it is named: one that holds no file but should not be there.
    """
    files, folders = _look(root)
    wanted, held = ancestors(listed), ancestors(files)
    bare = {folder for folder in folders if folder not in wanted and folder not in held}
    found = {path for path in files if path not in listed}
    if RUN_LOG_NAME in files and not stat.S_ISREG(os.lstat(root / RUN_LOG_NAME).st_mode):
        found.add(RUN_LOG_NAME)  # a log that is a link or a pipe is none of a run's
    return sorted(found | {f"{folder}/" for folder in bare if folder.rpartition("/")[0] not in bare})


def ancestors(paths: Collection[str]) -> set[str]:
    """Every folder, below the root, on the way to one of `paths`."""
    found: set[str] = set()
    for path in paths:
        while (path := path.rpartition("/")[0]) and path not in found:
            found.add(path)
    return found


def _look(root: Path) -> tuple[list[str], list[str]]:
    """Paths of what is no plain folder, and of the plain folders."""
    found: list[str] = []
    folders: list[str] = []
    stack = [""]
    while stack:
        folder = stack.pop()
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False):
                    stack.append(path)
                    folders.append(path)
                else:
                    found.append(path)
    return found, folders


def tree_digest(root: Path) -> str:
    """SHA-256 (hex) over the sorted (path, kind, SHA-256 of the content or link target) of all files but the root's run.log."""
    tree = hashlib.sha256()
    for path in walk(root):
        if path == RUN_LOG_NAME:
            continue
        full = os.path.join(root, path)
        if os.path.islink(full):
            kind, content = b"link", hashlib.sha256(os.fsencode(os.readlink(full))).digest()
        else:
            kind, content = b"file", file_digest(full)
        tree.update(os.fsencode(path) + b"\0" + kind + b"\0" + content)
    return tree.hexdigest()


def file_digest(path: str | Path) -> bytes:
    """SHA-256 of a file's content."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb", buffering=0) as file:
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
        return digest.digest()
