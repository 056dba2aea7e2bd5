"""`mxconv check`: integrity alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mxconv.commands.common import PATH, options, session
from mxconv.documents import error_payload
from mxconv.draw import size

EPILOG = """\b
Examples:
  mxconv check out            # every file and tensor against manifest.json
  mxconv check MiniMax-M1     # headers, index and sizes of a source checkpoint
"""


@click.command("check", epilog=EPILOG)
@click.argument("folder", type=PATH)
@options("workers")
def command(folder: Path, **flags: Any) -> int:
    """Check an artifact against its manifest, byte for byte, or a source checkpoint against its headers and index."""
    with session("check", flags) as (settings, console):
        from mxconv.artifact import check_folder

        report = check_folder(folder, workers=settings.workers, progress=console)
        console.document(
            "check",
            {
                "folder": folder, "kind": report.kind, "ok": not report.problems, "files": report.files, "tensors": report.tensors,
                "bytes": report.size_bytes, "manifest_sha256": report.sha256, "notes": report.notes,
                "problems": [error_payload(problem)["problems"][0] for problem in report.problems],
            },
        )  # fmt: skip
        for note in report.notes:
            console.note(note)
        report.require()
        proof = (
            "every byte matches the manifest"
            if report.kind == "artifact"
            else "headers, index and config agree (no hashes to check)"
        )
        console.line(f"ok   {report.kind}: {report.tensors:,} tensors in {report.files} files, {size(report.size_bytes)}: {proof}")
        return 0
