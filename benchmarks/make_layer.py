"""Writes a checkpoint with MiniMax-M1's true layer shapes and random weights, to time and to weigh conversions.

    python benchmarks/make_layer.py FOLDER [--experts 8] [--layers 1] [--vocab 2048]

One lightning layer of 8 experts is 3.3 GB (hidden 6144, intermediate 9216, 64 heads of 128).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

H, INNER, HEADS, KV, D = 6144, 9216, 64, 8, 128


def bf16(random: np.random.Generator, *shape: int) -> torch.Tensor:
    """Random bf16 of standard deviation about .02, made 8 M values at a time."""
    out = torch.empty(shape, dtype=torch.bfloat16).view(-1)
    for start in range(0, out.numel(), 1 << 23):
        part = out[start : start + (1 << 23)]
        part.copy_(torch.from_numpy(random.standard_normal(part.numel(), dtype=np.float32)) * 0.02)
    return out.view(shape)


def config(layers: int, experts: int, vocab: int) -> dict[str, Any]:
    """config.json: MiniMax-M1's, but for these three numbers and lightning layers alone."""
    return {
        "model_type": "minimax_m1", "architectures": ["MiniMaxM1ForCausalLM"], "vocab_size": vocab, "hidden_size": H,
        "intermediate_size": INNER, "num_hidden_layers": layers, "attn_type_list": [0] * layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV, "head_dim": D, "rotary_dim": 64, "rope_theta": 10000000, "num_local_experts": experts,
        "num_experts_per_tok": 2, "postnorm": True, "layernorm_full_attention_alpha": 3.5565588200778455,
        "layernorm_linear_attention_alpha": 3.5565588200778455, "layernorm_mlp_alpha": 3.5565588200778455, "rms_norm_eps": 1e-5,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--vocab", type=int, default=2048)
    a = parser.parse_args()
    a.folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    number = 0

    def save(tensors: dict[str, torch.Tensor]) -> None:
        nonlocal number
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, a.folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        number += 1

    save(
        {
            "model.embed_tokens.weight": bf16(random, a.vocab, H),
            "lm_head.weight": bf16(random, a.vocab, H),
            "model.norm.weight": bf16(random, H),
        }
    )
    for layer in range(a.layers):
        p = f"model.layers.{layer}."
        save(
            {
                f"{p}input_layernorm.weight": bf16(random, H), f"{p}post_attention_layernorm.weight": bf16(random, H),
                f"{p}self_attn.qkv_proj.weight": bf16(random, 3 * HEADS * D, H),
                f"{p}self_attn.norm.weight": bf16(random, HEADS * D),
                f"{p}self_attn.output_gate.weight": bf16(random, HEADS * D, H),
                f"{p}self_attn.out_proj.weight": bf16(random, H, HEADS * D),
                f"{p}block_sparse_moe.gate.weight": bf16(random, a.experts, H).float(),
            }
        )  # fmt: skip
        for e in range(a.experts):
            x = f"{p}block_sparse_moe.experts.{e}."
            save(
                {
                    f"{x}w1.weight": bf16(random, INNER, H),
                    f"{x}w2.weight": bf16(random, H, INNER),
                    f"{x}w3.weight": bf16(random, INNER, H),
                }
            )
    (a.folder / "config.json").write_text(json.dumps(config(a.layers, a.experts, a.vocab), indent=2))
    index = {"metadata": {}, "weight_map": weight_map}
    (a.folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main()
