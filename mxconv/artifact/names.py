"""File names of an artifact, finished and in the making."""

from __future__ import annotations

from pathlib import Path

MANIFEST_NAME = "manifest.json"
JOURNAL_NAME = ".mxconv.journal"
RUN_LOG_NAME = "run.log"
PART_SUFFIX = ".part"
PLAN_CHARS = 16


def part_path(path: Path, plan_digest: str) -> Path:
    """Where the file that will stand at `path` is built: `.<name>.<plan>.part` beside it."""
    return path.with_name(f".{path.name}.{plan_digest[:PLAN_CHARS]}{PART_SUFFIX}")


def beside_path(root: Path, plan_digest: str) -> Path:
    """Where the artifact that will replace `root` is built: a hidden sibling on the same filesystem."""
    return root.with_name(f".{root.name}.{plan_digest[:PLAN_CHARS]}.building")
