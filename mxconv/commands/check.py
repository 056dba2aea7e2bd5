"""`mxconv check`: integrity alone."""

from __future__ import annotations

from dataclasses import replace
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
  mxconv check out --expect 6f9ff1bdf366ef42                        # and it is the artifact that the run reported
  mxconv check out --signature out.sig --public-key release.pub     # and its manifest is signed with this key
"""


@click.command("check", epilog=EPILOG)
@click.argument("folder", type=PATH)
@click.option("--expect", metavar="SHA256", help="The manifest's digest (or its first 16 digits) that this artifact must have.")
@click.option("--signature", type=PATH, metavar="FILE", help="A signature over manifest.json that must hold (model-signing).")
@click.option("--public-key", type=PATH, metavar="FILE", help="The key (PEM) that the signature must come from.")
@click.option("--identity", metavar="NAME", help="For keyless signatures: who must have signed.")
@click.option("--identity-provider", metavar="URL", help="For keyless signatures: who vouches for the identity.")
@options("workers")
def command(
    folder: Path, expect: str | None, signature: Path | None, public_key: Path | None, identity: str | None,
    identity_provider: str | None, **flags: Any,
) -> int:  # fmt: skip
    """Check an artifact against its manifest, byte for byte, or a source checkpoint against its headers and index."""
    with session("check", flags) as (settings, console):
        from mxconv.artifact import check_folder
        from mxconv.artifact.signature import Trust, manifest_problems, parse_digest, verify_signature
        from mxconv.errors import UsageError

        trust = Trust(public_key=public_key, identity=identity, identity_provider=identity_provider)
        if signature is None and trust != Trust():
            raise UsageError("a key or an identity is given, but no --signature")
        digest = None if expect is None else parse_digest(expect)
        if signature is not None:
            verify_signature(folder, signature, trust)
        report = check_folder(folder, workers=settings.workers, progress=console)
        if digest is not None:  # one problem among the others: whose the damage is does not hide what is damaged
            report = replace(report, problems=(*manifest_problems(report.sha256, digest, folder), *report.problems))
        console.document(
            "check",
            {
                "folder": folder, "kind": report.kind, "ok": not report.problems, "files": report.files, "tensors": report.tensors,
                "bytes": report.size_bytes, "manifest_sha256": report.sha256,
                "signed_by": (identity or public_key) if signature is not None else None, "notes": report.notes,
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
        if signature is not None:
            console.line(f"ok   signature: {signature} holds for the manifest, by {identity or public_key}")
        return 0
