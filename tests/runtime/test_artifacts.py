"""fastdeploy artifacts: every scheme and TP size, written by an independent hand and held to an independent serving forward."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxconv.errors import IncompleteInput, IntegrityError, MalformedInput, MxconvError, UsageError
from mxconv.quantize.schemes import SCHEMES
from mxconv.runtime import load
from tests.oracle.fastdeploy_writer import write_artifact
from tests.oracle.forward import Oracle
from tests.oracle.serving import Serving
from tests.runtime.helpers import FLOAT32_BAR, FLOAT64_BAR, QUANTIZABLE, error, gathered_absmax
from tests.synthetic import make_checkpoint, random_ids

IDS = random_ids(200, 1, 10)
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"scheme": name} for name in SCHEMES},
    "w4afp8 g256": {"scheme": "w4afp8", "group": 256, "hadamard": 256},
    "w4afp8_static channel": {"scheme": "w4afp8_static", "group": "channel", "hadamard": 256},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source"), shared=[0, 64, 0], **QUANTIZABLE)


@pytest.fixture(scope="module")
def seen(source: Path) -> dict[int, dict[tuple[int, int, str], float]]:
    """Hadamard block of down_proj (32: of both) → absmax of every projection's input."""
    model = load(source)
    rotations = {b: {"up_gate_proj": 0, "down_proj": b} for b in (128, 256)} | {32: {"up_gate_proj": 32, "down_proj": 32}}
    return {b: gathered_absmax(model, IDS, rotation) for b, rotation in rotations.items()}


def make(source: Path, out: Path, seen: dict, tp: int, options: dict[str, Any], **more: Any) -> Path:
    scheme = options["scheme"]
    block = 32 if scheme == "tensor_wise_fp8" else options.get("hadamard", 128)
    absmax = seen[block] if SCHEMES[scheme].static else None
    return write_artifact(source, out, tp=tp, absmax=absmax, **options, **more)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_quantized_logits(source: Path, seen: dict, tmp_path: Path, name: str, tp: int) -> None:
    artifact = make(source, tmp_path, seen, tp, OPTIONS[name])
    model = load(artifact, dtype=torch.float64)
    assert error(model(IDS)[0], Serving(source, artifact).logits(IDS[0])) <= FLOAT64_BAR
    plain = Serving(source, artifact, quantize_activations=False).logits(IDS[0])
    assert error(model(IDS, activations="none")[0], plain) <= FLOAT64_BAR
    assert error(load(artifact, stream=True)(IDS, activations="none")[0], plain) <= FLOAT32_BAR


@pytest.mark.parametrize("name", OPTIONS)
def test_ranks_equal_one(source: Path, seen: dict, tmp_path: Path, name: str) -> None:
    """TP 4 (above the KV heads) computes what TP 1 does, and put together it holds the very codes and scales."""
    tp = 2 if OPTIONS[name].get("hadamard") == 256 else 4
    one = load(make(source, tmp_path / "1", seen, 1, OPTIONS[name]))
    artifact = make(source, tmp_path / "n", seen, tp, OPTIONS[name])
    several, merged = load(artifact), load(artifact, merge=True)
    assert (several.tp, merged.tp) == (tp, 1)
    assert error(several(IDS, activations="none"), one(IDS, activations="none")) <= FLOAT32_BAR
    assert torch.equal(merged(IDS), one(IDS))
    for layer in range(3):
        for weight in one.weights.names(layer):
            a, b = one.weights.coded(layer, weight, 0), merged.weights.coded(layer, weight, 0)
            assert torch.equal(one.weights.dense(layer, weight, 0), merged.weights.dense(layer, weight, 0)), weight
            if a is not None:
                assert b is not None and torch.equal(a.codes, b.codes) and torch.equal(a.weight_scale, b.weight_scale)
    for rank in range(tp):
        held = load_file(artifact / f"rank{rank}" / "model-00001-of-00001.safetensors")
        expected = several.weights.expected_tensors(rank)
        assert {weight: tuple(tensor.shape) for weight, tensor in held.items()} == {w: e.shape for w, e in expected.items()}
    for weight in ("embed", "lm_head", "final_norm"):
        assert torch.equal(one.weights.dense(None, weight, 0)[:200], merged.weights.dense(None, weight, 0)[:200])


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_unquantized(source: Path, tmp_path: Path, tp: int) -> None:
    artifact = write_artifact(source, tmp_path, tp=tp)
    expected = Oracle(source).logits(IDS[0])
    for merge in (False, True):
        model = load(artifact, dtype=torch.float64, merge=merge)
        logits = model(IDS)
        assert logits.shape[-1] == 200
        assert error(logits[0], expected) <= FLOAT64_BAR
    simulated, stored = load(source, tp=tp).weights, load(artifact).weights
    for layer in (None, 0, 1, 2):
        assert simulated.names(layer) == stored.names(layer)
        for name in stored.names(layer):
            for rank in range(tp):
                assert torch.equal(simulated.dense(layer, name, rank), stored.dense(layer, name, rank)), (layer, name, rank)


