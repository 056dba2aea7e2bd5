"""ModelConfig: what a MiniMax checkpoint's config.json says, whichever dialect says it.

Every key is in exactly one table below: *used* (it shapes the model), *fixed* (we implement one value and refuse the
others by name) or *harmless* (it cannot change a logit). A key in none of them is refused too: a setting that we
do not know may be one that changes the model.

Sources: the config classes of MiniMax-Text-01 / MiniMax-M1 (`minimax-m1` dialect) and of transformers'
`MiniMaxConfig` (`minimax` dialect).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mxconv.errors import IncompleteInput, MalformedInput, MxconvError, raise_all
from mxconv.jsonfiles import read_json

MAX_EXPERTS = 200_000
"""Experts of all layers together: a config that asks for more is refused before anything is counted out (M1 has 2,560)."""

LINEAR, FULL = "linear_attention", "full_attention"

DIALECT_OF_MODEL_TYPE = {
    "minimax_m1": "minimax-m1",
    "minimax_text_01": "minimax-m1",
    "MiniMaxM1": "minimax-m1",
    "MiniMaxText01": "minimax-m1",
    "minimax": "minimax",
}

# Keys that shape the model, per dialect. "common" holds those that both spell alike.
USED_KEYS = {
    "common": frozenset(
        "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "rotary_dim rope_theta rms_norm_eps num_local_experts num_experts_per_tok tie_word_embeddings eos_token_id "
        "max_position_embeddings shared_intermediate_size mxconv".split()
    ),
    "minimax-m1": frozenset(
        "attn_type_list postnorm layernorm_full_attention_alpha layernorm_full_attention_beta layernorm_linear_attention_alpha "
        "layernorm_linear_attention_beta layernorm_mlp_alpha layernorm_mlp_beta".split()
    ),
    "minimax": frozenset(
        "layer_types block_size full_attn_alpha_factor full_attn_beta_factor linear_attn_alpha_factor linear_attn_beta_factor "
        "mlp_alpha_factor mlp_beta_factor rope_parameters partial_rotary_factor".split()
    ),
}

# Keys of which one value is implemented: (accepted values, what the other values would ask for).
FIXED_KEYS: Mapping[str, tuple[tuple[object, ...], str]] = {
    "hidden_act": (("silu",), "another activation function"),
    "sliding_window": ((None, 0), "windowed softmax attention"),
    "rope_scaling": ((None,), "scaled rotary embeddings"),
    "attention_bias": ((None, False), "biases in the attention projections"),
    "mlp_bias": ((None, False), "biases in the experts"),
    "use_qk_norm": ((None, False), "normalised queries and keys"),
    "norm_topk_prob": ((None, True), "router weights that are not renormalised"),
    "shared_moe_mode": ((None, "sigmoid"), "a shared expert mixed in another way"),
    "scoring_func": ((None, "softmax"), "another router function"),
    "logits_soft_cap": ((None,), "capped logits"),
    "num_mtp_modules": ((None, 0), "multi-token prediction modules"),
}

# Keys that cannot change a logit of a forward pass in evaluation mode.
HARMLESS_KEYS = frozenset(
    "_name_or_path _attn_implementation_autoset add_cross_attention architectures attention_dropout auto_map bad_words_ids "
    "begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id "
    "diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty "
    "finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder is_encoder_decoder label2id "
    "length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions "
    "output_hidden_states output_router_logits output_scores pad_token_id prefix problem_type pruned_heads "
    "remove_invalid_values repetition_penalty return_dict return_dict_in_generate router_aux_loss_coef router_jitter_noise "
    "sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p "
    "torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache moe_num_experts".split()
)

# Keys that only an artifact (a config with an "mxconv" block) may carry; their truth is in that block.
ARTIFACT_KEYS = frozenset(("is_quantized", "quantization_config"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape and the constants of one hybrid-attention model; `l` indexes layers from 0.

    Source: model.md of MiniMax-Text-01 / M1; field names are those of the released config where it has one.
    """

    dialect: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    rope_permuted: bool
    """q and k rows of softmax layers are in transformers' `proportional` order (formats.md §1)."""
    rotary_dim_stated: bool
    num_experts: int
    experts_per_token: int
    rms_norm_eps: float
    block_size: int
    postnorm: bool
    full_attention_alpha: float
    full_attention_beta: float
    linear_attention_alpha: float
    linear_attention_beta: float
    mlp_alpha: float
    mlp_beta: float
    shared_intermediate_sizes: tuple[int, ...]
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    max_position_embeddings: int | None
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def num_layers(self) -> int:
        """Decoder layers of both kinds."""
        return len(self.layer_types)

    @property
    def artifact(self) -> Mapping[str, Any] | None:
        """The `mxconv` block of an artifact's config, None for a source checkpoint."""
        block = self.raw.get("mxconv")
        return block if isinstance(block, Mapping) else None

    def alpha_beta(self, layer: int) -> tuple[float, float]:
        """Residual factors (alpha, beta) of layer `layer`'s attention."""
        if self.layer_types[layer] == FULL:
            return self.full_attention_alpha, self.full_attention_beta
        return self.linear_attention_alpha, self.linear_attention_beta


