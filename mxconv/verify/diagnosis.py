"""What a wrong weight looks like: another rank's, another expert's, transposed … A guess that helps to find the mistake.

Unquantized weights must equal a candidate bit for bit; quantized ones must point in its direction (int4 noise leaves a cosine of
.99, an unrelated weight 0). Only the first few wrong weights are looked at: each costs reads of the source.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mxconv.config import LINEAR
from mxconv.errors import MxconvError
from mxconv.runtime import Weights
from mxconv.runtime.coded import PROJECTION, rotate
from mxconv.runtime.loader import split_expert

BUDGET = 12
SAME_DIRECTION = 0.9
WHOLE = 0.97
"""Of the whole weight and not of most of it: one doubled block of eight leaves a cosine of .96."""
SAME_SIZE = 0.05
MAX_EXPERTS = 64
NEIGHBOURS = 2


class Diagnosis:
    """Guesses for the first `BUDGET` wrong weights of one artifact; `source` is cut into as many ranks."""

    def __init__(self, artifact: Weights, source: Weights) -> None:
        self.artifact, self.source = artifact, source
        self.left = BUDGET

    def explain(self, layer: int | None, name: str, rank: int) -> str:
        """`; it looks like …`, or nothing."""
        if self.left <= 0:
            return ""
        self.left -= 1
        try:
            quantized = layer is not None and self.artifact.coded(layer, name, rank) is not None
            mine = self.artifact.dense(layer, name, rank)
            source = self.source.dense(layer, name, rank)
            if quantized and (factor := _factor(mine, source, WHOLE)) and abs(factor - 1) > SAME_SIZE:
                return f"; it looks like the source times {factor:.4g}"
            for words, candidate in self._candidates(layer, name, rank, source):
                if candidate.shape != mine.shape or torch.equal(candidate, source):
                    continue
                if _factor(mine, candidate, SAME_DIRECTION) if quantized else torch.equal(mine, candidate):
                    return f"; it looks like {words}"
        except MxconvError:  # what cannot be read is reported where it is read, not in a guess about it
            return ""
        return ""

    def _candidates(self, layer: int | None, name: str, rank: int, source: Tensor) -> Iterator[tuple[str, Tensor]]:
        projection, expert = split_expert(name)
        if projection.endswith("up_gate"):
            yield "gate and up exchanged", torch.cat(source.chunk(2)[::-1])
        for other in range(self.source.tp):
            if other != rank:
                yield f"that of rank {other}", self.source.dense(layer, name, other)
        if source.dim() == 2 and source.shape[0] == source.shape[1]:
            yield "its transpose", source.t()
        for axis, words in enumerate(("outputs", "inputs")[: source.dim()]):
            for shift in (1, -1):
                yield f"its {words} moved by {shift}", source.roll(shift, axis)
        if layer is not None:
            yield from self._relatives(layer, name, rank, expert, projection)
        if expert is not None and self.artifact.scheme is not None and self.artifact.scheme.rotation[PROJECTION[projection]]:
            yield "codes that were not rotated", rotate(source, self.artifact.scheme.rotation[PROJECTION[projection]])

    def _relatives(self, layer: int, name: str, rank: int, expert: int | None, projection: str) -> Iterator[tuple[str, Tensor]]:
        """Other experts, neighbouring layers, q, k and v for each other."""
        config = self.source.config
        for other in range(min(config.num_experts, MAX_EXPERTS)) if expert is not None else ():
            if other != expert:
                yield f"that of expert {other}", self.source.dense(layer, f"experts.{other}.{projection}", rank)
        alike = [other for other in range(config.num_layers) if other != layer and name in self.source.names(other)]
        for other in sorted(alike, key=lambda other: abs(other - layer))[:NEIGHBOURS]:
            yield f"that of layer {other}", self.source.dense(other, name, rank)
        if name in ("attn_norm", "mlp_norm"):
            twin = "mlp_norm" if name == "attn_norm" else "attn_norm"
            yield f"the layer's {twin}", self.source.dense(layer, twin, rank)
        if name in ("q", "k", "v"):
            parts = {other: self.source.dense(layer, other, rank) for other in "qkv"}
            yield from ((f"the layer's {other}", part) for other, part in parts.items() if other != name)
            if config.layer_types[layer] == LINEAR:
                heads = torch.stack([part.unflatten(0, (-1, config.head_dim)) for part in parts.values()], 1).flatten(0, 2)
                yield "a third of the rows in the source's order (head, {q, k, v}, dim)", heads.chunk(3)["qkv".index(name)]


def _factor(mine: Tensor, candidate: Tensor, cosine: float) -> float:
    """By how much `mine` is longer than `candidate`, 0 when it does not point in its direction."""
    product, size = float((mine * candidate).sum()), float(candidate.square().sum())
    if not product > cosine * (size * float(mine.square().sum())) ** 0.5:
        return 0.0
    return product / size
