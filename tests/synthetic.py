"""Random checkpoints of the MiniMax family in any shape, written with the safetensors package from model.md alone.

`make_checkpoint(folder, **shape)` writes config.json and shards and returns the folder; `Shape` lists what can be asked
for. Weights are random but tame: hidden states keep a moderate size, norms are near 1, router ties do not happen.
Nothing here comes from the product, so that tests have a second statement of names, orders and shapes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

BLOCK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a random checkpoint looks like; `layers` spells the layers, l lightning and s softmax."""

    layers: str = "lsl"
    hidden: int = 64
    intermediate: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    rotary_dim: int | None = 8
    """None leaves the key out of the config, which means head_dim."""
    rope_theta: float = 1e4
    experts: int = 4
    experts_per_token: int = 2
    dense: bool = False
    """One expert as a plain `mlp` instead of `block_sparse_moe` with one expert."""
    vocab: int = 128
    eps: float = 1e-5
    postnorm: bool | None = True
    """None leaves the key out, which means False."""
    alphas: tuple[float, float, float] = (1.6, 1.6, 1.6)
    """Full attention, linear attention, mlp."""
    betas: tuple[float, float, float] = (1.0, 1.0, 1.0)
    shared: int | Sequence[int] = 0
    tied: Literal["no", "yes", "stored", "contradicted"] = "no"
    """`stored` keeps an equal lm_head beside tie_word_embeddings, `contradicted` one that differs."""
    dialect: Literal["minimax-m1", "minimax"] = "minimax-m1"
    model_type: str | None = None
    stacked: bool = False
    """minimax dialect: 3-D `mlp.experts.gate_up_proj` and `down_proj`."""
    permuted: bool = False
    """minimax dialect: q and k rows in the order of rope_type proportional."""
    decay: Literal["formula", "transformers", "none"] = "formula"
    """minimax dialect: which slopes the decay buffers hold (`transformers`: its own, wrong unless heads is a power of two)."""
    dtype: torch.dtype = torch.bfloat16
    router_dtype: torch.dtype = torch.float32
    files: int = 2
    """Number of shards; 1 writes a single model.safetensors without an index."""
    scale: float = 1.0
    """Multiplies every expert weight."""
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    """Keys that replace or extend those of config.json; a value of ... removes the key."""


def slopes(heads: int) -> list[float]:
    """ALiBi-like slopes of model.md for any number of heads."""
    if heads & (heads - 1) == 0:
        return [2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)]
    below = 1 << (heads.bit_length() - 1)
    return slopes(below) + slopes(2 * below)[0::2][: heads - below]


def decay_rates(heads: int, layer: int, layers: int, kind: str = "formula") -> list[float]:
    """s per head of one lightning layer; `transformers` gives what its MiniMax model computes for itself."""
    if kind == "transformers":
        factor = 1 - layer / (layers - 1 + 1e-5) + 1e-5
        return [2.0 ** (-8.0 * (h + 1) / heads) * factor for h in range(heads)]
    factor = 1 - layer / (layers - 1) + 1e-5 if layers > 1 else 1 + 1e-5
    return [slope * factor for slope in slopes(heads)]


def decay_buffers(rates: Sequence[float], block: int = BLOCK) -> dict[str, Tensor]:
    """The four buffers that transformers saves for a lightning layer with decay rates s, float32."""
    s = torch.tensor(rates, dtype=torch.float64)[:, None, None]
    j = torch.arange(1, block + 1, dtype=torch.float64)[:, None]
    gap = (j - j.T)[None, None]
    return {
        "slope_rate": s.float(),
        "query_decay": torch.exp(-s * j).float(),
        "key_decay": torch.exp(-s * (block - j)).float(),
        "diagonal_decay": torch.where(gap >= 0, torch.exp(-s[None] * gap.clamp(min=0)), 0.0).float(),
    }


