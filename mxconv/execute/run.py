"""Running a plan: units on worker threads, outputs through the writer, the artifact published at the end.

torch and the input/output calls release the interpreter lock, so that workers are threads: none can outlive the process, and
the memory budget is one number. One torch thread a worker: threads inside an operation on small blocks make it slower.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mxconv.artifact import ArtifactWriter, Manifest, Output, Region, append_run_log, check_artifact, open_output, publish
from mxconv.artifact.system import writing
from mxconv.calibrate import Statistics
from mxconv.errors import Interrupted, ResourceError
from mxconv.execute.checking import run_check_decay, run_check_tied, run_decay
from mxconv.execute.copying import run_copy
from mxconv.execute.job import Done, Job
from mxconv.execute.manifest_facts import manifest_facts, require_same_source
from mxconv.execute.reading import Findings, SourceReader
from mxconv.execute.sidecars import Beside, config_bytes, index_files, other_paths, sidecars
from mxconv.execute.stopping import Stop, Watched, catching_signals
from mxconv.plan.values import Op, Plan, Unit
from mxconv.progress import SILENT, Progress
from mxconv.source import Source

if TYPE_CHECKING:
    from mxconv.execute.places import Places  # torch

HEADROOM = 1.02
"""Share of the planned bytes that must be free on the output's disk: index, tokenizer, journal and manifest come on top."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How to run; nothing here can change an output byte."""

    workers: int = 1
    memory_bytes: int = 1 << 30
    resume: bool = False
    overwrite: bool = False
    log: Mapping[str, Any] | None = None
    device: str = "cpu"
    """Where quantized weights are encoded: cpu, cuda or cuda:N."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """A finished run. `done_before` counts the units that an earlier run had proved; `checked` means nothing was written."""

    root: Path
    manifest: Manifest
    units: int
    done_before: int
    checked: bool
    seconds: float
    workers: int
    notes: tuple[str, ...]


class StatisticsMaker(Protocol):
    """Gets calibration statistics when a run needs them: from the unfinished run that it resumes, or by measuring."""

    def get(self, work: Path, plan: Plan, stop: Stop, progress: Progress) -> Statistics:
        """The statistics, stored in `work` together with their tokens."""


def usable_workers(plan: Plan, options: RunOptions) -> int:
    """Workers that fit the memory budget, at most those asked for. Raises ResourceError (6) when not even one does."""
    need = plan.largest_unit_bytes
    if need > options.memory_bytes:
        raise ResourceError(
            "the memory budget is too small for the largest unit", expected=f"at least {need} bytes",
            got=f"{options.memory_bytes} bytes",
            hint=f"give --memory {-(-need >> 20)}MiB or more",
        )  # fmt: skip
    return max(1, min(options.workers, options.memory_bytes // max(1, need), len(plan.units)))


def require_disk(plan: Plan, root: Path) -> None:
    """Raise ResourceError (6) when the output's disk cannot hold the plan, before the first byte is written."""
    with writing(root):
        folder = root if root.exists() else root.parent
        while not folder.exists():
            folder = folder.parent
        space = os.statvfs(folder)
        already = sum(p.stat().st_blocks * 512 for p in root.rglob("*") if p.is_file()) if root.exists() else 0
    need, free = int(plan.output_bytes * HEADROOM) + (1 << 20), space.f_bavail * space.f_frsize + already
    if need > free:
        raise ResourceError(
            "the disk cannot hold the output", where=folder, expected=f"{need} bytes free", got=f"{free} bytes",
            hint="make room or choose another output folder; nothing was written",
        )  # fmt: skip


