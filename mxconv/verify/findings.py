"""What verification found: a finding names one thing that is wrong, a section gathers one kind of looking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mxconv.errors import MxconvError, Problems, printable

Status = Literal["ok", "FAIL", "skipped"]
SECTIONS = ("structure", "numerics", "parallel", "logits")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong, down to tensor and rank, or file, or config key."""

    check: str
    """What was looked at, a few words: `weight`, `weight scale`, `config`, `kl_mean` …"""
    what: str
    file: str | None = None
    tensor: str | None = None
    """Name (or names, for a fused weight) in the artifact's files."""
    rank: int | None = None
    key: str | None = None
    """config.json key."""
    place: str | None = None
    """Rows and columns, a block, a layer."""
    expected: str | None = None
    got: str | None = None

    @property
    def where(self) -> str:
        """`rank 1: model.layers.0… rows 0-127`; empty for the artifact as a whole."""
        parts = [None if self.rank is None else f"rank {self.rank}", self.file, self.tensor, self.key, self.place]
        return " · ".join(printable(part) for part in parts if part)

    def render(self) -> str:
        """One line."""
        stated = (("expected", self.expected), ("got", self.got))
        facts = [f"{word} {printable(value)}" for word, value in stated if value is not None]
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head} ({', '.join(facts)})" if facts else head

    def document(self) -> dict[str, Any]:
        """The fields that are set."""
        names = ("check", "what", "file", "tensor", "rank", "key", "place", "expected", "got")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def from_error(error: MxconvError, check: str) -> list[Finding]:
    """An error met on the way as findings, one a problem."""
    problems: Sequence[MxconvError] = error.problems if isinstance(error, Problems) else (error,)
    return [Finding(check=check, what=p.what, file=p.where, expected=p.expected, got=p.got) for p in problems]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """The outcome of one kind of looking. `summary` and `limit` are its line in the table, `lines` what stands below it."""

    name: str
    status: Status
    summary: str
    limit: str = ""
    lines: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """What a person should know and that fails nothing."""
    findings: tuple[Finding, ...] = ()
    checks: tuple[str, ...] = ()
    """Everything that was looked at; a finding's `check` is one of them or a new word."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def document(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "status": self.status, "summary": self.summary, "limit": self.limit, "seconds": round(self.seconds, 3),
            "lines": list(self.lines), "warnings": list(self.warnings), "checks": list(self.checks),
            "findings": [finding.document() for finding in self.findings], "figures": dict(self.figures),
        }  # fmt: skip


def skipped(name: str, reason: str) -> Section:
    """A section that could not be looked at, and why."""
    return Section(name=name, status="skipped", summary=reason)


def status_of(findings: Sequence[Finding]) -> Status:
    """`FAIL` when something was found."""
    return "FAIL" if findings else "ok"
