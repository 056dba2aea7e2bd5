"""The two jobs that write artifacts: `convert` keeps every value, `quantize` encodes the routed experts."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mxconv.artifact import put
from mxconv.calibrate import FILE_NAME, TOKENS_NAME, Statistics, read_statistics
from mxconv.calibrate.tokens import load_tokens, tokens_digest
from mxconv.errors import MalformedInput, MxconvError, NumericError, UsageError
from mxconv.execute.reading import Findings, SourceReader
from mxconv.execute.run import RunOptions, RunResult, StatisticsMaker, run_plan
from mxconv.execute.sidecars import Beside, look_beside
from mxconv.execute.stopping import Stop
from mxconv.plan import Plan, Request, build_plan
from mxconv.progress import SILENT, Progress
from mxconv.source import Source, open_source
from mxconv.tensors import whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A source, what lies beside its weights, its plan, and how its activation scales are to be had: all that precedes a run."""

    source: Source
    beside: Beside
    plan: Plan
    statistics: StatisticsMaker | None


class _Measured:
    """Statistics measured on `ids`; those of the run that is resumed are taken when they are of the same source and tokens."""

    def __init__(self, source: Source, ids: np.ndarray, device: str, keep_decay: bool) -> None:
        self._source, self._ids, self._device, self._keep_decay = source, ids, device, keep_decay

    def get(self, work: Path, plan: Plan, stop: Stop, progress: Progress) -> Statistics:
        kept = work / FILE_NAME
        if kept.exists():
            found = read_statistics(kept)
            if (found.source_digest, found.tokens_digest) == (plan.source_digest, tokens_digest(self._ids)):
                progress.note("calibration statistics of the interrupted run are used again")
                return found
        from mxconv.calibrate.observe import calibrate  # torch

        try:
            measured = calibrate(
                self._source.root, self._ids, source_digest=plan.source_digest, device=self._device,
                keep_decay=self._keep_decay, progress=progress, check=stop.check,
            )  # fmt: skip
        except NumericError:
            raise_bad_weights(self._source, stop)  # a damaged weight shows first as an activation somewhere behind it
            raise
        store_statistics(work, measured, self._ids, plan.digest)
        return measured


class _Given:
    """Statistics of an earlier `mxconv calibrate`."""

    def __init__(self, statistics: Statistics, ids: np.ndarray) -> None:
        self._statistics, self._ids = statistics, ids

    def get(self, work: Path, plan: Plan, stop: Stop, progress: Progress) -> Statistics:
        store_statistics(work, self._statistics, self._ids, plan.digest)
        return self._statistics


def raise_bad_weights(source: Source, stop: Stop) -> None:
    """Read the source until a tensor with NaN or infinity is found, and raise the NumericError that names it."""
    reader = SourceReader(source, stop.check)
    try:
        for param in source.parameters:
            findings = Findings()
            for _ in reader.blocks(param.name, whole(param.shape), findings):
                pass
            findings.raise_bad()
    finally:
        reader.close()


