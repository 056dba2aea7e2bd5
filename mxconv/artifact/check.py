"""Integrity alone: an artifact against its manifest, a source checkpoint against its own headers. No model is built."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mxconv.artifact.manifest import FileFact, Manifest, find_artifact
from mxconv.artifact.names import MANIFEST_NAME, RUN_LOG_NAME
from mxconv.artifact.output import leftovers
from mxconv.artifact.tree import walk
from mxconv.checkpoint.boxes import ShortRead, fill
from mxconv.checkpoint.files import OPEN_FLAGS, check_inside, read_file
from mxconv.checkpoint.folder import read_shards
from mxconv.config import read_config
from mxconv.errors import IncompleteInput, IntegrityError, MxconvError, ResourceError, printable, raise_all, reading_failed
from mxconv.progress import SILENT, Progress

CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What was looked at and everything that is wrong with it; `sha256` is the manifest's digest for an artifact."""

    root: Path
    kind: Literal["artifact", "checkpoint"]
    files: int
    tensors: int
    size_bytes: int
    sha256: str | None
    problems: tuple[MxconvError, ...]
    notes: tuple[str, ...]

    def require(self) -> None:
        """Raise all problems, if there are any."""
        raise_all(self.problems)


def check_folder(root: Path, *, workers: int | None = None, progress: Progress = SILENT) -> CheckReport:
    """Check the artifact or source checkpoint in `root`.

    Raises IncompleteInput for an artifact that was never finished and IntegrityError for a manifest that was changed; everything
    else that is wrong is in the report.
    """
    manifest = find_artifact(root)
    return check_source(root) if manifest is None else check_artifact(root, manifest, workers=workers, progress=progress)


def check_source(root: Path) -> CheckReport:
    """Headers, index and config of a source checkpoint; its weights carry no hashes to check."""
    shards = read_shards(root)
    problems = list(shards.problems)
    try:
        shards.require()
        read_config(root)
    except MxconvError as error:
        problems = problems or [error]
    sizes = sum(file.size_bytes for file in shards.files)
    note = "a source checkpoint has no manifest: its headers were checked, not its weights"
    return CheckReport(
        root=root, kind="checkpoint", files=len(shards.files), tensors=len(shards.tensors), size_bytes=sizes, sha256=None,
        problems=tuple(problems), notes=(*shards.notes, note),
    )  # fmt: skip


def check_artifact(root: Path, manifest: Manifest, *, workers: int | None = None, progress: Progress = SILENT) -> CheckReport:
    """Every file that the manifest lists, hashed in parallel; files that it does not list."""
    facts = sorted(manifest.files.values(), key=lambda fact: -fact.size_bytes)
    total = sum(fact.size_bytes for fact in facts)
    progress.start("checking", total)
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        found = list(pool.map(lambda fact: _check_file(root, fact, progress), facts))
    progress.finish()
    left = leftovers(root, manifest.plan_digest)
    strays = set(walk(root)) - manifest.files.keys() - {MANIFEST_NAME, RUN_LOG_NAME, *left}
    problems = [problem for group in found for problem in group]
    problems += [IntegrityError("file is not in the manifest", where=root / path) for path in sorted(strays)]
    return CheckReport(
        root=root, kind="artifact", files=len(facts), tensors=sum(len(fact.tensors) for fact in facts), size_bytes=total,
        sha256=manifest.sha256, problems=tuple(problems),
        notes=tuple(f"{path} is left of a run that was killed at its very end; --resume removes it" for path in left),
    )  # fmt: skip


def _check_file(root: Path, fact: FileFact, progress: Progress) -> list[MxconvError]:
    path = root / fact.path
    try:
        check_inside(Path(os.path.realpath(root)), path)
        fd = os.open(path, OPEN_FLAGS)
    except FileNotFoundError:
        return [IntegrityError("file of the manifest is missing", where=path)]
    except MxconvError as error:
        return [IntegrityError(error.what, where=path)]
    except OSError as error:
        return [IntegrityError(f"file cannot be opened: {error.strerror}", where=path)]
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            return [IntegrityError("not a regular file", where=path)]
        if info.st_size != fact.size_bytes:
            what = "file is truncated" if info.st_size < fact.size_bytes else "file has grown"
            return [IntegrityError(what, where=path, expected=f"{fact.size_bytes} bytes", got=f"{info.st_size} bytes")]
        if _hash(fd, 0, fact.size_bytes, progress, fact.path) == fact.sha256:
            return []
        return _name_damage(root, fact, fd)
    except ShortRead:
        return [IntegrityError("file became shorter while it was read", where=path)]
    except OSError as error:
        return [ResourceError(f"cannot read: {error.strerror}", where=path)]
    finally:
        os.close(fd)


def _hash(fd: int, offset: int, length: int, progress: Progress, item: str) -> str:
    digest = hashlib.sha256()
    buffer = np.empty(min(CHUNK_BYTES, length), dtype=np.uint8)
    for start in range(offset, offset + length, CHUNK_BYTES):
        chunk = buffer[: min(CHUNK_BYTES, offset + length - start)]
        fill(fd, chunk, start)
        digest.update(chunk.data)
        progress.advance(len(chunk), item)
    return digest.hexdigest()


def _name_damage(root: Path, fact: FileFact, fd: int) -> list[MxconvError]:
    """The tensors of a damaged file that are not what the manifest says; the file alone when its header is damaged too."""
    path = root / fact.path
    if not fact.tensors:
        return [IntegrityError("content was changed", where=path, expected=f"sha256 {fact.sha256}")]
    read = read_file(root, Path(os.path.realpath(root)), fact.path)
    stored = {} if read is None or read.problems else {entry.name: entry for entry in read.entries}
    as_planned = all(
        name in stored and (stored[name].dtype, stored[name].shape) == (tensor.dtype, tensor.shape)
        for name, tensor in fact.tensors.items()
    )
    if read is None or not as_planned or len(stored) != len(fact.tensors):
        return [IntegrityError("header was changed", where=path, expected=f"sha256 {fact.sha256}")]
    damaged = [
        name
        for name, entry in stored.items()
        if _hash(fd, read.data_start + entry.begin, entry.end - entry.begin, SILENT, name) != fact.tensors[name].sha256
    ]
    return _damage(path, damaged) or [IntegrityError("header was changed", where=path, expected=f"sha256 {fact.sha256}")]


def _damage(path: Path, names: Iterable[str]) -> list[MxconvError]:
    return [IntegrityError(f"tensor {printable(repr(name))} was changed", where=path) for name in names]


def missing_files(root: Path, manifest: Manifest) -> list[MxconvError]:
    """Files of the manifest that are absent or of another size: the look that a reader can afford before it loads."""
    problems: list[MxconvError] = []
    for fact in manifest.files.values():
        path = root / fact.path
        try:
            size = os.stat(path).st_size
        except (FileNotFoundError, NotADirectoryError):
            problems.append(IncompleteInput("file of the manifest is missing", where=path))
            continue
        except OSError as error:
            problems.append(reading_failed(error, path))
            continue
        if size != fact.size_bytes:
            problems.append(
                IntegrityError("file has another size than the manifest says", where=path, expected=fact.size_bytes, got=size)
            )
    return problems
