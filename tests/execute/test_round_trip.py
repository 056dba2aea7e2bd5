"""The way back: fused rank shards → the artifact's own source form, byte for byte, for every dialect, shape and TP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mxconv.errors import IntegrityError, MalformedInput, Problems, UsageError
from mxconv.execute import RunOptions, convert, quantize
from mxconv.runtime import load
from tests.synthetic import make_checkpoint, random_ids

M1: dict[str, dict[str, Any]] = {
    "m1-like": {},
    "one file": {"files": 1},
    "text-01, no postnorm": {"postnorm": None, "model_type": "minimax_text_01"},
    "re-saved": {"model_type": "MiniMaxM1"},
    "shared experts in some layers": {"shared": [64, 0, 32]},
    "dense": {"dense": True, "experts": 1, "experts_per_token": 1},
    "one routed expert": {"experts": 1, "experts_per_token": 1},
    "tied": {"tied": "yes"},
    "tied, head stored as well": {"tied": "stored"},
    "vocabulary 100": {"vocab": 100},
    "bf16 router": {"router_dtype": torch.bfloat16},
    "f32 weights": {"dtype": torch.float32},
}
HF: dict[str, dict[str, Any]] = {
    "per expert": {},
    "stacked": {"stacked": True},
    "permuted": {"permuted": True},
    "stacked, permuted, one file": {"stacked": True, "permuted": True, "files": 1},
    "without buffers": {"decay": "none"},
    "tied": {"tied": "yes"},
}
CASES = [*(("minimax-m1", name) for name in M1), *(("minimax", name) for name in HF)]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_checkpoint(back: Path, source: Path) -> None:
    """Same files with the same tensors and bits; decay buffers, which are regenerated, only nearly."""
    assert sorted(p.name for p in back.glob("*.safetensors")) == sorted(p.name for p in source.glob("*.safetensors"))
    for file in source.glob("*.safetensors"):
        ours, theirs = load_file(back / file.name), load_file(file)
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            assert ours[name].shape == value.shape, name
            if name.endswith(("_decay", "slope_rate")):
                assert ours[name].dtype == torch.float32
                torch.testing.assert_close(ours[name], value.float(), rtol=4e-3, atol=4e-3)
            else:
                assert ours[name].dtype == value.dtype, name
                assert torch.equal(ours[name].view(torch.uint8), value.view(torch.uint8)), name
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()
    index = source / "model.safetensors.index.json"
    assert (back / index.name).exists() == index.exists()
    if index.exists():
        ours, theirs = (json.loads((folder / index.name).read_text()) for folder in (back, source))
        assert ours["weight_map"] == theirs["weight_map"]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(("dialect", "name"), CASES)
def test_there_and_back(tmp_path: Path, dialect: str, name: str, tp: int) -> None:
    source = make_checkpoint(tmp_path / "source", dialect=dialect, **(M1 if dialect == "minimax-m1" else HF)[name])
    convert(source, tmp_path / "shards", tp=tp, options=RunOptions(workers=2))
    convert(tmp_path / "shards", tmp_path / "back", layout=None, options=RunOptions(workers=2))
    assert_same_checkpoint(tmp_path / "back", source)


@pytest.mark.parametrize("name", HF)
def test_the_minimax_dialect_by_way_of_the_other_one(tmp_path: Path, name: str) -> None:
    """minimax → minimax-m1 → minimax-m1's own form: the second artifact goes back to what the first was made from."""
    source = make_checkpoint(tmp_path / "source", dialect="minimax", **HF[name])
    convert(source, tmp_path / "m1", layout="minimax-m1")
    convert(tmp_path / "m1", tmp_path / "back", layout=None)
    assert_same_checkpoint(tmp_path / "back", source)


