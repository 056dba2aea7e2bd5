"""Canonical logical parameters: what a model of a given config is made of, independent of how anyone stores it.

A parameter has a *role* with named axes; its name is the role with numbers filled in. Axes: V vocabulary, H hidden,
N heads (key/value heads where the role is one of softmax k and v), D head_dim, E experts, I intermediate,
S shared intermediate, `1` a single row. Matrices are [out, in]; `q` is [N, D, H]: the out axis is split into heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mxconv.config import FULL, ModelConfig

# role → axes, in canonical order
ROLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "embed": ("V", "H"),
        "final_norm": ("H",),
        "lm_head": ("V", "H"),
        "layers.{l}.attn_norm": ("H",),
        "layers.{l}.mlp_norm": ("H",),
        "layers.{l}.q": ("N", "D", "H"),
        "layers.{l}.k": ("N", "D", "H"),
        "layers.{l}.v": ("N", "D", "H"),
        "layers.{l}.attn_out": ("H", "N", "D"),
        "layers.{l}.output_gate": ("N", "D", "H"),
        "layers.{l}.linear_norm": ("N", "D"),
        "layers.{l}.router": ("E", "H"),
        "layers.{l}.experts.{e}.gate": ("I", "H"),
        "layers.{l}.experts.{e}.up": ("I", "H"),
        "layers.{l}.experts.{e}.down": ("H", "I"),
        "layers.{l}.mlp.gate": ("I", "H"),
        "layers.{l}.mlp.up": ("I", "H"),
        "layers.{l}.mlp.down": ("H", "I"),
        "layers.{l}.shared.gate": ("S", "H"),
        "layers.{l}.shared.up": ("S", "H"),
        "layers.{l}.shared.down": ("H", "S"),
        "layers.{l}.shared.coefficient": ("1", "H"),
    }
)

_EVERY_LAYER = ("attn_norm", "mlp_norm", "q", "k", "v", "attn_out")
_LINEAR_ONLY = ("output_gate", "linear_norm")
_MLP = ("gate", "up", "down")
_SHARED = ("gate", "up", "down", "coefficient")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One logical parameter: `name` = role with its layer and expert, `shape` along the role's canonical `axes`."""

    name: str
    role: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    layer: int | None = None
    expert: int | None = None
    full_attention: bool = False
    """q, k, v of a softmax layer: the kind that carries rotary embeddings and may be shared between query heads."""


def axis_sizes(config: ModelConfig, role: str, layer: int | None) -> Mapping[str, int]:
    """Size of every axis name for `role` in `layer`."""
    kv_role = layer is not None and config.layer_types[layer] == FULL and role in ("layers.{l}.k", "layers.{l}.v")
    return {
        "V": config.vocab_size,
        "H": config.hidden_size,
        "N": config.num_key_value_heads if kv_role else config.num_attention_heads,
        "D": config.head_dim,
        "E": config.num_experts,
        "I": config.intermediate_size,
        "S": 0 if layer is None else config.shared_intermediate_sizes[layer],
        "1": 1,
    }


def parameter(config: ModelConfig, role: str, layer: int | None = None, expert: int | None = None) -> Parameter:
    """The parameter of `role` at `layer` and `expert`."""
    sizes = axis_sizes(config, role, layer)
    return Parameter(
        name=role.replace("{l}", str(layer)).replace("{e}", str(expert)),
        role=role,
        axes=ROLES[role],
        shape=tuple(sizes[axis] for axis in ROLES[role]),
        layer=layer,
        expert=expert,
        full_attention=layer is not None and config.layer_types[layer] == FULL,
    )


def parameters(config: ModelConfig, *, dense_mlp: bool) -> Iterator[Parameter]:
    """Every parameter of a model of `config`, in reading order: layer by layer, experts by number.

    `dense_mlp`: a one-expert model that stores a plain `mlp` in place of a router and an expert.
    """
    yield parameter(config, "embed")
    for layer, kind in enumerate(config.layer_types):
        roles = [*_EVERY_LAYER, *(() if kind == FULL else _LINEAR_ONLY)]
        if dense_mlp:
            roles += [f"mlp.{part}" for part in _MLP]
        else:
            roles.append("router")
        if config.shared_intermediate_sizes[layer]:
            roles += [f"shared.{part}" for part in _SHARED]
        for role in roles:
            yield parameter(config, f"layers.{{l}}.{role}", layer)
        for expert in range(0 if dense_mlp else config.num_experts):
            for part in _MLP:
                yield parameter(config, f"layers.{{l}}.experts.{{e}}.{part}", layer, expert)
    yield parameter(config, "final_norm")
    if not config.tie_word_embeddings:
        yield parameter(config, "lm_head")
