"""`diff`: silent on one model in many spellings, and exact about a planted difference."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mxconv.comparison import Comparison, Measure, compare, models
from mxconv.errors import IncompleteInput, UsageError
from mxconv.execute import convert, quantize
from tests.spoil import Folder
from tests.synthetic import make_checkpoint

SHAPE: dict[str, Any] = {
    "layers": "lsl", "hidden": 128, "intermediate": 512, "heads": 4, "kv_heads": 2, "head_dim": 32, "rotary_dim": 16, "experts": 2,
    "vocab": 100, "files": 1,
}  # fmt: skip
W2 = "model.layers.1.block_sparse_moe.experts.1.w2.weight"
QKV = "model.layers.0.self_attn.qkv_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source`, and the same model as fused ranks, in the other dialect, and quantized at two TP sizes."""
    root = tmp_path_factory.mktemp("made")
    source = make_checkpoint(root / "source", **SHAPE)
    convert(source, root / "tp1")
    convert(source, root / "tp4", tp=4)
    convert(source, root / "hf", layout="minimax")
    for tp in (1, 2):
        quantize(source, root / f"w4-{tp}", tp=tp)
    np.save(root / "ids.npy", np.arange(200) % 100)
    quantize(source, root / "static", scheme="w4a8", tp=2, calibration=root / "ids.npy")
    return root


def edited(source: Path, to: Path, change: Any, **config: Any) -> Path:
    """A copy of a checkpoint of one file with `change(tensors)` made and keys of its config set."""
    shutil.copytree(source, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(raw))
    return to


def names(found: Comparison) -> list[str]:
    return [difference.name for difference in found.differences]


