"""Wrong artifacts, made from right ones: each mutant is one mistake that a converter could make, with manifest and hashes made to
match, so that only verify's own reasoning can find it.

`MUTANTS`: name → the base artifact it is made of, what it does to it (spoil.py), and what verify must name. `BASES`: right ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mxconv.execute import convert, quantize
from tests.spoil import (
    MOE,
    SHAPE,
    Folder,
    configured,
    doubled_block,
    eos_beyond,
    exchange_halves,
    expert,
    experts_of_rank_1,
    extra,
    gate_and_up,
    gone,
    half_precision_norm,
    interleaved_qkv,
    kept_unquantized,
    keys_for_queries,
    kv_of_neighbour,
    minus_eight,
    nibbles_swapped,
    norm_of_rank_0,
    on,
    one_code_negated,
    one_group_shifted,
    other_rotation,
    other_seed,
    own_scales,
    padding_filled,
    rank_twice,
    ranks_exchanged,
    rotated_up_gate,
    scaled_group,
    slopes_kept,
    swapped,
    unrotated,
)
from tests.synthetic import make_checkpoint


@dataclass(frozen=True)
class Base:
    """A right artifact: scheme (None: convert) and ranks."""

    scheme: str | None
    tp: int


BASES: Mapping[str, Base] = {
    "convert": Base(None, 2), "w4afp8": Base("w4afp8", 2), "w4a8": Base("w4a8", 2), "block": Base("block_wise_fp8", 2),
    "tensor": Base("tensor_wise_fp8", 2), "wide": Base("w4afp8", 4),
}  # fmt: skip


def make_source(folder: Path) -> Path:
    """The checkpoint that all bases are made from."""
    return make_checkpoint(folder, **SHAPE)


def make_base(name: str, source: Path, out: Path) -> Path:
    """The right artifact `name` of `BASES` in the folder `out`."""
    base = BASES[name]
    if base.scheme is None:
        convert(source, out, tp=base.tp)
    else:
        ids = out.parent / "ids.npy"
        np.save(ids, np.random.default_rng(0).integers(0, SHAPE["vocab"], (4, 128)))
        static = base.scheme in ("w4a8", "tensor_wise_fp8")
        quantize(source, out, scheme=base.scheme, tp=base.tp, calibration=ids if static else None)
    return out


@dataclass(frozen=True)
class Mutant:
    """`spoil` changes a Folder in memory. Verify must report a finding in `section` whose words have all of `names`."""

    base: str
    spoil: Callable[[Folder], None]
    section: str
    names: tuple[str, ...]


_UG, _DOWN = expert(1, 0, "up_gate"), expert(1, 0, "down")
_ROUTER = f"{MOE.format(1)}gate.weight"

MUTANTS: Mapping[str, Mutant] = {
    # experts
    "experts exchanged": Mutant(
        "w4afp8",
        swapped(f"{MOE.format(1)}experts.0.", f"{MOE.format(1)}experts.2."),
        "numerics",
        ("rank 0", f"{_UG}quant_weight", "blocks"),
    ),
    "experts exchanged in one rank": Mutant(
        "convert",
        swapped(f"{MOE.format(1)}experts.0.", f"{MOE.format(1)}experts.2.", (1,)),
        "numerics",
        ("rank 1", f"{_DOWN}weight"),
    ),
    "gate and up exchanged": Mutant("w4afp8", gate_and_up, "numerics", ("rank 1", f"{expert(0, 1, 'up_gate')}quant_weight")),
    "gate and up exchanged, unquantized": Mutant(
        "convert", on(f"{_UG}weight", exchange_halves(1)), "numerics", ("rank 1", f"{_UG}weight")
    ),
    "experts of another layer": Mutant("w4afp8", other_seed, "numerics", ("rank 0", f"{expert(1, 3, 'down')}quant_weight")),
    "experts of another rank": Mutant("w4afp8", experts_of_rank_1, "numerics", ("rank 0", f"{_DOWN}quant_weight")),
    "an expert left unquantized": Mutant("w4afp8", kept_unquantized, "structure", ("rank 1", "mxconv.ignored_layers", "layer 1")),
    # codes
    "nibbles swapped": Mutant(
        "w4afp8", on(f"{_UG}quant_weight", nibbles_swapped, (1,)), "numerics", ("rank 1", f"{_UG}quant_weight")
    ),
    "a group of codes off by one": Mutant(
        "w4afp8",
        on(f"{_UG}quant_weight", one_group_shifted, (1,)),
        "numerics",
        ("rank 1", f"{_UG}quant_weight", "gate rows 0-127", "inputs 0-127"),
    ),
    "one code negated": Mutant(
        "w4afp8", on(f"{_UG}quant_weight", one_code_negated, (0,)), "numerics", ("rank 0", f"{_UG}quant_weight", "1 of")
    ),
    "a code of -8": Mutant("w4afp8", on(f"{_UG}quant_weight", minus_eight, (0,)), "numerics", ("rank 0", "1 codes are -8")),
    "codes rolled along the inputs": Mutant(
        "block", on(f"{_DOWN}quant_weight", lambda x: x.roll(1, 0), (0,)), "numerics", ("rank 0", f"{_DOWN}quant_weight")
    ),
    "quantized along the wrong axis": Mutant(
        "block", on(f"{_DOWN}quant_weight", lambda x: x.T.contiguous(), (1,)), "numerics", ("rank 1", f"{_DOWN}quant_weight")
    ),
    # scales
    "a block doubled": Mutant(
        "w4afp8",
        on(f"{_UG}weight_scale", scaled_group(2.0), (1,)),
        "numerics",
        ("rank 1", f"{_UG}quant_weight", "gate rows 0-127", "inputs 128-255"),
    ),
    "a block's scale 2 % off": Mutant(
        "w4afp8", on(f"{_UG}weight_scale", scaled_group(1.02), (1,)), "numerics", ("rank 1", f"{_UG}weight_scale")
    ),
    "scales inverted": Mutant(
        "w4a8", on(f"{_UG}weight_scale", lambda s: 1 / s, (1,)), "numerics", ("rank 1", f"{_UG}weight_scale")
    ),
    "scales dropped": Mutant("w4a8", on(f"{_UG}weight_scale", torch.ones_like), "numerics", ("rank 0", f"{_UG}weight_scale")),
    "groups off by one": Mutant(
        "w4afp8", on(f"{_DOWN}weight_scale", lambda s: s.roll(1, 1), (0,)), "numerics", ("rank 0", f"{_DOWN}weight_scale")
    ),
    "outputs off by one": Mutant(
        "w4a8", on(f"{_UG}weight_scale", lambda s: s.roll(1, 0), (0,)), "numerics", ("rank 0", f"{_UG}weight_scale")
    ),
    "block scales exchanged": Mutant(
        "block", on(f"{_UG}weight_scale", exchange_halves(0), (0,)), "numerics", ("rank 0", f"{_UG}weight_scale")
    ),
    "scales not divided by the root of the rotation": Mutant(
        "w4afp8", on(f"{_DOWN}weight_scale", lambda s: s * 128**0.5), "numerics", ("rank 1", f"{_DOWN}weight_scale")
    ),
    "a tensor scale 1 % off": Mutant(
        "tensor", on(f"{_DOWN}weight_scale", lambda s: s * 1.01), "numerics", ("rank 1", f"{_DOWN}weight_scale")
    ),
    "channel scales of a rank's own slice": Mutant(
        "w4a8", own_scales, "parallel", ("rank 1", f"{expert(2, 0, 'down')}weight_scale")
    ),
    "a scale that is NaN": Mutant(
        "w4afp8", on(f"{_UG}weight_scale", lambda s: s.fill_(float("nan")), (1,)), "numerics", ("rank 1", f"{_UG}weight_scale")
    ),
    # rotation
    "rotation missing": Mutant("w4afp8", unrotated, "numerics", ("rank 0", f"{expert(1, 2, 'down')}quant_weight")),
    "rotation of another size": Mutant("w4afp8", other_rotation, "numerics", ("rank 1", f"{expert(2, 3, 'down')}quant_weight")),
    "rotation of the wrong projection": Mutant(
        "w4afp8", rotated_up_gate, "numerics", ("rank 0", f"{expert(0, 3, 'up_gate')}quant_weight")
    ),
    # activation scales
    "activation scale doubled": Mutant(
        "w4a8", on(f"{_DOWN}activation_scale", lambda s: s * 2), "numerics", ("rank 1", f"{_DOWN}activation_scale", "factor of 2")
    ),
    "activation scale halved": Mutant(
        "tensor", on(f"{_UG}activation_scale", lambda s: s / 2), "numerics", ("rank 0", f"{_UG}activation_scale")
    ),
    "activation scale not divided by 448": Mutant(
        "tensor", on(f"{_UG}activation_scale", lambda s: s * 448), "numerics", ("rank 0", f"{_UG}activation_scale")
    ),
    "activation scale of one rank": Mutant(
        "w4a8", on(f"{_DOWN}activation_scale", lambda s: s * 1.1, (1,)), "parallel", ("rank 1", f"{_DOWN}activation_scale")
    ),
    "activation scale zero": Mutant(
        "w4a8", on(f"{_UG}activation_scale", lambda s: s * 0, (1,)), "numerics", ("rank 1", f"{_UG}activation_scale")
    ),
    # ranks
    "a rank's shard twice": Mutant("convert", rank_twice, "numerics", ("rank 1", "model.layers.0.self_attn.output_gate.weight")),
    "ranks exchanged": Mutant("w4afp8", ranks_exchanged, "numerics", ("rank 0", "model.embed_tokens.weight")),
    "linear norm of another rank": Mutant("w4afp8", norm_of_rank_0, "numerics", ("rank 1", "model.layers.2.self_attn.norm.weight")),
    "KV head of a neighbour": Mutant("wide", kv_of_neighbour, "parallel", ("rank 1", "model.layers.1.self_attn.qkv_proj.weight")),
    "padding that is not zero": Mutant("convert", padding_filled, "parallel", ("rank 1", "model.embed_tokens.weight")),
    "a norm that differs between ranks": Mutant(
        "convert", on("model.norm.weight", lambda x: x * 1.01, (1,)), "parallel", ("rank 1", "model.norm.weight")
    ),
    # attention
    "qkv left per head": Mutant("convert", interleaved_qkv, "numerics", ("rank 0", "model.layers.0.self_attn.qkv_proj.weight")),
    "q and k exchanged": Mutant(
        "convert",
        on("model.layers.2.self_attn.qkv_proj.weight", keys_for_queries(2, 256)),
        "numerics",
        ("rank 1", "model.layers.2.self_attn.qkv_proj.weight"),
    ),
    "a square matrix transposed": Mutant(
        "convert",
        on("model.layers.0.self_attn.out_proj.weight", lambda x: x.T, (0,)),
        "numerics",
        ("rank 0", "model.layers.0.self_attn.out_proj.weight"),
    ),
    "a block of attention doubled": Mutant(
        "convert",
        on("model.layers.0.self_attn.out_proj.weight", doubled_block, (1,)),
        "numerics",
        ("rank 1", "model.layers.0.self_attn.out_proj.weight"),
    ),
    "router rows rolled": Mutant("w4afp8", on(_ROUTER, lambda x: x.roll(1, 1)), "numerics", ("rank 0", _ROUTER)),
    "norms exchanged": Mutant(
        "convert",
        swapped("model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"),
        "numerics",
        ("rank 0", "model.layers.0.input_layernorm.weight"),
    ),
    "a norm in another dtype": Mutant("convert", half_precision_norm, "numerics", ("rank 0", "model.norm.weight", "dtype")),
    "embedding off by one row": Mutant(
        "convert",
        on("model.embed_tokens.weight", lambda x: x.roll(1, 0), (0,)),
        "numerics",
        ("rank 0", "model.embed_tokens.weight"),
    ),
    # config
    "config rotary_dim": Mutant("convert", configured(rotary_dim=64), "structure", ("rotary_dim", "expected 32", "got 64")),
    "config alpha": Mutant("convert", configured(layernorm_mlp_alpha=1.0), "structure", ("layernorm_mlp_alpha",)),
    "config beta": Mutant(
        "convert", configured(layernorm_linear_attention_beta=0.9), "structure", ("layernorm_linear_attention_beta",)
    ),
    "config attn_type_list": Mutant("convert", configured(attn_type_list=[1, 0, 0]), "structure", ("attn_type_list",)),
    "config postnorm": Mutant("convert", configured(postnorm=False), "structure", ("postnorm",)),
    "config rms_norm_eps": Mutant("convert", configured(rms_norm_eps=1e-6), "structure", ("rms_norm_eps",)),
    "config rope_theta": Mutant("convert", configured(rope_theta=5e5), "structure", ("rope_theta",)),
    "config top-1": Mutant("convert", configured(num_experts_per_tok=1), "structure", ("num_experts_per_tok",)),
    "config without is_permuted": Mutant(
        "block",
        configured(quantization_config=lambda q: {**q, "is_permuted": False}),
        "structure",
        ("quantization_config.is_permuted",),
    ),
    "config with torch_dtype": Mutant("w4afp8", configured(torch_dtype="bfloat16"), "structure", ("torch_dtype",)),
    "config that renormalises no router": Mutant("convert", configured(norm_topk_prob=...), "structure", ("norm_topk_prob",)),
    "config scheme": Mutant(
        "w4afp8", configured(quantization_config=lambda q: {**q, "moe_dynamic_quant": False}), "structure", ("moe_dynamic_quant",)
    ),
    "decay rates of its own": Mutant("convert", slopes_kept, "numerics", ("rank 1", "mxconv.slopes", "layer 0")),
    "end of sequence outside the vocabulary": Mutant("convert", eos_beyond, "structure", ("outside the vocabulary",)),
    # tensors
    "a tensor is missing": Mutant(
        "convert", gone("model.layers.2.self_attn.norm.weight"), "structure", ("model.layers.2.self_attn.norm.weight", "rank1")
    ),
    "a tensor too many": Mutant("convert", extra, "structure", ("rank 0", "inv_freq")),
}
