"""Configs: both dialects, every key used, harmless or refused by name, all problems at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mxconv.config import DIALECT_OF_MODEL_TYPE, FIXED_KEYS, FULL, HARMLESS_KEYS, LINEAR, USED_KEYS, parse_config, read_config
from mxconv.errors import IncompleteInput, MalformedInput, MxconvError, Problems
from tests.synthetic import Shape, make_config


def m1(**changes: Any) -> dict[str, Any]:
    return {**make_config(Shape()), **changes}


def hf(**changes: Any) -> dict[str, Any]:
    return {**make_config(Shape(dialect="minimax")), **changes}


def problems_of(raw: dict[str, Any]) -> list[str]:
    try:
        parse_config(raw)
    except Problems as found:
        return [problem.render() for problem in found.problems]
    except MxconvError as problem:
        return [problem.render()]
    return []


def test_the_released_config_is_read(shared: Path) -> None:
    config = read_config(shared / "reference" / "minimax-m1")
    assert config.dialect == "minimax-m1" and config.num_layers == 80
    assert [i for i, kind in enumerate(config.layer_types) if kind == FULL] == list(range(7, 80, 8))
    assert (config.rotary_dim, config.head_dim, config.rope_theta) == (64, 128, 1e7)
    assert config.full_attention_alpha == 3.5565588200778455 == (2 * 80) ** 0.25
    assert config.postnorm and config.shared_intermediate_sizes == (0,) * 80


@pytest.mark.parametrize("model_type", DIALECT_OF_MODEL_TYPE)
def test_every_model_type_is_taken(model_type: str) -> None:
    raw = hf() if model_type == "minimax" else m1(model_type=model_type)
    assert parse_config(raw).dialect == DIALECT_OF_MODEL_TYPE[model_type]


@pytest.mark.parametrize("model_type", ["minimax_m2", "llama", None, 3, ["minimax_m1"]])
def test_other_model_types_are_refused(model_type: Any) -> None:
    with pytest.raises(MalformedInput, match="model_type"):
        parse_config(m1(model_type=model_type))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"), ("sliding_window", 4096), ("rope_scaling", {"type": "yarn"}), ("attention_bias", True),
        ("norm_topk_prob", False), ("shared_moe_mode", "softmax"), ("scoring_func", "sigmoid"), ("use_qk_norm", True),
        ("num_mtp_modules", 1), ("mlp_bias", True), ("logits_soft_cap", 30.0),
    ],
)  # fmt: skip
def test_what_is_not_implemented_is_refused_by_name(key: str, value: Any) -> None:
    assert key in FIXED_KEYS
    found = problems_of(m1(**{key: value}))
    assert len(found) == 1 and repr(key) in found[0] and FIXED_KEYS[key][1] in found[0]


@pytest.mark.parametrize("key", ["attn_temperature", "n_group", "quantization_confg"])
def test_an_unknown_key_is_refused(key: str) -> None:
    assert any(key in line for line in problems_of(m1(**{key: 1})))


def test_a_key_of_the_other_dialect_is_unknown() -> None:
    assert problems_of(m1(full_attn_alpha_factor=1.0)) and problems_of(hf(attn_type_list=[1, 0, 1]))


def test_no_key_is_in_two_tables() -> None:
    used = set().union(*USED_KEYS.values())
    assert not used & HARMLESS_KEYS and not used & set(FIXED_KEYS) and not HARMLESS_KEYS & set(FIXED_KEYS)


def test_an_already_quantized_source_is_refused() -> None:
    assert "quantized already" in problems_of(m1(quantization_config={"quant_method": "fp8"}))[0]


def test_all_problems_come_together() -> None:
    found = problems_of(
        m1(hidden_act="gelu", sliding_window=1, vocab_size=0, attn_type_list=[0, 2, 0], rms_norm_eps="x", postnorm=1)
    )
    assert len(found) == 6


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "attn_type_list"])
def test_a_missing_key_is_named(key: str) -> None:
    raw = m1()
    del raw[key]
    with pytest.raises((IncompleteInput, Problems)) as caught:
        parse_config(raw)
    assert caught.value.exit_code in (3, 4) and key in caught.value.render()


@pytest.mark.parametrize("value", [True, "64", 64.0, -1, 0, None, [64], 1 << 50])
def test_a_size_is_a_positive_integer(value: Any) -> None:
    assert any("vocab_size" in line for line in problems_of(m1(vocab_size=value)))


@pytest.mark.parametrize(("key", "value"), [("num_local_experts", 10**9), ("num_hidden_layers", 10**9)])
def test_a_config_cannot_ask_for_billions_of_tensors(key: str, value: int) -> None:
    found = problems_of(m1(**{key: value}))
    assert found and any(key in line for line in found)


def test_missing_postnorm_means_false_in_one_dialect_and_true_in_the_other() -> None:
    raw = m1()
    raw.pop("postnorm")
    assert parse_config(raw).postnorm is False
    assert parse_config(hf()).postnorm is True


@pytest.mark.parametrize(
    ("value", "sizes"), [(0, (0, 0, 0)), ([0], (0, 0, 0)), (64, (64, 64, 64)), ([64, 0, 32], (64, 0, 32)), ([0, 0], (0, 0, 0))]
)
def test_shared_sizes_are_one_or_one_a_layer(value: Any, sizes: tuple[int, ...]) -> None:
    assert parse_config(m1(shared_intermediate_size=value)).shared_intermediate_sizes == sizes


@pytest.mark.parametrize("value", [[64], [64, 64], -1, "64", [True, 0, 0]])
def test_other_shared_sizes_are_refused(value: Any) -> None:
    assert any("shared_intermediate_size" in line for line in problems_of(m1(shared_intermediate_size=value)))


def test_proportional_rope_is_the_original_in_another_order() -> None:
    rope = {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e7**2}
    config = parse_config(hf(rope_parameters=rope))
    assert (config.rotary_dim, config.rope_theta, config.rope_permuted) == (8, 1e7, True)
    default = parse_config(hf(rope_parameters={"rope_type": "default", "rope_theta": 1e4}))
    assert (default.rope_permuted, default.rotary_dim_stated) == (False, "rotary_dim" in hf())


@pytest.mark.parametrize("rope", [{"rope_type": "yarn"}, {"rope_type": "default", "factor": 2.0}, "default"])
def test_other_rope_is_refused(rope: Any) -> None:
    assert problems_of(hf(rope_parameters=rope))


def test_layer_types_of_both_dialects() -> None:
    assert parse_config(m1(attn_type_list=[0, 1, 0])).layer_types == (LINEAR, FULL, LINEAR)
    assert parse_config(hf()).layer_types == (LINEAR, FULL, LINEAR)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1, "a": 2}', "\xff", "[" * 100_000, "null", "1e400"])
def test_a_broken_file_is_malformed(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(MalformedInput) as caught:
        read_config(tmp_path)
    assert "config.json" in caught.value.render()


def test_an_absent_file_is_incomplete(tmp_path: Path) -> None:
    with pytest.raises(IncompleteInput):
        read_config(tmp_path)


def test_control_characters_of_a_config_are_never_printed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**m1(), "evil\x1b[31m": "\x07"}))
    with pytest.raises(MalformedInput) as caught:
        read_config(tmp_path)
    assert all(character.isprintable() or character == "\n" for character in caught.value.render())