@pytest.mark.parametrize(
    "shape", [{}, {"heads": 12, "kv_heads": 4, "head_dim": 8, "rotary_dim": 4}, {"tied": "yes"}, {"vocab": 100}]
)
def test_m1_to_minimax_and_on_to_m1_keeps_every_tensor(tmp_path: Path, shape: dict[str, Any]) -> None:
    source = make_checkpoint(tmp_path / "source", **shape)
    convert(source, tmp_path / "hf", layout="minimax")
    convert(tmp_path / "hf", tmp_path / "m1", layout="minimax-m1")
    assert_same_checkpoint(tmp_path / "m1", source)


@pytest.mark.parametrize("layout", ["fastdeploy", "minimax", "minimax-m1"])
@pytest.mark.parametrize(
    ("dialect", "name"), [("minimax-m1", "m1-like"), ("minimax-m1", "tied"), *(("minimax", name) for name in HF)]
)
def test_every_form_computes_the_same_logits(tmp_path: Path, dialect: str, name: str, layout: str) -> None:
    """The runtime, which does not know the mapping tables, sees the same model in every form."""
    source = make_checkpoint(tmp_path / "source", dialect=dialect, **(M1 if dialect == "minimax-m1" else HF)[name])
    convert(source, tmp_path / "out", layout=layout, tp=2 if layout == "fastdeploy" else 1)
    ids = random_ids(128, 2, 40)
    wanted = load(source, dtype=torch.float64)(ids).double()
    got = load(tmp_path / "out", dtype=torch.float64)(ids).double()
    assert float((got - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize(
    ("shape", "word"),
    [
        ({"postnorm": False}, "postnorm"),
        ({"shared": 64}, "shared"),
        ({"dense": True, "experts": 1, "experts_per_token": 1}, "dense"),
    ],
)
def test_what_the_minimax_dialect_cannot_hold_is_refused(tmp_path: Path, shape: dict[str, Any], word: str) -> None:
    source = make_checkpoint(tmp_path / "source", **shape)
    with pytest.raises(UsageError, match=word):
        convert(source, tmp_path / "out", layout="minimax")
    assert not (tmp_path / "out").exists()


def test_a_quantized_artifact_has_no_way_back(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", hidden=128, intermediate=128)
    quantize(source, tmp_path / "q")
    with pytest.raises(UsageError, match="no way back"):
        convert(tmp_path / "q", tmp_path / "back", layout=None)


def test_copies_that_differ_between_ranks_are_found(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", kv_heads=1)
    convert(source, tmp_path / "shards", tp=2)
    file = next((tmp_path / "shards" / "rank1").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="copies of final_norm differ"):
        convert(tmp_path / "shards", tmp_path / "back", layout=None)


def test_padding_that_is_not_zero_is_found(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", vocab=100)
    convert(source, tmp_path / "shards", tp=2)
    file = next((tmp_path / "shards" / "rank1").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][-1, 0] = 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="padding"):
        convert(tmp_path / "shards", tmp_path / "back", layout=None)


def test_other_decay_buffers_are_refused_unless_kept(tmp_path: Path) -> None:
    shape = {"heads": 12, "kv_heads": 4, "head_dim": 8, "rotary_dim": 4, "dialect": "minimax", "decay": "transformers"}
    source = make_checkpoint(tmp_path / "source", **shape)
    with pytest.raises((MalformedInput, Problems), match="layer 0: decay buffer"):
        convert(source, tmp_path / "refused", tp=2)
    convert(source, tmp_path / "kept", tp=2, keep_decay=True)
    ids = random_ids(128, 1, 300)
    wanted, got = load(source, keep_decay=True)(ids), load(tmp_path / "kept")(ids)
    assert float((got - wanted).norm() / wanted.norm()) < 2e-6
    convert(tmp_path / "kept", tmp_path / "back", layout=None)
    assert_same_checkpoint(tmp_path / "back", source)
    formula = make_checkpoint(tmp_path / "formula", **{**shape, "decay": "formula"})
    assert float((load(formula)(ids) - wanted).norm() / wanted.norm()) > 1e-2


def test_a_contradicting_tied_head_is_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", tied="contradicted")
    with pytest.raises(MalformedInput, match="different lm_head"):
        convert(source, tmp_path / "out")
