"""A pass over all weights of an artifact: each is read once for all ranks, held against its source and against the other ranks.

At any moment one weight of all ranks and of the source is in memory: at most one expert's projection of each side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from mxconv.errors import IntegrityError, MalformedInput
from mxconv.progress import Progress
from mxconv.runtime import Weights
from mxconv.runtime.coded import Coded
from mxconv.runtime.loader import VOCABULARY_WEIGHTS, split_expert
from mxconv.verify import parallel
from mxconv.verify.deviations import Deviation
from mxconv.verify.diagnosis import Diagnosis
from mxconv.verify.findings import Finding, from_error
from mxconv.verify.numerics import Judge, equal_finding

VOCABULARY_ROWS = 8192
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The deviation of one quantized projection of one rank."""

    layer: int
    name: str
    rank: int
    deviation: Deviation


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What the pass saw. `numerics` and `parallel` are findings of the two sections."""

    numerics: list[Finding] = field(default_factory=list)
    parallel: list[Finding] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    zero_rows: dict[str, list[int]] = field(default_factory=dict)
    """`embed`, `lm_head` → token ids whose row is all zero."""
    activation_scales: dict[tuple[int, str], tuple[float, ...]] = field(default_factory=dict)
    """(layer, name) → activation_scale of each rank."""
    weights: int = 0
    unexplained: dict[int, tuple[int | None, str, int]] = field(default_factory=dict)
    """Index in `numerics` → (layer, name, rank) of the wrong weight whose last finding that is."""

    @classmethod
    def of(cls, parts: Iterable[Outcome]) -> Outcome:
        """All `parts` in order."""
        whole = cls()
        for part in parts:
            whole.unexplained |= {len(whole.numerics) + index: wrong for index, wrong in part.unexplained.items()}
            whole.numerics += part.numerics
            whole.parallel += part.parallel
            whole.measured += part.measured
            whole.activation_scales |= part.activation_scales
            whole.weights += part.weights
            for name, ids in part.zero_rows.items():
                whole.zero_rows.setdefault(name, []).extend(ids)
        return whole


class WeightsPass:
    """The pass, step by step; a step can be done in any process, and in any order.

    `source` is cut into as many ranks as the artifact, None when there is nothing to hold it against.
    """

    def __init__(self, artifact: Weights, source: Weights | None, judge: Judge | None, progress: Progress) -> None:
        self.artifact, self.source, self.judge, self.progress = artifact, source, judge, progress
        self.outcome = Outcome()

    def steps(self) -> list[Callable[[], Outcome]]:
        """A step a weight, layer by layer, with one for the names of a layer before and one for its decay rates behind them."""
        steps: list[Callable[[], Outcome]] = []
        layers = self.artifact.config.num_layers
        for layer in (None, *range(layers)):
            words = "embedding and head" if layer is None else f"layer {layer + 1} of {layers}"
            steps.append(partial(self._step, words, partial(self._names, layer)))
            steps += [partial(self._step, words, partial(self._one, layer, name)) for name in self.artifact.names(layer)]
            if layer is not None:
                steps.append(partial(self._step, words, partial(self._rates, layer)))
        return steps

    def _step(self, words: str, look: Callable[[], None]) -> Outcome:
        self.outcome = Outcome()
        look()
        self.progress.advance(0, words)
        return self.outcome

    def explained(self, outcome: Outcome) -> Outcome:
        """`outcome` of all steps, the first few wrong weights told with what they look like."""
        if self.source is not None:
            diagnosis = Diagnosis(self.artifact, self.source)
            for index, wrong in outcome.unexplained.items():
                finding = outcome.numerics[index]
                outcome.numerics[index] = replace(finding, what=finding.what + diagnosis.explain(*wrong))
        return outcome

    def _names(self, layer: int | None) -> None:
        """Both sides have the same weights; configs that agree leave no other way, files may be of another form."""
        if self.source is None:
            return
        ours, theirs = set(self.artifact.names(layer)), set(self.source.names(layer))
        for name in sorted(ours ^ theirs):
            what = "the artifact has it and the source does not" if name in ours else "the source has it and the artifact does not"
            self.outcome.numerics.append(Finding(check="unquantized weights", what=what, place=f"layer {layer} {name}"))

    def _one(self, layer: int | None, name: str) -> None:
        known = self.source is not None and name in self.source.names(layer)
        self.outcome.weights += 1
        if name in VOCABULARY_WEIGHTS:
            self._vocabulary(name, known)
        elif split_expert(name)[1] is None or layer is None:
            self._plain(layer, name, known)
        else:
            self._expert(layer, name, known)

    def _of_ranks(self, read: Callable[[int], T]) -> list[T] | None:
        """`read(rank)` of every rank; None, with findings, when a rank of the artifact holds something that cannot be used."""
        found = []
        for rank in range(self.artifact.tp):
            try:
                found.append(read(rank))
            except (MalformedInput, IntegrityError) as error:
                self.outcome.numerics += [replace(each, rank=rank) for each in from_error(error, "usable weights")]
        return found if len(found) == self.artifact.tp else None

    def _parts(self, weights: Weights, layer: int | None, name: str, rank: int) -> Tensor:
        parts = weights.read(layer, name, rank)
        return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))

    def _plain(self, layer: int | None, name: str, known: bool) -> None:
        """A weight that is stored as it was."""
        parts = self._of_ranks(lambda rank: self._parts(self.artifact, layer, name, rank))
        if parts is None:
            return
        self.outcome.parallel += parallel.differing_copies(self.artifact, layer, name, parts)
        for rank, part in enumerate(parts):
            if known and self.source is not None:
                self._equal(layer, name, rank, part, self._parts(self.source, layer, name, rank), name if name in "qkv" else None)

    def _equal(self, layer: int | None, name: str, rank: int, ours: Tensor, theirs: Tensor, place: str | None = None) -> None:
        tensor = " ".join(self.artifact.stored(layer, name, rank))
        found = equal_finding(ours, theirs, widened=name == "router", tensor=tensor, rank=rank, place=place)
        self._add(layer, name, rank, [] if found is None else [found])

    def _add(self, layer: int | None, name: str, rank: int, findings: list[Finding]) -> None:
        """Take findings about one weight of one rank; the last is to be told with what the weight looks like."""
        self.outcome.numerics += findings
        if findings:
            self.outcome.unexplained[len(self.outcome.numerics) - 1] = layer, name, rank

    def _vocabulary(self, name: str, known: bool) -> None:
        """Embedding or head in blocks of rows; rows that are all zero are listed, padding must be."""
        each = self.artifact.rank_rows(name)
        zero = self.outcome.zero_rows.setdefault(name, [])
        for rank in range(self.artifact.tp):
            self.outcome.parallel += parallel.padding(self.artifact, name, rank)
            last = min(each, max(self.artifact.config.vocab_size - rank * each, 0))
            for start in range(0, last, VOCABULARY_ROWS):
                stop = min(start + VOCABULARY_ROWS, last)
                ours = self.artifact.rows(name, rank, start, stop)
                zero += (rank * each + start + (~ours.any(1)).nonzero().flatten()).tolist()
                if known and self.source is not None:
                    self._equal(None, name, rank, ours, self.source.rows(name, rank, start, stop), f"from row {start}")

    def _expert(self, layer: int, name: str, known: bool) -> None:
        """A routed expert's projection, quantized or kept."""
        ranks = range(self.artifact.tp)
        coded = self._of_ranks(lambda rank: self.artifact.coded(layer, name, rank))
        if coded is None:
            return
        self.outcome.parallel += parallel.differing_scales(self.artifact, layer, name, coded)
        scales = tuple(float(each.activation_scale) for each in coded if each is not None and each.activation_scale is not None)
        if scales:
            self.outcome.activation_scales[layer, name] = scales
        if not known or self.source is None:
            return
        for rank in ranks:
            if coded[rank] is None:
                ours = self._parts(self.artifact, layer, name, rank)
                self._equal(layer, name, rank, ours, self._parts(self.source, layer, name, rank))
        if any(each is not None for each in coded) and self.judge is not None:
            self._quantized(layer, name, coded, self.judge)

    def _quantized(self, layer: int, name: str, coded: Sequence[Coded | None], judge: Judge) -> None:
        if self.source is None:
            return
        projection = split_expert(name)[0]
        shared = judge.scheme.granularity == "tensor" or (judge.scheme.granularity == "channel" and projection == "down")
        largest: Tensor | None = None
        if shared:  # one scale for all ranks, so that all of them are looked at before any is judged
            tiles = [judge.tiles(self._parts(self.source, layer, name, rank), projection) for rank in range(self.artifact.tp)]
            largest = torch.stack(tiles).amax(0)
        for rank, mine in enumerate(coded):
            if mine is None:
                continue
            source = self._parts(self.source, layer, name, rank)
            stored = self.artifact.stored(layer, name, rank)
            deviation, findings = judge.weight(mine, source, largest, projection, stored, rank)
            self.outcome.measured.append(Measured(layer=layer, name=name, rank=rank, deviation=deviation))
            self._add(layer, name, rank, findings)

    def _rates(self, layer: int) -> None:
        """Decay rates of lightning layers, which a config block may keep."""
        if self.source is None:
            return
        for rank in range(self.artifact.tp):
            ours, theirs = self.artifact.rates(layer, rank), self.source.rates(layer, rank)
            if list(ours) != list(theirs):
                words = [f"{[round(rate, 6) for rate in rates[:3]]} …" for rates in (theirs, ours)]
                self.outcome.numerics.append(
                    Finding(
                        check="decay rates", what="differ from the source's", key="mxconv.slopes", rank=rank,
                        place=f"layer {layer}", expected=words[0], got=words[1],
                    )
                )
