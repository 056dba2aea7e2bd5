"""The `fastdeploy` layout: fused, transposed to [in, out], one set of files a tensor-parallel rank (formats.md §2).

Matrices are stored [in, out] (Paddle's orientation); qkv of both kinds of layer is [q_r | k_r | v_r], experts are
[gate_r | up_r]; the vocabulary is padded to a multiple of 64 where the consumer pads it. The router is float32.
Quantized experts replace `.weight` by the tensors that the scheme names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxconv.config import FULL, LINEAR, ModelConfig
from mxconv.mapping.minimax_m1 import m1_config
from mxconv.mapping.rules import Rule, Table

_L = "model.layers.{l}."
_MOE = _L + "block_sparse_moe."
EXPERT = _MOE + "experts.{e}."
VOCABULARY_MULTIPLE = 64

FASTDEPLOY = Table(
    name="fastdeploy",
    rules=(
        Rule(
            pattern="model.embed_tokens.weight", holds=("embed",), axes="V H", shard="V", pad_vocabulary="always", group="embedding"
        ),
        Rule(pattern="lm_head.weight", holds=("lm_head",), axes="H V", shard="V", pad_vocabulary="if undivided", group="embedding"),
        Rule(pattern="model.norm.weight", holds=("final_norm",), axes="H", group="norm"),
        Rule(pattern=_L + "input_layernorm.weight", holds=("layers.{l}.attn_norm",), axes="H", group="norm"),
        Rule(pattern=_L + "post_attention_layernorm.weight", holds=("layers.{l}.mlp_norm",), axes="H", group="norm"),
        Rule(
            pattern=_L + "self_attn.qkv_proj.weight", holds=("layers.{l}.q", "layers.{l}.k", "layers.{l}.v"),
            axes="H (* N D)", shard="N", group="attention",
        ),
        Rule(
            pattern=_L + "self_attn.output_gate.weight", holds=("layers.{l}.output_gate",), axes="H (N D)", shard="N",
            layers=LINEAR, group="lightning",
        ),
        Rule(
            pattern=_L + "self_attn.norm.weight", holds=("layers.{l}.linear_norm",), axes="(N D)", shard="N",
            layers=LINEAR, group="lightning",
        ),
        Rule(
            pattern=_L + "self_attn.out_proj.weight", holds=("layers.{l}.attn_out",), axes="(N D) H", shard="N",
            layers=LINEAR, group="lightning",
        ),
        Rule(
            pattern=_L + "self_attn.o_proj.weight", holds=("layers.{l}.attn_out",), axes="(N D) H", shard="N",
            layers=FULL, group="attention",
        ),
        Rule(pattern=_MOE + "gate.weight", holds=("layers.{l}.router",), axes="H E", dtype="F32", group="router"),
        Rule(
            pattern=EXPERT + "up_gate_proj.weight", holds=("layers.{l}.experts.{e}.gate", "layers.{l}.experts.{e}.up"),
            axes="H (* I)", shard="I", group="experts",
        ),
        Rule(pattern=EXPERT + "down_proj.weight", holds=("layers.{l}.experts.{e}.down",), axes="I H", shard="I", group="experts"),
        Rule(
            pattern=_L + "shared_mlp.up_gate_proj.weight", holds=("layers.{l}.shared.gate", "layers.{l}.shared.up"),
            axes="H (* S)", shard="S", group="shared",
        ),
        Rule(pattern=_L + "shared_mlp.down_proj.weight", holds=("layers.{l}.shared.down",), axes="S H", shard="S", group="shared"),
        Rule(pattern=_L + "coefficient.weight", holds=("layers.{l}.shared.coefficient",), axes="H 1", group="shared"),
        Rule(
            pattern=_L + "mlp.up_gate_proj.weight", holds=("layers.{l}.mlp.gate", "layers.{l}.mlp.up"),
            axes="H (* I)", shard="I", group="shared",
        ),
        Rule(pattern=_L + "mlp.down_proj.weight", holds=("layers.{l}.mlp.down",), axes="I H", shard="I", group="shared"),
    ),
    first_file=1,
    ranked=True,
)  # fmt: skip

# `transformers_version` above 4.56.0 flips this consumer to another file format, `torch_dtype` is its older spelling of
# dtype, and remote code does not travel with the weights.
_LEFT_OUT = ("torch_dtype", "transformers_version", "auto_map", "is_quantized", "quantization_config", "mxconv")


def fastdeploy_config(config: ModelConfig, *, quantization: Mapping[str, Any] | None, block: Mapping[str, Any]) -> dict[str, Any]:
    """The artifact's config.json: M1's keys, what this consumer's M1 code asks for, and the `mxconv` block."""
    keys = {k: v for k, v in m1_config(config).items() if k not in _LEFT_OUT}
    keys |= {"dtype": "bfloat16", "norm_topk_prob": True, "moe_num_experts": config.num_experts}
    if quantization is not None:
        keys |= {"is_quantized": True, "quantization_config": {"quantization": "mix_quant", **quantization}}
    return {**keys, "mxconv": dict(block)}
