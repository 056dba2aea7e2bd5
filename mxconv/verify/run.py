"""verify: the order of looking, what is skipped when something is missing, and the report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from mxconv.artifact import Manifest, require_artifact
from mxconv.config import ModelConfig, read_config
from mxconv.errors import IntegrityError, MalformedInput, MxconvError, ResourceError, UsageError
from mxconv.progress import SILENT, Progress
from mxconv.quantize.schemes import Scheme, scheme_from_block
from mxconv.runtime import Weights, open_weights
from mxconv.verify import serving, structure
from mxconv.verify.activation import check_scales
from mxconv.verify.consumer import consumer_warnings, fastdeploy_rules
from mxconv.verify.findings import Finding, Section, from_error, skipped, status_of
from mxconv.verify.limits import Limits
from mxconv.verify.logits import LogitsOutcome, SourceSide, artifact_lanes, kept_reference, run_logits
from mxconv.verify.numerics import ROUND_TO_NEAREST, Judge
from mxconv.verify.numerics_section import numerics_section
from mxconv.verify.options import Options
from mxconv.verify.prompts import Prompts, choose_prompts
from mxconv.verify.reference import source_digest
from mxconv.verify.report import Report
from mxconv.verify.verdict import judge_logits, judge_parallel
from mxconv.verify.weights_pass import Outcome, WeightsPass

T = TypeVar("T")
_NO_SOURCE = "there is no source to compare with (--source)"


@dataclass(slots=True, kw_only=True)
class _Subject:
    """The artifact as far as it could be opened."""

    root: Path
    manifest: Manifest
    config: ModelConfig | None = None
    scheme: Scheme | None = None
    weights: Weights | None = None
    merged: Weights | None = None


def verify(artifact: Path | str, options: Options, progress: Progress = SILENT) -> Report:
    """Verify the artifact in folder `artifact` against `options.source`.

    What is wrong with the artifact is in the report. Raises IncompleteInput for a folder that is no finished artifact,
    IntegrityError for a manifest that was changed, UsageError for a request that does not fit, and whatever is wrong with the
    source or the reference file.
    """
    root = Path(artifact)
    Limits(scheme=None, overrides=options.limits)
    subject = _Subject(root=root, manifest=require_artifact(root))
    run = _Run(subject, options, progress)
    try:
        return run.report()
    finally:
        progress.finish()
        run.close()


class _Run:
    """One verification; the steps in order, what they share, and the time each section took."""

    def __init__(self, subject: _Subject, options: Options, progress: Progress) -> None:
        self.subject, self.options, self.progress = subject, options, progress
        self.device = torch.device(options.device)
        self.opened: list[Weights] = []
        self.seconds: dict[str, float] = {}
        self.source: Weights | None = None

    def close(self) -> None:
        """Close every file."""
        for weights in self.opened:
            weights.close()

    def report(self) -> Report:
        """All sections."""
        looked = self._timed("structure", self._look)
        limits = Limits(scheme=None if self.subject.scheme is None else self.subject.scheme.name, overrides=self.options.limits)
        weights = self.subject.weights
        if weights is None:
            why = "the artifact cannot be opened (see structure)"
            sections = [self._structure(looked, None, None), *(skipped(name, why) for name in ("numerics", "parallel", "logits"))]
        else:
            sections = self._judge(weights, looked, limits)
        block = {} if self.subject.config is None else self.subject.config.artifact or {}
        return Report(
            artifact=self.subject.root, source=self.options.source, scheme=limits.scheme, layout=str(block.get("layout")),
            tp=weights.tp if weights is not None else 0, limits=limits.document(),
            sections=tuple(replace(section, seconds=self.seconds.get(section.name, 0.0)) for section in sections),
        )  # fmt: skip

    def _timed(self, name: str, step: Callable[[], T]) -> T:
        began = time.monotonic()
        try:
            return step()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    # Structure, and opening both sides.

    def _look(self) -> serving.Served:
        """Everything that can be seen without reading weights; opens artifact and source."""
        root, manifest = self.subject.root, self.subject.manifest
        served = serving.Served()
        self.progress.start("verify: structure", 0)
        served.findings += structure.look_at_files(root, manifest, hash_files=self.options.hash_files, progress=self.progress)
        source = None if self.options.source is None else read_config(self.options.source)
        config = self._attempt(served, "config", lambda: read_config(root))
        if config is not None:
            self.subject.config = config
            self._look_at_config(served, config, source)
        ranks = self._attempt(served, "headers", lambda: structure.rank_shards(root))
        if ranks is not None:
            served.findings += structure.look_at_headers(root, manifest, ranks)
        if config is not None and ranks is not None:
            self._open(served)
        if self.subject.weights is not None and ranks is not None:
            served.findings += structure.look_at_tensors(self.subject.weights, ranks)
            served.lines.insert(0, _inventory(manifest))
        return served

    def _look_at_config(self, served: serving.Served, config: ModelConfig, source: ModelConfig | None) -> None:
        block = config.artifact
        if block is None:
            served.findings.append(Finding(check="config", what="there is no mxconv block", key="mxconv"))
            return
        self._check_tp(block.get("tp"), per_rank=block.get("layout") == "fastdeploy")
        scheme = self._attempt(served, "config", lambda: scheme_from_block(block, "config.json"))
        self.subject.scheme = scheme
        if block.get("layout") == "fastdeploy" and (scheme is not None or block.get("scheme") is None):
            served.findings += fastdeploy_rules(config.raw, scheme)
        origin = self.subject.manifest.body.get("source")
        if source is not None:
            kept = origin.get("config") if isinstance(origin, dict) else None
            served.findings += structure.look_at_config(config, source, kept if isinstance(kept, dict) else None)
        served.warnings += consumer_warnings(block)
        text = serving.look_at_text(self.subject.root, self.options.source, config)
        for name in ("findings", "warnings", "lines"):
            getattr(served, name).extend(getattr(text, name))

    def _check_tp(self, own: object, *, per_rank: bool) -> None:
        if per_rank and self.options.tp is not None and self.options.tp != own:
            raise UsageError(
                f"this artifact is cut into {own} ranks and cannot be verified as {self.options.tp}", where=self.subject.root,
                expected=f"--tp {own}", got=f"--tp {self.options.tp}", hint="leave --tp out: the artifact knows its own",
            )  # fmt: skip

    def _attempt(self, served: serving.Served, check: str, step: Callable[[], T]) -> T | None:
        """`step`, what it raises about the artifact becoming findings."""
        try:
            return step()
        except ResourceError:
            raise
        except MxconvError as error:
            served.findings += from_error(error, check)
            return None

    def _open(self, served: serving.Served) -> None:
        subject, options = self.subject, self.options

        def opened(merge: bool) -> Weights:
            weights = open_weights(subject.root, tp=options.tp, merge=merge, keep_decay=options.keep_decay)
            self.opened.append(weights)
            return weights

        known = {finding.render() for finding in served.findings}
        errors = serving.Served()
        subject.weights = self._attempt(errors, "tensors", lambda: opened(False))
        served.findings += [finding for finding in errors.findings if finding.render() not in known]
        if subject.weights is not None and subject.weights.tp > 1:
            subject.merged = self._attempt(served, "tensors", lambda: opened(True))
        if options.source is not None and subject.weights is not None:
            self.source = self._source(options.source, subject.weights.tp)

    def _source(self, path: Path, tp: int | None) -> Weights:
        """The source cut into `tp` simulated ranks, or whole (None)."""
        block = read_config(path).artifact or {}
        own = block.get("tp", 1) if block.get("layout") == "fastdeploy" else None
        if own is not None and tp is not None and tp != own:
            raise UsageError(
                f"the source is an artifact of {own} ranks and cannot be cut into {tp}", where=path,
                hint="verify against the checkpoint that both were made from",
            )  # fmt: skip
        weights = open_weights(path, tp=tp, merge=tp is None, keep_decay=self.options.keep_decay)
        self.opened.append(weights)
        return weights

    def _structure(self, looked: serving.Served, outcome: Outcome | None, prompts: Prompts | None) -> Section:
        findings, warnings = list(looked.findings), list(looked.warnings)
        if outcome is not None:
            used = [] if prompts is None or not prompts.natural else prompts.ids.unique().tolist()
            more, wrong = serving.zero_row_words(outcome.zero_rows, used)
            warnings += more
            findings += wrong
        manifest = self.subject.manifest
        return Section(
            name="structure", status=status_of(findings), summary=_inventory(manifest), lines=tuple(looked.lines),
            warnings=tuple(warnings), findings=tuple(findings), checks=structure.CHECKS,
            figures={"files": len(manifest.files), "tensors": _tensors(manifest)},
        )  # fmt: skip

    # Weights and logits.

    def _judge(self, weights: Weights, looked: serving.Served, limits: Limits) -> list[Section]:
        asked = self.options.sections
        outcome = Outcome()
        if {"numerics", "parallel"} & set(asked):
            outcome = self._timed("numerics", lambda: self._weights(weights, limits))
        factor = self._timed("numerics", lambda: self._activations(weights, outcome, limits))
        prompts: Prompts | None = None
        logits: LogitsOutcome | None = None
        broken: list[Finding] = []
        if "logits" in asked:
            prompts = choose_prompts(self.subject.root, weights.config.vocab_size, self.options)
            logits, broken = self._timed("logits", lambda: self._logits(weights, prompts))
        judged = [
            self._structure(looked, outcome, prompts),
            skipped("numerics", _NO_SOURCE) if self.source is None else numerics_section(outcome, limits, factor),
            self._parallel(weights, logits, outcome, limits),
            self._logits_section(logits, broken, prompts, limits),
        ]
        return [section if section.name in ("structure", *asked) else skipped(section.name, "not asked for") for section in judged]

    def _parallel(self, weights: Weights, logits: LogitsOutcome | None, outcome: Outcome, limits: Limits) -> Section:
        if weights.tp == 1:
            return skipped("parallel", "one rank")
        why = "not asked for" if "logits" not in self.options.sections else "the passes could not be run"
        return judge_parallel(logits, outcome.parallel, weights.tp, limits, why)

    def _logits_section(
        self, logits: LogitsOutcome | None, broken: list[Finding], prompts: Prompts | None, limits: Limits
    ) -> Section:
        if self.source is None:
            return skipped("logits", _NO_SOURCE)
        if logits is None or prompts is None:
            return Section(
                name="logits", status="FAIL", summary="the passes could not be run", findings=tuple(broken), checks=("passes",)
            )
        return judge_logits(logits, prompts, limits, self.source.config.vocab_size)

    def _weights(self, weights: Weights, limits: Limits) -> Outcome:
        self.progress.start("verify: weights", 0)
        judge = None
        if weights.scheme is not None:
            judge = Judge(scheme=weights.scheme, method=self._method(), limits=limits, device=self.device)
        with torch.inference_mode():
            return WeightsPass(weights, self.source, judge, self.progress).run()

    def _method(self) -> str:
        """How codes were chosen, as the artifact says; rounding to nearest when it says nothing."""
        conventions = self.subject.manifest.body.get("numeric_conventions")
        block = {} if self.subject.config is None else self.subject.config.artifact or {}
        stated = conventions.get("method") if isinstance(conventions, dict) else None
        return str(block.get("method") or stated or ROUND_TO_NEAREST)

    def _activations(self, weights: Weights, outcome: Outcome, limits: Limits) -> float | None:
        if self.options.source is None or not outcome.activation_scales:
            return None
        whole = self._source(self.options.source, None)
        scales = outcome.activation_scales
        findings, factor = check_scales(self.subject.root, weights, whole, scales, limits, self.device, self.progress)
        outcome.numerics += findings
        return factor

    def _logits(self, weights: Weights, prompts: Prompts) -> tuple[LogitsOutcome | None, list[Finding]]:
        """The passes; what the artifact's tensors keep from being run becomes findings."""
        if self.source is None and self.subject.merged is None:
            return None, []
        self.progress.start("verify: logits", 0)
        side = None
        if self.options.source is not None:
            whole = self._source(self.options.source, None)
            side = SourceSide(weights=whole, digest=source_digest(whole.config, structure.rank_shards(self.options.source)))
        kept = kept_reference(side, prompts, self.options, self.device)
        try:
            lanes = artifact_lanes(weights, self.subject.merged, self.device)
            return run_logits(lanes, side, kept, prompts, self.options, self.device, self.progress), []
        except (MalformedInput, IntegrityError) as error:
            if error.where is not None and self.options.source is not None and error.where.startswith(str(self.options.source)):
                raise
            return None, from_error(error, "passes")


def _tensors(manifest: Manifest) -> int:
    return sum(len(fact.tensors) for fact in manifest.files.values())


def _inventory(manifest: Manifest) -> str:
    weights = sum(bool(fact.tensors) for fact in manifest.files.values())
    return f"{_tensors(manifest):,} tensors in {weights:,} files"
