"""bfloat16: what a bf16 server computes, with float32 statistics, router, softmax and states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mxconv.runtime import load
from tests.oracle.fastdeploy_writer import write_artifact
from tests.runtime.helpers import QUANTIZABLE, error, split_call
from tests.synthetic import make_checkpoint, random_ids


def test_noise_floor_of_trained_models(shared: Path) -> None:
    """KL of bf16 against float32 as model.md measured it: 4.2-4.7e-4 on tiny-a, 7.1e-4 on demo."""
    for name, low, high in (("tiny-a", 2e-4, 8e-4), ("demo", 3.5e-4, 1.4e-3)):
        folder = shared / "models" / name
        ids = torch.from_numpy(np.load(shared / "models" / f"{name}-expected.npz")["long_ids"]).long()
        exact = torch.log_softmax(load(folder)(ids).double(), -1)
        rounded = torch.log_softmax(load(folder, dtype=torch.bfloat16)(ids).double(), -1)
        divergence = float((exact.exp() * (exact - rounded)).sum(-1).mean())
        assert low < divergence < high, (name, divergence)


@pytest.mark.parametrize("shape", [{}, {"shared": 32, "postnorm": None}, {"dense": True}])
def test_bf16_is_near_float32(tmp_path: Path, shape: dict) -> None:
    folder = make_checkpoint(tmp_path, layers="lsls", **shape)
    ids = random_ids(128, 2, 300)
    model = load(folder, dtype=torch.bfloat16)
    logits = model(ids)
    assert logits.dtype == torch.float32
    assert 1e-4 < error(logits, load(folder)(ids)) < 0.1
    assert error(split_call(model, ids, [200, 257]), logits) < 0.05
    assert all(state.dtype == torch.float32 for state in _states(model, ids))


def _states(model, ids):  # type: ignore[no-untyped-def]
    cache = model.cache()
    model(ids, cache=cache)
    return cache.states.values()


def test_bf16_routes_with_the_stored_float32_router(tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path), dtype=torch.bfloat16)
    with model.layer(0) as layer:
        assert layer.feed_forward.router is not None
        assert torch.equal(layer.feed_forward.router, model.weights.read(0, "router", 0)[0])


def test_quantized_artifact_in_bf16(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source", **QUANTIZABLE)
    artifact = write_artifact(folder, tmp_path / "artifact", tp=2, scheme="w4afp8")
    ids = random_ids(200, 1, 20)
    for activations in ("none", "quantized"):
        exact = load(artifact)(ids, activations=activations)
        assert error(load(artifact, dtype=torch.bfloat16)(ids, activations=activations), exact) < 0.25  # int4 noise itself is .18
