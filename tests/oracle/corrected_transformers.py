"""Stock transformers made to compute the original model, by data alone.

transformers' MiniMax ignores rotary_dim, has slopes for powers of two only and another layer factor. Its code is left as
it is: q and k rows move to where a `proportional` rope of the whole head rotates them, its theta is set so that the frequencies
are the original's, and the decay buffers are overwritten from the formula.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tests.oracle.forward import read
from tests.synthetic import decay_buffers, decay_rates, permute_rope


def corrected(folder: Path, rates: dict[int, list[float]] | None = None) -> torch.nn.Module:
    """A float32 MiniMaxForCausalLM with the weights of an `minimax-m1` source checkpoint (postnorm, routed experts).

    `rates` replaces the decay of some lightning layers.
    """
    import transformers

    c, tensors = read(folder)
    heads, kv, dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    rotary = c.get("rotary_dim", dim)
    config = transformers.MiniMaxConfig(
        vocab_size=c["vocab_size"], hidden_size=c["hidden_size"], intermediate_size=c["intermediate_size"],
        num_hidden_layers=c["num_hidden_layers"], num_attention_heads=heads, num_key_value_heads=kv, head_dim=dim,
        num_local_experts=c["num_local_experts"], num_experts_per_tok=c["num_experts_per_tok"], rms_norm_eps=c["rms_norm_eps"],
        layer_types=["full_attention" if kind else "linear_attention" for kind in c["attn_type_list"]],
        tie_word_embeddings=c["tie_word_embeddings"], bos_token_id=None, eos_token_id=None, max_position_embeddings=8192,
        full_attn_alpha_factor=c["layernorm_full_attention_alpha"], full_attn_beta_factor=c["layernorm_full_attention_beta"],
        linear_attn_alpha_factor=c["layernorm_linear_attention_alpha"],
        linear_attn_beta_factor=c["layernorm_linear_attention_beta"],
        mlp_alpha_factor=c["layernorm_mlp_alpha"], mlp_beta_factor=c["layernorm_mlp_beta"],
        rope_parameters={
            "rope_type": "proportional", "partial_rotary_factor": rotary / dim, "rope_theta": c["rope_theta"] ** (dim / rotary)
        },
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.MiniMaxForCausalLM(config).float().eval()
    missing = set(model.state_dict()) - set(_fill(model, tensors, heads, kv, dim, rotary))
    left = {name for name in missing if not name.endswith(("slope_rate", "query_decay", "key_decay", "diagonal_decay"))}
    tied = {"lm_head.weight"} if c["tie_word_embeddings"] else set()
    if left - tied:
        raise AssertionError(f"oracle left weights unset: {sorted(left)[:4]}")
    for index, kind in enumerate(c["attn_type_list"]):
        if not kind:
            attention = model.model.layers[index].self_attn
            own = (rates or {}).get(index) or decay_rates(heads, index, c["num_hidden_layers"])
            for name, buffer in decay_buffers(own).items():
                setattr(attention, name, buffer)
    return model


def _fill(model: torch.nn.Module, tensors: dict[str, Tensor], heads: int, kv: int, dim: int, rotary: int) -> set[str]:
    """Copy every weight to its place; the names that were set."""
    state = model.state_dict()
    done = set()
    for name, target in state.items():
        source = None
        if name in tensors:
            source = tensors[name]
        elif ".mlp.gate.weight" in name:
            source = tensors[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")]
        elif ".mlp.experts." in name:
            stem = name.split(".mlp.experts.")[0] + ".block_sparse_moe.experts"
            experts = range(target.shape[0])
            if name.endswith("gate_up_proj"):
                source = torch.stack([torch.cat([tensors[f"{stem}.{e}.w{i}.weight"] for i in (1, 3)]) for e in experts])
            else:
                source = torch.stack([tensors[f"{stem}.{e}.w2.weight"] for e in experts])
        if source is None:
            continue
        source = source.float()
        if name.endswith("q_proj.weight"):
            source = permute_rope(source, heads, dim, rotary)
        if name.endswith("k_proj.weight"):
            source = permute_rope(source, kv, dim, rotary)
        target.copy_(source)
        done.add(name)
    return done


def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """float32 [B, T, V]."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits
