"""Several models advance over the same tokens side by side, layer by layer; between layers only hidden states live.

A *lane* is one model with one way to treat activations. Lanes that share a model share its layer: attention weights are widened
once for both, one expert at a time. Over several processes a lane is either run by all of them, each computing its ranks, or by
one of them alone; they keep in step layer by layer. After every layer each lane's hidden states are compared with the first lane's
on a sample of tokens (`probes`), spread evenly over all windows, so that a stored reference can keep every layer's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mxconv.progress import SILENT, Progress
from mxconv.runtime import Model
from mxconv.runtime.batch import Batch
from mxconv.runtime.linear import Activations
from mxconv.runtime.world import ALONE, World, everywhere

PROBES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One forward pass through `model`."""

    name: str
    model: Model
    activations: Activations = "quantized"
    owner: int | None = None
    """The process that runs it alone; None for one that all of them run."""


def probe_indices(windows: int, length: int, probes: int = PROBES) -> Tensor:
    """int64: up to `probes` of the windows·length token positions, evenly spread."""
    total = windows * length
    count = min(probes, total)
    return torch.arange(count, dtype=torch.int64) * total // count


def relative_error(x: Tensor, reference: Tensor) -> float:
    """‖x − reference‖ / ‖reference‖, summed in float64."""
    x, reference = x.to(torch.float64), reference.to(torch.float64)
    return float((x - reference).norm() / reference.norm())


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Where one lane arrived: final hidden states [windows, T, H], and its probes after each layer, float32 [layers, probes, H]."""

    hidden: Tensor
    probes: Tensor


def run(lanes: Sequence[Lane], ids: Tensor, progress: Progress = SILENT, world: World = ALONE) -> dict[str, Trace]:
    """Advance all `lanes` over `ids` int64 [windows, T] from embedding to last layer; traces of this process's lanes by name.

    The models have the same number of layers. What fails in one process is raised in all.
    """
    running = _Running(ids)
    together = [lane for lane in lanes if lane.owner is None]
    apart = [lane for lane in lanes if lane.owner == world.rank]
    layers = (together or apart)[0].model.config.num_layers if lanes else 0
    with torch.inference_mode():
        for number in range(-1, layers):
            # Lanes of all processes first: whoever has lanes of its own computes them while the others wait at the next layer.
            running.advance(together, number)
            everywhere(world, partial(running.advance, apart, number))
            if number >= 0:
                progress.advance(0, f"layer {number + 1} of {layers}, {len(lanes)} passes side by side")
    return running.traces()


class _Running:
    """Hidden states and probes of lanes on their way."""

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.index = ids, probe_indices(*ids.shape)
        self.hidden: dict[str, Tensor] = {}
        self.probes: dict[str, list[Tensor]] = {}
        self.batches: dict[int, Batch] = {}

    def advance(self, lanes: Iterable[Lane], number: int) -> None:
        """Take `lanes` through layer `number`; through the embedding for -1."""
        lanes = list(lanes)
        for model in dict.fromkeys(lane.model for lane in lanes):
            own = [lane for lane in lanes if lane.model is model]
            if number < 0:
                self.batches[id(model)] = model.batch(self.ids)
                for lane in own:
                    self.hidden[lane.name], self.probes[lane.name] = model.embed(self.ids), []
                continue
            with model.layer(number) as layer:
                for lane in own:
                    x = layer(self.hidden[lane.name], self.batches[id(model)], activations=lane.activations)
                    self.hidden[lane.name] = x
                    self.probes[lane.name].append(x.flatten(0, 1)[self.index.to(x.device)].float().cpu())

    def traces(self) -> dict[str, Trace]:
        """Where the lanes arrived."""
        return {name: Trace(hidden=x, probes=torch.stack(self.probes[name])) for name, x in self.hidden.items()}


def gathered(traces: Mapping[str, Trace], lanes: Sequence[Lane], device: torch.device, world: World) -> dict[str, Trace]:
    """At rank 0 the traces of all `lanes`; elsewhere `traces`, which are those of this process's own."""
    found = dict(traces)
    for lane in lanes:
        if lane.owner is None:
            continue
        mine = traces.get(lane.name)
        hidden = world.fetch(lane.owner, None if mine is None else mine.hidden)
        probes = world.fetch(lane.owner, None if mine is None else mine.probes)
        if hidden is not None and probes is not None:
            found[lane.name] = Trace(hidden=hidden.to(device), probes=probes)
    return {lane.name: found[lane.name] for lane in lanes if lane.name in found}


def layer_errors(traces: Mapping[str, Trace], reference: Tensor) -> dict[str, list[float]]:
    """Relative error of each trace's probes after every layer against the reference's probes [layers, probes, H]."""
    return {
        name: [relative_error(mine, theirs) for mine, theirs in zip(trace.probes, reference, strict=True)]
        for name, trace in traces.items()
    }
