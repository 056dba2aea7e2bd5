"""Where each weight lies in each layout's files: the runtime's own statement of names, orders and orientations.

A logical weight is [out, in]; its out axis is a list of parts, each a stretch of one stored tensor. Axis letters:

    N query heads   K kv heads   D head_dim   3 q, k, v of one head   F the fused heads of a rank: N queries, K keys, K values
    H hidden   I intermediate   S shared intermediate   E experts   2 gate, up   V vocabulary   1 one row

Sources keep [out, in] and the whole model; simulated ranks cut N, K, I, S and V. A fastdeploy artifact keeps [in, out], one set
of files a rank. Sources: the modeling code and released index of MiniMax-M1; transformers' MiniMax; formats.md §2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mxconv.config import FULL, LINEAR

CUT_AXES = frozenset("NKISV")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stretch of the stored tensor `file` (a name below the layer, or a whole name for global weights).

    `out` and `inner` are the axes of the logical weight's out and in sides; a norm has no `inner`. `transposed` says that the
    file holds [in, out]. `pick` restricts one axis: its letter and which slots of it.
    """

    file: str
    out: str
    inner: str = "H"
    transposed: bool = False
    leading: str = ""
    """Axes in front of both, of which `pick` takes one slot (the experts of a stacked tensor)."""
    pick: tuple[str, str | int] | None = None
    permuted: bool = False
    """Rows of q or k that a `proportional` rope puts in another order."""

    @property
    def axes(self) -> str:
        """Stored axes, outermost first."""
        return self.leading + (self.inner + self.out if self.transposed else self.out + self.inner)


Table = Mapping[str, tuple[Part, ...]]


def _table(rows: dict[str, Part | tuple[Part, ...]]) -> Table:
    return MappingProxyType({name: parts if isinstance(parts, tuple) else (parts,) for name, parts in rows.items()})


def _part(file: str, out: str, inner: str = "H", **more: object) -> Part:
    return Part(file=file, out=out, inner=inner, **more)  # type: ignore[arg-type]


def _stored_in_out(file: str, out: str, inner: str = "H", **more: object) -> Part:
    return Part(file=file, out=out, inner=inner, transposed=True, **more)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One layout's tables. `feed_forward` is keyed by form; `marker` names the tensor that shows which form a layer has."""

    name: str
    per_rank: bool
    """Each rank has files of its own and sizes are a rank's; otherwise ranks are cut out of whole tensors."""
    top: Table
    norms: Table
    attention: Mapping[str, Table]
    feed_forward: Mapping[str, Table]
    marker: Mapping[str, str]
    expert: Mapping[str, Table]
    """Weights of expert {e}, for the forms that have experts."""
    shared: Table


_NORMS = _table(
    {
        "attn_norm": _part("input_layernorm.weight", "H", ""),
        "mlp_norm": _part("post_attention_layernorm.weight", "H", ""),
    }
)
_LINEAR_NORM = _part("self_attn.norm.weight", "ND", "")
_QKV = "self_attn.qkv_proj.weight"

_SOURCE_ATTENTION = MappingProxyType(
    {
        LINEAR: _table(
            {
                "q": _part(_QKV, "N3D", pick=("3", 0)),
                "k": _part(_QKV, "N3D", pick=("3", 1)),
                "v": _part(_QKV, "N3D", pick=("3", 2)),
                "output_gate": _part("self_attn.output_gate.weight", "ND"),
                "linear_norm": _LINEAR_NORM,
                "attn_out": _part("self_attn.out_proj.weight", "H", "ND"),
            }
        ),
        FULL: _table(
            {
                "q": _part("self_attn.q_proj.weight", "ND", permuted=True),
                "k": _part("self_attn.k_proj.weight", "KD", permuted=True),
                "v": _part("self_attn.v_proj.weight", "KD"),
                "attn_out": _part("self_attn.o_proj.weight", "H", "ND"),
            }
        ),
    }
)

_EXPERT = "block_sparse_moe.experts.{e}"

