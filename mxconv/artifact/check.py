"""Integrity alone: an artifact against its manifest, a source checkpoint against its own headers. No model is built."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from mxconv.artifact.facts import fact_problems
from mxconv.artifact.leftovers import leftovers
from mxconv.artifact.manifest import FileFact, Manifest, find_artifact
from mxconv.artifact.names import MANIFEST_NAME, RUN_LOG_NAME
from mxconv.artifact.tree import strays
from mxconv.checkpoint.boxes import ShortRead, fill
from mxconv.checkpoint.files import OPEN_FLAGS, check_inside, read_file
from mxconv.checkpoint.folder import read_shards
from mxconv.config import read_config
from mxconv.errors import IncompleteInput, IntegrityError, Listed, MxconvError, ResourceError, printable, raise_all, reading_failed
from mxconv.progress import SILENT, Progress

CHUNK_BYTES = 4 << 20
WAKE_SECONDS = 0.2


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
    """Whether the manifest is one that a run writes; every file that it lists, hashed in parallel; what it does not list.

    An exception in the calling thread, or one that `progress` raises, ends the hashing within a chunk of each file.
    """
    facts = sorted(manifest.files.values(), key=lambda fact: -fact.size_bytes)
    total = sum(fact.size_bytes for fact in facts)
    look = _Look(root=root, progress=progress)
    progress.start("checking", total)
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        found = [pool.submit(look.at, fact) for fact in facts]
        try:
            while wait(found, timeout=WAKE_SECONDS, return_when=FIRST_EXCEPTION).not_done:
                _raise_failed(found)  # a signal that another thread received is looked at between two waits
            problems = [problem for future in found for problem in future.result()]
        except BaseException:
            look.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    progress.finish()
    left = leftovers(root, manifest)
    extra = strays(root, {*manifest.files, MANIFEST_NAME, RUN_LOG_NAME, *left})
    listed = Listed()
    for path in extra:
        listed.add(IntegrityError, f"{'folder' if path.endswith('/') else 'file'} is not in the manifest", where=root / path)
    return CheckReport(
        root=root, kind="artifact", files=len(facts), tensors=sum(len(fact.tensors) for fact in facts), size_bytes=total,
        sha256=manifest.sha256, problems=(*fact_problems(manifest, str(root / MANIFEST_NAME)), *problems, *listed.problems()),
        notes=tuple(f"{path} is left of a run that was killed at its very end; --resume removes it" for path in left),
    )  # fmt: skip


def _raise_failed(futures: Sequence[Future[list[MxconvError]]]) -> None:
    for future in futures:
        if future.done():
            future.result()


class Stopped(Exception):
    """The check is ending; nobody waits for this file any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """One check of an artifact, told to every thread."""

    root: Path
    progress: Progress
    stop: threading.Event = field(default_factory=threading.Event)

    def at(self, fact: FileFact) -> list[MxconvError]:
        """What is wrong with one file."""
        path = self.root / fact.path
        try:
            check_inside(Path(os.path.realpath(self.root)), path)
            fd = os.open(path, OPEN_FLAGS)
        except FileNotFoundError:
            return [IntegrityError("file of the manifest is missing", where=path)]
        except MxconvError as error:
            return [IntegrityError(error.what, where=path)]
        except OSError as error:
            return [IntegrityError(f"file cannot be opened: {error.strerror}", where=path)]
        try:
            return self._compare(fact, fd, path)
        except ShortRead:
            return [IntegrityError("file became shorter while it was read", where=path)]
        except OSError as error:
            return [ResourceError(f"cannot read: {error.strerror}", where=path)]
        finally:
            os.close(fd)

    def _compare(self, fact: FileFact, fd: int, path: Path) -> list[MxconvError]:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            return [IntegrityError("not a regular file", where=path)]
        if info.st_size != fact.size_bytes:
            what = "file is truncated" if info.st_size < fact.size_bytes else "file has grown"
            return [IntegrityError(what, where=path, expected=f"{fact.size_bytes} bytes", got=f"{info.st_size} bytes")]
        if self._hash(fd, 0, fact.size_bytes, self.progress, fact.path) == fact.sha256:
            return []
        return self._name_damage(fact, fd)

    def _hash(self, fd: int, offset: int, length: int, progress: Progress, item: str) -> str:
        digest = hashlib.sha256()
        buffer = np.empty(min(CHUNK_BYTES, length), dtype=np.uint8)
        for start in range(offset, offset + length, CHUNK_BYTES):
            if self.stop.is_set():
                raise Stopped
            chunk = buffer[: min(CHUNK_BYTES, offset + length - start)]
            fill(fd, chunk, start)
            digest.update(chunk.data)
            progress.advance(len(chunk), item)
        return digest.hexdigest()

    def _name_damage(self, fact: FileFact, fd: int) -> list[MxconvError]:
        """The tensors of a damaged file that are not what the manifest says; the file alone when its header is damaged too."""
        root, path = self.root, self.root / fact.path
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
            if self._hash(fd, read.data_start + entry.begin, entry.end - entry.begin, SILENT, name) != fact.tensors[name].sha256
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
