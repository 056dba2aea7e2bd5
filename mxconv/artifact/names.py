"""File names of an artifact, finished and in the making."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePath, PurePosixPath
from typing import TypeVar

MANIFEST_NAME = "manifest.json"
JOURNAL_NAME = ".mxconv.journal"
RUN_LOG_NAME = "run.log"
PART_SUFFIX = ".part"
PLAN_CHARS = 16
BUILD_SUFFIX = ".building"
ASIDE_SUFFIX = ".old"

P = TypeVar("P", bound=PurePath)


def part_path(path: P, plan_digest: str) -> P:
    """Where the file that will stand at `path` is built: `.<name>.<plan>.part` beside it."""
    return path.with_name(f".{path.name}.{plan_digest[:PLAN_CHARS]}{PART_SUFFIX}")


def own_paths(files: Iterable[str], plan_digest: str) -> set[str]:
    """`files`, paths of an artifact in the making, and every other name that its run uses; not its manifest."""
    finals = [PurePosixPath(path) for path in (*files, MANIFEST_NAME)]
    parts = {str(part_path(path, plan_digest)) for path in finals}
    return {*map(str, finals[:-1]), *parts, JOURNAL_NAME, RUN_LOG_NAME}


def beside_path(root: Path, plan_digest: str) -> Path:
    """Where the artifact that will replace `root` is built: a hidden sibling on the same filesystem."""
    return root.with_name(f".{root.name}.{plan_digest[:PLAN_CHARS]}{BUILD_SUFFIX}")
