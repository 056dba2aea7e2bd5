"""verify: the order of looking, what is skipped when something is missing, and the report.

Several processes may do it together (`World`): what one of them can do alone is handed out step by step, what needs all ranks of a
layer at once runs in all of them, and rank 0 judges. Every check happens however many there are, and so do the figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from mxconv.artifact import require_artifact
from mxconv.errors import IntegrityError, MalformedInput, ResourceError
from mxconv.progress import SILENT, Progress
from mxconv.runtime import Weights
from mxconv.runtime.world import ALONE, World, everywhere
from mxconv.verify import serving, structure
from mxconv.verify.activation import Gathered, gather_step, judge_gathered
from mxconv.verify.findings import Finding, Section, from_error, skipped, status_of
from mxconv.verify.limits import Limits
from mxconv.verify.logits import LogitsOutcome, SourceSide, artifact_lanes, kept_reference, run_logits
from mxconv.verify.numerics import ROUND_TO_NEAREST, Judge
from mxconv.verify.numerics_section import numerics_section
from mxconv.verify.options import Options
from mxconv.verify.prompts import Prompts, choose_prompts
from mxconv.verify.reference import source_digest
from mxconv.verify.report import Report
from mxconv.verify.subject import Subject, inventory, tensors
from mxconv.verify.verdict import judge_logits, judge_parallel
from mxconv.verify.weights_pass import Outcome, WeightsPass

T = TypeVar("T")
_NO_SOURCE = "there is no source to compare with (--source)"


def verify(artifact: Path | str, options: Options, progress: Progress = SILENT, world: World = ALONE) -> Report:
    """Verify the artifact in folder `artifact` against `options.source`; the same report in every process of `world`.

    What is wrong with the artifact is in the report. Raises IncompleteInput for a folder that is no finished artifact,
    IntegrityError for a manifest that was changed, UsageError for a request that does not fit, and whatever is wrong with the
    source or the reference file.
    """
    root = Path(artifact)
    Limits(scheme=None, overrides=options.limits)
    own = options if world.rank == 0 else replace(options, hash_files=False)
    subject = Subject(root=root, manifest=require_artifact(root), options=own, progress=progress)
    run = _Run(subject, own, progress, world)
    try:
        return world.tell(run.report())
    finally:
        progress.finish()
        subject.close()


class _Run:
    """One verification; the steps in order, what they share, and the time each section took."""

    def __init__(self, subject: Subject, options: Options, progress: Progress, world: World) -> None:
        self.subject, self.options, self.progress, self.world = subject, options, progress, world
        self.device = torch.device(options.device)
        self.seconds: dict[str, float] = {}

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
            tp=weights.tp if weights is not None else 0, limits=limits.document(), processes=self.world.size,
            sections=tuple(replace(section, seconds=self.seconds.get(section.name, 0.0)) for section in sections),
        )  # fmt: skip

    def _timed(self, name: str, step: Callable[[], T]) -> T:
        began = time.monotonic()
        try:
            return step()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    def _look(self) -> serving.Served:
        """Structure; every process opens both sides, and all must have come as far."""
        looked, subject = self.subject.look(), self.subject
        opened = subject.weights is not None, subject.merged is not None, subject.source is not None
        first, error = self.world.tell(opened), None
        if opened != first:
            error = ResourceError(
                f"rank {self.world.rank} cannot open what rank 0 can, or the other way round", where=subject.root,
                hint="do all processes see the same files?",
            )  # fmt: skip
        self.world.agree(error)
        if subject.weights is not None:
            self.world.group(subject.weights.tp)  # whether the processes share its ranks out, before anything is computed
        return looked

    def _structure(self, looked: serving.Served, outcome: Outcome | None, prompts: Prompts | None) -> Section:
        findings, warnings = list(looked.findings), list(looked.warnings)
        if outcome is not None:
            used = [] if prompts is None or not prompts.natural else prompts.ids.unique().tolist()
            more, wrong = serving.zero_row_words(outcome.zero_rows, used)
            warnings += more
            findings += wrong
        manifest = self.subject.manifest
        return Section(
            name="structure", status=status_of(findings), summary=inventory(manifest), lines=tuple(looked.lines),
            warnings=tuple(warnings), findings=tuple(findings), checks=structure.CHECKS,
            figures={"files": len(manifest.files), "tensors": tensors(manifest)},
        )  # fmt: skip

    # Weights and logits.

    def _judge(self, weights: Weights, looked: serving.Served, limits: Limits) -> list[Section]:
        asked = self.options.sections
        outcome, factor = Outcome(), None
        if {"numerics", "parallel"} & set(asked):
            outcome, factor = self._timed("numerics", lambda: self._weights(weights, limits))
        prompts: Prompts | None = None
        logits: LogitsOutcome | None = None
        broken: list[Finding] = []
        if "logits" in asked:
            prompts = self.world.tell(
                choose_prompts(self.subject.root, weights.config.vocab_size, self.options) if self.world.rank == 0 else None
            )
        if prompts is not None:
            logits, broken = self._timed("logits", lambda: self._logits(weights, prompts))
        if self.world.rank:
            return []
        judged = [
            self._structure(looked, outcome, prompts),
            skipped("numerics", _NO_SOURCE) if self.subject.source is None else numerics_section(outcome, limits, factor),
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
        if self.subject.source is None:
            return skipped("logits", _NO_SOURCE)
        if logits is None or prompts is None:
            return Section(
                name="logits", status="FAIL", summary="the passes could not be run", findings=tuple(broken), checks=("passes",)
            )
        return judge_logits(logits, prompts, limits, self.subject.source.config.vocab_size)

    def _weights(self, weights: Weights, limits: Limits) -> tuple[Outcome, float | None]:
        """The pass over all weights, and static activation scales against what is gathered again (its factor)."""
        self.progress.start("verify: weights", 0)
        judge = None
        if weights.scheme is not None:
            judge = Judge(scheme=weights.scheme, method=self._method(), limits=limits, device=self.device)
        over = WeightsPass(weights, self.subject.source, judge, self.progress)
        gather = self._gathering(weights)
        with torch.inference_mode():
            # The gathering is the longest step: whoever takes it first leaves the others to those that are free.
            results = self.world.share_out([*([gather] if gather else []), *over.steps()])
            outcomes = [each for each in results if isinstance(each, Outcome)]
            outcome = over.explained(Outcome.of(outcomes))
        gathered = next((each for each in results if isinstance(each, Gathered)), None)
        if gathered is None:
            return outcome, None
        findings, factor = judge_gathered(weights, outcome.activation_scales, gathered, limits)
        outcome.numerics += findings
        return outcome, factor

    def _gathering(self, weights: Weights) -> Callable[[], Gathered | Outcome] | None:
        if self.options.source is None:
            return None
        whole = self.subject.cut_source(self.options.source, None)
        return gather_step(self.subject.root, weights, whole, self.device, self.progress)

    def _method(self) -> str:
        """How codes were chosen, as the artifact says; rounding to nearest when it says nothing."""
        conventions = self.subject.manifest.body.get("numeric_conventions")
        block = {} if self.subject.config is None else self.subject.config.artifact or {}
        stated = conventions.get("method") if isinstance(conventions, dict) else None
        return str(block.get("method") or stated or ROUND_TO_NEAREST)

    def _logits(self, weights: Weights, prompts: Prompts) -> tuple[LogitsOutcome | None, list[Finding]]:
        """The passes; what the artifact's tensors keep from being run becomes findings."""
        source = self.options.source
        if self.subject.source is None and self.subject.merged is None:
            return None, []
        self.progress.start("verify: logits", 0)
        side = None
        if source is not None:
            whole = self.subject.cut_source(source, None)
            side = SourceSide(weights=whole, digest=source_digest(whole.config, structure.rank_shards(source)))
        kept = kept_reference(side, prompts, self.options, self.device) if self.world.rank == 0 else None
        try:
            lanes = everywhere(self.world, lambda: artifact_lanes(weights, self.subject.merged, self.device, self.world))
            return run_logits(lanes, side, kept, prompts, self.options, self.device, self.progress, self.world), []
        except (MalformedInput, IntegrityError) as error:
            of_source = error.where is not None and source is not None and error.where.startswith(str(source))
            if of_source or not self.world.settled(error):
                raise
            return None, from_error(error, "passes")
