"""Weights: one checkpoint or artifact, read by the runtime's own statement of what lies where (layouts.py).

Logical names: `embed`, `lm_head`, `final_norm` (layer None); of a layer `attn_norm`, `mlp_norm`, `q`, `k`, `v`, `output_gate`,
`linear_norm`, `attn_out`, `router`, `shared.up_gate`, `shared.down`, `shared.coefficient`, `mlp.up_gate`, `mlp.down`,
`experts.{e}.up_gate`, `experts.{e}.down`. Every weight is [out, in] of one rank; up_gate has gate rows first; norms are 1-D.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mxconv.checkpoint import ByteReader, Shards, StoredTensor
from mxconv.config import ModelConfig
from mxconv.errors import MalformedInput
from mxconv.quantize.schemes import Scheme
from mxconv.runtime import lightning
from mxconv.runtime.coded import Coded, decode, unpack
from mxconv.runtime.expectation import Expected, expected_tensors, feed_forward_form
from mxconv.runtime.layouts import CUT_AXES, QUANTIZED_SUFFIXES, Layout, Part
from mxconv.runtime.sizes import axis_sizes, kv_heads, product, vocabulary_rows
from mxconv.tensors import TORCH_NAMES, Box, box_shape

VOCABULARY_WEIGHTS = ("embed", "lm_head")


class Weights(ABC):
    """What the model, calibration and verification read: decoded and coded weights of each rank, by logical name."""

    config: ModelConfig
    tp: int
    scheme: Scheme | None
    layout: str

    @abstractmethod
    def names(self, layer: int | None) -> tuple[str, ...]:
        """Logical names present in `layer`, or of the whole model for None; a tied model has no `lm_head`."""

    @abstractmethod
    def read(self, layer: int | None, name: str, rank: int) -> tuple[Tensor, ...]:
        """The out-parts of an unquantized weight [out, in] in the dtype stored; transposed layouts give transposed views."""

    @abstractmethod
    def coded(self, layer: int | None, name: str, rank: int) -> Coded | None:
        """Codes and scales of a quantized expert projection of `rank`, None for what is stored unquantized."""

    @abstractmethod
    def rows(self, name: str, rank: int, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of `rank`'s `embed` or `lm_head` in the dtype stored; padding rows are zero."""

    @abstractmethod
    def stored(self, layer: int | None, name: str, rank: int) -> tuple[str, ...]:
        """Names in the files of the tensors that hold a weight, for messages."""

    @abstractmethod
    def expected_tensors(self, rank: int) -> Mapping[str, Expected]:
        """Every tensor that the files of `rank` must hold, and nothing else (a source has one set of files, whatever `rank`)."""

    @abstractmethod
    def rates(self, layer: int, rank: int) -> Sequence[float]:
        """Decay rate of each of `rank`'s heads in lightning layer `layer`."""

    @abstractmethod
    def close(self) -> None:
        """Close the files; reading opens them again."""

    def dense(self, layer: int | None, name: str, rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A weight of `rank` decoded to `dtype`, [out, in] in the space of the unquantized model; norms 1-D."""
        coded = self.coded(layer, name, rank)
        if coded is not None and self.scheme is not None:
            return decode(coded, self.scheme, name.rsplit(".", 1)[-1], dtype)
        return self.fused(layer, (name,), rank, dtype)

    def fused(self, layer: int | None, names: Sequence[str], rank: int, dtype: torch.dtype) -> Tensor:
        """Unquantized weights of `rank` one below the other, [sum of outs, in], widened into place part by part."""
        parts = [part for name in names for part in self.read(layer, name, rank)]
        if len(parts) == 1:
            return parts[0].to(dtype)
        rows, columns = sum(len(part) for part in parts), parts[0].shape[1]
        # Memory order follows the files: copying [in, out] into [out, in] would be a slow transposition.
        transposed = parts[0].stride(0) == 1
        joined = torch.empty(columns, rows, dtype=dtype).t() if transposed else torch.empty(rows, columns, dtype=dtype)
        for part, place in zip(parts, joined.split([len(part) for part in parts]), strict=True):
            place.copy_(part)
        return joined

    def rank_rows(self, name: str) -> int:
        """Rows of `embed` or `lm_head` that each rank holds, padding included."""
        return vocabulary_rows(self.config, name, self.tp)


def split_expert(name: str) -> tuple[str, int | None]:
    """("up_gate", 3) for `experts.3.up_gate`; (name, None) for a weight of no routed expert."""
    if name.startswith("experts."):
        _, number, projection = name.split(".")
        return projection, int(number)
    return name, None


class StoredWeights(Weights):
    """Weights in files: a source cut into `tp` simulated ranks, or an artifact with a set of files a rank."""

    def __init__(
        self, config: ModelConfig, layout: Layout, layout_name: str, shards: Sequence[Shards], *, tp: int,
        scheme: Scheme | None = None, kept_rates: Mapping[int, Sequence[float]] | None = None,
    ) -> None:  # fmt: skip
        self.config, self.tp, self.scheme, self.layout = config, tp, scheme, layout_name
        self._table = layout
        self._shards = tuple(shards)
        self._readers = tuple(ByteReader(each) for each in shards)
        self._kept_rates = dict(kept_rates or {})
        self._forms = tuple(feed_forward_form(config, layout, layer, shards[0].tensors) for layer in range(config.num_layers))

    def close(self) -> None:
        """See `Weights.close`."""
        for reader in self._readers:
            reader.close()

    def names(self, layer: int | None) -> tuple[str, ...]:
        """See `Weights.names`."""
        if layer is None:
            return tuple(name for name in self._table.top if name != "lm_head" or not self.config.tie_word_embeddings)
        tables = [self._table.norms, self._table.attention[self.config.layer_types[layer]]]
        form = self._forms[layer]
        tables.append(self._table.feed_forward[form])
        if self.config.shared_intermediate_sizes[layer]:
            tables.append(self._table.shared)
        experts = range(self.config.num_experts) if form in self._table.expert else ()
        return (*(name for table in tables for name in table), *(f"experts.{e}.{p}" for e in experts for p in ("up_gate", "down")))

    def stored(self, layer: int | None, name: str, rank: int) -> tuple[str, ...]:
        """See `Weights.stored`."""
        quantized = self._quantized(layer, name, rank)
        return quantized if quantized else tuple(self._file(part, layer, name) for part in self._parts(layer, name))

    def expected_tensors(self, rank: int) -> Mapping[str, Expected]:
        """See `Weights.expected_tensors`."""
        shards = self._shards[rank if self._table.per_rank else 0]
        return expected_tensors(self.config, self._table, self.tp, self.scheme, shards.tensors)

    def rates(self, layer: int, rank: int) -> Sequence[float]:
        """See `Weights.rates`."""
        heads = self.config.num_attention_heads
        rates = self._kept_rates.get(layer) or lightning.decay_rates(heads, layer, self.config.num_layers)
        each = heads // self.tp
        return rates[rank * each : (rank + 1) * each]

    def read(self, layer: int | None, name: str, rank: int) -> tuple[Tensor, ...]:
        """See `Weights.read`."""
        if name in VOCABULARY_WEIGHTS:
            return (self.rows(name, rank, 0, self.rank_rows(name)),)
        return tuple(self._read_part(part, layer, name, rank) for part in self._parts(layer, name))

    def rows(self, name: str, rank: int, start: int, stop: int) -> Tensor:
        """See `Weights.rows`."""
        (part,) = self._table.top[name]
        first = 0 if self._table.per_rank else rank * self.rank_rows(name)
        last = self.rank_rows(name) if self._table.per_rank else self.config.vocab_size
        low, high = min(first + start, last), min(first + stop, last)
        tensor = self._tensor(part.file, rank)
        if low == high:
            return torch.zeros(stop - start, self.config.hidden_size, dtype=getattr(torch, TORCH_NAMES[tensor.dtype]))
        box: Box = tuple((low, high) if axis == "V" else (0, self.config.hidden_size) for axis in part.axes)
        found = self._load(tensor, tensor.shape, box, rank)
        found = found.t() if part.transposed else found
        padding = stop - start - len(found)
        return torch.cat((found, found.new_zeros(padding, found.shape[1]))) if padding else found

    def coded(self, layer: int | None, name: str, rank: int) -> Coded | None:
        """See `Weights.coded`."""
        quantized = self._quantized(layer, name, rank)
        if not quantized or self.scheme is None:
            return None
        codes, *scales = (self._load_whole(file, rank) for file in quantized)
        if len(scales) > 1 and not bool((scales[1] > 0).all() & scales[1].isfinite().all()):
            raise MalformedInput("activation_scale is not above 0 and finite", where=quantized[2], got=scales[1].tolist())
        return Coded(
            codes=unpack(codes, self.scheme), weight_scale=scales[0], activation_scale=scales[1] if len(scales) > 1 else None
        )

    def _parts(self, layer: int | None, name: str) -> tuple[Part, ...]:
        if layer is None:
            return self._table.top[name]
        projection, expert = split_expert(name)
        form = self._forms[layer]
        if expert is not None:
            return self._table.expert[form][projection]
        tables = (self._table.norms, self._table.attention[self.config.layer_types[layer]], self._table.feed_forward[form])
        return next((table[name] for table in tables if name in table), None) or self._table.shared[name]

    def _file(self, part: Part, layer: int | None, name: str) -> str:
        if layer is None:
            return part.file
        return f"model.layers.{layer}.{part.file.format(e=split_expert(name)[1])}"

    def _quantized(self, layer: int | None, name: str, rank: int) -> tuple[str, ...]:
        """Names of the stored codes and scales, empty for an unquantized weight."""
        if self.scheme is None or layer is None or split_expert(name)[1] is None:
            return ()
        (part,) = self._parts(layer, name)
        stem = self._file(part, layer, name).removesuffix("weight")
        if f"{stem}quant_weight" not in self._shards[rank].tensors:
            return ()
        suffixes = QUANTIZED_SUFFIXES if self.scheme.static else QUANTIZED_SUFFIXES[:2]
        return tuple(stem + suffix for suffix in suffixes)

    def _tensor(self, file: str, rank: int) -> StoredTensor:
        return self._shards[rank if self._table.per_rank else 0].tensors[file]

    def _load(self, tensor: StoredTensor, view: tuple[int, ...], box: Box, rank: int) -> Tensor:
        reader = self._readers[rank if self._table.per_rank else 0]
        flat = torch.from_numpy(reader.read(replace(tensor, shape=view), box))
        return flat.view(getattr(torch, TORCH_NAMES[tensor.dtype])).view(box_shape(box))

    def _load_whole(self, file: str, rank: int) -> Tensor:
        tensor = self._tensor(file, rank)
        return self._load(tensor, tensor.shape, tuple((0, n) for n in tensor.shape), rank)

    def _range(self, axis: str, size: int, part: Part, layer: int | None, name: str, rank: int) -> tuple[int, int]:
        """Slots of one axis that `part` and `rank` take."""
        if part.pick and part.pick[0] == axis:
            slot = part.pick[1]
            if axis == "F":
                heads = self.config.num_attention_heads // self.tp
                keys = (size - heads) // 2
                return {"q": (0, heads), "k": (heads, heads + keys), "v": (heads + keys, size)}[str(slot)]
            index = split_expert(name)[1] if slot == "expert" else int(slot)
            return (index or 0, (index or 0) + 1)
        if self._table.per_rank or axis not in CUT_AXES:
            return 0, size
        if axis == "K":
            return kv_heads(self.config, self.tp, rank)
        return rank * size // self.tp, (rank + 1) * size // self.tp

    def _read_part(self, part: Part, layer: int | None, name: str, rank: int) -> Tensor:
        sizes = axis_sizes(self.config, layer, self.tp if self._table.per_rank else 1)
        view = tuple(sizes[axis] for axis in part.axes)
        box: Box = tuple(self._range(axis, sizes[axis], part, layer, name, rank) for axis in part.axes)
        taken = dict(zip(part.axes, box_shape(box), strict=True))
        tensor = self._load(self._tensor(self._file(part, layer, name), rank), view, box, rank)
        if not part.inner:
            return tensor.reshape(product(taken, part.out))
        out, inner = product(taken, part.out), product(taken, part.inner)
        if part.transposed:
            return tensor.reshape(inner, out).t()
        matrix = tensor.reshape(out, inner)
        return put_back(matrix, self.config) if part.permuted and self.config.rope_permuted else matrix


def put_back(rows: Tensor, config: ModelConfig) -> Tensor:
    """q or k rows [heads·D, H] of a `proportional` rope back in the original order.

    The stored rows of a head have original dims [0, r/2) at [0, r/2) and [r/2, r) at [D/2, D/2 + r/2); the dims that do not
    rotate fill the other slots in order.
    """
    size, half = config.head_dim, config.rotary_dim // 2
    first, second = list(range(half)), list(range(size // 2, size // 2 + half))
    rest = [slot for slot in range(size) if slot not in {*first, *second}]
    return rows.unflatten(0, (-1, size))[:, [*first, *second, *rest]].flatten(0, 1)
