"""A bounded set of open files that threads share."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MAX_OPEN_FILES = 64


class _OpenFile:
    __slots__ = ("fd", "users")

    def __init__(self, fd: int) -> None:
        self.fd, self.users = fd, 0


class Descriptors:
    """Descriptors by file number: opened when first needed, the longest unused closed beyond `max_open`; thread-safe.

    A descriptor that a thread is using is never closed, so more than `max_open` may be open while more threads than that work.
    """

    def __init__(self, open_file: Callable[[int], int], *, max_open: int = MAX_OPEN_FILES) -> None:
        self._open_file = open_file
        self._max_open = max_open
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def use(self, number: int) -> Iterator[int]:
        """The descriptor of file `number`, kept open for the block."""
        with self._lock:
            entry = self._open.get(number)
            if entry is None:
                entry = self._open[number] = _OpenFile(self._open_file(number))
            self._open.move_to_end(number)
            entry.users += 1
            self._evict(self._max_open)
        try:
            yield entry.fd
        finally:
            with self._lock:
                entry.users -= 1

    def close(self) -> None:
        """Close every file that no thread is using."""
        with self._lock:
            self._evict(0)

    def forget(self, number: int) -> None:
        """Close file `number` if it is open and unused: its name will not be written again."""
        with self._lock:
            entry = self._open.get(number)
            if entry is not None and entry.users == 0:
                os.close(self._open.pop(number).fd)

    def _evict(self, keep: int) -> None:
        for number in list(self._open):
            if len(self._open) <= keep:
                return
            if self._open[number].users == 0:
                os.close(self._open.pop(number).fd)
