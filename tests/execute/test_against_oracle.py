"""Every byte of an artifact against an independent writer that was made from formats.md alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mxconv.calibrate import Statistics, read_statistics
from mxconv.execute import RunOptions, convert, quantize
from tests.oracle.fastdeploy_writer import write_artifact
from tests.synthetic import make_checkpoint

# Shapes that a mapping written for M1 alone gets wrong. Distinct random values everywhere.
SHAPES: dict[str, dict[str, Any]] = {
    "m1-like": {},
    "12 heads, kv 3": {"heads": 12, "kv_heads": 3, "head_dim": 8, "rotary_dim": 4, "layers": "slls"},
    "shared expert": {"shared": [0, 64, 128], "layers": "lsl"},
    "dense": {"dense": True, "experts": 1, "experts_per_token": 1},
    "one routed expert": {"experts": 1, "experts_per_token": 1},
    "tied": {"tied": "yes"},
    "vocabulary 100": {"vocab": 100},
    "no postnorm": {"postnorm": None},
    "f16 weights, bf16 router": {"dtype": torch.float16, "router_dtype": torch.bfloat16},
}
QUANTIZABLE = {"hidden": 128, "intermediate": 512, "heads": 4, "kv_heads": 2, "head_dim": 16}


def ranks_of(folder: Path, tp: int) -> list[dict[str, torch.Tensor]]:
    found = []
    for rank in range(tp):
        at = folder / f"rank{rank}" if tp > 1 else folder
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(at.glob("*.safetensors")):
            tensors |= load_file(file)
        found.append(tensors)
    return found


def assert_same(ours: Path, theirs: Path, tp: int) -> None:
    for rank, (mine, wanted) in enumerate(zip(ranks_of(ours, tp), ranks_of(theirs, tp), strict=True)):
        assert set(mine) == set(wanted), rank
        for name, value in wanted.items():
            assert mine[name].dtype == value.dtype and mine[name].shape == value.shape, (rank, name)
            assert torch.equal(mine[name].view(torch.uint8), value.view(torch.uint8)), (rank, name)
    mine_config, config = (json.loads((folder / "config.json").read_text()) for folder in (ours, theirs))
    block, wanted_block = mine_config.pop("mxconv"), config.pop("mxconv")
    assert mine_config == config
    assert {key: block[key] for key in wanted_block} == wanted_block


# 3 key/value heads: TP 3, 6 and 12 have a test of their own
CASES = [(name, tp) for name, shape in SHAPES.items() for tp in (1, 2, 4) if tp == 1 or shape.get("kv_heads") != 3]


@pytest.mark.parametrize(("name", "tp"), CASES)
def test_convert(tmp_path: Path, name: str, tp: int) -> None:
    source = make_checkpoint(tmp_path / "source", **SHAPES[name])
    convert(source, tmp_path / "ours", tp=tp)
    assert_same(tmp_path / "ours", write_artifact(source, tmp_path / "theirs", tp=tp), tp)


@pytest.mark.parametrize("tp", [3, 6, 12])
def test_convert_to_ranks_that_are_no_power_of_two(tmp_path: Path, tp: int) -> None:
    """12 heads over 3, 6 and 12 ranks; 3 key/value heads are copied to 2 and 4 ranks each at 6 and 12."""
    source = make_checkpoint(
        tmp_path / "source", heads=12, kv_heads=3, head_dim=8, rotary_dim=4, intermediate=48, vocab=190, layers="ls"
    )
    convert(source, tmp_path / "ours", tp=tp)
    assert_same(tmp_path / "ours", write_artifact(source, tmp_path / "theirs", tp=tp), tp)


def absmax_of(statistics: Statistics, scheme: str) -> dict[tuple[int, int, str], float]:
    block = {"tensor_wise_fp8": {"up_gate_proj": 32, "down_proj": 32}}.get(scheme, {"up_gate_proj": 0, "down_proj": 128})
    return {
        (layer, expert, name): statistics.absmax(layer, expert, name, block[name])
        for layer, expert in statistics.tokens
        for name in ("up_gate_proj", "down_proj")
    }


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("scheme", ["w4afp8", "w4afp8_static", "w4a8", "block_wise_fp8", "tensor_wise_fp8"])
def test_quantize(tmp_path: Path, scheme: str, tp: int) -> None:
    source = make_checkpoint(tmp_path / "source", layers="lsl", **QUANTIZABLE)
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, 128, (2, 64)))
    static = scheme in ("w4afp8_static", "w4a8", "tensor_wise_fp8")
    quantize(
        source, tmp_path / "ours", scheme=scheme, tp=tp, calibration=ids if static else None, ignore=["model.layers.1.*"],
        options=RunOptions(workers=2),
    )  # fmt: skip
    absmax = absmax_of(read_statistics(tmp_path / "ours" / "statistics.json"), scheme) if static else None
    theirs = write_artifact(source, tmp_path / "theirs", tp=tp, scheme=scheme, absmax=absmax, ignore=[1])
    assert_same(tmp_path / "ours", theirs, tp)


@pytest.mark.parametrize(
    ("scheme", "group", "hadamard"),
    [("w4afp8", 256, 256), ("w4afp8_static", "channel", 128), ("w4afp8", 128, 512), ("w4a8", None, 256)],
)
def test_quantize_with_other_groups_and_rotations(tmp_path: Path, scheme: str, group: Any, hadamard: int) -> None:
    source = make_checkpoint(tmp_path / "source", layers="ls", hidden=256, intermediate=512, heads=4, kv_heads=2, head_dim=16)
    static = scheme != "w4afp8"
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, 128, 200))
    quantize(
        source, tmp_path / "ours", scheme=scheme, group_size=group, hadamard_block=hadamard, calibration=ids if static else None
    )  # fmt: skip
    absmax = None
    if static:
        measured = read_statistics(tmp_path / "ours" / "statistics.json")
        absmax = {
            (layer, expert, name): measured.absmax(layer, expert, name, b)
            for layer, expert in measured.tokens
            for name, b in (("up_gate_proj", 0), ("down_proj", hadamard))
        }
    theirs = write_artifact(source, tmp_path / "theirs", scheme=scheme, group=group, hadamard=hadamard, absmax=absmax)
    assert_same(tmp_path / "ours", theirs, 1)
