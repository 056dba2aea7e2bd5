"""Stored activation scales against an absmax that is gathered again on the tokens that the artifact records.

A wrong `activation_scale` is nearly invisible in logits (w4a8 at twice the scale: KL .0327 → .0362 on the demo model), so it is
compared itself. The source runs at TP 1 in float32, layers streamed, and every expert's input is rotated as the scheme rotates
it; experts that see no token are held to the largest absmax of their layer, which is what they are given.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mxconv.errors import IncompleteInput, MalformedInput, MxconvError, printable
from mxconv.jsonfiles import read_regular
from mxconv.progress import Progress
from mxconv.quantize.schemes import Scheme
from mxconv.runtime import Model, Weights
from mxconv.runtime.coded import PROJECTION, rotate
from mxconv.runtime.moe import Observer
from mxconv.verify.findings import Finding, from_error
from mxconv.verify.limits import Limits

TOKENS_NAME = "calibration.npy"
CHECK = "activation scales"
MAX_IDS_BYTES = 1 << 30

Key = tuple[int, str]
"""(layer, logical name)."""
Stored = Mapping[Key, Sequence[float]]
"""Activation scale of each rank."""


def recorded_tokens(root: Path, vocabulary: int) -> np.ndarray:
    """int64 [N, T]: the ids that the artifact in `root` was calibrated on. Raises IncompleteInput or MalformedInput."""
    path = root / TOKENS_NAME
    if not path.exists():
        raise IncompleteInput(f"there is no {TOKENS_NAME}: which tokens the scales come from is not recorded", where=path)
    ids = read_ids(path)
    if ids.dtype.kind not in "iu" or ids.ndim != 2 or not ids.size:
        raise MalformedInput("not token ids", where=path, expected="integers [windows, tokens]")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise MalformedInput("a token id is outside the vocabulary", where=path, expected=f"0 … {vocabulary - 1}")
    return ids.astype(np.int64)


def read_ids(path: Path) -> np.ndarray:
    """The array in a .npy file. Raises IncompleteInput or MalformedInput; nothing is unpickled."""
    content = read_regular(path, MAX_IDS_BYTES)
    try:
        values = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, MemoryError, OSError, SyntaxError) as error:  # whatever a broken header makes of itself
        raise MalformedInput(f"not a .npy file of numbers: {printable(error)}", where=path) from None
    if not isinstance(values, np.ndarray):
        raise MalformedInput("not a .npy file", where=path)
    return values


class Gathering:
    """Absmax of the rotated inputs of every expert projection, (layer, logical name) → value."""

    def __init__(self, scheme: Scheme) -> None:
        self.rotation = scheme.rotation
        self.values: dict[Key, float] = {}

    def observer(self, layer: int) -> Observer:
        """What `layer` calls with the input of each expert GEMM."""
        names = {projection: name for name, projection in PROJECTION.items()}

        def observe(expert: int, projection: str, x: Tensor) -> None:
            if x.numel():
                key = layer, f"experts.{expert}.{names[projection]}"
                largest = float(rotate(x, self.rotation[projection]).abs().max())
                self.values[key] = max(self.values.get(key, 0.0), largest)

        return observe


def gather(source: Weights, ids: np.ndarray, scheme: Scheme, device: torch.device, progress: Progress) -> Mapping[Key, float]:
    """Run `source` (TP 1) over `ids` int64 [N, T] and return every seen projection's absmax."""
    gathering = Gathering(scheme)
    model = Model(source, device=device, dtype=torch.float32, stream=True)
    tokens = torch.from_numpy(ids)
    with torch.inference_mode():
        batch, x = model.batch(tokens), model.embed(tokens)
        for index in range(model.config.num_layers):
            with model.layer(index) as layer:
                x = layer(x, batch, observer=gathering.observer(index))
            progress.advance(0, f"activation scales, layer {index + 1} of {model.config.num_layers}")
    return gathering.values


def judge_scales(
    artifact: Weights, stored: Stored, gathered: Mapping[Key, float], limits: Limits
) -> tuple[list[Finding], float]:
    """(findings, largest factor): the activation scales of every rank against `gathered` absmaxes."""
    scheme = artifact.scheme
    findings: list[Finding] = []
    worst = 1.0
    if scheme is None:
        return findings, worst
    divisor = scheme.activation.divisor if scheme.activation.stored_divided else 1.0
    limit = limits["activation_factor"]
    for (layer, name), scales in stored.items():
        expected = _absmax(gathered, layer, name) / divisor
        if not expected:  # nothing of this layer was seen, or it was all zero: any scale is as good
            continue
        for rank, scale in enumerate(scales):
            factor = max(scale / expected, expected / scale)
            worst = max(worst, factor)
            if not factor <= limit:
                findings.append(
                    Finding(
                        check=CHECK, what=f"off by a factor of {factor:.3g} on the recorded tokens", rank=rank,
                        tensor=artifact.stored(layer, name, rank)[-1], expected=f"{expected:.6g} to a factor of {limit:g}",
                        got=f"{scale:.6g}",
                    )
                )
    return findings, worst


def _absmax(gathered: Mapping[Key, float], layer: int, name: str) -> float:
    own = gathered.get((layer, name))
    if own is not None:
        return own
    projection = name.rsplit(".", 1)[-1]
    return max((value for (at, other), value in gathered.items() if at == layer and other.endswith(f".{projection}")), default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """Absmaxes of the source on the recorded tokens, or why there are none."""

    absmax: Mapping[Key, float] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


def gather_step(
    root: Path, artifact: Weights, source: Weights, device: torch.device, progress: Progress
) -> Callable[[], Gathered] | None:
    """What gathers for `artifact` in `root` on the whole `source`; None where there is no static scale to judge.

    A recording that is missing or broken is a finding.
    """
    scheme = artifact.scheme
    if scheme is None or not scheme.static or not _any_quantized(artifact):
        return None

    def step() -> Gathered:
        try:
            ids = recorded_tokens(root, artifact.config.vocab_size)
        except MxconvError as error:
            return Gathered(findings=tuple(from_error(error, CHECK)))
        return Gathered(absmax=gather(source, ids, scheme, device, progress))

    return step


def _any_quantized(artifact: Weights) -> bool:
    layers = range(artifact.config.num_layers)
    experts = ((layer, name) for layer in layers for name in artifact.names(layer) if name.startswith("experts."))
    return any(artifact.stored(layer, name, 0)[0].endswith("quant_weight") for layer, name in experts)


def judge_gathered(
    artifact: Weights, stored: Stored, gathered: Gathered, limits: Limits
) -> tuple[list[Finding], float | None]:
    """(findings, largest factor) of what `gather_step` gave."""
    if not stored:
        return [], None
    if gathered.findings:
        return list(gathered.findings), None
    return judge_scales(artifact, stored, gathered.absmax, limits)