@pytest.mark.parametrize("shape", [{"tied": "yes", "vocab": 130}, {"dense": True}, {"experts": 1}, {"shared": 128, "heads": 4}])
def test_unquantized_shapes(shape: dict[str, Any], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source", postnorm=None, **shape)
    artifact = write_artifact(folder, tmp_path / "artifact", tp=2)
    ids = random_ids(128, 1, 8)
    assert error(load(artifact, dtype=torch.float64)(ids)[0], Oracle(folder).logits(ids[0])) <= FLOAT64_BAR


def test_decoded_weights_are_near_their_source(source: Path, seen: dict, tmp_path: Path) -> None:
    """`dense` is in the source's own space: relative errors are those of the formats on random weights."""
    bounds = {"w4afp8": 0.13, "w4afp8_static": 0.13, "w4a8": 0.15, "block_wise_fp8": 0.03, "tensor_wise_fp8": 0.03}
    reference = load(source, tp=2).weights
    for name, bound in bounds.items():
        weights = load(make(source, tmp_path / name, seen, 2, OPTIONS[name])).weights
        for weight in ("experts.1.up_gate", "experts.3.down"):
            for rank in range(2):
                off = error(weights.dense(1, weight, rank), reference.dense(1, weight, rank))
                assert bound / 8 < off < bound, (name, weight)


def test_ignored_layers_stay_unquantized(source: Path, seen: dict, tmp_path: Path) -> None:
    artifact = make(source, tmp_path, seen, 2, OPTIONS["w4a8"], ignore=(1,))
    model = load(artifact, dtype=torch.float64)
    assert model.weights.coded(1, "experts.0.down", 0) is None
    assert model.weights.coded(2, "experts.0.down", 0) is not None
    assert model.weights.stored(1, "experts.0.down", 1) == ("model.layers.1.block_sparse_moe.experts.0.down_proj.weight",)
    assert error(model(IDS)[0], Serving(source, artifact).logits(IDS[0])) <= FLOAT64_BAR


def test_kept_slopes(source: Path, tmp_path: Path) -> None:
    rates = {"0": [0.3 + 0.01 * h for h in range(8)], "2": [0.2] * 8}
    artifact = write_artifact(source, tmp_path, tp=2, mxconv={"slopes": {k: [s.hex() for s in v] for k, v in rates.items()}})
    expected = Oracle(source).logits(IDS[0], rates={int(layer): values for layer, values in rates.items()})
    assert error(load(artifact, dtype=torch.float64)(IDS)[0], expected) <= FLOAT64_BAR
    assert error(load(source)(IDS)[0], expected) > 1e-3


@pytest.mark.parametrize(
    "slopes", [[], {"1": ["0x1p-1"] * 8}, {"0": ["0x1p-1"] * 7}, {"0": ["x"] * 8}, {"0": ["-0x1p-1"] * 8}, {"0": 3}]
)
def test_bad_slopes(source: Path, tmp_path: Path, slopes: Any) -> None:
    artifact = write_artifact(source, tmp_path, mxconv={"slopes": slopes or [1]})
    with pytest.raises(MalformedInput, match="slopes"):
        load(artifact)


def test_another_tp_is_an_error(source: Path, tmp_path: Path) -> None:
    artifact = write_artifact(source, tmp_path, tp=2)
    assert load(artifact, tp=2).tp == 2
    with pytest.raises(UsageError, match="cut into 2 ranks"):
        load(artifact, tp=1)


def edit_config(artifact: Path, **block: Any) -> None:
    config = json.loads((artifact / "config.json").read_text())
    config["mxconv"] |= block
    (artifact / "config.json").write_text(json.dumps(config))


def damaged(artifact: Path, how: str) -> None:
    file = artifact / "rank1" / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    stem = "model.layers.0.block_sparse_moe.experts.2.down_proj"

    def put(name: str, tensor: Tensor | None) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor.contiguous()
        save_file(tensors, file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name)}
        (artifact / "rank1" / "model.safetensors.index.json").write_text(json.dumps(index))

    {
        "no manifest": lambda: (artifact / "manifest.json").unlink(),
        "rank missing": lambda: shutil.rmtree(artifact / "rank1"),
        "rank too many": lambda: shutil.copytree(artifact / "rank1", artifact / "rank2"),
        "tensor missing": lambda: put(f"{stem}.weight_scale", None),
        "codes transposed": lambda: put(f"{stem}.quant_weight", tensors[f"{stem}.quant_weight"].T),
        "scale as bf16": lambda: put(f"{stem}.weight_scale", tensors[f"{stem}.weight_scale"].bfloat16()),
        "activation scale 0-d": lambda: put(f"{stem}.activation_scale", torch.tensor(1.0)),
        "router as bf16": lambda: put("model.layers.0.block_sparse_moe.gate.weight",
                                      tensors["model.layers.0.block_sparse_moe.gate.weight"].bfloat16()),
        "no block": lambda: (artifact / "config.json").write_text(
            json.dumps({k: v for k, v in json.loads((artifact / "config.json").read_text()).items() if k != "mxconv"}
                       | {"is_quantized": False, "quantization_config": None})
        ) and (artifact / "manifest.json").unlink(),
        "tp text": lambda: edit_config(artifact, tp="2"),
        "layout": lambda: edit_config(artifact, layout="gguf"),
        "scheme": lambda: edit_config(artifact, scheme="w9"),
        "group": lambda: edit_config(artifact, group_size=64),
    }[how]()  # fmt: skip


