"""Strict readers of setting values, from text (a flag, a variable) or from a TOML value. Each raises `Rejected` or returns."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", re.ASCII)
# K, M, G … without an i are binary too, as for dd, ulimit and JVM flags; kB, MB, GB are decimal.
SIZE_FACTORS: Mapping[str, int] = MappingProxyType(
    {"": 1, "b": 1}
    | {unit + ending: 1024**power for power, unit in enumerate("kmgtp", 1) for ending in ("", "i", "ib")}
    | {unit + "b": 1000**power for power, unit in enumerate("kmgtp", 1)}
)
DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?", re.ASCII)
WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", re.ASCII)
TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class Rejected(ValueError):
    """A value that cannot be: what was expected and what was got."""

    def __init__(self, expected: str, got: object) -> None:
        super().__init__(f"expected {expected}, got {got!r}")
        self.expected, self.got = expected, repr(got)


def _whole(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,18}", value.strip(), re.ASCII):
        return int(value)
    return None


def integer(minimum: int) -> Callable[[Any], int]:
    """A reader of whole numbers of at least `minimum`."""

    def parse(value: Any) -> int:
        number = _whole(value)
        if number is None or number < minimum:
            raise Rejected(f"a whole number of at least {minimum}", value)
        return number

    return parse


def integer_of(allowed: Iterable[int]) -> Callable[[Any], int]:
    """A reader of one of some whole numbers."""
    numbers = tuple(allowed)

    def parse(value: Any) -> int:
        number = _whole(value)
        if number not in numbers or number is None:
            raise Rejected(" or ".join(map(str, numbers)), value)
        return number

    return parse


def choice(allowed: Iterable[str]) -> Callable[[Any], str]:
    """A reader of one of some names; a near miss is named."""
    names = tuple(allowed)

    def parse(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            near = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
            raise Rejected(f"{' or '.join(names)}{f' (did you mean {near[0]}?)' if near else ''}", value)
        return value

    return parse


def word(value: Any) -> str:
    """A plain name."""
    if not isinstance(value, str) or not WORD.fullmatch(value):
        raise Rejected("a name", value)
    return value


def words(value: Any) -> tuple[str, ...]:
    """Patterns: a list, or a text with spaces between them."""
    parts = value.split() if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else [None]
    if not all(isinstance(part, str) and part.strip() for part in parts):
        raise Rejected("a list of patterns, or a text of them with spaces between", value)
    return tuple(parts)


def group_size(value: Any) -> int | Literal["channel"]:
    """A multiple of 128, or `channel`."""
    if value == "channel":
        return "channel"
    number = _whole(value)
    if number is None or number <= 0 or number % 128:
        raise Rejected("a multiple of 128, or channel", value)
    return number


def device(value: Any) -> str:
    """`cpu`, `cuda`, `cuda:N`."""
    if not isinstance(value, str) or not DEVICE.fullmatch(value):
        raise Rejected("cpu, cuda or cuda:N", value)
    return value


def size(value: Any) -> int:
    """Bytes: a whole number, or text such as 2GiB, 1.5G, 512M, 800MB (GB and MB decimal, all others binary)."""
    expected = "bytes above 0, as 1073741824, 1GiB, 512M or 800MB"
    number = value if isinstance(value, int) and not isinstance(value, bool) else None
    if isinstance(value, str) and (match := SIZE.fullmatch(value.strip())):
        amount, unit = match.groups()
        factor = SIZE_FACTORS.get(unit.lower())
        if factor is not None and len(amount) <= 20 and (factor > 1 or "." not in amount):
            number = int(amount) * factor if "." not in amount else int(float(amount) * factor)
    if number is None or not 0 < number < 1 << 60:
        raise Rejected(expected, value)
    return number


def path(value: Any) -> Path:
    """A path; `~` is the home folder."""
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value or "\0" in value:
        raise Rejected("a path", value)
    return Path(value).expanduser()


def flag(value: Any) -> bool:
    """True or false, as a TOML value or one of 1 true yes on / 0 false no off."""
    text = value.lower() if isinstance(value, str) else None
    if isinstance(value, bool):
        return value
    if text not in TRUE + FALSE:
        raise Rejected("true or false", value)
    return text in TRUE


def limits(value: Any) -> Mapping[str, float]:
    """Named limits: a table, or NAME=NUMBER texts (a list, or one text with spaces between)."""
    expected = "NAME=NUMBER with a finite number of at least 0"
    pairs = value.items() if isinstance(value, Mapping) else [part.partition("=")[::2] for part in words(value)]
    found: dict[str, float] = {}
    for name, stated in pairs:
        number = _finite(stated)
        if number is None or number < 0 or not isinstance(name, str) or not WORD.fullmatch(name):
            raise Rejected(expected, f"{name}={stated}")
        found[name] = number
    return MappingProxyType(found)


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
