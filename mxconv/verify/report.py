"""The report: sections in order, as a table for people, a document for machines, a JUnit file for CI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mxconv.errors import EXIT_OK, IntegrityError
from mxconv.verify.findings import Finding, Section
from mxconv.verify.junit import to_junit
from mxconv.verify.metrics import METRICS_VERSION

MAX_SHOWN = 20


class Sink(Protocol):
    """What `render` needs of `mxconv.console.Console`."""

    def line(self, text: str = "") -> None:
        """One line."""
        ...

    def table(self, title: str | None, columns: Sequence[Any], rows: Sequence[Sequence[object]]) -> None:
        """Aligned rows."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that one verification found. `ok`: no section failed; skipped ones are for the reader to judge."""

    artifact: Path
    source: Path | None
    scheme: str | None
    layout: str
    tp: int
    sections: tuple[Section, ...]
    limits: Mapping[str, float]
    processes: int = 1
    """How many computed it together."""
    metrics_version: int = METRICS_VERSION

    @property
    def ok(self) -> bool:
        """No section failed."""
        return all(section.status != "FAIL" for section in self.sections)

    @property
    def exit_code(self) -> int:
        """0, or 8 when a section failed."""
        return EXIT_OK if self.ok else IntegrityError.exit_code

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Of all sections."""
        return tuple(finding for section in self.sections for finding in section.findings)

    def section(self, name: str) -> Section:
        """The section `name`; KeyError when there is none."""
        return {section.name: section for section in self.sections}[name]

    def document(self) -> dict[str, Any]:
        """JSON values, for `Console.document("verify", …)`."""
        return {
            "ok": self.ok, "artifact": str(self.artifact), "source": None if self.source is None else str(self.source),
            "scheme": self.scheme, "layout": self.layout, "tp": self.tp, "processes": self.processes,
            "metrics_version": self.metrics_version, "limits": dict(self.limits),
            "sections": {section.name: section.document() for section in self.sections},
        }  # fmt: skip

    def junit(self) -> bytes:
        """UTF-8 XML; a failed check is a failure of its own."""
        return to_junit(self.sections, f"mxconv verify {self.artifact.name}")

    def render(self, console: Sink, *, details: bool = True) -> None:
        """The table, then, with `details`, each section's lines; warnings and findings always."""
        rows = [
            (section.name, section.summary, section.status, f"limit {section.limit}" if section.limit else "")
            for section in self.sections
        ]
        console.table(None, ("", "", "", ""), rows)
        for section in self.sections:
            body = [*(section.lines if details else ()), *(f"warn: {text}" for text in section.warnings)]
            shown = [f"FAIL {finding.render()}" for finding in section.findings[:MAX_SHOWN]]
            if len(section.findings) > MAX_SHOWN:
                shown.append(f"… and {len(section.findings) - MAX_SHOWN} more findings (--json has all)")
            if body or shown:
                console.line()
                console.line(section.name)
                for text in (*body, *shown):
                    console.line(f"  {text}")