@pytest.mark.parametrize(
    ("how", "kind", "match"),
    [
        ("no manifest", IncompleteInput, "manifest.json"),
        ("rank missing", IncompleteInput, "rank folders"),
        ("rank too many", IncompleteInput, "rank folders"),
        ("tensor missing", IncompleteInput, r"experts\.2\.down_proj\.weight_scale is missing"),
        ("codes transposed", MalformedInput, r"experts\.2\.down_proj\.quant_weight has another shape"),
        ("scale as bf16", MalformedInput, r"weight_scale has another dtype \(expected F32, got BF16\)"),
        ("activation scale 0-d", MalformedInput, "activation_scale has another shape"),
        ("router as bf16", MalformedInput, "gate.weight has another dtype"),
        ("no block", IncompleteInput, "manifest.json"),
        ("tp text", MalformedInput, "tp"),
        ("layout", UsageError, "layout"),
        ("scheme", MalformedInput, "scheme"),
        ("group", MalformedInput, "block"),
    ],
)
def test_damage(source: Path, seen: dict, tmp_path: Path, how: str, kind: type[MxconvError], match: str) -> None:
    artifact = make(source, tmp_path, seen, 2, OPTIONS["w4a8"])
    damaged(artifact, how)
    with pytest.raises(kind, match=match):
        load(artifact)


def test_zero_activation_scale(source: Path, seen: dict, tmp_path: Path) -> None:
    artifact = make(source, tmp_path, seen, 1, OPTIONS["w4a8"])
    file = artifact / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.block_sparse_moe.experts.2.down_proj.activation_scale"].zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(MalformedInput, match="activation_scale"):
        load(artifact).weights.coded(0, "experts.2.down", 0)


@pytest.mark.parametrize("tensor", ["model.layers.1.self_attn.qkv_proj.weight", "model.layers.1.input_layernorm.weight"])
def test_replicas_that_differ(source: Path, tmp_path: Path, tensor: str) -> None:
    """TP 4 over 2 KV heads: ranks 0 and 1 hold the same head, every rank the same norm."""
    artifact = write_artifact(source, tmp_path, tp=4)
    file = artifact / "rank1" / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    tensors[tensor][..., -1] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="different copies"):
        load(artifact, merge=True)(IDS)


def test_source_layout_artifacts_need_a_manifest(tmp_path: Path) -> None:
    block = {"version": 1, "layout": "minimax-m1", "tp": 1, "scheme": None}
    folder = make_checkpoint(tmp_path, config={"mxconv": block})
    with pytest.raises(IncompleteInput, match="manifest"):
        load(folder)
    (folder / "manifest.json").write_text("{}")
    ids = random_ids(128, 1, 4)
    assert error(load(folder, tp=2, dtype=torch.float64)(ids)[0], Oracle(folder).logits(ids[0])) <= FLOAT64_BAR