SOURCE = Layout(
    name="source",
    per_rank=False,
    top=_table(
        {
            "embed": _part("model.embed_tokens.weight", "V"),
            "final_norm": _part("model.norm.weight", "H", ""),
            "lm_head": _part("lm_head.weight", "V"),
        }
    ),
    norms=_NORMS,
    attention=_SOURCE_ATTENTION,
    feed_forward=MappingProxyType(
        {
            "experts": _table({"router": _part("block_sparse_moe.gate.weight", "E")}),
            "stacked": _table({"router": _part("mlp.gate.weight", "E")}),
            "dense": _table(
                {
                    "mlp.up_gate": (_part("mlp.gate_proj.weight", "I"), _part("mlp.up_proj.weight", "I")),
                    "mlp.down": _part("mlp.down_proj.weight", "H", "I"),
                }
            ),
        }
    ),
    marker=MappingProxyType({"stacked": "mlp.experts.gate_up_proj", "dense": "mlp.gate_proj.weight"}),
    expert=MappingProxyType(
        {
            "experts": _table(
                {
                    "up_gate": (_part(f"{_EXPERT}.w1.weight", "I"), _part(f"{_EXPERT}.w3.weight", "I")),
                    "down": _part(f"{_EXPERT}.w2.weight", "H", "I"),
                }
            ),
            "stacked": _table(
                {
                    "up_gate": _part("mlp.experts.gate_up_proj", "2I", leading="E", pick=("E", "expert")),
                    "down": _part("mlp.experts.down_proj", "H", "I", leading="E", pick=("E", "expert")),
                }
            ),
        }
    ),
    shared=_table(
        {
            "shared.up_gate": (_part("shared_mlp.gate_proj.weight", "S"), _part("shared_mlp.up_proj.weight", "S")),
            "shared.down": _part("shared_mlp.down_proj.weight", "H", "S"),
            "shared.coefficient": _part("coefficient.weight", "1"),
        }
    ),
)

_FUSED = MappingProxyType({name: _stored_in_out(_QKV, "FD", pick=("F", name)) for name in "qkv"})

FASTDEPLOY = Layout(
    name="fastdeploy",
    per_rank=True,
    top=_table(
        {
            "embed": _part("model.embed_tokens.weight", "V"),
            "final_norm": _part("model.norm.weight", "H", ""),
            "lm_head": _stored_in_out("lm_head.weight", "V"),
        }
    ),
    norms=_NORMS,
    attention=MappingProxyType(
        {
            LINEAR: _table(
                {
                    **_FUSED,
                    "output_gate": _stored_in_out("self_attn.output_gate.weight", "ND"),
                    "linear_norm": _LINEAR_NORM,
                    "attn_out": _stored_in_out("self_attn.out_proj.weight", "H", "ND"),
                }
            ),
            FULL: _table({**_FUSED, "attn_out": _stored_in_out("self_attn.o_proj.weight", "H", "ND")}),
        }
    ),
    feed_forward=MappingProxyType(
        {
            "experts": _table({"router": _stored_in_out("block_sparse_moe.gate.weight", "E")}),
            "dense": _table(
                {
                    "mlp.up_gate": _stored_in_out("mlp.up_gate_proj.weight", "2I"),
                    "mlp.down": _stored_in_out("mlp.down_proj.weight", "H", "I"),
                }
            ),
        }
    ),
    marker=MappingProxyType({"dense": "mlp.up_gate_proj.weight"}),
    expert=MappingProxyType(
        {
            "experts": _table(
                {
                    "up_gate": _stored_in_out(f"{_EXPERT}.up_gate_proj.weight", "2I"),
                    "down": _stored_in_out(f"{_EXPERT}.down_proj.weight", "H", "I"),
                }
            )
        }
    ),
    shared=_table(
        {
            "shared.up_gate": _stored_in_out("shared_mlp.up_gate_proj.weight", "2S"),
            "shared.down": _stored_in_out("shared_mlp.down_proj.weight", "H", "S"),
            "shared.coefficient": _stored_in_out("coefficient.weight", "1"),
        }
    ),
)

LAYOUTS: Mapping[str, Layout] = MappingProxyType({"minimax-m1": SOURCE, "minimax": SOURCE, "fastdeploy": FASTDEPLOY})

# The three tensors that replace `X.weight` of a quantized expert projection X.
QUANTIZED_SUFFIXES = ("quant_weight", "weight_scale", "activation_scale")
