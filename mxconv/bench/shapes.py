"""Shapes of synthetic models: M1's own layers, one of each kind, whole or as one of eight ranks; and one for a laptop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mxconv.config import ModelConfig, parse_config

_M1 = MappingProxyType(
    {
        "model_type": "minimax_m1", "hidden_size": 6144, "intermediate_size": 9216, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "rotary_dim": 64, "rope_theta": 10_000_000, "num_local_experts": 32,
        "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "hidden_act": "silu", "postnorm": True, "tie_word_embeddings": False,
        "max_position_embeddings": 10_240_000, "shared_intermediate_size": 0, "layernorm_full_attention_alpha": 3.5565588200778455,
        "layernorm_linear_attention_alpha": 3.5565588200778455, "layernorm_mlp_alpha": 3.5565588200778455,
        "layernorm_full_attention_beta": 1.0, "layernorm_linear_attention_beta": 1.0, "layernorm_mlp_beta": 1.0,
        "vocab_size": 8192,
    }
)  # fmt: skip
_SMALL = MappingProxyType(
    {
        **_M1, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
        "rotary_dim": 32, "num_local_experts": 8,
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticShape:
    """Config keys without the layers, and the tensor-parallel ranks of which one is computed."""

    keys: Mapping[str, object]
    tp: int
    summary: str


SHAPES: Mapping[str, SyntheticShape] = MappingProxyType(
    {
        "m1": SyntheticShape(keys=_M1, tp=1, summary="MiniMax-M1's layers, whole"),
        "m1-tp8": SyntheticShape(keys=_M1, tp=8, summary="MiniMax-M1's layers, one of 8 ranks"),
        "small": SyntheticShape(keys=_SMALL, tp=1, summary="hidden 512, 8 experts"),
    }
)


def synthetic_config(shape: SyntheticShape, layers: str = "ls") -> ModelConfig:
    """The config of `shape` with one layer a letter: l lightning, s softmax."""
    kinds = [int(kind == "s") for kind in layers]
    return parse_config({**shape.keys, "num_hidden_layers": len(kinds), "attn_type_list": kinds}, "synthetic config")
