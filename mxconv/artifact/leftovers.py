"""What runs that were killed leave behind in and beside a folder where nothing is wrong otherwise."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from mxconv.artifact.journal import read_remains
from mxconv.artifact.manifest import Manifest
from mxconv.artifact.names import ASIDE_SUFFIX, BUILD_SUFFIX, JOURNAL_NAME, MANIFEST_NAME, PLAN_CHARS, part_path
from mxconv.errors import MxconvError
from mxconv.jsonfiles import read_regular


def leftovers(folder: Path, manifest: Manifest) -> list[str]:
    """What a run that died after its manifest may leave in a finished artifact: the manifest's part, and last its journal.

    The one must be the manifest again and the other a journal of this plan: anything else under these names is no leftover.
    """
    part = str(part_path(PurePosixPath(MANIFEST_NAME), manifest.plan_digest))
    found = [part] if _same(folder / part, folder / MANIFEST_NAME) else []
    remains = read_remains(folder)
    if remains is not None and remains.whole and remains.plan in (None, manifest.plan_digest):
        found.append(JOURNAL_NAME)
    return found


def _same(a: Path, b: Path) -> bool:
    try:
        return not a.is_symlink() and read_regular(a) == read_regular(b)
    except MxconvError:
        return False


def other_builds(root: Path, plan_digest: str) -> list[Path]:
    """Hidden folders beside `root` in which runs with --overwrite and another plan were interrupted."""
    suffixes = f"({re.escape(BUILD_SUFFIX)}|{re.escape(ASIDE_SUFFIX)})"
    pattern = re.compile(rf"{re.escape(f'.{root.name}.')}(?P<plan>[0-9a-f]{{{PLAN_CHARS}}}){suffixes}")
    try:
        names = sorted(os.listdir(root.parent))
    except OSError:
        return []
    matches = ((name, pattern.fullmatch(name)) for name in names)
    return [root.parent / name for name, match in matches if match and match["plan"] != plan_digest[:PLAN_CHARS]]