def run_plan(
    plan: Plan,
    source: Source,
    beside: Beside,
    root: Path,
    options: RunOptions,
    *,
    statistics: StatisticsMaker | None = None,
    progress: Progress = SILENT,
) -> RunResult:
    """Write the artifact of `plan` into `root`.

    Idempotent: with `resume` what an earlier run proved is kept. Raises OutputConflict, ResourceError, NumericError,
    IntegrityError, MalformedInput or Interrupted; after any of them the run can be resumed.
    """
    began = time.monotonic()
    workers = usable_workers(plan, options)
    stop = Stop()
    watched = Watched(progress, stop)
    if not os.path.lexists(root):
        require_disk(plan, Path(os.path.realpath(root)))  # before its folder is made
    with (
        _places(plan, options.device) as places,
        catching_signals(stop),
        open_output(root, plan_digest=plan.digest, resume=options.resume, overwrite=options.overwrite, progress=progress) as output,
    ):
        if output.finished is not None:
            require_same_source(output.finished, source, beside)
            check_artifact(output.root, output.finished, workers=workers, progress=watched).require()
            return _result(output.root, output.finished, plan, len(plan.units), True, began, workers, ())
        require_disk(plan, output.work)
        regions = {unit.id: _regions(plan, unit) for unit in plan.units}
        state = {**source.fingerprint(), **beside.fingerprint()}
        others = other_paths(plan, beside, calibrated=statistics is not None)
        with ArtifactWriter(output, files=plan.files, units=regions, others=others, source=state, progress=watched) as writer:
            before = len(writer.done)
            measured = statistics.get(output.work, plan, stop, progress) if statistics is not None else None
            reader = SourceReader(source, stop.check)
            workers = workers if places is None else places.workers(plan, workers)
            _run_units(Job(plan=plan, reader=reader, statistics=measured, places=places), writer, regions, workers, stop, progress)
            manifest, notes = _publish(plan, source, beside, writer, measured, stop)
            progress.finish()  # only now: files are hashed and named in the background until the last one stands
        _log(output, options, workers, began, plan)
        return _result(output.root, manifest, plan, before, False, began, workers, notes)


def _regions(plan: Plan, unit: Unit) -> list[Region]:
    return [Region(file=plan.file_of[o.rank, o.spec.name], tensor=o.spec.name, box=o.box) for o in unit.outputs]


def _run_units(
    job: Job, writer: ArtifactWriter, regions: Mapping[str, Sequence[Region]], workers: int, stop: Stop, progress: Progress
) -> None:
    """Checks first, then the rest in the order in which the source lies on the disk."""
    plan, reader = job.plan, job.reader
    todo = [unit for unit in plan.units if unit.id not in writer.done]
    progress.start("quantize" if plan.request.scheme else "convert", plan.read_bytes)
    progress.advance(plan.read_bytes - sum(unit.read_bytes for unit in todo))
    try:
        for batch in (
            [u for u in todo if not u.outputs],
            sorted((u for u in todo if u.outputs), key=lambda u: _position(reader.source, u)),
        ):
            with _torch_threads(plan), ThreadPoolExecutor(workers, thread_name_prefix="mxconv-unit") as pool:

                def work(unit: Unit) -> None:
                    stop.check()
                    _run_unit(unit, job, writer, regions[unit.id])
                    progress.advance(unit.read_bytes, unit.id)

                _wait([pool.submit(work, unit) for unit in batch], stop)
        reader.check_unchanged([read for unit in todo for read in unit.reads])
    finally:
        reader.close()


def _wait(futures: Sequence[Future[None]], stop: Stop) -> None:
    """Wait for all; on the first failure stop the others and raise it (a real failure before an interruption)."""
    finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
    failures = [error for future in finished if not future.cancelled() and (error := future.exception()) is not None]
    if failures:
        stop.set()
        for future in futures:
            future.cancel()
        wait([future for future in futures if not future.cancelled()])
        raise next((error for error in failures if not isinstance(error, Interrupted)), failures[0])


@contextmanager
def _places(plan: Plan, device: str) -> Iterator[Places | None]:
    """Where quantized weights are encoded; a plan that only copies does not load torch."""
    if plan.request.scheme is None:
        yield None
        return
    from mxconv.execute.places import Places

    with Places(device) as places:
        yield places


