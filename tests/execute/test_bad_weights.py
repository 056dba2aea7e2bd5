"""Weights that must not pass: NaN, infinity, scales that the consumer cannot hold. Exit code 7, tensor, count, first index."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mxconv.errors import IntegrityError, NumericError
from mxconv.execute import RunOptions, convert, quantize
from tests.synthetic import make_checkpoint

W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
W2 = "model.layers.1.block_sparse_moe.experts.2.w2.weight"


def poisoned(folder: Path, name: str, *, value: float, at: list[tuple[int, int]]) -> Path:
    source = make_checkpoint(folder, hidden=128, intermediate=256, files=1)
    tensors = load_file(source / "model.safetensors")
    for row, column in at:
        tensors[name][row, column] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


@pytest.mark.parametrize("scheme", ["w4afp8", "block_wise_fp8", "tensor_wise_fp8", None])
@pytest.mark.parametrize("name", [W1, W2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, scheme: str | None, name: str, value: float) -> None:
    source = poisoned(tmp_path / "source", name, value=value, at=[(101, 7), (90, 100), (120, 3)])
    with pytest.raises(NumericError) as caught:
        if scheme is None:
            convert(source, tmp_path / "out", tp=2, options=RunOptions(workers=2))
        else:
            ids = tmp_path / "ids.npy"
            np.save(ids, np.arange(40) % 128)
            static = scheme == "tensor_wise_fp8"
            quantize(source, tmp_path / "out", scheme=scheme, tp=2, calibration=ids if static else None)
    assert caught.value.exit_code == 7
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert name in str(caught.value) and "3 weights" in str(caught.value) and "(90, 100)" in str(caught.value)


def test_a_scale_that_overflows_float16_is_refused(tmp_path: Path) -> None:
    source = poisoned(tmp_path / "source", W1, value=1e6, at=[(5, 5)])
    with pytest.raises(NumericError, match="float16"):
        quantize(source, tmp_path / "out")
    quantize(source, tmp_path / "fp8", scheme="block_wise_fp8")


def test_small_scales_are_counted_in_the_manifest(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", hidden=128, intermediate=128, scale=1e-6)
    result = quantize(source, tmp_path / "out")
    assert result.manifest.body["warnings"]["subnormal_scales"] > 0
    assert any("subnormal" in note for note in result.notes)


def test_a_source_that_changes_during_the_run_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_checkpoint(tmp_path / "source", hidden=128, intermediate=256, files=1)
    import mxconv.execute.run as run

    ran = 0
    copy = run.OPERATIONS["copy"]

    def touch(unit, job, findings):  # type: ignore[no-untyped-def]
        nonlocal ran
        ran += 1
        if ran == 5:
            file = source / "model.safetensors"
            tensors = load_file(file)
            tensors["model.norm.weight"] = torch.zeros_like(tensors["model.norm.weight"])
            save_file(tensors, file, metadata={"format": "pt"})
        return copy(unit, job, findings)

    monkeypatch.setitem(run.OPERATIONS, "copy", touch)  # type: ignore[arg-type]
    with pytest.raises(IntegrityError, match="changed"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
