"""ArtifactWriter: units in any order, from any thread, into files that appear whole or not at all.

A unit is a list of regions that are computed together. Its data is written first, then its journal line; when the last unit of a
file is committed, the file is hashed, made durable and linked to its final name in the background. A run that dies leaves parts and
a journal. When it is resumed, nothing is believed because it exists: finished files are hashed whole, the regions of other
committed units are hashed one by one, and whatever does not match its journal line is done again.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from itertools import combinations
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np

from mxconv.artifact.disposal import MADE_FIRST
from mxconv.artifact.failpoints import reach
from mxconv.artifact.journal import Journal, put_by_a_run, small_digests
from mxconv.artifact.names import own_paths
from mxconv.artifact.output import Output
from mxconv.artifact.parts import FileHash, Parts, Region
from mxconv.artifact.proof import Proof, prove
from mxconv.artifact.system import sync_directory, writing
from mxconv.artifact.tree import strays
from mxconv.errors import IntegrityError, Listed, MxconvError, OutputConflict, raise_all
from mxconv.placement import PlacedFile
from mxconv.progress import SILENT, Progress
from mxconv.tensors import intersect

FINISHERS = max(2, min(8, (os.cpu_count() or 1) // 4))
"""Files hashed at a time, each at what a core hashes twice; the last ones of all ranks end together, when no worker is left."""
CHECK_SECONDS = 0.2


class ArtifactWriter:
    """Writes the files of one plan into an `Output`; a context manager. Leaving it early keeps everything for a later resume."""

    def __init__(
        self,
        output: Output,
        *,
        files: Sequence[PlacedFile],
        units: Mapping[str, Sequence[Region]],
        others: Collection[str] = (),
        source: Mapping[str, Any] | None = None,
        progress: Progress = SILENT,
    ) -> None:
        """`units` names every unit and its regions; together the regions cover every tensor of `files` exactly once.

        `others` are the paths of all other files of the artifact but its manifest: nothing else may lie in the folder.
        `source` tells one state of the source from another (`Shards.fingerprint`): a run is resumed on the state it began with.
        Raises OutputConflict (another plan, another writer or a foreign file in the folder), IntegrityError (the source changed
        since the run began) and ResourceError (disk full).
        """
        self.output = output
        self.files = tuple(files)
        self.others = frozenset(others)
        self._paths = [*(file.path for file in files), *sorted(self.others)]
        self._units = units
        self._progress = progress
        self._lock = threading.Lock()
        self._hashes: dict[int, FileHash] = {}
        self._finishing: dict[int, Future[None]] = {}
        self._written: dict[int, dict[str, str]] = {number: {} for number in range(len(files))}
        self.parts = Parts(output.work, plan_digest=output.plan_digest, files=self.files)
        check_cover(self.files, units, self.parts)
        self._journal = Journal(output.work, output.plan_digest)
        self._small = small_digests(self._journal.records)
        self._pool = ThreadPoolExecutor(FINISHERS, thread_name_prefix="mxconv-finish")
        try:
            self.refuse_strays()
            self._record_paths()
            self._compare_source(source)
            proof = prove(self._journal.records, self.parts, self.files, units, progress)
            self._start(proof)
        except BaseException:
            self._shut()
            raise

    @property
    def done(self) -> frozenset[str]:
        """Units that are written and committed; right after construction: those that an earlier run proved."""
        with self._lock:
            return frozenset(self._facts)

    @property
    def finished_files(self) -> frozenset[int]:
        """Numbers of the files that stand under their final names: what a worker's own `Parts` must be told."""
        with self._lock:
            return frozenset(self._hashes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._shut()

    def write(self, region: Region, data: memoryview | np.ndarray) -> str:
        """Write the C-contiguous bytes of `region`; their SHA-256 (hex), to be handed to `commit`. Thread-safe.

        Worker processes call `Parts.write` of their own `Parts` instead and send the digest back.
        """
        return self.parts.write(region, data)

    def commit(self, unit: str, *, source_sha256: str, outputs: Sequence[str], facts: Mapping[str, Any] | None = None) -> None:
        """All regions of `unit` are written: record it. `outputs` are their digests in order, `facts` any JSON. Thread-safe.

        Raises IntegrityError when a redone unit differs from what an already finished file holds of it, and whatever went wrong
        while a file was finished in the background.
        """
        regions = self._units[unit]
        if len(regions) != len(outputs):
            raise MxconvError("a unit is committed without all its regions", where=unit, expected=len(regions), got=len(outputs))
        self._raise_failed()
        self._compare_finished(unit, outputs)
        record = {
            "kind": "unit",
            "unit": unit,
            "source_sha256": source_sha256,
            "outputs": list(outputs),
            "facts": dict(facts or {}),
        }
        self._journal.append(record)
        reach("unit-journaled")
        with self._lock:
            self._note_done(unit, outputs, MappingProxyType(dict(facts or {})))

    def facts(self, unit: str) -> Mapping[str, Any]:
        """What a committed unit recorded, in this run or an earlier one."""
        with self._lock:
            return self._facts[unit]

    def finish(self, check: Callable[[], None] = lambda: None) -> Mapping[str, FileHash]:
        """Wait until every file stands under its final name; their hashes by path. MxconvError when a unit was not committed.

        `check` is called several times a second while files are still hashed, and may raise to end the run.
        """
        missing = sorted(self._units.keys() - self._facts.keys())
        if missing:
            raise MxconvError(f"{len(missing)} units were not committed", where=missing[0])
        waiting: set[Future[None]] = set(self._finishing.values())
        while waiting:
            check()
            done, waiting = wait(waiting, timeout=CHECK_SECONDS, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        self._journal.sync()
        return MappingProxyType({self.files[number].path: self._hashes[number] for number in range(len(self.files))})

    def end(self) -> None:
        """The artifact is published: the journal goes."""
        self._journal.remove()
        reach("journal-removed")

    def claim(self, path: str, data: bytes) -> None:
        """Put on record what the small file `path` will hold, so that an overwriting run knows it for mxconv's own.

        Raises OutputConflict when what lies there now was put there by somebody else.
        """
        known = self._small.get(path, frozenset())
        if os.path.lexists(self.output.work / path) and not put_by_a_run(self.output.work / path, known, data):
            self._refuse([path])
        digest = hashlib.sha256(data).hexdigest()
        self._small[path] = known | {digest}
        self._journal.append({"kind": "small", "path": path, "sha256": digest})
        self._journal.sync()

    def refuse_strays(self) -> None:
        """Raise OutputConflict for whatever lies in the folder and is of no run of this plan: `check` would refuse it later."""
        work = self.output.work
        found = strays(work, own_paths(self._paths, self.output.plan_digest))
        if self._journal.whole:  # then a small file that is not on record is not the run's, whatever its name
            found += [path for path in sorted(self.others - MADE_FIRST - self._small.keys()) if os.path.lexists(work / path)]
        self._refuse(found)

    def _refuse(self, found: Sequence[str]) -> None:
        listed = Listed()
        for path in found:
            listed.add(
                OutputConflict, "something that is not of this run lies in the output folder", where=self.output.work / path,
                hint="move it elsewhere, then run the same command again with --resume",
            )  # fmt: skip
        raise_all(listed.problems())

    def _record_paths(self) -> None:
        """Put on record, before any of it is there, what the run will write: so it is known for mxconv's if the run dies."""
        known = {path for record in self._journal.records if record.get("kind") == "files" for path in record["paths"]}
        if not known.issuperset(self._paths):
            self._journal.append({"kind": "files", "paths": self._paths})
            self._journal.sync()

    def _compare_source(self, source: Mapping[str, Any] | None) -> None:
        if source is None:
            return
        began = next((record["source"] for record in self._journal.records if record.get("kind") == "source"), None)
        if began is None:
            self._journal.append({"kind": "source", "source": dict(source)})
            return
        now = json.loads(json.dumps(dict(source)))
        changed = sorted(key for key in began.keys() | now.keys() if began.get(key) != now.get(key))
        if changed:
            raise IntegrityError(
                "the source changed since this run began", where=", ".join(changed[:5]), hint="begin anew with --overwrite"
            )

    def _start(self, proof: Proof) -> None:
        self._facts: dict[str, Mapping[str, Any]] = {}
        self._pending: list[set[str]] = [set() for _ in self.files]
        for unit, regions in self._units.items():
            for region in regions:
                self._pending[region.file].add(unit)
        for number, hashes in proof.files.items():
            self._hashes[number] = hashes
            self.parts.mark_finished(number)
        for number in range(len(self.files)):
            if number not in proof.files:
                self.parts.create(number)
        with writing(self.output.work):
            sync_directory(self.output.work)
        with self._lock:
            for unit, record in proof.units.items():
                self._note_done(unit, record["outputs"], MappingProxyType(dict(record["facts"])))
            for number, pending in enumerate(self._pending):
                if not pending and number not in self._hashes and number not in self._finishing:
                    self._finishing[number] = self._pool.submit(self._finish_file, number)

    def _note_done(self, unit: str, outputs: Sequence[str], facts: Mapping[str, Any]) -> None:
        self._facts[unit] = facts
        for region, digest in zip(self._units[unit], outputs, strict=True):
            if self.parts.covers_tensor(region):
                self._written[region.file][region.tensor] = digest
        for number in {region.file for region in self._units[unit]}:
            self._pending[number].discard(unit)
            if not self._pending[number] and number not in self._hashes and number not in self._finishing:
                self._finishing[number] = self._pool.submit(self._finish_file, number)

    def _finish_file(self, number: int) -> None:
        self._journal.sync()  # what proves a file is on the disk before the file gets its name
        hashes = self.parts.finish(number, self._written[number])
        self._journal.append({"kind": "file", "path": hashes.path, "sha256": hashes.sha256, "tensors": dict(hashes.tensors)})
        reach("file-recorded")
        with self._lock:
            self._hashes[number] = hashes
        self._progress.file_done(hashes.path, hashes.size_bytes)

    def _compare_finished(self, unit: str, outputs: Sequence[str]) -> None:
        for region, digest in zip(self._units[unit], outputs, strict=True):
            with self._lock:
                hashes = self._hashes.get(region.file)
            if hashes is None:
                continue
            stands = hashes.tensors[region.tensor] if self.parts.covers_tensor(region) else self.parts.hash_region(region)
            if stands != digest:
                raise IntegrityError(
                    f"tensor {region.tensor!r} came out otherwise than in the finished file",
                    where=hashes.path,
                    expected=stands,
                    got=digest,
                )

    def _raise_failed(self) -> None:
        for future in list(self._finishing.values()):
            if future.done() and future.exception() is not None:
                future.result()

    def _shut(self) -> None:
        """Stop the background work, make the journal durable, close everything."""
        self.parts.stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        try:
            if os.path.exists(self._journal.path):
                self._journal.sync()
        finally:
            self._journal.close()
            self.parts.close()


def check_cover(files: Sequence[PlacedFile], units: Mapping[str, Sequence[Region]], parts: Parts) -> None:
    """Raise MxconvError unless the regions of all units cover every tensor exactly once (no overlap, no gap)."""
    boxes: dict[tuple[int, str], list[Region]] = {}
    for regions in units.values():
        for region in regions:
            boxes.setdefault((region.file, region.tensor), []).append(region)
    for number, file in enumerate(files):
        for tensor in file.tensors:
            found = boxes.pop((number, tensor.name), [])
            covered = sum(parts.region_bytes(region) for region in found)
            if covered != tensor.size_bytes or _overlap(found):
                raise MxconvError("units do not cover a tensor once", where=tensor.name, expected=tensor.size_bytes, got=covered)
    if boxes:
        raise MxconvError("a unit writes a tensor that no file holds", where=next(iter(boxes))[1])


def _overlap(regions: Sequence[Region]) -> bool:
    """Whether two boxes share an element."""
    return len(regions) > 1 and any(intersect(a.box, b.box) is not None for a, b in combinations(regions, 2))
