"""Activation scales against an absmax gathered again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mxconv.calibrate import read_statistics
from mxconv.errors import IncompleteInput, MalformedInput
from mxconv.execute import quantize
from mxconv.progress import SILENT
from mxconv.quantize.schemes import SCHEMES
from mxconv.runtime import open_weights
from mxconv.verify import Options, verify
from mxconv.verify.activation import gather, judge_scales, recorded_tokens
from mxconv.verify.limits import Limits
from tests.spoil import seal
from tests.synthetic import make_checkpoint
from tests.verify.conftest import SMALL

STATIC = [name for name, scheme in SCHEMES.items() if scheme.static]


@pytest.mark.parametrize("scheme", STATIC)
def test_gathering_agrees_with_the_calibration_that_it_does_not_share(scheme: str, made: Callable[..., Path], small: Path) -> None:
    """Two passes, two rotations, one absmax."""
    artifact = made(scheme, 2)
    statistics = read_statistics(artifact / "statistics.json")
    chosen = SCHEMES[scheme]
    found = gather(open_weights(small), recorded_tokens(artifact, 128), chosen, torch.device("cpu"), SILENT)
    assert found
    for (layer, name), value in found.items():
        expert = int(name.split(".")[1])
        projection = {"up_gate": "up_gate_proj", "down": "down_proj"}[name.split(".")[2]]
        wanted = statistics.absmax(layer, expert, projection, chosen.rotation[projection])
        assert value == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "factor"), [(1.0, 1.0), (1.2, 1.2), (1 / 1.2, 1.2), (1.3, 1.3), (1 / 1.3, 1.3), (100.0, 100.0)]
)
def test_the_factor_counts_both_ways(change: float, factor: float, made: Callable[..., Path]) -> None:
    artifact = open_weights(made("tensor_wise_fp8", 2))
    gathered = {(0, "experts.0.down"): 44.8}
    stored = {(0, "experts.0.down"): (0.1, 0.1 * change)}
    findings, worst = judge_scales(artifact, stored, gathered, Limits(scheme="tensor_wise_fp8", overrides={}))
    assert worst == pytest.approx(factor)
    assert [finding.rank for finding in findings] == ([1] if factor > 1.25 else [])


def test_experts_that_saw_no_token_are_held_to_the_peer_maximum(made: Callable[..., Path]) -> None:
    artifact = open_weights(made("w4a8", 1))
    gathered = {(1, "experts.0.down"): 3.0, (1, "experts.1.down"): 5.0, (1, "experts.1.up_gate"): 90.0, (0, "experts.2.down"): 70.0}
    limits = Limits(scheme="w4a8", overrides={})
    assert judge_scales(artifact, {(1, "experts.3.down"): (5.0,)}, gathered, limits) == ([], 1.0)
    findings, _ = judge_scales(artifact, {(1, "experts.3.down"): (3.0,)}, gathered, limits)
    assert [finding.tensor for finding in findings] == ["model.layers.1.block_sparse_moe.experts.3.down_proj.activation_scale"]


def test_an_artifact_with_unseen_experts_passes(tmp_path: Path) -> None:
    """Two tokens cannot reach all eight experts."""
    source = make_checkpoint(tmp_path / "source", **{**SMALL, "experts": 8})
    np.save(tmp_path / "ids.npy", np.array([[3, 9]]))
    quantize(source, tmp_path / "out", scheme="w4a8", tp=2, calibration=tmp_path / "ids.npy")
    assert read_statistics(tmp_path / "out" / "statistics.json").unseen
    report = verify(tmp_path / "out", Options(source=source, sections=("numerics",)))
    assert report.ok and report.section("numerics").figures["activation_factor"] == pytest.approx(1.0, rel=1e-4)


def test_without_the_recorded_tokens_nothing_vouches_for_the_scales(
    made: Callable[..., Path], small: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(made("w4a8", 1), tmp_path / "out"))
    (out / "calibration.npy").unlink()
    seal(out)
    (finding,) = verify(out, Options(source=small, sections=("numerics",))).findings
    assert finding.check == "activation scales" and "calibration.npy" in finding.render()


NO_TOKENS = [np.ones((2, 3)), np.ones(4, dtype=np.int64), np.full((1, 3), 128), np.full((1, 3), -1), "text", ""]


@pytest.mark.parametrize("values", NO_TOKENS)
def test_recordings_that_are_no_tokens(values: Any, tmp_path: Path) -> None:
    path = tmp_path / "calibration.npy"
    if isinstance(values, str):
        path.write_text(values)
    else:
        np.save(path, values)
    with pytest.raises(MalformedInput):
        recorded_tokens(tmp_path, 128)


def test_no_recording(tmp_path: Path) -> None:
    with pytest.raises(IncompleteInput):
        recorded_tokens(tmp_path, 128)


def test_another_checkpoints_tokens_change_the_verdict(made: Callable[..., Path], small: Path, tmp_path: Path) -> None:
    """The scales must fit the tokens that the artifact records, not any."""
    out = Path(shutil.copytree(made("w4a8", 1), tmp_path / "out"))
    np.save(out / "calibration.npy", np.array([[1, 1], [2, 2]], dtype=np.int32))
    seal(out)
    findings = verify(out, Options(source=small, sections=("numerics",))).findings
    assert findings and {finding.check for finding in findings} == {"activation scales"}