def permute_rope(weight: Tensor, heads: int, head_dim: int, rotary_dim: int) -> Tensor:
    """q or k rows [heads·D, H]: original dims [0,r/2), [r/2,r) moved to [0,r/2), [D/2,D/2+r/2), the others keep their order."""
    half, middle = rotary_dim // 2, head_dim // 2
    slots: list[int | None] = [None] * head_dim
    slots[:half] = range(half)
    slots[middle : middle + half] = range(half, rotary_dim)
    rest = iter(range(rotary_dim, head_dim))
    order = [next(rest) if slot is None else slot for slot in slots]
    return weight.view(heads, head_dim, -1)[:, order].reshape(weight.shape).contiguous()


class _Draw:
    """Random weights of one seed, drawn in the order asked for."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.random = torch.Generator().manual_seed(shape.seed)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.random)

    def linear(self, rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return (self.normal(rows, columns) * (gain / math.sqrt(columns))).to(self.shape.dtype)

    def norm(self, size: int) -> Tensor:
        return (1 + 0.1 * self.normal(size)).to(self.shape.dtype)


def _attention(draw: _Draw, layer: int) -> dict[str, Tensor]:
    s = draw.shape
    width = s.heads * s.head_dim
    if s.layers[layer] == "l":
        weights = {
            "qkv_proj.weight": draw.linear(3 * width, s.hidden), "output_gate.weight": draw.linear(width, s.hidden),
            "norm.weight": draw.norm(width), "out_proj.weight": draw.linear(s.hidden, width),
        }  # fmt: skip
        if s.dialect == "minimax" and s.decay != "none":
            buffers = decay_buffers(decay_rates(s.heads, layer, len(s.layers), s.decay))
            weights |= {name: buffer.to(s.dtype) for name, buffer in buffers.items()}
        return weights
    kv = s.kv_heads * s.head_dim
    q, k = draw.linear(width, s.hidden, 1.5), draw.linear(kv, s.hidden, 1.5)
    if s.permuted:
        rotary = s.head_dim if s.rotary_dim is None else s.rotary_dim
        q, k = permute_rope(q, s.heads, s.head_dim, rotary), permute_rope(k, s.kv_heads, s.head_dim, rotary)
    return {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": draw.linear(kv, s.hidden),
            "o_proj.weight": draw.linear(s.hidden, width)}  # fmt: skip


def _mlp(draw: _Draw, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(gate, up, down)."""
    s = draw.shape
    return (
        draw.linear(size, s.hidden, s.scale), draw.linear(size, s.hidden, s.scale), draw.linear(s.hidden, size, 1.5 * s.scale)
    )  # fmt: skip


def _moe(draw: _Draw) -> dict[str, Tensor]:
    s = draw.shape
    if s.dense:
        gate, up, down = _mlp(draw, s.intermediate)
        return {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up, "mlp.down_proj.weight": down}
    router = (draw.normal(s.experts, s.hidden) / math.sqrt(s.hidden)).to(s.router_dtype)
    experts = [_mlp(draw, s.intermediate) for _ in range(s.experts)]
    if s.stacked:
        return {
            "mlp.gate.weight": router,
            "mlp.experts.gate_up_proj": torch.stack([torch.cat((gate, up)) for gate, up, _ in experts]),
            "mlp.experts.down_proj": torch.stack([down for _, _, down in experts]),
        }
    weights = {"block_sparse_moe.gate.weight": router}
    for e, parts in enumerate(experts):
        for name, weight in zip(("w1", "w3", "w2"), parts, strict=True):
            weights[f"block_sparse_moe.experts.{e}.{name}.weight"] = weight
    return weights


def shared_sizes(shape: Shape) -> list[int]:
    """The shared expert's intermediate size in each layer."""
    return [shape.shared] * len(shape.layers) if isinstance(shape.shared, int) else list(shape.shared)