@pytest.mark.parametrize(
    ("a", "b"),
    [("source", "tp1"), ("source", "tp4"), ("tp4", "tp1"), ("hf", "tp4"), ("source", "hf"), ("w4-1", "w4-2"), ("static", "static")],
)
def test_one_model_in_two_spellings_does_not_differ(made: Path, a: str, b: str) -> None:
    found = compare(made / a, made / b, workers=2)
    assert found.equal and found.compared == 3 + 3 * (2 + 4 + 1 + 2 * 2) + 2 * 2 and not found.notes


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_transformers_spellings_do_not_differ(stacked: bool, permuted: bool, tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", **SHAPE)
    other = make_checkpoint(tmp_path / "other", **SHAPE, dialect="minimax", stacked=stacked, permuted=permuted)
    found = compare(plain, other)
    assert not found.differences
    assert set(found.config) <= {"rope_theta", "max_position_embeddings"}


def test_a_planted_value_is_found_with_its_place_and_size(made: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[W2][7, 300] += 0.5
        tensors[W2][90, 2] -= 0.25

    other = edited(made / "source", tmp_path / "other", change)
    before, after = (load_file(folder / "model.safetensors")[W2].double() for folder in (made / "source", other))
    for reference in ("source", "tp4", "hf"):
        found = compare(made / reference, other, workers=2)
        assert names(found) == ["layers.1.experts.1.down"] and not found.config
        (each,) = found.differences
        assert (each.elements, each.differing, each.first) == (128 * 512, 2, (7, 300))
        assert each.max_abs == float((before - after).abs().max())
        assert each.relative_l2 == pytest.approx(float((before - after).norm() / before.norm()), rel=1e-12)
    assert compare(made / "source", other).differences[0].stored == (W2,)


def test_a_difference_in_an_interleaved_tensor_is_named_q_k_or_v(made: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[QKV][(2 * 3 + 1) * 32 + 5, 9] += 1  # head 2, k, row 5

    other = edited(made / "source", tmp_path / "other", change)
    (each,) = compare(made / "tp4", other).differences
    assert each.name == "layers.0.k" and each.first == (2 * 32 + 5, 9) and each.differing == 1


@pytest.mark.parametrize("name", ["embed", "lm_head"])
def test_vocabulary_matrices_are_compared_in_blocks(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    stored = {"embed": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}[name]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[stored][61, 3] += 1
        tensors[stored][99, 127] += 1

    other = edited(made / "source", tmp_path / "other", change)
    monkeypatch.setattr(models, "ROWS", 16)
    (each,) = compare(made / "tp4", other).differences
    assert (each.name, each.first, each.differing, each.elements) == (name, (61, 3), 2, 100 * 128)


def test_the_worst_comes_first_and_signs_of_zero_and_nan_count(made: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = float("nan")
        tensors[W2] *= 2

    other = edited(made / "source", tmp_path / "other", change)
    found = compare(made / "source", other)
    assert names(found) == ["final_norm", "layers.1.experts.1.down"]
    assert found.differences[0].max_abs == math.inf and found.differences[1].relative_l2 == 1
    assert compare(other, other).equal  # a NaN is itself
    json.dumps(found.document()["equal"])
    measure = Measure()
    measure.add(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    assert measure.differing == 1 and measure.max_abs == 0
    measure = Measure()
    measure.add(torch.zeros(3), torch.tensor([0.0, 2.0, 0.0]))
    assert measure.relative_l2 == math.inf and measure.first == (1,)


def test_another_dtype_with_the_same_values_is_a_note(made: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[W2] = tensors[W2].float()

    found = compare(made / "source", edited(made / "source", tmp_path / "other", change))
    assert found.equal and found.notes == ("some weights have the same values in bfloat16 and in float32",)


def test_config_and_shapes_and_what_one_side_lacks(made: Path, tmp_path: Path) -> None:
    other = edited(made / "source", tmp_path / "other", lambda tensors: None, layernorm_mlp_alpha=1.5)
    found = compare(made / "source", other)
    assert not found.equal and found.config == {"mlp_alpha": (1.6, 1.5)} and not found.differences
    fewer = make_checkpoint(tmp_path / "fewer", **{**SHAPE, "layers": "ls", "intermediate": 256, "experts": 4})
    found = compare(made / "source", fewer)
    reasons = {each.name: each.reason or "" for each in found.differences}
    assert reasons["layers.2.q"] == "only in the first one" and reasons["layers.1.experts.3.down"] == "only in the second one"
    assert reasons["layers.0.experts.0.down"] == "shapes differ: [128, 512] and [128, 256]"
    assert {"layer_types", "num_experts", "intermediate_size"} <= found.config.keys()


def test_quantization_error_is_measured_on_decoded_weights(made: Path) -> None:
    found = compare(made / "source", made / "w4-2")
    assert {each.name.split(".")[2] for each in found.differences} == {"experts"} and len(found.differences) == 12
    assert all(0.05 < each.relative_l2 < 0.2 for each in found.differences)
    assert compare(made / "source", made / "w4-2", only="*.q").equal


def test_one_code_one_scale_and_one_activation_scale(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "static", tmp_path / "other")
    folder = Folder(tmp_path / "other", made / "source")
    stem = "model.layers.1.block_sparse_moe.experts.0."
    folder.ranks[1][f"{stem}up_gate_proj.quant_weight"][3, 5] ^= 1
    for rank in folder.ranks:
        rank[f"{stem}down_proj.activation_scale"] *= 2
    folder.save()
    found = compare(made / "static", tmp_path / "other")
    assert sorted(names(found)) == ["layers.1.experts.0.down (activation_scale)", "layers.1.experts.0.up_gate"]
    assert found.differences[0].relative_l2 == 1 and found.differences[1].first == (256 + 5, 6)


def test_ranks_that_contradict_each_other_are_named(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "tp4", tmp_path / "other")
    folder = Folder(tmp_path / "other", made / "source")
    folder.ranks[2]["model.norm.weight"] += 1
    folder.save()
    (each,) = compare(made / "tp4", tmp_path / "other").differences
    assert each.name == "final_norm" and "different copies" in (each.reason or "")


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    tied = make_checkpoint(tmp_path / "tied", **SHAPE, tied="yes")

    def untie(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    found = compare(tied, edited(tied, tmp_path / "untied", untie, tie_word_embeddings=False))
    assert not found.differences and found.config == {"tie_word_embeddings": (True, False)}


def test_kept_decay_rates_are_compared(tmp_path: Path) -> None:
    shape = {**SHAPE, "heads": 6, "dialect": "minimax"}  # six heads: what transformers computes for itself is not the formula
    right = make_checkpoint(tmp_path / "right", **shape)
    found = compare(right, make_checkpoint(tmp_path / "other", **shape, decay="transformers"), keep_decay=True)
    assert set(names(found)) == {"layers.0 decay rates"}  # in layer 2 all rates are nearly zero


def test_memory_and_patterns(made: Path, tmp_path: Path) -> None:
    assert compare(made / "source", made / "tp4", workers=8, memory_bytes=1).equal
    with pytest.raises(UsageError):
        compare(made / "source", made / "tp4", only="nothing*")
    shutil.copytree(made / "tp4", tmp_path / "unfinished")
    (tmp_path / "unfinished" / "manifest.json").unlink()
    with pytest.raises(IncompleteInput):
        compare(made / "source", tmp_path / "unfinished")
