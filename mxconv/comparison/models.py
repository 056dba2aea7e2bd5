"""Two models side by side, weight by weight, each read through the runtime, which knows every layout, rank count and scheme.

A weight is [out, in] of the whole model on both sides: ranks are put together, fused and transposed tensors taken apart, codes
decoded. Only the weights being compared are in memory; vocabulary matrices pass in blocks of rows.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxconv.comparison.measure import Difference, Measure
from mxconv.config import LINEAR, ModelConfig
from mxconv.errors import MxconvError, UsageError
from mxconv.progress import SILENT, Progress
from mxconv.runtime import Weights, open_weights
from mxconv.runtime.coded import Coded, decode

VOCABULARY = ("embed", "lm_head")
ROWS = 4096
# How a checkpoint spells the same model, not what the model is.
_SPELLING = frozenset(("dialect", "model_type", "rope_permuted", "rotary_dim_stated", "raw"))
_COPIES = 4
"""Tensors as large as the largest weight that a worker may hold: both sides, the ranks of one being joined, and its decoding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What was compared and everything that differs, the worst first; `config` maps a field to its two values."""

    a: Path
    b: Path
    compared: int
    config: dict[str, tuple[Any, Any]]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Same config, same weights."""
        return not self.config and not self.differences

    def document(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "a": self.a, "b": self.b, "equal": self.equal, "compared": self.compared,
            "config": {key: {"a": pair[0], "b": pair[1]} for key, pair in self.config.items()},
            "differences": [difference.document() for difference in self.differences], "notes": list(self.notes),
        }  # fmt: skip


