"""Several models advance over the same tokens side by side, layer by layer; between layers only hidden states live.

A *lane* is one model with one way to treat activations. Lanes that share a model share its layer: attention weights are widened
once for both, one expert at a time. After every layer each lane's hidden states are compared with the first lane's on a sample
of tokens (`probes`), spread evenly over all windows, so that a stored reference can keep every layer's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mxconv.progress import SILENT, Progress
from mxconv.runtime import Model
from mxconv.runtime.linear import Activations

PROBES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One forward pass through `model`."""

    name: str
    model: Model
    activations: Activations = "quantized"


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


def run(lanes: Sequence[Lane], ids: Tensor, progress: Progress = SILENT) -> dict[str, Trace]:
    """Advance all `lanes` over `ids` int64 [windows, T] from embedding to last layer; traces by name.

    The models have the same number of layers.
    """
    models = list(dict.fromkeys(lane.model for lane in lanes))
    layers = models[0].config.num_layers if models else 0
    index = probe_indices(*ids.shape)
    hidden: dict[str, Tensor] = {}
    probes: dict[str, list[Tensor]] = {lane.name: [] for lane in lanes}
    with torch.inference_mode():
        batches = {id(model): model.batch(ids) for model in models}
        for lane in lanes:
            hidden[lane.name] = lane.model.embed(ids)
        for number in range(layers):
            for model in models:
                with model.layer(number) as layer:
                    for lane in (lane for lane in lanes if lane.model is model):
                        x = layer(hidden[lane.name], batches[id(model)], activations=lane.activations)
                        hidden[lane.name] = x
                        probes[lane.name].append(x.flatten(0, 1)[index.to(x.device)].float().cpu())
            progress.advance(0, f"layer {number + 1} of {layers}, {len(lanes)} passes side by side")
    return {lane.name: Trace(hidden=hidden[lane.name], probes=torch.stack(probes[lane.name])) for lane in lanes}


def layer_errors(traces: Mapping[str, Trace], reference: Tensor) -> dict[str, list[float]]:
    """Relative error of each trace's probes after every layer against the reference's probes [layers, probes, H]."""
    return {
        name: [relative_error(mine, theirs) for mine, theirs in zip(trace.probes, reference, strict=True)]
        for name, trace in traces.items()
    }
