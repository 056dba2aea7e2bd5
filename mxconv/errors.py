"""The one exception tree: every failure a user can meet, with the exit code that a pipeline sees.

A message says what is wrong, where, what was expected and what was got, and what to do next; `render` puts the parts
in that order. Names that come out of files pass through `printable`, so that no control character reaches a terminal.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from typing import Any

EXIT_OK = 0
EXIT_BUG = 1
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


def printable(text: object, limit: int = 200) -> str:
    """`text` with control, format and other unprintable characters escaped, cut to `limit` characters."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in str(text))
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


class MxconvError(Exception):
    """A failure with an exit code and the parts of its message."""

    exit_code = EXIT_BUG
    kind = "error"

    def __init__(
        self, what: str, *, where: object = None, expected: object = None, got: object = None, hint: str | None = None
    ) -> None:
        self.what = what
        self.where = None if where is None else printable(where)
        self.expected = None if expected is None else printable(expected)
        self.got = None if got is None else printable(got)
        self.hint = hint
        super().__init__(self.render())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled whole: a failure travels from one process to another."""
        return _remade, (type(self), self.args, dict(self.__dict__))

    def render(self) -> str:
        """One line (two with a hint): `where: what (expected …, got …)`."""
        head = f"{self.where}: {self.what}" if self.where else self.what
        facts = [f"{word} {value}" for word, value in (("expected", self.expected), ("got", self.got)) if value is not None]
        line = f"{head} ({', '.join(facts)})" if facts else head
        return f"{line}\nhint: {self.hint}" if self.hint else line


def _remade(kind: type[MxconvError], args: tuple[Any, ...], fields: dict[str, Any]) -> MxconvError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(fields)
    return error


class UsageError(MxconvError):
    """The request cannot be met as asked: an option, a TP size, a layout that cannot hold this model."""

    exit_code = 2
    kind = "usage"


class MalformedInput(MxconvError):
    """The input is not what it claims to be, contradicts itself, or asks for something not implemented."""

    exit_code = 3
    kind = "malformed input"


class IncompleteInput(MxconvError):
    """A part of the input is missing."""

    exit_code = 4
    kind = "incomplete input"


class OutputConflict(MxconvError):
    """The output place is taken: by another plan, another writer, or a finished artifact."""

    exit_code = 5
    kind = "output conflict"


class ResourceError(MxconvError):
    """Disk, memory or an input/output operation gave out; the run can be resumed."""

    exit_code = 6
    kind = "resource"


class NumericError(MxconvError):
    """NaN, infinity or overflow in the numbers."""

    exit_code = 7
    kind = "numeric"


class IntegrityError(MxconvError):
    """Bytes or results are not what they must be: corruption, a changed source, a failed verification."""

    exit_code = 8
    kind = "integrity"


class Interrupted(MxconvError):
    """SIGINT (130) or SIGTERM (143) ended the run; it can be resumed."""

    kind = "interrupted"

    def __init__(self, what: str, *, exit_code: int = EXIT_SIGINT, hint: str | None = None) -> None:
        super().__init__(what, hint=hint)
        self.exit_code = exit_code


# What a path is, in contrast to what the machine could not do with it.
_WRONG_PATH = (errno.ELOOP, errno.ENXIO, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def reading_failed(error: OSError, where: object, thing: str = "file") -> MxconvError:
    """The error for an `OSError` of opening or reading (not for a missing file): MalformedInput or ResourceError."""
    if error.errno in _WRONG_PATH:
        return MalformedInput(f"{thing} cannot be opened: {error.strerror}", where=where)
    return ResourceError(f"cannot read: {error.strerror}", where=where, hint="check permissions and the disk, then run again")


# Problems of several kinds are reported together; the exit code is the first of these that is present.
PRECEDENCE = (3, 4, 7, 2, 8, 6, 5, 1)


class Problems(MxconvError):
    """Several failures found in one look, all listed; the exit code follows `PRECEDENCE`."""

    kind = "problems"

    def __init__(self, problems: Sequence[MxconvError]) -> None:
        self.problems = tuple(problems)
        codes = {problem.exit_code for problem in self.problems}
        self.exit_code = next((code for code in PRECEDENCE if code in codes), EXIT_BUG)
        super().__init__(f"{len(self.problems)} problems")

    def render(self) -> str:
        """All problems, those of the deciding kind first."""
        first = sorted(self.problems, key=lambda problem: PRECEDENCE.index(problem.exit_code))
        return "\n".join([f"{len(first)} problems:", *(f"  - {problem.render()}".replace("\n", "\n    ") for problem in first)])


MAX_LISTED = 20
MAX_KEPT = 1000


class Listed:
    """Problems as they are found: at most `MAX_LISTED` of a kind are kept, the rest counted, since a file can hold a million."""

    def __init__(self) -> None:
        self._kept: list[MxconvError] = []
        self._counts: dict[tuple[type[MxconvError], str], int] = {}
        self._rest: dict[type[MxconvError], int] = {}

    def add(
        self, problem: type[MxconvError], what: str, name: object = None, *, where: object = None, expected: object = None,
        got: object = None, hint: str | None = None,
    ) -> None:  # fmt: skip
        """One more. `what` is the same for all of a kind; `{}` in it stands for `name`, which is made printable."""
        count = self._counts[problem, what] = self._counts.get((problem, what), 0) + 1
        if count <= MAX_LISTED:
            told = what.replace("{}", printable(name)) if name is not None else what
            self._kept.append(problem(told, where=where, expected=expected, got=got, hint=hint))

    def extend(self, problems: Iterable[MxconvError]) -> None:
        """Problems that were listed before, as those of a file's header."""
        for problem in problems:
            if len(self._kept) < MAX_KEPT:
                self._kept.append(problem)
            else:
                self._rest[type(problem)] = self._rest.get(type(problem), 0) + 1

    def problems(self) -> tuple[MxconvError, ...]:
        """All that are kept, then a line for each kind that had more."""
        more = []
        for (problem, what), count in self._counts.items():
            left = count - MAX_LISTED
            if left > 0:
                more.append(problem(what.replace("{}", f"… and {left} more") if "{}" in what else f"{what}: {left} more"))
        return (*self._kept, *more, *(problem(f"{count} more problems of this kind") for problem, count in self._rest.items()))

    def __bool__(self) -> bool:
        return bool(self._kept)


def raise_all(problems: Iterable[MxconvError]) -> None:
    """Raise nothing, the only problem, or `Problems` of them all."""
    found = list(problems)
    if len(found) == 1:
        raise found[0]
    if found:
        raise Problems(found)
