"""Units for transformers' decay buffers: comparing stored ones with the formula, and writing them for the minimax dialect."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from mxconv.config import LINEAR, ModelConfig
from mxconv.mapping.decay import DECAY_BUFFERS, decay_shapes
from mxconv.plan.values import Output, Unit
from mxconv.source import Source
from mxconv.tensors import TensorSpec, whole


def buffer_names(layer: int) -> dict[str, str]:
    """Buffer → tensor name in `layer`."""
    return {buffer: f"model.layers.{layer}.self_attn.{buffer}" for buffer in DECAY_BUFFERS}


def check_units(source: Source) -> Iterator[Unit]:
    """One unit for each lightning layer with stored decay buffers, and one for a stored head beside tied embeddings."""
    for layer, kind in enumerate(source.config.layer_types):
        names = [name for name in buffer_names(layer).values() if name in source.bound.dropped]
        if kind == LINEAR and names:
            sizes = [source.specs[0][name].size_bytes for name in names]
            yield Unit(
                id=f"check model.layers.{layer} decay buffers", op="check_decay", group="decay", layer=layer,
                reads=tuple((0, name) for name in names), outputs=(), read_bytes=sum(sizes), memory_bytes=8 * max(sizes),
            )  # fmt: skip
    if source.tied_head_stored:
        size = 2 * source.config.vocab_size * source.config.hidden_size
        yield Unit(
            id="check lm_head against embedding", op="check_tied", group="embedding", layer=None,
            reads=((0, "model.embed_tokens.weight"), (0, "lm_head.weight")), outputs=(), read_bytes=2 * size, memory_bytes=64 << 20,
        )  # fmt: skip


def decay_units(config: ModelConfig, wanted: Collection[str] | None) -> Iterator[Unit]:
    """Units that write the four buffers of every lightning layer (float32); only those in `wanted`, where that is given."""
    shapes = decay_shapes(config.num_attention_heads, config.block_size)
    for layer, kind in enumerate(config.layer_types):
        if kind != LINEAR:
            continue
        specs = [
            TensorSpec(name=name, dtype="F32", shape=shapes[buffer])
            for buffer, name in buffer_names(layer).items()
            if wanted is None or name in wanted
        ]
        if not specs:
            continue
        outputs = tuple(Output(rank=0, spec=spec, box=whole(spec.shape)) for spec in specs)
        yield Unit(
            id=f"model.layers.{layer}.self_attn decay buffers", op="decay", group="decay", layer=layer, reads=(), outputs=outputs,
            read_bytes=0, memory_bytes=6 * max(spec.size_bytes for spec in specs),
        )  # fmt: skip
