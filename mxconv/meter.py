"""Meters: how the progress of a running phase is shown. `console.py` chooses one.

`LiveMeter` draws a bar on a terminal (rich, imported only then); `PlainMeter` writes a line a finished file and one every
half minute, for pipes and logs; `EventMeter` writes JSON objects for machines. All are thread-safe.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from mxconv import draw
from mxconv.errors import printable
from mxconv.progress import Progress

if TYPE_CHECKING:
    import rich.progress

HEARTBEAT_SECONDS = 30.0
EVENT_SECONDS = 1.0


class Counter(Progress):
    """What every meter knows of the current phase; the base of all of them, showing nothing itself.

    Speed is the mean over the phase: it is what the estimate of the time left should use, and it does not jump.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.lock = threading.RLock()
        self.clock = clock
        self.title, self.item = "", ""
        self.active = False
        self.total_bytes = self.done_bytes = self.files = 0
        self.began = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the phase began."""
        return max(self.clock() - self.began, 1e-9)

    @property
    def bytes_per_second(self) -> float:
        """Mean speed of the phase."""
        return self.done_bytes / self.seconds

    @property
    def seconds_left(self) -> float | None:
        """Estimate of what is left; None while nothing can be said."""
        if not self.total_bytes or not self.done_bytes:
            return None
        return max(self.total_bytes - self.done_bytes, 0) / self.bytes_per_second

    def start(self, title: str, total_bytes: int) -> None:
        """A phase begins; one that still runs is finished first."""
        if self.active:
            self.finish()
        with self.lock:
            self.title, self.item, self.active = printable(title), "", True
            self.total_bytes, self.done_bytes, self.files = total_bytes, 0, 0
            self.began = self.clock()

    def advance(self, amount_bytes: int, item: str = "") -> None:
        """Count `amount_bytes`; `item` is what is worked on."""
        with self.lock:
            self.done_bytes += amount_bytes
            if item:
                self.item = printable(item)

    def file_done(self, path: str, size_bytes: int) -> None:
        """Count a finished file."""
        with self.lock:
            self.files += 1

    def finish(self) -> None:
        """The phase is over."""
        with self.lock:
            self.active = False

    def cancel(self) -> None:
        """The phase ends without a word (an error follows)."""
        with self.lock:
            self.active = False

    def summary(self) -> str:
        """`quantize: 13.2 MiB in 0.4 s, 33.1 MB/s, 6 files`."""
        files = f", {self.files:,} file{'s' * (self.files != 1)}" if self.files else ""
        moved = f"{draw.size(self.done_bytes)} in {draw.duration(self.seconds)}, {draw.rate(self.bytes_per_second)}"
        return f"{self.title}: {moved if self.done_bytes else draw.duration(self.seconds)}{files}"


class PlainMeter(Counter):
    """A line for each finished file, and one when `interval` seconds pass without any; never cut to a width."""

    def __init__(
        self, write: Callable[[str], None], *, interval: float = HEARTBEAT_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(clock)
        self.write, self.interval = write, interval
        self.spoke = 0.0
        self.stop = threading.Event()

    def start(self, title: str, total_bytes: int) -> None:
        """Begin, and keep a thread that speaks when nothing else does (a slow disk must not look like a dead job)."""
        super().start(title, total_bytes)
        self.spoke = self.began
        self.stop = threading.Event()
        threading.Thread(target=self._beat, args=(self.stop,), name="mxconv-progress", daemon=True).start()

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(min(self.interval / 4, 1.0)):
            with self.lock:
                due = self.active and self.clock() - self.spoke >= self.interval
                if due:
                    self._say(f"{self.title}: {self._position()}{f', {self.item}' if self.item else ''}")

    def _say(self, line: str) -> None:
        self.spoke = self.clock()
        self.write(line)

    def _position(self) -> str:
        if not self.total_bytes and not self.done_bytes:  # a phase that is not about bytes
            return draw.duration(self.seconds)
        if not self.total_bytes:
            return f"{draw.size(self.done_bytes)}, {draw.rate(self.bytes_per_second)}"
        left = self.seconds_left
        share = min(100, 100 * self.done_bytes // self.total_bytes)
        eta = f", {draw.duration(left)} left" if left is not None else ""
        return f"{draw.size(self.done_bytes)} of {draw.size(self.total_bytes)} ({share} %), {draw.rate(self.bytes_per_second)}{eta}"

    def file_done(self, path: str, size_bytes: int) -> None:
        """One line: the file, its size, and how far the phase is."""
        with self.lock:
            super().file_done(path, size_bytes)
            self._say(f"{self.title}: wrote {printable(path, 4096)}, {draw.size(size_bytes)}; {self._position()}")

    def finish(self) -> None:
        """Stop the thread and say what the phase took."""
        with self.lock:
            said = self.active
            self.cancel()
            if said:
                self._say(self.summary())

    def cancel(self) -> None:
        """Stop the thread."""
        with self.lock:
            super().cancel()
            self.stop.set()


class EventMeter(Counter):
    """JSON objects: `start`, `progress` (at most one a second), `file`, `finish`."""

    def __init__(self, emit: Callable[[str, dict[str, Any]], None], clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self.emit = emit
        self.spoke = 0.0

    def start(self, title: str, total_bytes: int) -> None:
        """Emit `start`."""
        super().start(title, total_bytes)
        with self.lock:
            self.spoke = self.began
            self.emit("start", {"phase": self.title, "total_bytes": total_bytes})

    def advance(self, amount_bytes: int, item: str = "") -> None:
        """Emit `progress` when the last event is a second old."""
        with self.lock:
            super().advance(amount_bytes, item)
            if self.clock() - self.spoke >= EVENT_SECONDS:
                self.spoke = self.clock()
                self.emit("progress", self._state() | {"item": self.item})

    def file_done(self, path: str, size_bytes: int) -> None:
        """Emit `file`."""
        with self.lock:
            super().file_done(path, size_bytes)
            self.emit("file", {"phase": self.title, "path": path, "size_bytes": size_bytes})

    def finish(self) -> None:
        """Emit `finish`."""
        with self.lock:
            if self.active:
                super().finish()
                self.emit("finish", self._state() | {"files": self.files})

    def _state(self) -> dict[str, Any]:
        return {
            "phase": self.title, "done_bytes": self.done_bytes, "total_bytes": self.total_bytes, "seconds": round(self.seconds, 3)
        }  # fmt: skip


class LiveMeter(Counter):
    """A live line on a terminal: title, bar, bytes, speed, time left, what is worked on. It leaves one summary line."""

    def __init__(
        self, stream: TextIO, write: Callable[[str], None], *, color: bool, ascii_only: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        super().__init__(clock)
        self.stream, self.write, self.color, self.ascii_only = stream, write, color, ascii_only
        self.bars: rich.progress.Progress | None = None

    def _open(self) -> rich.progress.Progress:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, Task
        from rich.table import Column
        from rich.text import Text

        class Words(ProgressColumn):
            """One of our own texts, cut at the terminal's edge by rich."""

            def __init__(self, words: Callable[[], str], *, cut_last: bool = True) -> None:
                super().__init__(Column(no_wrap=cut_last))
                self.words = words

            def render(self, task: Task) -> Text:
                return Text(self.words(), no_wrap=True, overflow="ellipsis")

        terminal = Console(
            file=self.stream, force_terminal=True, no_color=not self.color, legacy_windows=False, highlight=False, markup=False,
            emoji=False, safe_box=self.ascii_only,
        )  # fmt: skip
        title, numbers, item = Words(lambda: self.title), Words(self._numbers), Words(lambda: self.item, cut_last=False)
        bars = Progress(
            title, BarColumn(bar_width=24), numbers, item,
            console=terminal, transient=True, refresh_per_second=8, redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        bars.add_task("", total=self.total_bytes or None, completed=self.done_bytes)
        return bars

    def _numbers(self) -> str:
        moved = draw.size(self.done_bytes) if self.done_bytes or self.total_bytes else ""  # a phase may be about no bytes
        moved += f"/{draw.size(self.total_bytes)}" if self.total_bytes else ""
        left = self.seconds_left
        eta = f"  {draw.duration(left)} left" if left is not None else ""
        return f"{moved}  {draw.rate(self.bytes_per_second)}{eta}"

    def start(self, title: str, total_bytes: int) -> None:
        """Begin drawing."""
        super().start(title, total_bytes)
        self.resume()

    def advance(self, amount_bytes: int, item: str = "") -> None:
        """Move the bar; rich redraws on its own clock."""
        with self.lock:
            super().advance(amount_bytes, item)
            if self.bars is not None:
                self.bars.update(self.bars.task_ids[0], completed=self.done_bytes)

    def finish(self) -> None:
        """Take the bar away and leave the summary."""
        if not self.active:
            return
        self.cancel()
        self.write(self.summary())

    def cancel(self) -> None:
        """Take the bar away and leave nothing."""
        super().cancel()
        self.pause()

    def pause(self) -> None:
        """Take the bar away, to leave the terminal to other output."""
        with self.lock:
            bars, self.bars = self.bars, None
        if bars is not None:  # outside the lock: rich joins its refresh thread, which may be asking us for text
            bars.stop()

    def resume(self) -> None:
        """Bring the bar back while the phase is active."""
        with self.lock:
            if not self.active or self.bars is not None:
                return
            self.bars = self._open()
            self.bars.start()
