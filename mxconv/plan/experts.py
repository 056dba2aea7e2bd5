"""Quantize units: one projection of one expert, the tensors that hold it on every rank, and what must divide.

Names and shapes are those of the `fastdeploy` layout (formats.md §2): `quant_weight` int8 bytes [in/2, out] for int4 and
[in, out] for e4m3, `weight_scale` float32 in the scheme's own orientation, `activation_scale` float32 [1] when static.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mxconv.config import ModelConfig
from mxconv.mapping.bind import Bound
from mxconv.mapping.containers import Container, Part
from mxconv.mapping.fastdeploy import EXPERT
from mxconv.mapping.rules import fill
from mxconv.plan.pieces import BLOCK_BYTES
from mxconv.plan.values import Coded, Output, Unit
from mxconv.quantize.schemes import FP8_BLOCK, PROJECTIONS, Scheme
from mxconv.tensors import TensorSpec, whole

SOURCES = {"up_gate_proj": ("gate", "up"), "down_proj": ("down",)}


def projection_shape(config: ModelConfig, projection: str, ranks: int) -> tuple[int, int]:
    """(in, out) features of `projection` on one of `ranks` ranks."""
    each = config.intermediate_size // ranks
    return (config.hidden_size, 2 * each) if projection == "up_gate_proj" else (each, config.hidden_size)


def coded_specs(prefix: str, scheme: Scheme, features: tuple[int, int], rank: int) -> Coded:
    """The tensors that `scheme` stores for the projection `prefix` of (in, out) `features`."""
    n_in, n_out = features
    step = scheme.group_size or FP8_BLOCK
    shapes = {
        ("group", "out,in"): (n_out, n_in // step),
        ("group", "in,out"): (n_in // step, n_out),
        ("block", "in,out"): (n_in // step, n_out // step),
        ("channel", "out"): (n_out,),
        ("tensor", "one"): (1,),
    }
    codes = (n_in // 2, n_out) if scheme.weight == "int4" else (n_in, n_out)
    scale = shapes[scheme.granularity, scheme.scale_orientation]
    return Coded(
        rank=rank,
        codes=TensorSpec(name=f"{prefix}.quant_weight", dtype="I8", shape=codes),
        scale=TensorSpec(name=f"{prefix}.weight_scale", dtype="F32", shape=scale),
        activation=TensorSpec(name=f"{prefix}.activation_scale", dtype="F32", shape=(1,)) if scheme.static else None,
    )


def quantize_units(config: ModelConfig, scheme: Scheme, bound: Bound, ranks: int, layers: Sequence[int]) -> Iterator[Unit]:
    """One unit for each projection of each expert of `layers`."""
    for layer in layers:
        for expert in range(config.num_experts):
            for projection in PROJECTIONS:
                yield _unit(config, scheme, bound, ranks, layer, expert, projection)


def _unit(config: ModelConfig, scheme: Scheme, bound: Bound, ranks: int, layer: int, expert: int, projection: str) -> Unit:
    prefix = fill(EXPERT + projection, layer, expert)
    features = projection_shape(config, projection, ranks)
    coded = tuple(coded_specs(prefix, scheme, features, rank) for rank in range(ranks))
    specs = [(c.rank, spec) for c in coded for spec in (c.codes, c.scale, c.activation) if spec is not None]
    sources = tuple(f"layers.{layer}.experts.{expert}.{part}" for part in SOURCES[projection])
    held = {(c.rank, c.name): c for name in sources for c, _ in bound.holders.get(name, ())}
    share = {key: max(1, len({part.stack for part in c.parts})) for key, c in held.items()}
    outputs = tuple(Output(rank=rank, spec=spec, box=whole(spec.shape)) for rank, spec in specs)
    holders = [holder for name in sources for holder in bound.holders.get(name, ())]
    whole_source = 0 if all(streams(c, part) for c, part in holders) else sum(c.size_bytes // share[key] for key, c in held.items())
    return Unit(
        id=prefix, op="quantize", group="experts", layer=layer, expert=expert, projection=projection, sources=sources,
        reads=tuple(held), outputs=outputs, coded=coded,
        read_bytes=sum(c.size_bytes // share[key] for key, c in held.items()),
        memory_bytes=sum(output.size_bytes for output in outputs) + whole_source + 6 * BLOCK_BYTES,
    )  # fmt: skip


def streams(container: Container, part: Part) -> bool:
    """Rows of the whole parameter are runs of the file, so that blocks of them can be read without the rest."""
    return container.dims[-1] == (part.axes[-1],) and part.origin[-1] == 0 and container.rank == 0


def quantize_problems(config: ModelConfig, scheme: Scheme, ranks: int) -> list[str]:
    """What `scheme` cannot cut at `ranks` ranks, in words; empty when everything divides."""
    hidden, each = config.hidden_size, config.intermediate_size / ranks
    found = []
    step = scheme.group_size if scheme.granularity == "group" else FP8_BLOCK if scheme.granularity == "block" else 2
    what = {"group": f"groups of {step}", "block": f"blocks of {FP8_BLOCK}"}.get(scheme.granularity, "pairs of packed codes")
    if step and each % step:
        found.append(f"w2 would have {each / step:g} {what} a rank (intermediate_size {config.intermediate_size})")
    if step and hidden % step:
        found.append(f"hidden_size {hidden} is no multiple of {step} ({what})")
    rotation_in = {"up_gate_proj": hidden, "down_proj": each}
    for projection, block in scheme.rotation.items():
        if block and rotation_in[projection] % block:
            found.append(
                f"the input of {projection}, {rotation_in[projection]:g} a rank, is no multiple of the Hadamard block {block}"
            )
    return found
