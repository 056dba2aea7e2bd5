"""What becomes of a folder that was replaced: removed where mxconv made all of it, else kept under a name that can be seen.

Nothing is believed because of its name. A manifest must be sealed and list a file before that file is mxconv's; of the small files,
which people edit, the content must still be the listed one. Where there is only a journal, it must name the file. One file that is
not known in this way, and the whole folder is kept. Then the known files are removed, never whatever a folder may hold.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from mxconv.artifact.journal import read_remains
from mxconv.artifact.manifest import FileFact, read_manifest
from mxconv.artifact.names import JOURNAL_NAME, MANIFEST_NAME, RUN_LOG_NAME, own_paths
from mxconv.artifact.system import sync_directory, writing
from mxconv.artifact.tree import ancestors, file_digest, strays
from mxconv.errors import MxconvError
from mxconv.progress import Progress

MADE_FIRST = frozenset(("statistics.json", "calibration.npy"))
"""What a run writes before its journal speaks of small files: told by name."""


def dispose(old: Path, root: Path, progress: Progress) -> None:
    """Remove the folder `old` that `root` replaced; what mxconv did not make is given a visible name instead."""
    with writing(old):
        files = _own_files(old)
        if files is not None and _remove(old, files):
            sync_directory(root.parent)
            return
        kept = _free_name(root)
        os.rename(old, kept)
        sync_directory(root.parent)
    progress.note(f"{kept}: what was there before; not all of it is mxconv's own, and so it was not removed")


def _own_files(folder: Path) -> list[str] | None:
    """The files of `folder`, in the order in which to remove them; None when one of them was not put there by a run.

    What tells that mxconv made the folder comes last, so that after a crash in between the rest can still be told.
    """
    own: set[str] = {RUN_LOG_NAME}
    if os.path.lexists(folder / MANIFEST_NAME):
        try:
            manifest = read_manifest(folder)
        except MxconvError:
            return None
        if not all(_as_written(folder, fact) for fact in manifest.files.values()):
            return None
        own = {MANIFEST_NAME, *own_paths(manifest.files, manifest.plan_digest)}
    elif (remains := read_remains(folder)) is not None:
        own = {JOURNAL_NAME, RUN_LOG_NAME} if remains.plan is None else own_paths(remains.files, remains.plan)
        if not all(_as_put(folder, path, remains.small) for path in remains.files - MADE_FIRST):
            return None
    if strays(folder, own):
        return None
    return sorted((path for path in own if os.path.lexists(folder / path)), key=lambda path: path in (MANIFEST_NAME, JOURNAL_NAME))


def _as_written(folder: Path, fact: FileFact) -> bool:
    """Whether a listed file, if it is there, is a shard, damaged or not, or a small file that nobody edited."""
    path = folder / fact.path
    try:
        info = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    if not stat.S_ISREG(info.st_mode):
        return False
    return bool(fact.tensors) or (info.st_size == fact.size_bytes and file_digest(path).hex() == fact.sha256)


def _as_put(folder: Path, path: str, small: Mapping[str, frozenset[str]]) -> bool:
    """Whether a planned file of an unfinished run, if it is there, is a shard or holds what the run gave it."""
    place = folder / path
    if path.endswith(".safetensors") or not os.path.lexists(place):
        return True
    return not place.is_symlink() and place.is_file() and file_digest(place).hex() in small.get(path, ())


def _remove(folder: Path, files: list[str]) -> bool:
    """Remove `files` and the folders that held them; False when something else came into one meanwhile."""
    for path in files:
        (folder / path).unlink()
    try:
        for inner in sorted(ancestors(files), key=len, reverse=True):
            (folder / inner).rmdir()
        folder.rmdir()
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        return False
    return True


def _free_name(root: Path) -> Path:
    candidates = (root.with_name(f"{root.name}.replaced{f'-{n}' if n else ''}") for n in range(1_000_000))
    return next(path for path in candidates if not os.path.lexists(path))
