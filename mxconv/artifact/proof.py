"""What a resumed run may believe: files and units whose bytes on the disk match the journal of the run before."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mxconv.artifact.journal import Record
from mxconv.artifact.parts import FileHash, Parts, Region
from mxconv.artifact.system import writing
from mxconv.checkpoint.boxes import ShortRead
from mxconv.errors import IntegrityError
from mxconv.placement import PlacedFile
from mxconv.progress import Progress

MAX_WORKERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """Finished files (by number) with their hashes, and units (by name) with their journal records."""

    files: Mapping[int, FileHash]
    units: Mapping[str, Record]


def prove(
    records: Sequence[Record], parts: Parts, files: Sequence[PlacedFile], units: Mapping[str, Sequence[Region]], progress: Progress
) -> Proof:
    """Hash what the journal lists, in parallel. A file under its final name that cannot be proven goes back into the making."""
    claimed = {record["unit"]: record for record in records if _is_claim(record, units)}
    recorded = {record["path"]: record for record in records if record.get("kind") == "file"}
    standing = [number for number in range(len(files)) if os.path.lexists(parts.final(number))]
    if not standing and not claimed:
        return Proof(files={}, units={})
    total = sum(files[number].size_bytes for number in standing)
    total += sum(parts.region_bytes(r) for unit in claimed for r in units[unit] if r.file not in standing)
    progress.start("checking what an earlier run wrote", total)
    with ThreadPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1)) as pool:
        hashed = pool.map(lambda number: _prove_file(number, parts, recorded.get(files[number].path), progress), standing)
        proven = {number: hashes for number, hashes in zip(standing, hashed, strict=True) if hashes is not None}
        for number in standing:
            if number in proven:
                parts.mark_finished(number)
                with writing(parts.part(number)):
                    parts.part(number).unlink(missing_ok=True)
            else:
                progress.note(f"{files[number].path}: does not match its journal and is checked piece by piece")
                parts.demote(number)
        kept = pool.map(lambda unit: _prove_unit(units[unit], claimed[unit]["outputs"], parts, proven, progress), claimed)
        done = {unit: claimed[unit] for unit, good in zip(list(claimed), kept, strict=True) if good}
    progress.finish()
    if len(done) < len(claimed):
        progress.note(f"{len(claimed) - len(done)} units are not on the disk as their journal says and are done again")
    return Proof(files=proven, units=done)


def _is_claim(record: Record, units: Mapping[str, Sequence[Region]]) -> bool:
    """Whether a record is of a unit of this plan, with one digest a region."""
    unit, outputs, facts = record.get("unit"), record.get("outputs"), record.get("facts")
    known = record.get("kind") == "unit" and isinstance(unit, str) and unit in units
    return known and isinstance(outputs, list) and isinstance(facts, dict) and len(outputs) == len(units[str(unit)])


def _prove_file(number: int, parts: Parts, record: Mapping[str, Any] | None, progress: Progress) -> FileHash | None:
    if record is None:
        return None
    try:
        hashes = parts.hash_final(number, lambda amount: progress.advance(amount, parts.final(number).name))
    except (OSError, IntegrityError):
        return None
    return hashes if hashes.sha256 == record.get("sha256") and dict(hashes.tensors) == record.get("tensors") else None


def _hash_on_disk(parts: Parts, region: Region) -> str | None:
    with writing(parts.part(region.file)):
        try:
            return parts.hash_region(region)
        except (FileNotFoundError, ShortRead):
            return None


def _prove_unit(
    regions: Sequence[Region], outputs: Sequence[str], parts: Parts, proven: Mapping[int, FileHash], progress: Progress
) -> bool:
    for region, digest in zip(regions, outputs, strict=True):
        known = proven.get(region.file)
        if known is not None and parts.covers_tensor(region):
            if known.tensors[region.tensor] != digest:
                return False
            continue
        if _hash_on_disk(parts, region) != digest:
            return False
        if known is None:
            progress.advance(parts.region_bytes(region), region.tensor)
    return True
