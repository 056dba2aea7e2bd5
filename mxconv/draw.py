"""Text without a sink: sizes, counts, durations, columns, bars. Pure functions; `console.py` writes what they return.

Sizes are binary (GiB = 2³⁰ bytes), rates decimal (GB/s = 10⁹ bytes a second), as `df -h` and the hardware's data sheets say
them. Widths are in terminal cells: a wide East Asian character takes two, a combining mark none.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

SIZE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
RATE_UNITS = ("B/s", "kB/s", "MB/s", "GB/s", "TB/s")
COUNT_UNITS = ("", "k", "M", "B", "T")

EIGHTHS = " ▏▎▍▌▋▊▉█"
LEVELS = "▁▂▃▄▅▆▇█"
ASCII_LEVELS = "_.:-=+*#"

# What a stream that cannot encode our typography gets instead; the rest is escaped.
ASCII_TWINS = str.maketrans(
    {"·": "-", "→": "->", "…": "...", "×": "x", "–": "-", "—": "-", "≤": "<=", "≥": ">=", "±": "+-", "Δ": "d", "█": "#"}
    | dict.fromkeys(EIGHTHS[1:8], "#")
    | dict(zip(LEVELS[:-1], ASCII_LEVELS[:-1], strict=True))
)


@dataclass(frozen=True, slots=True)
class Column:
    """A table column: its heading and the side its cells lean to."""

    heading: str = ""
    align: Literal["left", "right"] = "left"


def _scaled(value: float, step: int, units: Sequence[str]) -> str:
    power = 0
    # 999.95 would print as 1000.0: it belongs to the next unit already
    while power + 1 < len(units) and abs(value) >= step - (0.05 if power else 0.5):
        value /= step
        power += 1
    number = f"{value:.0f}" if power == 0 else f"{value:.1f}"
    return f"{number} {units[power]}".rstrip()


def size(count_bytes: float) -> str:
    """`849.6 GiB`, `512 B`."""
    return _scaled(count_bytes, 1024, SIZE_UNITS)


def rate(bytes_per_second: float) -> str:
    """`1.2 GB/s`."""
    return _scaled(bytes_per_second, 1000, RATE_UNITS)


def count(number: int) -> str:
    """`8,243` below a million, then `15.7 M`, `456.1 B`."""
    return f"{number:,}" if abs(number) < 1_000_000 else _scaled(number, 1000, COUNT_UNITS)


def plural(number: int, noun: str) -> str:
    """`1 file`, `1,464 files`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def duration(seconds: float) -> str:
    """`0.4 s`, `42 s`, `3 min 05 s`, `2 h 07 min`; `?` when not finite."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def cells(text: str) -> int:
    """Terminal cells that `text` takes."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) != 0 for c in text)


def pad(text: str, width: int, align: str = "left") -> str:
    """`text` filled with spaces to `width` cells, never cut."""
    fill = " " * max(0, width - cells(text))
    return fill + text if align == "right" else text + fill


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]], indent: int = 2) -> list[str]:
    """Aligned lines, the headings first unless all are empty; no line is cut and none ends in spaces."""
    body = [list(row) for row in rows]
    lines = [[column.heading for column in columns], *body] if any(column.heading for column in columns) else body
    widths = [max(map(cells, texts)) for texts in zip(*lines, strict=True)]
    return [
        " " * indent + "  ".join(pad(cell, w, c.align) for cell, w, c in zip(line, widths, columns, strict=True)).rstrip()
        for line in lines
    ]


def bar(value: float, top: float, width: int, *, ascii_only: bool = False) -> str:
    """A horizontal bar of `value` out of `top`, at most `width` cells; a positive value is never invisible."""
    if not math.isfinite(value):
        return "!" * width
    share = min(1.0, max(0.0, value / top)) if top > 0 else 0.0
    if ascii_only:
        return "#" * max(round(share * width), int(share > 0))
    eighths = max(round(share * width * 8), int(share > 0))
    return "█" * (eighths // 8) + (EIGHTHS[eighths % 8] if eighths % 8 else "")


def sparkline(values: Sequence[float], *, top: float | None = None, ascii_only: bool = False) -> str:
    """One character a value, from 0 to `top` (default: the largest); `!` for a value that is not finite."""
    levels = ASCII_LEVELS if ascii_only else LEVELS
    finite = [value for value in values if math.isfinite(value)]
    ceiling = top if top is not None else max(finite, default=0.0)

    def level(value: float) -> str:
        if not math.isfinite(value):
            return "!"
        share = min(1.0, max(0.0, value / ceiling)) if ceiling > 0 else 0.0
        return levels[min(len(levels) - 1, int(share * len(levels)))]

    return "".join(level(value) for value in values)


def bar_chart(
    labels: Sequence[str], values: Sequence[float], *, limit: float | None = None, width: int = 40, ascii_only: bool = False
) -> list[str]:
    """A labelled bar a value with its number; with a `limit`, bars are drawn against it and one above it says `FAIL`."""
    finite = [value for value in values if math.isfinite(value)]
    top = max([*finite, limit or 0.0], default=0.0)
    label_width = max(map(cells, labels), default=0)
    lines = []
    for label, value in zip(labels, values, strict=True):
        drawn = pad(bar(value, top, width, ascii_only=ascii_only), width)
        over = limit is not None and not value <= limit
        lines.append(f"  {pad(label, label_width)}  {drawn}  {value:.3g}{'  FAIL' if over else ''}")
    return lines


def encodable(text: str, encoding: str | None) -> str:
    """`text` as a stream of `encoding` can write it: unchanged, or with ASCII twins and escapes for what it lacks."""
    try:
        text.encode(encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return text.translate(ASCII_TWINS).encode("ascii", "backslashreplace").decode("ascii")
    return text
