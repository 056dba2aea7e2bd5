"""The `minimax` dialect: transformers' MiniMaxForCausalLM, as the `-hf` repositories hold it.

Names are those of `minimax-m1`, with two differences: experts may be stacked (newer saves), and every lightning layer
carries four decay buffers, which are compared with the formula and then dropped (they are a function of the config).

Written so that *unpatched* transformers computes the original model (formats.md §1): `rope_type: proportional`, whose
zero frequencies leave the dims after rotary_dim alone, needs q and k rows permuted per head, and the decay buffers are
written from the original formula, since transformers' own differs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mxconv.config import ModelConfig
from mxconv.errors import UsageError
from mxconv.mapping.minimax_m1 import COMMON_RULES
from mxconv.mapping.rules import Rule, Table

_L = "model.layers.{l}."
_DECAY = "a decay buffer: compared with the model's formula, not stored"
DECAY_BUFFERS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")

MINIMAX = Table(
    name="minimax",
    rules=(
        *COMMON_RULES,
        Rule(pattern=_L + "mlp.gate.weight", holds=("layers.{l}.router",), axes="E H", group="router", read_only=True),
        Rule(
            pattern=_L + "mlp.experts.gate_up_proj", holds=("layers.{l}.experts.{e}.gate", "layers.{l}.experts.{e}.up"),
            axes="E (* I) H", group="experts", read_only=True,
        ),
        Rule(
            pattern=_L + "mlp.experts.down_proj", holds=("layers.{l}.experts.{e}.down",), axes="E H I", group="experts",
            read_only=True,
        ),
        *(Rule(pattern=_L + f"self_attn.{name}", group="decay", dropped=_DECAY) for name in DECAY_BUFFERS),
    ),
    first_file=1,
    rope_permuted=True,
)  # fmt: skip

M1_ONLY_KEYS = frozenset(
    "attn_type_list postnorm layernorm_full_attention_alpha layernorm_full_attention_beta layernorm_linear_attention_alpha "
    "layernorm_linear_attention_beta layernorm_mlp_alpha layernorm_mlp_beta rotary_dim rope_theta rope_scaling auto_map "
    "shared_intermediate_size shared_moe_mode torch_dtype norm_topk_prob moe_num_experts mxconv".split()
)


def minimax_problems(config: ModelConfig, *, dense_mlp: bool) -> list[UsageError]:
    """What the minimax dialect cannot say about a model of `config`."""
    reasons = []
    if not config.postnorm:
        reasons.append("postnorm is false, and this dialect is always true")
    if any(config.shared_intermediate_sizes):
        reasons.append("it has shared experts, and this dialect has none")
    if dense_mlp:
        reasons.append("it has a dense mlp, and this dialect has none")
    return [
        UsageError(f"the minimax dialect cannot hold this model: {reason}", hint="choose --layout minimax-m1") for reason in reasons
    ]


def minimax_config(config: ModelConfig) -> dict[str, Any]:
    """`config` with the keys of transformers' MiniMaxConfig; dtype float32, since a bf16 load rounds the decay buffers."""
    kept = {k: v for k, v in config.raw.items() if k not in M1_ONLY_KEYS}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rotary_dim < config.head_dim:
        rope = {
            "rope_type": "proportional",
            "partial_rotary_factor": config.rotary_dim / config.head_dim,
            "rope_theta": config.rope_theta ** (config.head_dim / config.rotary_dim),
        }
    return {
        **kept,
        "architectures": ["MiniMaxForCausalLM"],
        "model_type": "minimax",
        "dtype": "float32",
        "head_dim": config.head_dim,
        "layer_types": list(config.layer_types),
        "block_size": config.block_size,
        "full_attn_alpha_factor": config.full_attention_alpha,
        "full_attn_beta_factor": config.full_attention_beta,
        "linear_attn_alpha_factor": config.linear_attention_alpha,
        "linear_attn_beta_factor": config.linear_attention_beta,
        "mlp_alpha_factor": config.mlp_alpha,
        "mlp_beta_factor": config.mlp_beta,
        "rope_parameters": rope,
    }


def permuted_order(head_dim: int, rotary_dim: int) -> np.ndarray:
    """int64 [head_dim]: permuted[i] = original[order[i]] along D.

    Original dims [0, r/2) and [r/2, r) sit at [0, r/2) and [D/2, D/2 + r/2), where rotate-half over the whole head pairs them.
    """
    half, quarter = head_dim // 2, rotary_dim // 2
    order = np.empty(head_dim, np.int64)
    order[:quarter] = np.arange(quarter)
    order[half : half + quarter] = np.arange(quarter, rotary_dim)
    order[quarter:half] = np.arange(rotary_dim, rotary_dim + half - quarter)
    order[half + quarter :] = np.arange(rotary_dim + half - quarter, head_dim)
    return order
