"""How a run ends before its time: SIGINT, SIGTERM or the failure of a worker, told to every thread."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mxconv.errors import EXIT_SIGINT, EXIT_SIGTERM, Interrupted
from mxconv.progress import Progress


class Stop:
    """Why the run must end, told to every worker: a signal, or the failure of one of them."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.signal: int | None = None

    def set(self, number: int | None = None) -> None:
        """End the run."""
        self.signal = number if number is not None else self.signal
        self._event.set()

    def check(self) -> None:
        """Raise Interrupted when the run is to end."""
        if self._event.is_set():
            raise self.interrupted()

    def interrupted(self) -> Interrupted:
        """The error that says so, with the exit code of the signal."""
        name = "SIGTERM" if self.signal == signal.SIGTERM else "interrupt"
        code = EXIT_SIGTERM if self.signal == signal.SIGTERM else EXIT_SIGINT
        return Interrupted(
            f"stopped by {name}; what is done is kept", exit_code=code, hint="run the same command with --resume to go on"
        )


class Watched(Progress):
    """A run's progress that ends the run at the next step once `stop` says so: hashing what stands can take as long as a run."""

    def __init__(self, progress: Progress, stop: Stop) -> None:
        self._progress, self._stop = progress, stop

    def start(self, title: str, total_bytes: int) -> None:
        """A phase begins."""
        self._progress.start(title, total_bytes)

    def advance(self, amount_bytes: int, item: str = "") -> None:
        """More is done. Raises Interrupted when the run is to end."""
        self._stop.check()
        self._progress.advance(amount_bytes, item)

    def file_done(self, path: str, size_bytes: int) -> None:
        """A file stands under its final name."""
        self._progress.file_done(path, size_bytes)

    def note(self, line: str) -> None:
        """Something worth knowing."""
        self._progress.note(line)

    def finish(self) -> None:
        """The phase is over."""
        self._progress.finish()


@contextmanager
def catching_signals(stop: Stop) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop` while the block runs; a second one ends the process as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: object) -> None:
        stop.set(number)
        signal.signal(number, before[number] if callable(before[number]) else signal.SIG_DFL)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
