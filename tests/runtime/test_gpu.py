"""The same model on a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mxconv.quantize.schemes import SCHEMES
from mxconv.runtime import generate, load
from tests.oracle.fastdeploy_writer import write_artifact
from tests.runtime.helpers import QUANTIZABLE, error, gathered_absmax, split_call
from tests.synthetic import make_checkpoint, random_ids

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tp", [1, 2])
def test_source(tmp_path: Path, tp: int) -> None:
    folder = make_checkpoint(tmp_path, layers="lsls", shared=32, postnorm=None)
    ids = random_ids(128, 2, 530)
    mask = torch.ones(2, 530, dtype=torch.bool)
    mask[0, 100:140] = False
    expected = load(folder, dtype=torch.float64)(ids, mask=mask)
    for dtype, bar in ((torch.float32, 2e-6), (torch.float64, 1e-7)):
        model = load(folder, device="cuda", dtype=dtype, tp=tp, stream=tp == 2)
        logits = model(ids, mask=mask)
        assert logits.is_cuda
        assert error(logits.cpu()[mask], expected[mask]) <= bar
        assert error(split_call(model, ids, [255, 256, 257], mask=mask).cpu()[mask], expected[mask]) <= bar
    assert error(load(folder, device="cuda", dtype=torch.bfloat16)(ids, mask=mask).cpu()[mask], expected[mask]) < 0.1


@pytest.mark.parametrize("name", SCHEMES)
def test_artifacts(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path / "source", **QUANTIZABLE)
    ids = random_ids(200, 1, 40)
    scheme = SCHEMES[name]
    absmax = gathered_absmax(load(folder), ids, dict(scheme.rotation)) if scheme.static else None
    artifact = write_artifact(folder, tmp_path / "artifact", tp=2, scheme=name, absmax=absmax)
    on_cpu, on_gpu = load(artifact), load(artifact, device="cuda")
    assert error(on_gpu(ids, activations="none").cpu(), on_cpu(ids, activations="none")) <= 2e-6
    assert error(on_gpu(ids).cpu(), on_cpu(ids)) <= 0.05  # rounding flips codes


def test_generate(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    tokens = [list(generate(load(folder, device=device), [1, 2, 3], max_tokens=20, eos_ids=())) for device in ("cpu", "cuda")]
    assert tokens[0] == tokens[1]