def make_tensors(shape: Shape) -> dict[str, Tensor]:
    """All tensors of a checkpoint of `shape` under the names of its dialect."""
    draw = _Draw(shape)
    tensors = {"model.embed_tokens.weight": draw.normal(shape.vocab, shape.hidden).to(shape.dtype)}
    for layer, shared in enumerate(shared_sizes(shape)):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}self_attn.{name}": weight for name, weight in _attention(draw, layer).items()}
        tensors |= {f"{prefix}{name}": weight for name, weight in _moe(draw).items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = draw.norm(shape.hidden)
        if shared:
            for name, weight in zip(("gate", "up", "down"), _mlp(draw, shared), strict=True):
                tensors[f"{prefix}shared_mlp.{name}_proj.weight"] = weight
            tensors[f"{prefix}coefficient.weight"] = draw.linear(1, shape.hidden, 2.0)
    tensors["model.norm.weight"] = draw.norm(shape.hidden)
    head = draw.linear(shape.vocab, shape.hidden, 2.0)
    if shape.tied == "stored":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    elif shape.tied != "yes":
        tensors["lm_head.weight"] = head
    return tensors


def make_config(shape: Shape) -> dict[str, Any]:
    """config.json of a checkpoint of `shape`."""
    m1 = shape.dialect == "minimax-m1"
    factors = zip(("full", "linear", "mlp"), shape.alphas, shape.betas, strict=True)
    config: dict[str, Any] = {
        "model_type": shape.model_type or ("minimax_m1" if m1 else "minimax"),
        "architectures": ["MiniMaxM1ForCausalLM" if m1 else "MiniMaxForCausalLM"],
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": len(shape.layers),
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "num_local_experts": 1 if shape.dense else shape.experts,
        "num_experts_per_tok": 1 if shape.dense else min(shape.experts_per_token, shape.experts),
        "vocab_size": shape.vocab, "rms_norm_eps": shape.eps, "hidden_act": "silu", "max_position_embeddings": 4096,
        "tie_word_embeddings": shape.tied != "no", "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    rotary = {} if shape.rotary_dim is None else {"rotary_dim": shape.rotary_dim}
    if m1:
        config |= {"attn_type_list": [int(kind == "s") for kind in shape.layers], "rope_theta": shape.rope_theta, **rotary}
        for name, alpha, beta in factors:
            key = f"layernorm_{name}_attention" if name != "mlp" else "layernorm_mlp"
            config |= {f"{key}_alpha": alpha, f"{key}_beta": beta}
        if shape.postnorm is not None:
            config["postnorm"] = shape.postnorm
        if not isinstance(shape.shared, int) or shape.shared:
            config |= {"shared_intermediate_size": shape.shared, "shared_moe_mode": "sigmoid"}
    else:
        kinds = {"l": "linear_attention", "s": "full_attention"}
        config |= {"layer_types": [kinds[kind] for kind in shape.layers], "block_size": BLOCK}
        for name, alpha, beta in factors:
            key = f"{name}_attn" if name != "mlp" else "mlp"
            config |= {f"{key}_alpha_factor": alpha, f"{key}_beta_factor": beta}
        if shape.permuted:
            part = (shape.head_dim if shape.rotary_dim is None else shape.rotary_dim) / shape.head_dim
            config["rope_parameters"] = {
                "rope_type": "proportional", "partial_rotary_factor": part, "rope_theta": shape.rope_theta ** (1 / part)
            }  # fmt: skip
        else:
            config |= {"rope_theta": shape.rope_theta, **rotary}
    config |= shape.config
    return {key: value for key, value in config.items() if value is not ...}


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], files: int) -> Path:
    """config.json and `tensors` in `files` shards of about equal size, numbered from 00000, with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(files)]
    seen = 0
    for name, tensor in tensors.items():
        shards[min(files - 1, seen * files // max(1, total))][name] = tensor
        seen += tensor.nbytes
    shards = [shard for shard in shards if shard]
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def make_checkpoint(folder: Path | str, **shape: Any) -> Path:
    """A random checkpoint of `Shape(**shape)` in `folder`, which is returned."""
    wanted = Shape(**shape)
    return write_checkpoint(Path(folder), make_config(wanted), make_tensors(wanted), wanted.files)


def random_ids(vocab: int, batch: int, length: int, seed: int = 0) -> Tensor:
    """int64 [batch, length] token ids."""
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
