"""The runtime against transformers' code, corrected by data, on fresh random models that it can express."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mxconv.runtime import load
from tests.oracle.corrected_transformers import corrected, logits
from tests.runtime.helpers import FLOAT32_BAR, error, smallest_gap
from tests.synthetic import make_checkpoint, random_ids

pytest.importorskip("transformers", minversion="5.17")

SHAPES: dict[str, dict[str, Any]] = {
    "12 heads": {"heads": 12, "kv_heads": 3, "layers": "llsl", "intermediate": 96},
    "head_dim not hidden over heads": {"head_dim": 32, "rotary_dim": 8, "layers": "slsl", "hidden": 48},
    "factors": {"alphas": (1.1, 1.7, 0.6), "betas": (0.7, 1.3, 0.9), "layers": "ssl"},
    "one expert": {"experts": 1, "layers": "lsl"},
    "one kv head": {"heads": 8, "kv_heads": 1, "layers": "sl"},
    "as many kv heads": {"heads": 4, "kv_heads": 4, "layers": "ls", "rotary_dim": 16},
    "one layer": {"layers": "l", "heads": 5, "kv_heads": 5},
    "tied": {"tied": "yes", "layers": "ls"},
}
# Two blocks and a part of a third.
TOKENS = 530


@pytest.mark.parametrize("name", SHAPES)
def test_prefill(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, seed=len(name), **SHAPES[name])
    ids = random_ids(128, 2, TOKENS)
    expected = logits(corrected(folder), ids)
    model = load(folder)
    # The smallest gap of these seeds is 1.1e-5; a near-tie would say nothing about either forward.
    assert smallest_gap(model, ids) > 5e-6, "take another seed"
    assert error(model(ids), expected) <= FLOAT32_BAR
    cache = model.cache()
    first = model(ids[:, :520], cache=cache)
    rest = [model(ids[:, t : t + 1], cache=cache) for t in range(520, TOKENS)]
    assert error(torch.cat([first, *rest], 1), expected) <= FLOAT32_BAR


def test_trained_models(shared: Path) -> None:
    """Text of the trained models' own distribution would do as well: the ids only have to be legal."""
    ids = random_ids(4096, 1, 300, seed=2)
    for name in ("demo", "tiny-a"):
        folder = shared / "models" / name
        model = load(folder)
        assert smallest_gap(model, ids) > 5e-6, "take another seed"
        assert error(model(ids), logits(corrected(folder), ids)) <= FLOAT32_BAR


def test_stock_transformers_is_another_model(tmp_path: Path) -> None:
    """What the oracle corrects is not small: with transformers' own slopes a model of 12 heads is far off."""
    from tests.synthetic import decay_rates

    folder = make_checkpoint(tmp_path, heads=12, kv_heads=4, layers="lls")
    ids = random_ids(128, 1, 40)
    own = {layer: decay_rates(12, layer, 3, "transformers") for layer in (0, 1)}
    assert error(logits(corrected(folder, own), ids), load(folder)(ids)) > 0.05