def store_statistics(work: Path, statistics: Statistics, ids: np.ndarray, plan_digest: str) -> None:
    """Write statistics.json and calibration.npy into `work`, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, ids.astype("<i4"), allow_pickle=False)
    put(work, TOKENS_NAME, buffer.getvalue(), plan_digest, "small")
    put(work, FILE_NAME, statistics.to_bytes(), plan_digest, "small")


def prepare(
    source_path: Path, request: Request, *, calibration: Path | None = None, statistics: Path | None = None, device: str = "cpu"
) -> Prepared:
    """Open the source and make the plan of `request`; for a static scheme, find its calibration tokens too.

    `statistics`: the folder that `mxconv calibrate` wrote, or its statistics.json. Raises what `build_plan` raises, UsageError
    for calibration that the scheme does not take, MalformedInput for statistics of another checkpoint.
    """
    source = open_source(source_path, drop=request.drop)
    beside = look_beside(source)
    source = replace(source, problems=(*source.problems, *beside.problems))  # all of a plan's problems are told together
    static = request.scheme is not None and request.scheme.static
    if not static and (calibration is not None or statistics is not None):
        raise UsageError("only static schemes take calibration", got=request.scheme.name if request.scheme else "convert")
    if not static:
        return Prepared(source=source, beside=beside, plan=build_plan(source, request), statistics=None)
    if statistics is not None:
        found, ids = _read_given(statistics, source)
        plan = build_plan(source, replace(request, calibration=f"statistics {found.digest}"))
        return Prepared(source=source, beside=beside, plan=plan, statistics=_Given(found, ids))
    build_plan(source, request)  # problems of the source come before those of the calibration
    ids = load_tokens(source.root, calibration, source.config.vocab_size)
    plan = build_plan(source, replace(request, calibration=f"tokens {tokens_digest(ids)}"))
    return Prepared(source=source, beside=beside, plan=plan, statistics=_Measured(source, ids, device, request.keep_decay))


def _read_given(path: Path, source: Source) -> tuple[Statistics, np.ndarray]:
    folder = path if path.is_dir() else path.parent
    found = read_statistics(folder / FILE_NAME if path.is_dir() else path)
    if found.source_digest != source.headers_digest():
        raise MalformedInput(
            "these statistics are of another checkpoint",
            where=path,
            expected=source.headers_digest()[:16],
            got=found.source_digest[:16],
        )
    ids = load_tokens(source.root, folder / TOKENS_NAME, source.config.vocab_size)
    if tokens_digest(ids) != found.tokens_digest:
        raise MalformedInput(f"{TOKENS_NAME} and {FILE_NAME} do not belong together", where=folder)
    return found, ids


def execute(prepared: Prepared, output: Path, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Run a prepared job into the folder `output`.

    Raises what `run_plan` raises, and UsageError for an output inside the source.
    """
    prepared.source.require_weights()
    out, root = output.resolve(), prepared.source.root.resolve()
    if out == root or out.is_relative_to(root):
        raise UsageError(
            "the output folder lies inside the source, which is never written to", where=output, hint="choose another folder"
        )
    if root.is_relative_to(out):
        raise UsageError("the source lies inside the output folder", where=output, hint="choose another folder")
    if prepared.plan.request.scheme is not None and prepared.plan.request.scheme.static and prepared.statistics is None:
        raise MxconvError("a static scheme was prepared without statistics")
    return run_plan(
        prepared.plan, prepared.source, prepared.beside, output, options, statistics=prepared.statistics, progress=progress
    )


def convert(
    source: Path | str, output: Path | str, *, layout: str | None = "fastdeploy", tp: int = 1, drop: Sequence[str] = (),
    keep_decay: bool = False, options: RunOptions | None = None, progress: Progress = SILENT,
) -> RunResult:  # fmt: skip
    """Write `source` in another layout, every value kept; `layout` None is the form that an artifact was made from."""
    request = Request(layout=layout, tp=tp, drop=tuple(drop), keep_decay=keep_decay)
    return execute(prepare(Path(source), request), Path(output), options or RunOptions(), progress)


def quantize(
    source: Path | str, output: Path | str, *, scheme: str = "w4afp8", tp: int = 1, group_size: int | None = None,
    hadamard_block: int | None = None, ignore: Sequence[str] = (), drop: Sequence[str] = (), keep_decay: bool = False,
    calibration: Path | None = None, statistics: Path | None = None, device: str | None = None,
    options: RunOptions | None = None, progress: Progress = SILENT,
) -> RunResult:  # fmt: skip
    """Write `source` with its routed experts quantized by `scheme`, for `tp` ranks.

    device: cpu, cuda or cuda:N, for calibration and encoding; that of `options` when it is not given.
    """
    from mxconv.quantize.schemes import get_scheme

    options = replace(options or RunOptions(), device=device or (options or RunOptions()).device)
    chosen = get_scheme(scheme, group_size=group_size, hadamard_block=hadamard_block)
    request = Request(tp=tp, scheme=chosen, ignore=tuple(ignore), drop=tuple(drop), keep_decay=keep_decay)
    prepared = prepare(Path(source), request, calibration=calibration, statistics=statistics, device=options.device)
    return execute(prepared, Path(output), options, progress)
