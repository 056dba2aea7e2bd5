"""The forward passes of one verification, side by side, and what their logits say about each other.

Lanes: the source in float32, and in bfloat16 for the noise floor; the artifact at its TP size and merged to TP 1, each as served
(activations quantized) and with its weights alone. An unquantized artifact is the same either way and has one of each pair.

Over several processes all of them run the artifact's lanes at its TP size, each its own ranks; every lane at one rank is run by one
process, as it would be alone. Rank 0 scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mxconv.progress import Progress
from mxconv.runtime import Model, Weights
from mxconv.runtime.world import World
from mxconv.verify import reference as stored
from mxconv.verify.heads import Side, accompany, block_of, compare
from mxconv.verify.metrics import Metrics, summarize
from mxconv.verify.options import Options
from mxconv.verify.prompts import Prompts
from mxconv.verify.reference import Reference
from mxconv.verify.streams import Lane, Trace, gathered, layer_errors, run

LOGITS_SHARE = 8
"""A block of logits gets this part of the memory; larger ones are no faster."""
SOURCE, FLOOR = "source", "bf16"
SERVED, WEIGHTS_ONLY = "as served", "weights only"
MERGED_SERVED, MERGED_WEIGHTS_ONLY = "as served, tp 1", "weights only, tp 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsOutcome:
    """Metrics of (reference, other) lanes, and each lane's relative hidden-state error against the source after every layer."""

    metrics: Mapping[tuple[str, str], Metrics]
    layers: Mapping[str, list[float]]
    from_reference: bool

    def against_source(self, lane: str) -> Metrics | None:
        """The source against `lane`; None without a source or such a lane."""
        return self.metrics.get((SOURCE, lane))


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSide:
    """The source at TP 1 and the digest of its headers."""

    weights: Weights
    digest: str


LONE_LANES = (SOURCE, FLOOR, MERGED_SERVED, MERGED_WEIGHTS_ONLY)
"""Lanes at one rank, neighbours in pairs that share what they read."""


def owner_of(name: str, world: World) -> int | None:
    """The process that runs lane `name`, None for all together: two processes have two lanes at one rank each, four or more one."""
    if name not in LONE_LANES or world.size == 1:
        return None
    return LONE_LANES.index(name) * min(world.size, len(LONE_LANES)) // len(LONE_LANES)


def artifact_lanes(weights: Weights, merged: Weights | None, device: torch.device, world: World) -> list[Lane]:
    """The lanes of the artifact that this process has a part in (rank 0: all); `merged` is None where it has one rank."""
    lanes = []
    for each, names in ((weights, (SERVED, WEIGHTS_ONLY)), (merged, (MERGED_SERVED, MERGED_WEIGHTS_ONLY))):
        wanted = [name for name in names if owner_of(name, world) in (None, world.rank) or world.rank == 0]
        if each is None or not wanted:
            continue
        group = world.group(each.tp) if each is weights else None
        model = Model(each, device=device, dtype=torch.float32, stream=True, group=group)
        if each.scheme is not None and names[0] in wanted:
            lanes.append(Lane(name=names[0], model=model, owner=owner_of(names[0], world)))
        if names[1] in wanted:
            lanes.append(Lane(name=names[1], model=model, activations="none", owner=owner_of(names[1], world)))
    return lanes


def source_lanes(source: SourceSide, device: torch.device, world: World) -> list[Lane]:
    """The lanes of the source that this process has a part in."""
    dtypes = {SOURCE: torch.float32, FLOOR: torch.bfloat16}
    return [
        Lane(
            name=name, model=Model(source.weights, device=device, dtype=dtype, stream=True), activations="none",
            owner=owner_of(name, world),
        )
        for name, dtype in dtypes.items() if owner_of(name, world) in (None, world.rank) or world.rank == 0
    ]  # fmt: skip


def pairs_of(lanes: list[Lane], *, with_source: bool) -> list[tuple[str, str]]:
    """Which lanes are compared: all at the artifact's TP with the source, and TP 1 with TP n."""
    names = [lane.name for lane in lanes]
    twins = [twin for twin in ((MERGED_SERVED, SERVED), (MERGED_WEIGHTS_ONLY, WEIGHTS_ONLY)) if twin[0] in names]
    if not with_source:
        return twins
    exact = (MERGED_WEIGHTS_ONLY,) if MERGED_WEIGHTS_ONLY in names and SERVED not in names else ()
    return [(SOURCE, name) for name in (SERVED, WEIGHTS_ONLY, *exact, FLOOR) if name in (*names, FLOOR)] + twins


def run_logits(
    lanes: list[Lane], source: SourceSide | None, kept: Reference | None, prompts: Prompts, options: Options, device: torch.device,
    progress: Progress, world: World,
) -> LogitsOutcome:  # fmt: skip
    """Run all lanes and compare. The source's come from `kept` (rank 0 has it); without it they are run, and
    `options.reference` is written. Rank 0 gets the outcome, the others an empty one.
    """
    ids = prompts.ids.to(device)
    from_reference = world.tell(kept is not None)
    sources = [] if source is None else source_lanes(source, device, world)
    live = [*([] if from_reference else sources), *lanes]
    traces = gathered(run(live, ids, progress, world), live, device, world)
    pairs = pairs_of(lanes, with_source=source is not None)
    block = world.tell(block_of(pairs, ids, options.memory_bytes // LOGITS_SHARE) if pairs else 0)
    if world.rank:
        together = sorted((lane for lane in lanes if lane.owner is None), key=lambda lane: lane.name)
        if block:
            accompany([Side(model=lane.model, hidden=traces[lane.name].hidden) for lane in together], block)
        return LogitsOutcome(metrics={}, layers={}, from_reference=from_reference)
    if kept is not None:
        traces |= {SOURCE: kept.source, FLOOR: kept.floor}
    elif source is not None and options.reference is not None:
        reference = Reference(source=traces[SOURCE], floor=traces[FLOOR])
        stored.write_reference(options.reference, reference, _identity(source, prompts, options))
        progress.note(f"the source's side is kept in {options.reference}")
    models = {lane.name: lane.model for lane in (*sources, *lanes)}
    sides = {name: Side(model=models[name], hidden=trace.hidden) for name, trace in traces.items()}
    progress.advance(0, "logits, by blocks of the vocabulary")
    scores = compare(sides, pairs, ids, options.memory_bytes // LOGITS_SHARE) if pairs else {}
    return LogitsOutcome(
        metrics={pair: summarize(score) for pair, score in scores.items()}, layers=_layers(traces), from_reference=from_reference
    )


def _layers(traces: Mapping[str, Trace]) -> dict[str, list[float]]:
    if SOURCE not in traces:
        return {}
    others = {name: trace for name, trace in traces.items() if name != SOURCE}
    return layer_errors(others, traces[SOURCE].probes)


def _identity(source: SourceSide, prompts: Prompts, options: Options) -> dict[str, object]:
    return stored.identity(source.digest, prompts.digest, keep_decay=options.keep_decay)


def kept_reference(source: SourceSide | None, prompts: Prompts, options: Options, device: torch.device) -> Reference | None:
    """What the file `options.reference` keeps, None when there is none; see `reference.read_reference` for what it raises."""
    if source is None or options.reference is None or not options.reference.exists():
        return None
    return stored.read_reference(options.reference, _identity(source, prompts, options), device)
