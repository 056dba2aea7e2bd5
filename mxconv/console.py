"""The one sink: everything that mxconv says goes through a `Console`.

Data goes to stdout, chatter (progress, notes, warnings, errors) to stderr. What is drawn depends on who reads:

    a terminal       colours (never alone: ok, warn and FAIL are words) and a live bar on stderr
    a pipe, a log    the same text plain, a line a finished file or half minute, never cut to a width
    a machine        `--json`: one document on stdout for a report; for a run (`stream=True`) JSON lines, one an event

NO_COLOR, TERM=dumb and CI are honoured. rich is imported only when something is drawn live. All text passes through
`errors.printable`, so that no control character of a file's names reaches a terminal.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO

from mxconv import draw
from mxconv.documents import dumps, error_payload, stamped
from mxconv.draw import Column
from mxconv.errors import MxconvError, ResourceError, printable
from mxconv.meter import Counter, EventMeter, LiveMeter, PlainMeter
from mxconv.progress import Progress

STYLES = {"ok": "32", "FAIL": "1;31", "warn": "33", "title": "1", "hint": "36", "error": "1;31", "note": "2"}
DUMB = ("", "dumb")
STATUS_WORD = re.compile(r"\b(ok|FAIL|warn)\b")


class Console(Progress):
    """Where a command speaks. Thread-safe; a reader that went away (a closed pipe) ends no job.

    `json`: data as JSON; `stream`: this command is a run, so `json` means JSON lines. `quiet`: errors, warnings and data
    only. `verbose`: 1 adds details, 2 the debug lines of the libraries. `progress=False`: no progress of any kind.
    """

    def __init__(
        self, *, json: bool = False, stream: bool = False, quiet: bool = False, verbose: int = 0, progress: bool = True,
        stdout: TextIO | None = None, stderr: TextIO | None = None, environ: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.json, self.stream, self.quiet, self.verbose = json, json and stream, quiet, 0 if quiet else verbose
        self._stdout, self._stderr = stdout or sys.stdout, stderr or sys.stderr
        self._environ = os.environ if environ is None else environ
        self._lock = threading.RLock()
        self._documented = False
        self._broken: set[int] = set()
        self.live = _live_terminal(self._stderr, self._environ) and not (self.stream and _is_terminal(self._stdout))
        self._meters = self._choose_meters(progress and not quiet)

    def _choose_meters(self, wanted: bool) -> list[Counter]:
        meters: list[Counter] = [EventMeter(self._event)] if self.stream else []
        if wanted and self.live:
            color, ascii_only = self._color(self._stderr), not self._is_unicode(self._stderr)
            meters.append(LiveMeter(self._stderr, self._chat, color=color, ascii_only=ascii_only))
        elif wanted and not (self.stream and _is_terminal(self._stdout)):
            meters.append(PlainMeter(self._chat))
        return meters

    # Data, on stdout. In JSON mode a command sends `document` instead and the rest is silent.

    def line(self, text: str = "") -> None:
        """One line of a report; the words ok, warn and FAIL are coloured on a terminal."""
        if not self.json:
            self._out(self._painted(_clean(text), self._stdout) + "\n")

    def title(self, text: str) -> None:
        """The heading of what follows."""
        if not self.json:
            self._out(self._paint(_clean(text), "title", self._stdout) + "\n")

    def table(self, title: str | None, columns: Sequence[str | Column], rows: Sequence[Sequence[object]]) -> None:
        """Aligned rows under a title; a `Column` may lean right; headings are left out when all are empty."""
        if title:
            self.title(title)
        made = [Column(_clean(column)) if isinstance(column, str) else column for column in columns]
        for line in draw.table(made, [[_clean(cell) for cell in row] for row in rows]):
            self.line(line)

    def values(self, title: str | None, pairs: Mapping[str, object]) -> None:
        """Name and value, a line each."""
        self.table(title, ("", ""), list(pairs.items()))

    def chart(self, title: str | None, labels: Sequence[str], values: Sequence[float], *, limit: float | None = None) -> None:
        """A horizontal bar for each value (a layer's error); with a limit, those above it say FAIL."""
        if self.json:
            return
        if title:
            self.title(title)
        names, ascii_only = [_clean(label) for label in labels], not self._is_unicode(self._stdout)
        for line in draw.bar_chart(names, values, limit=limit, ascii_only=ascii_only):
            self.line(line)

    def sparkline(self, label: str, values: Sequence[float], *, top: float | None = None) -> None:
        """One line: label, a character a value, and the largest value."""
        if values:
            drawn = draw.sparkline(values, top=top, ascii_only=not self._is_unicode(self._stdout))
            self.line(f"  {label}  {drawn}  max {max(values):.3g}")

    def fragment(self, text: str) -> None:
        """A piece of generated text, without a line end, at once. Control characters but newline and tab are escaped."""
        if not self.json:
            self._out("".join(c if c in "\n\t" else printable(c) for c in text))

    def document(self, kind: str, payload: Mapping[str, Any]) -> None:
        """The JSON result of a command: `payload` under `schema: mxconv.<kind>`, `version`. Silent unless `json`.

        A report prints one document and no second one; a run prints it as its `result` event.
        """
        if not self.json:
            return
        if self.stream:
            self._event("result", stamped(kind, payload))
        elif not self._documented:
            self._documented = True
            self._out(dumps(stamped(kind, payload), indent=2) + "\n")

    # Chatter, on stderr.

    def note(self, line: str) -> None:
        """Something worth knowing; silent with `quiet`."""
        self._said("note", line)
        if not self.quiet:
            self._chat(f"{self._paint('note:', 'note', self._stderr)} {_clean(line)}")

    def warn(self, line: str) -> None:
        """Something that may be a mistake; never silent."""
        self._said("warning", line)
        self._chat(f"{self._paint('warning:', 'warn', self._stderr)} {_clean(line)}")

    def detail(self, line: str, level: int = 1) -> None:
        """What only `-v` (or, at level 2, `-vv`) wants to know."""
        if self.verbose >= level:
            self._chat(_clean(line))

    def error(self, error: MxconvError) -> None:
        """Say a failure on stderr: `error: where: what (expected …, got …)`, then `hint:`; in JSON mode a document as well."""
        self.close()
        head, *rest = (_clean(line) for line in error.render().split("\n"))
        painted = [line.replace("hint:", self._paint("hint:", "hint", self._stderr), 1) for line in rest]
        self._chat("\n".join([f"{self._paint('error:', 'error', self._stderr)} {head}", *painted]))
        if self.stream:
            self._event("error", stamped("error", error_payload(error)))
        else:
            self.document("error", error_payload(error))

    def mute(self) -> None:
        """Say nothing any more, of any kind: another process speaks."""
        self.close()
        self._meters = []
        self._broken |= {id(self._stdout), id(self._stderr)}

    def close(self) -> None:
        """Take down what is drawn live and end a running phase without a summary; the console can still speak."""
        for meter in self._meters:
            meter.cancel()

    def __enter__(self) -> Console:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def logging_handler(self) -> logging.Handler:
        """A handler that brings the package's `logging` records here: warnings always, info with -v, debug with -vv."""
        return _LogHandler(self)

    # Progress, from any thread.

    def start(self, title: str, total_bytes: int) -> None:
        """A phase begins."""
        for meter in self._meters:
            meter.start(title, total_bytes)

    def advance(self, amount_bytes: int, item: str = "") -> None:
        """More bytes of the phase are done."""
        for meter in self._meters:
            meter.advance(amount_bytes, item)

    def file_done(self, path: str, size_bytes: int) -> None:
        """A file stands under its final name."""
        for meter in self._meters:
            meter.file_done(path, size_bytes)

    def finish(self) -> None:
        """The phase is over."""
        for meter in self._meters:
            meter.finish()

    # Writing.

    def _said(self, event: str, line: str) -> None:
        if self.stream:
            self._event(event, {"text": line})

    def _event(self, event: str, fields: Mapping[str, Any]) -> None:
        self._out(dumps({"event": event, **fields}) + "\n")

    def _chat(self, text: str) -> None:
        self._write(self._stderr, text + "\n")

    def _out(self, text: str) -> None:
        self._write(self._stdout, text)

    def _write(self, stream: TextIO, text: str) -> None:
        """Write and flush; a closed pipe is remembered and skipped, another failure of stdout is ResourceError (6)."""
        with self._lock:
            if id(stream) in self._broken:
                return
            live = [meter for meter in self._meters if isinstance(meter, LiveMeter)] if _is_terminal(stream) else []
            for meter in live:
                meter.pause()
            try:
                stream.write(draw.encodable(text, getattr(stream, "encoding", None)))
                stream.flush()
            except (OSError, ValueError) as error:
                self._broken.add(id(stream))
                _discard(stream)
                if stream is self._stdout and isinstance(error, OSError) and error.errno != errno.EPIPE:
                    raise ResourceError(f"standard output cannot be written: {error.strerror}") from None
            for meter in live:
                meter.resume()

    def _color(self, stream: TextIO) -> bool:
        return _is_terminal(stream) and not self._environ.get("NO_COLOR") and self._environ.get("TERM", "") not in DUMB

    def _is_unicode(self, stream: TextIO) -> bool:
        sample = draw.EIGHTHS + draw.LEVELS
        return draw.encodable(sample, getattr(stream, "encoding", None)) == sample

    def _paint(self, text: str, style: str, stream: TextIO) -> str:
        return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if self._color(stream) else text

    def _painted(self, text: str, stream: TextIO) -> str:
        return STATUS_WORD.sub(lambda word: self._paint(word[0], word[0], stream), text)


class _LogHandler(logging.Handler):
    """Log records as chatter."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            self.console.warn(text)
        else:
            self.console.detail(text, 1 if record.levelno >= logging.INFO else 2)


def _clean(text: object) -> str:
    """`text` without control characters and whole: lines are never cut."""
    return printable(text, sys.maxsize)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def _live_terminal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """A terminal that can be redrawn and that a person watches."""
    return _is_terminal(stream) and environ.get("TERM", "") not in DUMB and not environ.get("CI")


def _discard(stream: TextIO) -> None:
    """Point a broken standard stream at nothing, so that the interpreter's own flush at exit does not fail again."""
    if stream in (sys.__stdout__, sys.__stderr__):
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError):
            return
