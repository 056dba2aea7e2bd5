"""What the files of a rank must hold, by the runtime's own tables: every tensor's dtype and shape, and how stored ones differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mxconv.checkpoint import StoredTensor
from mxconv.config import LINEAR, ModelConfig
from mxconv.errors import IncompleteInput, MalformedInput, MxconvError, printable
from mxconv.quantize.schemes import Scheme
from mxconv.runtime.coded import PACKED_CODES, scale_shape
from mxconv.runtime.decay import buffer_shapes
from mxconv.runtime.layouts import Layout, Part
from mxconv.runtime.sizes import axis_sizes, product, vocabulary_rows
from mxconv.tensors import FLOAT_DTYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """One tensor that a file must hold: safetensors dtype codes allowed, and shape."""

    dtypes: frozenset[str]
    shape: tuple[int, ...]


def feed_forward_form(config: ModelConfig, layout: Layout, layer: int, present: Mapping[str, StoredTensor]) -> str:
    """`experts`, `stacked` or `dense`: which form the feed-forward of `layer` has, seen from the names in the files."""
    for form, name in layout.marker.items():
        if f"model.layers.{layer}.{name}" in present and (form != "dense" or config.num_experts == 1):
            return form
    return "experts"


def _shape(part: Part, sizes: dict[str, int]) -> tuple[int, ...]:
    leading = tuple(sizes[axis] for axis in part.leading)
    if not part.inner:
        return (*leading, product(sizes, part.out))
    out, inner = product(sizes, part.out), product(sizes, part.inner)
    return (*leading, inner, out) if part.transposed else (*leading, out, inner)


class _Rank:
    """Builds the expectation of one set of files."""

    def __init__(
        self, config: ModelConfig, layout: Layout, tp: int, scheme: Scheme | None, present: Mapping[str, StoredTensor]
    ) -> None:
        self.config, self.layout, self.scheme, self.present = config, layout, scheme, present
        self.ranks = tp if layout.per_rank else 1
        self.found: dict[str, Expected] = {}

    def add(self, name: str, shape: tuple[int, ...], dtypes: frozenset[str] = FLOAT_DTYPES) -> None:
        self.found[name] = Expected(dtypes=dtypes, shape=shape)

    def top(self) -> None:
        sizes = axis_sizes(self.config, None, self.ranks)
        for name, (part,) in self.layout.top.items():
            if name == "lm_head" and self.config.tie_word_embeddings and (self.layout.per_rank or part.file not in self.present):
                continue
            if "V" in part.axes and self.layout.per_rank:
                sizes["V"] = vocabulary_rows(self.config, name, self.ranks)
            self.add(part.file, _shape(part, sizes))

    def layer(self, layer: int) -> None:
        prefix = f"model.layers.{layer}."
        sizes = axis_sizes(self.config, layer, self.ranks)
        form = feed_forward_form(self.config, self.layout, layer, self.present)
        tables = [self.layout.norms, self.layout.attention[self.config.layer_types[layer]], self.layout.feed_forward[form]]
        if self.config.shared_intermediate_sizes[layer]:
            tables.append(self.layout.shared)
        for table in tables:
            for name, parts in table.items():
                for part in parts:
                    router = name == "router" and self.layout.per_rank
                    self.add(prefix + part.file, _shape(part, sizes), frozenset(("F32",)) if router else FLOAT_DTYPES)
        if form in self.layout.expert:
            for expert in range(self.config.num_experts):
                for parts in self.layout.expert[form].values():
                    for part in parts:
                        self.expert(prefix + part.file.format(e=expert), part, sizes)
        if self.config.layer_types[layer] == LINEAR and self.config.dialect == "minimax" and not self.layout.per_rank:
            for buffer, shape in buffer_shapes(self.config.num_attention_heads, self.config.block_size).items():
                if f"{prefix}self_attn.{buffer}" in self.present:
                    self.add(f"{prefix}self_attn.{buffer}", shape)

    def expert(self, file: str, part: Part, sizes: dict[str, int]) -> None:
        scheme = self.scheme
        if scheme is None or file in self.present:
            self.add(file, _shape(part, sizes))
            return
        stem = file.removesuffix("weight")
        out, inner = product(sizes, part.out), product(sizes, part.inner)
        self.add(f"{stem}quant_weight", (inner // PACKED_CODES[scheme.weight], out), frozenset(("I8",)))
        self.add(f"{stem}weight_scale", scale_shape(scheme, out, inner), frozenset(("F32",)))
        if scheme.static:
            self.add(f"{stem}activation_scale", (1,), frozenset(("F32",)))


def expected_tensors(
    config: ModelConfig, layout: Layout, tp: int, scheme: Scheme | None, present: Mapping[str, StoredTensor]
) -> Mapping[str, Expected]:
    """Name in the files → what it must be, for one rank's files (or the whole source's).

    `present` decides only what may take several forms: dense or routed feed-forward, a quantized or a kept expert, a stored
    head beside tied embeddings, decay buffers.
    """
    rank = _Rank(config, layout, tp, scheme, present)
    rank.top()
    for layer in range(config.num_layers):
        rank.layer(layer)
    return rank.found


def differences(expected: Mapping[str, Expected], present: Mapping[str, StoredTensor], where: object) -> Iterator[MxconvError]:
    """Every expected tensor that is missing or has another dtype or shape."""
    for name, wanted in expected.items():
        stored = present.get(name)
        if stored is None:
            yield IncompleteInput(f"tensor {printable(name)} is missing", where=where, expected=list(wanted.shape))
        elif stored.shape != wanted.shape:
            yield MalformedInput(
                f"tensor {printable(name)} has another shape", where=where, expected=list(wanted.shape), got=list(stored.shape)
            )
        elif stored.dtype not in wanted.dtypes:
            yield MalformedInput(
                f"tensor {printable(name)} has another dtype", where=where, expected=" or ".join(sorted(wanted.dtypes)),
                got=stored.dtype,
            )  # fmt: skip