class _Reader:
    """Typed access to one config that collects problems instead of stopping at the first."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw, self.where = raw, where
        self.problems: list[MxconvError] = []

    def bad(self, key: str, expected: str) -> None:
        self.problems.append(
            MalformedInput(f"config key {key!r} is wrong", where=self.where, expected=expected, got=repr(self.raw.get(key)))
        )

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        value = self.raw.get(key, default)
        if key in self.raw and self.raw[key] is None and default is not None:
            value = default
        if value is None and key not in self.raw:
            self.problems.append(IncompleteInput(f"config key {key!r} is missing", where=self.where))
            return minimum
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value < 1 << 40:
            self.bad(key, f"an integer of at least {minimum}")
            return minimum
        return value

    def number(self, key: str, default: float, minimum: float = float("-inf")) -> float:
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
            self.bad(key, "a finite number")
            return default
        if value < minimum:
            self.bad(key, f"a number of at least {minimum:g}")
            return default
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            self.bad(key, "true or false")
            return default
        return value


def _check_known(reader: _Reader, dialect: str) -> None:
    used = USED_KEYS["common"] | USED_KEYS[dialect]
    for key, value in reader.raw.items():
        if key in FIXED_KEYS:
            accepted, meaning = FIXED_KEYS[key]
            if not any(value is choice or (value == choice and type(value) is type(choice)) for choice in accepted):
                reader.problems.append(
                    MalformedInput(
                        f"config key {key!r} asks for {meaning}, which mxconv does not implement",
                        where=reader.where,
                        expected=" or ".join(map(repr, accepted)),
                        got=repr(value),
                    )
                )
        elif key in ARTIFACT_KEYS and "mxconv" not in reader.raw:
            if value not in (None, False):
                reader.problems.append(
                    MalformedInput(
                        f"config key {key!r} says that the checkpoint is quantized already, and not by mxconv",
                        where=reader.where,
                        hint="start from the bf16 checkpoint",
                    )
                )
        elif key not in used and key not in HARMLESS_KEYS and key not in ARTIFACT_KEYS:
            reader.problems.append(
                MalformedInput(
                    f"config key {key!r} is not known to mxconv and may change the model",
                    where=reader.where,
                    got=f"{key} = {value!r}",
                    hint="if it cannot change a logit, remove it from a copy of config.json; else this model is not supported",
                )
            )


def _layer_types(reader: _Reader, dialect: str, layers: int) -> tuple[str, ...]:
    key, names = (
        ("attn_type_list", {0: LINEAR, 1: FULL}) if dialect == "minimax-m1" else ("layer_types", {LINEAR: LINEAR, FULL: FULL})
    )
    kinds = reader.raw.get(key)
    if kinds is None:
        reader.problems.append(IncompleteInput(f"config key {key!r} is missing", where=reader.where))
        return (FULL,) * layers
    if not isinstance(kinds, list) or any(isinstance(k, bool | list | dict) or k not in names for k in kinds):
        reader.bad(key, f"a list of {' or '.join(repr(name) for name in names)}")
        return (FULL,) * layers
    if len(kinds) != layers:
        reader.problems.append(
            MalformedInput(
                f"{key} and num_hidden_layers disagree", where=reader.where, expected=f"{layers} entries", got=len(kinds)
            )
        )
        return (FULL,) * layers
    return tuple(names[k] for k in kinds)


def _shared_sizes(reader: _Reader, layers: int) -> tuple[int, ...]:
    value = reader.raw.get("shared_intermediate_size", 0)
    sizes = value if isinstance(value, list) else [value] * layers
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in sizes):
        reader.bad("shared_intermediate_size", "a size of at least 0, or one for each layer")
        return (0,) * layers
    if not any(sizes):
        return (0,) * layers
    if len(sizes) != layers:
        reader.bad("shared_intermediate_size", f"{layers} entries, one for each layer")
        return (0,) * layers
    return tuple(sizes)


def _rope(reader: _Reader, dialect: str, head_dim: int) -> tuple[int, float, bool, bool]:
    """(rotary_dim, theta, permuted, rotary_dim stated) of the original formula: frequencies theta^(-2j/rotary_dim)."""
    theta = reader.number("rope_theta", 1e6)
    rotary = reader.integer("rotary_dim", head_dim)
    stated = reader.raw.get("rotary_dim") is not None
    permuted = False
    rope = reader.raw.get("rope_parameters") if dialect == "minimax" else None
    if rope is not None:
        if not isinstance(rope, dict) or not set(rope) <= {"rope_type", "rope_theta", "partial_rotary_factor"}:
            reader.bad("rope_parameters", "rope_type, rope_theta and partial_rotary_factor only")
            rope = {}
        kind = rope.get("rope_type", "default")
        nested = _Reader(rope, f"{reader.where}: rope_parameters")
        theta = nested.number("rope_theta", theta)
        factor = nested.number("partial_rotary_factor", reader.number("partial_rotary_factor", 1.0))
        reader.problems += nested.problems
        if kind not in ("default", "proportional"):
            reader.problems.append(
                MalformedInput(f"rope_type {kind!r} is not implemented", where=reader.where, expected="default or proportional")
            )
        part = round(head_dim * factor)
        if factor != 1.0 or kind == "proportional":
            if stated and rotary != part:
                reader.bad("rotary_dim", f"{part}, as partial_rotary_factor says")
            rotary, stated = part, True
        if kind == "proportional" and 0 < rotary <= head_dim:
            permuted = rotary < head_dim
            theta = _snap(theta ** (rotary / head_dim))
    if not 0 < rotary <= head_dim or rotary % 2:
        reader.bad("rotary_dim", f"an even size of at most head_dim {head_dim}")
        rotary = head_dim
    if theta <= 0:
        reader.bad("rope_theta", "a number above 0")
    return rotary, theta, permuted, stated


def _snap(theta: float) -> float:
    """Undo the last-bit error of theta ** (D/r) ** (r/D): released values are integers."""
    nearest = float(round(theta))
    return nearest if abs(theta - nearest) <= 1e-9 * abs(theta) else theta


_FACTORS = {
    "minimax-m1": {
        "full_attention_alpha": "layernorm_full_attention_alpha", "full_attention_beta": "layernorm_full_attention_beta",
        "linear_attention_alpha": "layernorm_linear_attention_alpha", "linear_attention_beta": "layernorm_linear_attention_beta",
        "mlp_alpha": "layernorm_mlp_alpha", "mlp_beta": "layernorm_mlp_beta",
    },
    "minimax": {
        "full_attention_alpha": "full_attn_alpha_factor", "full_attention_beta": "full_attn_beta_factor",
        "linear_attention_alpha": "linear_attn_alpha_factor", "linear_attention_beta": "linear_attn_beta_factor",
        "mlp_alpha": "mlp_alpha_factor", "mlp_beta": "mlp_beta_factor",
    },
}  # fmt: skip


def _eos(reader: _Reader) -> tuple[int, ...]:
    value = reader.raw.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        reader.bad("eos_token_id", "a token id, a list of them, or null")
        return ()
    return tuple(ids)


def parse_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """`raw` as a ModelConfig.

    Raises MalformedInput, IncompleteInput or Problems, which list every key that is missing, wrong or not implemented.
    """
    model_type = raw.get("model_type")
    dialect = DIALECT_OF_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None
    if dialect is None:
        raise MalformedInput(
            "model_type is not one that mxconv knows",
            where=where,
            expected=" or ".join(DIALECT_OF_MODEL_TYPE),
            got=repr(model_type),
        )
    reader = _Reader(raw, where)
    _check_known(reader, dialect)
    layers = reader.integer("num_hidden_layers")
    if layers > 100_000:
        reader.bad("num_hidden_layers", "at most 100000")
        raise_all(reader.problems)
    heads, hidden = reader.integer("num_attention_heads"), reader.integer("hidden_size")
    head_dim = reader.integer("head_dim", max(1, hidden // heads))
    kv_heads = reader.integer("num_key_value_heads", heads)
    experts = reader.integer("num_local_experts", 1)
    if layers * experts > MAX_EXPERTS:
        reader.bad("num_local_experts", f"at most {MAX_EXPERTS} experts in all layers together")
        raise_all(reader.problems)
    per_token = reader.integer("num_experts_per_tok", min(2, experts))
    if heads % kv_heads:
        reader.bad("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
    if per_token > experts and experts > 1:
        reader.bad("num_experts_per_tok", f"at most num_local_experts {experts}")
    rotary, theta, permuted, stated = _rope(reader, dialect, head_dim)
    block = raw.get("mxconv")
    if block is not None and not isinstance(block, dict):
        reader.bad("mxconv", "the block that mxconv writes")
    config = ModelConfig(
        dialect=dialect,
        model_type=str(model_type),
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size"),
        layer_types=_layer_types(reader, dialect, layers),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary,
        rope_theta=theta,
        rope_permuted=permuted,
        rotary_dim_stated=stated,
        num_experts=experts,
        experts_per_token=min(per_token, experts),
        rms_norm_eps=reader.number("rms_norm_eps", 1e-5, minimum=0.0),
        block_size=reader.integer("block_size", 256) if dialect == "minimax" else 256,
        postnorm=True if dialect == "minimax" else reader.flag("postnorm", False),
        **{name: reader.number(key, 1.0) for name, key in _FACTORS[dialect].items()},
        shared_intermediate_sizes=_shared_sizes(reader, layers),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        eos_token_ids=_eos(reader),
        max_position_embeddings=reader.raw.get("max_position_embeddings"),
        raw=MappingProxyType(dict(raw)),
    )
    if dialect == "minimax" and any(config.shared_intermediate_sizes):
        reader.bad("shared_intermediate_size", "0: the minimax dialect has no shared expert")
    raise_all(reader.problems)
    return config


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The ModelConfig of `folder`/config.json; see `parse_config` and `read_json` for what is raised."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise MalformedInput("config is not a JSON object", where=path)
    return parse_config(raw, str(path))