@contextmanager
def _torch_threads(plan: Plan) -> Iterator[None]:
    """One torch thread a worker, for plans that compute; a plan that only copies does not load torch."""
    if plan.request.scheme is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _position(source: Source, unit: Unit) -> tuple[int, int, int]:
    """(rank, file, offset) of the first byte that a unit reads."""
    rank, name = unit.reads[0] if unit.reads else (0, "")
    if not name:
        return (0, -1, 0)
    tensor = source.stored(rank, name)
    return rank, tensor.file, tensor.offset


def _run_quantize(unit: Unit, job: Job, findings: Findings) -> Done:
    from mxconv.execute.encoding import run_quantize  # torch, only where something is computed

    return run_quantize(unit, job, findings)


OPERATIONS: Mapping[Op, Callable[[Unit, Job, Findings], Done]] = {
    "check_decay": run_check_decay,
    "check_tied": run_check_tied,
    "copy": run_copy,
    "quantize": _run_quantize,
    "decay": run_decay,
}


def _run_unit(unit: Unit, job: Job, writer: ArtifactWriter, regions: Sequence[Region]) -> None:
    """Compute one unit, write its regions, commit it."""
    findings = Findings()
    done = OPERATIONS[unit.op](unit, job, findings)
    job.reader.check_unchanged(unit.reads)
    digests = [writer.write(region, array) for region, array in zip(regions, done.arrays, strict=True)]
    writer.commit(unit.id, source_sha256=findings.sha256.hexdigest(), outputs=digests, facts=done.facts)


def _publish(
    plan: Plan, source: Source, beside: Beside, writer: ArtifactWriter, statistics: Statistics | None, stop: Stop
) -> tuple[Manifest, tuple[str, ...]]:
    beside.check_unchanged()
    facts = {unit.id: dict(writer.facts(unit.id)) for unit in plan.units if writer.facts(unit.id)}
    slopes = {str(u.layer): facts[u.id]["slopes"] for u in plan.units if "slopes" in facts.get(u.id, {})}
    subnormal = sum(fact.get("subnormal_scales", 0) for fact in facts.values())
    warnings: dict[str, Any] = {}
    notes = []
    if subnormal:
        warnings["subnormal_scales"] = subnormal
        notes.append(f"{subnormal} int4 scales are subnormal in the consumer's float16 copy (groups with absmax under about 4e-4)")
    if slopes:
        warnings["kept_decay_layers"] = sorted(map(int, slopes))
        notes.append(
            f"{len(slopes)} layers keep decay slopes that are not the model's; the fastdeploy consumer uses the formula"
        )
    if statistics is not None and statistics.unseen:
        listed = ", ".join(f"{layer}.{expert}" for layer, expert in statistics.unseen[:12])
        notes.append(f"{len(statistics.unseen)} experts saw no calibration token and take their layer's largest absmax: {listed}")
    manifest = publish(
        writer, indexes=index_files(plan), sidecars=sidecars(beside, writer.output.work, statistics),
        config=config_bytes(plan, slopes), manifest=manifest_facts(plan, source, beside, statistics, warnings),
        check=stop.check,
    )  # fmt: skip
    return manifest, tuple(notes)


def _log(output: Output, options: RunOptions, workers: int, began: float, plan: Plan) -> None:
    record = {"plan": plan.digest, "workers": workers, "seconds": round(time.monotonic() - began, 3), **(options.log or {})}
    append_run_log(output.root, json.loads(json.dumps(record, default=str)))


def _result(
    root: Path, manifest: Manifest, plan: Plan, before: int, checked: bool, began: float, workers: int, notes: tuple[str, ...]
) -> RunResult:
    return RunResult(
        root=root, manifest=manifest, units=len(plan.units), done_before=before, checked=checked,
        seconds=time.monotonic() - began, workers=workers, notes=notes,
    )  # fmt: skip
