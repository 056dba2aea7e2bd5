"""What long jobs tell about themselves; this base class keeps silent, `console.py` draws it."""

from __future__ import annotations


class Progress:
    """A sink for the progress of one job; every method may be called from any thread."""

    def start(self, title: str, total_bytes: int) -> None:
        """A phase begins that will move `total_bytes` (0 when that is unknown)."""

    def advance(self, amount_bytes: int, item: str = "") -> None:
        """`amount_bytes` more are done; `item` is what is being worked on (a layer, a tensor, a file)."""

    def file_done(self, path: str, size_bytes: int) -> None:
        """A file stands under its final name."""

    def note(self, line: str) -> None:
        """Something a person should know that is no error."""

    def finish(self) -> None:
        """The phase is over."""


SILENT = Progress()
