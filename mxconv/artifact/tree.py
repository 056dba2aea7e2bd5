"""One digest for a whole folder: names and contents, not modes, times or run.log."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from mxconv.artifact.names import RUN_LOG_NAME

_CHUNK_BYTES = 4 << 20


def walk(root: Path) -> Iterator[str]:
    """Paths below `root` of everything that is no plain folder, sorted, with forward slashes; links are not followed."""
    found: list[str] = []
    stack = [""]
    while stack:
        folder = stack.pop()
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False):
                    stack.append(path)
                else:
                    found.append(path)
    yield from sorted(found)


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
            kind, content = b"file", _file_digest(full)
        tree.update(os.fsencode(path) + b"\0" + kind + b"\0" + content)
    return tree.hexdigest()


def _file_digest(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb", buffering=0) as file:
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
        return digest.digest()
