"""Opening sources: dialects, forms, decay buffers, tied heads, TP sizes, and everything that must be refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mxconv.errors import IncompleteInput, MalformedInput, MxconvError, Problems, UsageError
from mxconv.runtime import load, open_weights
from tests.oracle.forward import Oracle
from tests.runtime.helpers import FLOAT64_BAR, error, resave
from tests.synthetic import decay_rates, make_checkpoint, random_ids

IDS = random_ids(128, 1, 9)


def logits(folder: Path, **kwargs: Any) -> Tensor:
    return load(folder, dtype=torch.float64, **kwargs)(IDS)[0]


def test_names_of_a_layer(tmp_path: Path) -> None:
    weights = load(make_checkpoint(tmp_path, layers="ls", experts=2, shared=[16, 0])).weights
    assert weights.names(None) == ("embed", "final_norm", "lm_head")
    expert_names = ("experts.0.up_gate", "experts.0.down", "experts.1.up_gate", "experts.1.down")
    assert weights.names(0) == (
        "attn_norm", "mlp_norm", "q", "k", "v", "output_gate", "linear_norm", "attn_out", "router",
        "shared.up_gate", "shared.down", "shared.coefficient", *expert_names,
    )  # fmt: skip
    assert weights.names(1) == ("attn_norm", "mlp_norm", "q", "k", "v", "attn_out", "router", *expert_names)


def test_weights_of_ranks(tmp_path: Path) -> None:
    """Rows of q, k and v by hand from the source's (head, {q, k, v}, dim) order; columns of down; gate above up."""
    folder = make_checkpoint(tmp_path, layers="ls", files=1, heads=4, head_dim=8, kv_heads=2, intermediate=32, rotary_dim=4)
    tensors = load_file(folder / "model.safetensors")
    weights = load(folder, tp=4).weights
    qkv = tensors["model.layers.0.self_attn.qkv_proj.weight"].float()
    for rank in range(4):
        for slot, name in enumerate("qkv"):
            start = (rank * 3 + slot) * 8
            assert torch.equal(weights.dense(0, name, rank), qkv[start : start + 8])
    # KV heads 0, 0, 1, 1
    k = tensors["model.layers.1.self_attn.k_proj.weight"].float()
    assert [bool(torch.equal(weights.dense(1, "k", rank), k[:8])) for rank in range(4)] == [True, True, False, False]
    w1, w2, w3 = (tensors[f"model.layers.1.block_sparse_moe.experts.3.w{i}.weight"].float() for i in (1, 2, 3))
    assert torch.equal(weights.dense(1, "experts.3.up_gate", 2), torch.cat((w1[16:24], w3[16:24])))
    assert torch.equal(weights.dense(1, "experts.3.down", 2), w2[:, 16:24])
    assert torch.equal(weights.dense(0, "linear_norm", 3), tensors["model.layers.0.self_attn.norm.weight"].float()[24:])
    assert weights.stored(1, "experts.3.up_gate", 0) == tuple(
        f"model.layers.1.block_sparse_moe.experts.3.w{i}.weight" for i in (1, 3)
    )
    assert weights.dense(0, "router", 0, torch.float64).dtype == torch.float64


def test_expectation_is_exactly_what_a_checkpoint_holds(tmp_path: Path) -> None:
    for number, shape in enumerate(
        [{}, {"shared": [8, 0, 8]}, {"dense": True}, {"tied": "yes"}, {"tied": "stored"}, {"dialect": "minimax"},
         {"dialect": "minimax", "stacked": True}, {"dialect": "minimax", "decay": "none"}]
    ):  # fmt: skip
        folder = make_checkpoint(tmp_path / str(number), files=1, **shape)
        tensors = load_file(folder / "model.safetensors")
        expected = open_weights(folder, tp=2).expected_tensors(1)
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {n: e.shape for n, e in expected.items()}


def test_decay_buffers_of_the_formula_are_accepted(tmp_path: Path) -> None:
    for number, (decay, heads) in enumerate([("formula", 4), ("formula", 12), ("transformers", 4), ("transformers", 8)]):
        for dtype in (torch.bfloat16, torch.float32):
            folder = make_checkpoint(
                tmp_path / f"{number}{dtype}", layers="lls", dialect="minimax", decay=decay, heads=heads, kv_heads=heads,
                dtype=dtype,
            )  # fmt: skip
            assert error(logits(folder), Oracle(folder).logits(IDS[0])) <= FLOAT64_BAR


def test_decay_buffers_of_other_slopes(tmp_path: Path) -> None:
    folder = make_checkpoint(
        tmp_path, dialect="minimax", decay="transformers", heads=12, kv_heads=4, layers="sll", dtype=torch.float32
    )
    with pytest.raises(MalformedInput, match=r"layer 1: .*decay buffers differ") as caught:
        load(folder)
    assert caught.value.exit_code == 3 and "keep" in str(caught.value)
    # The last layer's rates are so small that both formulas agree within the tolerance: it keeps the original's.
    own = {1: decay_rates(12, 1, 3, "transformers")}
    assert error(logits(folder, keep_decay=True), Oracle(folder).logits(IDS[0], rates=own)) <= 1e-6  # slopes stored in float32


