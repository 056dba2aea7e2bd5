"""A file layer that fails: the system calls of `os` on files below a folder, from the n-th use on or once."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Calls whose first argument is a descriptor or a path.
CALLS = (
    "open", "read", "pread", "preadv", "write", "pwrite", "ftruncate", "fsync", "fdatasync", "fstat", "stat", "lstat", "link",
    "unlink", "replace", "mkdir", "listdir", "scandir",
)  # fmt: skip


class FaultyLayer:
    """Counts the calls on files below `folder`; the `at`-th `name` there fails with `code`, and all later ones when `lasting`."""

    def __init__(self, folder: Path, *, name: str = "", at: int = 0, code: int = 0, lasting: bool = False) -> None:
        self.folder, self.name, self.at, self.code, self.lasting = os.path.realpath(folder), name, at, code, lasting
        self.counts: Counter[str] = Counter()
        self.failed = 0
        self._lock = threading.Lock()
        self._readlink = os.readlink

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Put the layer under every user of `os`."""
        for name in CALLS:
            patch.setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _below(self, subject: Any) -> bool:
        try:
            path = self._readlink(f"/proc/self/fd/{subject}") if isinstance(subject, int) else os.path.abspath(os.fsdecode(subject))
        except (OSError, TypeError):
            return False
        return path == self.folder or path.startswith(self.folder + "/")

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if arguments and self._below(arguments[0]):
                with self._lock:
                    self.counts[name] += 1
                    count = self.counts[name]
                if name == self.name and (count == self.at or (self.lasting and count > self.at)):
                    self.failed += 1
                    raise OSError(self.code, os.strerror(self.code), str(arguments[0]))
            return call(*arguments, **options)

        return wrapped
