"""The `minimax-m1` dialect: MiniMax-Text-01, MiniMax-M1-40k and -80k as released.

17 patterns cover the 8,243 tensors of MiniMax-M1. `qkv_proj` of lightning layers is read per head: rows (head, {q, k, v}, dim).
The shared expert, its coefficient and the dense mlp do not occur in M1, but in the original modeling code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxconv.config import FULL, LINEAR, ModelConfig
from mxconv.mapping.rules import Rule, Table

_L = "model.layers.{l}."
_MOE = _L + "block_sparse_moe."

COMMON_RULES = (
    Rule(pattern="model.embed_tokens.weight", holds=("embed",), axes="V H", group="embedding"),
    Rule(pattern="lm_head.weight", holds=("lm_head",), axes="V H", group="embedding"),
    Rule(pattern="model.norm.weight", holds=("final_norm",), axes="H", group="norm"),
    Rule(pattern=_L + "input_layernorm.weight", holds=("layers.{l}.attn_norm",), axes="H", group="norm"),
    Rule(pattern=_L + "post_attention_layernorm.weight", holds=("layers.{l}.mlp_norm",), axes="H", group="norm"),
    Rule(
        pattern=_L + "self_attn.qkv_proj.weight", holds=("layers.{l}.q", "layers.{l}.k", "layers.{l}.v"),
        axes="(N * D) H", layers=LINEAR, group="lightning",
    ),
    Rule(
        pattern=_L + "self_attn.output_gate.weight", holds=("layers.{l}.output_gate",), axes="(N D) H",
        layers=LINEAR, group="lightning",
    ),
    Rule(pattern=_L + "self_attn.norm.weight", holds=("layers.{l}.linear_norm",), axes="(N D)", layers=LINEAR, group="lightning"),
    Rule(
        pattern=_L + "self_attn.out_proj.weight", holds=("layers.{l}.attn_out",), axes="H (N D)", layers=LINEAR, group="lightning"
    ),
    Rule(pattern=_L + "self_attn.q_proj.weight", holds=("layers.{l}.q",), axes="(N D) H", layers=FULL, group="attention"),
    Rule(pattern=_L + "self_attn.k_proj.weight", holds=("layers.{l}.k",), axes="(N D) H", layers=FULL, group="attention"),
    Rule(pattern=_L + "self_attn.v_proj.weight", holds=("layers.{l}.v",), axes="(N D) H", layers=FULL, group="attention"),
    Rule(pattern=_L + "self_attn.o_proj.weight", holds=("layers.{l}.attn_out",), axes="H (N D)", layers=FULL, group="attention"),
    Rule(pattern=_MOE + "gate.weight", holds=("layers.{l}.router",), axes="E H", group="router"),
    Rule(pattern=_MOE + "experts.{e}.w1.weight", holds=("layers.{l}.experts.{e}.gate",), axes="I H", group="experts"),
    Rule(pattern=_MOE + "experts.{e}.w2.weight", holds=("layers.{l}.experts.{e}.down",), axes="H I", group="experts"),
    Rule(pattern=_MOE + "experts.{e}.w3.weight", holds=("layers.{l}.experts.{e}.up",), axes="I H", group="experts"),
)  # fmt: skip

SHARED_RULES = (
    Rule(pattern=_L + "shared_mlp.gate_proj.weight", holds=("layers.{l}.shared.gate",), axes="S H", group="shared"),
    Rule(pattern=_L + "shared_mlp.up_proj.weight", holds=("layers.{l}.shared.up",), axes="S H", group="shared"),
    Rule(pattern=_L + "shared_mlp.down_proj.weight", holds=("layers.{l}.shared.down",), axes="H S", group="shared"),
    Rule(pattern=_L + "coefficient.weight", holds=("layers.{l}.shared.coefficient",), axes="1 H", group="shared"),
)

DENSE_RULES = (
    Rule(pattern=_L + "mlp.gate_proj.weight", holds=("layers.{l}.mlp.gate",), axes="I H", group="shared"),
    Rule(pattern=_L + "mlp.up_proj.weight", holds=("layers.{l}.mlp.up",), axes="I H", group="shared"),
    Rule(pattern=_L + "mlp.down_proj.weight", holds=("layers.{l}.mlp.down",), axes="H I", group="shared"),
)

MINIMAX_M1 = Table(name="minimax-m1", rules=(*COMMON_RULES, *SHARED_RULES, *DENSE_RULES), first_file=0)

# Keys of transformers' dialect that the released config spells otherwise or does not have.
MINIMAX_ONLY_KEYS = frozenset(
    "layer_types block_size full_attn_alpha_factor full_attn_beta_factor linear_attn_alpha_factor linear_attn_beta_factor "
    "mlp_alpha_factor mlp_beta_factor rope_parameters partial_rotary_factor".split()
)


def m1_config(config: ModelConfig) -> dict[str, Any]:
    """`config` with the keys of the released MiniMax-M1 config, whichever dialect it came from."""
    if config.dialect == "minimax-m1":
        return dict(config.raw)
    kept: Mapping[str, Any] = {k: v for k, v in config.raw.items() if k not in MINIMAX_ONLY_KEYS}
    return {
        **kept,
        "architectures": ["MiniMaxM1ForCausalLM"],
        "model_type": "minimax_m1",
        "attn_type_list": [int(kind == FULL) for kind in config.layer_types],
        "head_dim": config.head_dim,
        "layernorm_full_attention_alpha": config.full_attention_alpha,
        "layernorm_full_attention_beta": config.full_attention_beta,
        "layernorm_linear_attention_alpha": config.linear_attention_alpha,
        "layernorm_linear_attention_beta": config.linear_attention_beta,
        "layernorm_mlp_alpha": config.mlp_alpha,
        "layernorm_mlp_beta": config.mlp_beta,
        "postnorm": True,
        "rope_theta": config.rope_theta,
        "rotary_dim": config.rotary_dim,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
    }