@pytest.mark.parametrize("name", ["slope_rate", "query_decay", "key_decay", "diagonal_decay"])
def test_one_wrong_buffer(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path, dialect="minimax", files=1)

    def change(tensors: dict[str, Tensor]) -> None:
        buffer = tensors[f"model.layers.2.self_attn.{name}"]
        buffer.view(-1)[0] += 0.05

    resave(folder, change)
    with pytest.raises(MalformedInput, match="layer 2"):
        load(folder)
    with pytest.raises(MalformedInput, match="contradict"):
        load(folder, keep_decay=True)


def test_nan_in_a_buffer(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, dialect="minimax", files=1)
    resave(folder, lambda tensors: tensors["model.layers.0.self_attn.key_decay"].fill_(float("nan")))
    with pytest.raises(MalformedInput, match="layer 0"):
        load(folder)


def test_tied_head_that_differs(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, tied="contradicted")
    with pytest.raises(MalformedInput, match="lm_head differs"):
        load(folder)


@pytest.mark.parametrize(
    ("shape", "tp", "valid"),
    [
        ({"heads": 6, "kv_heads": 3, "intermediate": 96, "vocab": 192}, 2, "tp 1 or 3 or 6"),
        ({}, 3, "tp 1 or 2 or 4"),
        ({}, 8, "tp 1 or 2 or 4"),
        ({"intermediate": 50}, 4, "tp 1 or 2"),
        ({"shared": 6}, 4, "tp 1 or 2"),
        ({"heads": 5, "kv_heads": 5, "intermediate": 60, "vocab": 64}, 5, "tp 1"),
        ({}, 0, "tp 1 or 2 or 4"),
    ],
)
def test_tp_that_does_not_divide(tmp_path: Path, shape: dict[str, Any], tp: int, valid: str) -> None:
    folder = make_checkpoint(tmp_path, **shape)
    with pytest.raises(UsageError, match=valid):
        load(folder, tp=tp)


def drop(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def reshape(name: str) -> Any:
    return lambda tensors: tensors.update({name: tensors[name].reshape(-1, 2).contiguous()})


def retype(name: str) -> Any:
    return lambda tensors: tensors.update({name: tensors[name].to(torch.int32)})


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        (drop("model.layers.1.block_sparse_moe.experts.2.w3.weight"), IncompleteInput, r"layers\.1\..*\.2\.w3\.weight is missing"),
        (drop("lm_head.weight"), IncompleteInput, "lm_head.weight is missing"),
        (reshape("model.layers.0.self_attn.out_proj.weight"), MalformedInput, "out_proj.weight has another shape"),
        (retype("model.norm.weight"), MalformedInput, "another dtype"),
    ],
)
def test_tensors_that_are_not_as_expected(tmp_path: Path, change: Any, kind: type[MxconvError], match: str) -> None:
    folder = make_checkpoint(tmp_path, files=1)
    resave(folder, change)
    with pytest.raises(kind, match=match):
        load(folder)


def test_all_problems_at_once(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, files=1)
    resave(folder, lambda tensors: (drop("model.norm.weight")(tensors), reshape("lm_head.weight")(tensors)))
    with pytest.raises(Problems) as caught:
        load(folder)
    assert caught.value.exit_code == 3 and len(caught.value.problems) == 2


def test_unexpected_tensors_are_named_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_checkpoint(tmp_path, files=1)
    expected = logits(folder)
    resave(folder, lambda tensors: tensors.update({"model.layers.0.extra\x1b.weight": torch.zeros(2)}))
    try:
        with caplog.at_level(logging.WARNING):
            assert torch.equal(logits(folder), expected)
        assert "1 tensors are not part of the model" in caplog.text and "\x1b" not in caplog.text
    except MalformedInput as error_:  # the header parser may refuse the name before the runtime sees it
        assert "\x1b" not in str(error_)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(IncompleteInput):
        load(tmp_path / "absent")
    folder = make_checkpoint(tmp_path / "half")
    (folder / "rank0").mkdir()
    with pytest.raises(IncompleteInput, match="manifest"):
        load(folder)


def test_index_without_shards(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(IncompleteInput):
        load(folder)


def test_dtype_of_the_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dtype"):
        load(make_checkpoint(tmp_path), dtype=torch.float16)


def test_config_that_names_another_number_of_experts(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, experts=4)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 5}))
    with pytest.raises(MxconvError) as caught:
        load(folder)
    assert caught.value.exit_code in (3, 4)