def compare(
    a: Path, b: Path, *, only: str = "*", workers: int = 1, memory_bytes: int = 1 << 30, keep_decay: bool = False,
    progress: Progress = SILENT,
) -> Comparison:  # fmt: skip
    """Compare every weight whose logical name matches the glob `only`, decay rates and config.

    Peak memory follows the largest single weight and `workers`, which `memory_bytes` may lower; never the size of the model.
    Raises what opening either side raises (2, 3, 4), UsageError when `only` matches nothing.
    """
    left, right = (open_weights(path, merge=True, keep_decay=keep_decay) for path in (a, b))
    names = [pair for pair in _names(left, right) if fnmatch.fnmatchcase(_label(*pair), only)]
    if not names:
        raise UsageError("no weight matches", got=only, expected="a glob of names such as layers.3.*, *.down, lm_head")
    pair = _Pair(left, right, progress)
    count = max(1, min(workers, memory_bytes // (_COPIES * max(_largest(left), _largest(right))), len(names)))
    progress.start("diff", 0)
    try:
        with _one_thread(), ThreadPoolExecutor(count, thread_name_prefix="mxconv-diff") as pool:
            found = [difference for each in pool.map(lambda name: pair.look(*name), names) for difference in each]
    finally:
        progress.finish()
        left.close()
        right.close()
    found += [] if only != "*" else _decay(left, right)
    return Comparison(
        a=a, b=b, compared=len(names), config={} if only != "*" else _config(left.config, right.config),
        differences=tuple(sorted(found, key=lambda difference: difference.rank)), notes=tuple(sorted(pair.notes)),
    )  # fmt: skip


def _label(layer: int | None, name: str) -> str:
    return name if layer is None else f"layers.{layer}.{name}"


def _names(left: Weights, right: Weights) -> list[tuple[int | None, str]]:
    """(layer, name) of every weight of either side, in the order of the model."""
    layers = max(left.config.num_layers, right.config.num_layers)
    places: list[int | None] = [None, *range(layers)]
    return [(layer, name) for layer in places for name in dict.fromkeys((*_held(left, layer), *_held(right, layer)))]


def _held(weights: Weights, layer: int | None) -> tuple[str, ...]:
    return weights.names(layer) if layer is None or layer < weights.config.num_layers else ()


def _largest(weights: Weights) -> int:
    """Bytes of the largest weight once it is decoded to float32 (vocabulary in blocks of rows)."""
    config = weights.config
    inner = max(2 * config.intermediate_size, config.num_attention_heads * config.head_dim, ROWS, *config.shared_intermediate_sizes)
    return 4 * config.hidden_size * inner


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Pair:
    """Both sides, and what is worth saying of them all."""

    def __init__(self, left: Weights, right: Weights, progress: Progress) -> None:
        self.sides = (left, right)
        self.notes: set[str] = set()
        self._progress = progress
        self._lock = threading.Lock()

    def look(self, layer: int | None, name: str) -> list[Difference]:
        """What differs in one weight: nothing, its values, and in static schemes its activation scale."""
        label = _label(layer, name)
        holding = [name in _held(side, layer) for side in self.sides]
        tied = layer is None and name == "lm_head"
        if not all(holding) and not tied:
            side = self.sides[holding.index(True)]
            return [Difference(name=label, stored=side.stored(layer, name, 0), reason=f"only in the {_ordinal(holding)} one")]
        stored = self.sides[holding.index(True)].stored(layer, name, 0)
        try:
            found = self._rows(name, holding) if layer is None and name in VOCABULARY else self._whole(layer, name)
        except MxconvError as error:
            return [Difference(name=label, stored=stored, reason=error.render().split("\n")[0])]
        return [dataclasses.replace(difference, name=label + difference.name, stored=stored) for difference in found]

    def _rows(self, name: str, holding: list[bool]) -> list[Difference]:
        """A vocabulary matrix, block by block; the head of a tied model is its embedding."""
        names = [name if held else "embed" for held in holding]
        sizes = [(side.config.vocab_size, side.config.hidden_size) for side in self.sides]
        if sizes[0] != sizes[1]:
            return [_shapes(*sizes)]
        measure = Measure()
        for start in range(0, sizes[0][0], ROWS):
            stop = min(start + ROWS, sizes[0][0])
            a, b = (side.rows(each, 0, start, stop) for side, each in zip(self.sides, names, strict=True))
            measure.add(a, b, start)
            self._progress.advance(a.nbytes + b.nbytes, name)
        return self._found(measure)

    def _whole(self, layer: int | None, name: str) -> list[Difference]:
        coded = [side.coded(layer, name, 0) for side in self.sides]
        values = [self._values(side, each, layer, name) for side, each in zip(self.sides, coded, strict=True)]
        if values[0].shape != values[1].shape:
            return [_shapes(tuple(values[0].shape), tuple(values[1].shape))]
        measure = Measure()
        measure.add(values[0], values[1])
        self._progress.advance(sum(value.nbytes for value in values), _label(layer, name))
        return [*self._found(measure), *_activation(coded)]

    def _values(self, side: Weights, coded: Coded | None, layer: int | None, name: str) -> Tensor:
        """The weight in the dtype stored, or decoded to float32."""
        if coded is not None and side.scheme is not None:
            return decode(coded, side.scheme, name.rsplit(".", 1)[-1])
        parts = side.read(layer, name, 0)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _found(self, measure: Measure) -> list[Difference]:
        if not measure.differing:
            if measure.dtypes[0] != measure.dtypes[1]:
                with self._lock:
                    self.notes.add(f"some weights have the same values in {measure.dtypes[0]} and in {measure.dtypes[1]}")
            return []
        return [
            Difference(
                name="", elements=measure.elements, differing=measure.differing, max_abs=measure.max_abs,
                relative_l2=measure.relative_l2, first=measure.first, dtypes=measure.dtypes,
            )
        ]  # fmt: skip


def _ordinal(holding: list[bool]) -> str:
    return "first" if holding[0] else "second"


def _shapes(a: tuple[int, ...], b: tuple[int, ...]) -> Difference:
    return Difference(name="", reason=f"shapes differ: {list(a)} and {list(b)}")


def _activation(coded: list[Coded | None]) -> list[Difference]:
    """Calibrated activation scales where both sides have one; a scheme that has none is another kind of artifact, not an error."""
    scales = [each.activation_scale for each in coded if each is not None]
    if len(scales) != 2 or scales[0] is None or scales[1] is None:
        return []
    measure = Measure()
    measure.add(scales[0], scales[1])
    if not measure.differing:
        return []
    return [
        Difference(
            name=" (activation_scale)", elements=measure.elements, differing=measure.differing, max_abs=measure.max_abs,
            relative_l2=measure.relative_l2, first=measure.first, dtypes=measure.dtypes,
        )
    ]  # fmt: skip


def _decay(left: Weights, right: Weights) -> list[Difference]:
    """Decay rates of lightning layers, which come from the config's formula or from buffers that were kept."""
    found = []
    for layer in range(min(left.config.num_layers, right.config.num_layers)):
        if not left.config.layer_types[layer] == right.config.layer_types[layer] == LINEAR:
            continue
        a, b = (torch.tensor(side.rates(layer, 0), dtype=torch.float64) for side in (left, right))
        if a.shape != b.shape:
            found.append(dataclasses.replace(_shapes(tuple(a.shape), tuple(b.shape)), name=f"layers.{layer} decay rates"))
            continue
        measure = Measure()
        measure.add(a, b)
        if measure.differing:
            found.append(
                Difference(
                    name=f"layers.{layer} decay rates", elements=measure.elements, differing=measure.differing,
                    max_abs=measure.max_abs, relative_l2=measure.relative_l2, first=measure.first, dtypes=measure.dtypes,
                )
            )  # fmt: skip
    return found


def _config(a: ModelConfig, b: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Fields of the model's config that have two values."""
    names = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in _SPELLING]
    return {name: (getattr(a, name), getattr(b, name)) for name in names if getattr(a, name) != getattr(b, name)}
