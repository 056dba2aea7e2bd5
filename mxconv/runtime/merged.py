"""An artifact's ranks put back together into one: codes, scales and weights concatenated, replicas and padding dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mxconv.errors import IntegrityError, printable
from mxconv.quantize.schemes import Scheme
from mxconv.runtime.coded import Coded
from mxconv.runtime.expectation import Expected
from mxconv.runtime.loader import VOCABULARY_WEIGHTS, Weights, split_expert

# How a weight [out, in] is cut over ranks: along out, along in, along out in halves (gate rows, then up rows), or not at all.
_OUT, _IN, _HALVES, _WHOLE = "out", "in", "halves", "whole"
CUTS: Mapping[str, str] = {
    "q": _OUT, "k": _OUT, "v": _OUT, "output_gate": _OUT, "linear_norm": _OUT, "attn_out": _IN,
    "up_gate": _HALVES, "down": _IN, "shared.up_gate": _HALVES, "shared.down": _IN, "mlp.up_gate": _HALVES, "mlp.down": _IN,
    "attn_norm": _WHOLE, "mlp_norm": _WHOLE, "router": _WHOLE, "shared.coefficient": _WHOLE, "final_norm": _WHOLE,
}  # fmt: skip


def _cat(parts: Sequence[Tensor], dim: int) -> Tensor:
    """`torch.cat` that keeps [in, out] memory order, so that products have the bits of an artifact written as one rank."""
    if parts[0].dim() == 2 and parts[0].stride(0) == 1:
        return torch.cat([part.t() for part in parts], 1 - dim).t()
    return torch.cat(tuple(parts), dim)


def _halves(parts: Sequence[Tensor], dim: int) -> Tensor:
    """[gate_0 | up_0], [gate_1 | up_1], … → [gate_0 | gate_1 … | up_0 | up_1 …] along `dim`."""
    split = [part.chunk(2, dim) for part in parts]
    return _cat([gate for gate, _ in split] + [up for _, up in split], dim)


def join(parts: Sequence[Tensor], cut: str) -> Tensor:
    """One weight [out, in] (or a 1-D norm) from those of the ranks."""
    return _halves(parts, 0) if cut == _HALVES else _cat(parts, 0 if cut == _OUT else 1)


def join_scales(scales: Sequence[Tensor], scheme: Scheme, cut: str) -> Tensor | None:
    """Stored `weight_scale`s of the ranks as one, None when every rank must hold the same one."""
    orientation = scheme.scale_orientation
    if orientation == "one" or (orientation == "out" and cut == _IN):
        return None
    if orientation == "out":
        return _halves(scales, 0)
    out_dim = 0 if orientation == "out,in" else 1
    return _halves(scales, out_dim) if cut == _HALVES else _cat(scales, 1 - out_dim)


class MergedWeights(Weights):
    """The weights of a tensor-parallel artifact as one rank.

    Raises IntegrityError where the ranks hold different copies of what must be the same in all of them.
    """

    def __init__(self, parts: Weights) -> None:
        self.parts = parts
        self.config, self.scheme, self.layout, self.tp = parts.config, parts.scheme, parts.layout, 1

    def close(self) -> None:
        """See `Weights.close`."""
        self.parts.close()

    def names(self, layer: int | None) -> tuple[str, ...]:
        """See `Weights.names`."""
        return self.parts.names(layer)

    def stored(self, layer: int | None, name: str, rank: int) -> tuple[str, ...]:
        """See `Weights.stored`; the same names stand in every rank's files."""
        return self.parts.stored(layer, name, 0)

    def expected_tensors(self, rank: int) -> Mapping[str, Expected]:
        """What the files of rank `rank` of the artifact must hold."""
        return self.parts.expected_tensors(rank)

    def rates(self, layer: int, rank: int) -> Sequence[float]:
        """See `Weights.rates`."""
        return [rate for each in range(self.parts.tp) for rate in self.parts.rates(layer, each)]

    def rows(self, name: str, rank: int, start: int, stop: int) -> Tensor:
        """See `Weights.rows`; rows are those of the whole vocabulary."""
        each = self.parts.rank_rows(name)
        pieces = []
        for part in range(self.parts.tp):
            low, high = max(start - part * each, 0), min(stop - part * each, each)
            if low < high:
                pieces.append(self.parts.rows(name, part, low, high))
        joined = _cat(pieces, 0) if pieces else self.parts.rows(name, 0, 0, 0)
        missing = stop - start - len(joined)
        return _cat((joined, joined.new_zeros(missing, joined.shape[1])), 0) if missing else joined

    def read(self, layer: int | None, name: str, rank: int) -> tuple[Tensor, ...]:
        """See `Weights.read`."""
        if name in VOCABULARY_WEIGHTS:
            return (self.rows(name, 0, 0, self.rank_rows(name)),)
        cut = CUTS[split_expert(name)[0]]
        parts = [self._one(layer, name, each) for each in range(self.parts.tp)]
        if cut == _WHOLE:
            return (self._same(parts, layer, name),)
        if name in ("k", "v"):
            parts = self._distinct(parts, layer, name)
        return (join(parts, cut),)

    def coded(self, layer: int | None, name: str, rank: int) -> Coded | None:
        """See `Weights.coded`."""
        parts = [self.parts.coded(layer, name, each) for each in range(self.parts.tp)]
        coded = [part for part in parts if part is not None]
        if self.scheme is None or not coded:
            return None
        if len(coded) != len(parts):
            raise IntegrityError("some ranks hold this expert quantized and some do not", where=self._where(layer, name))
        cut = CUTS[split_expert(name)[0]]
        scales = [part.weight_scale for part in coded]
        activation = [part.activation_scale for part in coded if part.activation_scale is not None]
        scale = join_scales(scales, self.scheme, cut)
        return Coded(
            codes=join([part.codes for part in coded], cut),
            weight_scale=self._same(scales, layer, name) if scale is None else scale,
            activation_scale=self._same(activation, layer, name) if activation else None,
        )

    def _one(self, layer: int | None, name: str, rank: int) -> Tensor:
        parts = self.parts.read(layer, name, rank)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _distinct(self, parts: list[Tensor], layer: int | None, name: str) -> list[Tensor]:
        """One of each group of ranks that hold replicas of a KV head; lightning layers have none."""
        grouped = layer is not None and self.config.layer_types[layer] == "full_attention"
        copies = max(1, self.parts.tp // self.config.num_key_value_heads) if grouped else 1
        return [self._same(parts[first : first + copies], layer, name) for first in range(0, len(parts), copies)]

    def _same(self, parts: Sequence[Tensor], layer: int | None, name: str) -> Tensor:
        for rank, part in enumerate(parts):
            if not torch.equal(part, parts[0]):
                raise IntegrityError(f"ranks hold different copies (copy {rank} of {len(parts)})", where=self._where(layer, name))
        return parts[0]

    def _where(self, layer: int | None, name: str) -> str:
        return printable(" ".join(self.parts.stored(layer, name, 0)))
