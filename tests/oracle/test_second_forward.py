"""The runtime against a second forward written from the model's description, on fresh random models of many shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mxconv.runtime import load
from tests.oracle.forward import Oracle
from tests.runtime.helpers import FLOAT32_BAR, FLOAT64_BAR, error
from tests.synthetic import make_checkpoint, random_ids

# (shape, TP sizes besides 1 that it cuts into)
SHAPES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "plain": ({}, (2, 4)),
    "no postnorm": ({"postnorm": False, "alphas": (1.0, 1.0, 1.0)}, (2,)),
    "postnorm left out": ({"postnorm": None, "layers": "sl"}, (2,)),
    "shared expert": ({"shared": 32}, (2, 4)),
    "shared expert in some layers": ({"shared": [0, 64, 32], "postnorm": None}, (2, 4)),
    "shared expert, dense": ({"shared": 48, "dense": True}, (2,)),
    "dense mlp": ({"dense": True, "files": 1}, (2, 4)),
    "one routed expert": ({"experts": 1}, (2,)),
    "top 1": ({"experts_per_token": 1}, (2,)),
    "top 3 of 5": ({"experts": 5, "experts_per_token": 3}, (2,)),
    "tied": ({"tied": "yes", "vocab": 100}, (2,)),
    "tied and stored": ({"tied": "stored"}, (2,)),
    "12 heads": ({"heads": 12, "kv_heads": 4, "intermediate": 96, "alphas": (1.3, 0.8, 1.9), "betas": (0.7, 1.2, 0.5)}, (2, 4)),
    "3 heads, one layer": ({"heads": 3, "kv_heads": 3, "layers": "l"}, ()),
    "head_dim not hidden over heads": ({"head_dim": 24, "rotary_dim": 10, "heads": 2, "kv_heads": 1}, (2,)),
    "whole head rotates": ({"rotary_dim": None, "layers": "ss"}, (2,)),
    "kv replicated": ({"heads": 8, "kv_heads": 2}, (4, 8)),
    "vocabulary of no multiple": ({"vocab": 130}, (2, 4)),
    "float16": ({"dtype": torch.float16, "router_dtype": torch.float16}, (2,)),
    "float32, bf16 router": ({"dtype": torch.float32, "router_dtype": torch.bfloat16}, (2,)),
    "eps": ({"eps": 1e-3, "layers": "lls"}, (2,)),
    "minimax": ({"dialect": "minimax"}, (2, 4)),
    "minimax, stacked": ({"dialect": "minimax", "stacked": True, "experts": 3, "files": 1}, (2, 4)),
    "minimax, permuted": ({"dialect": "minimax", "permuted": True, "stacked": True, "layers": "sls"}, (2,)),
    "minimax, without buffers": ({"dialect": "minimax", "decay": "none", "heads": 6, "kv_heads": 2, "intermediate": 96}, (2,)),
}  # fmt: skip
VALUES = ("minimax_m1", "minimax_text_01", "MiniMaxM1", "MiniMaxText01")


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, tmp_path: Path) -> None:
    shape, sizes = SHAPES[name]
    folder = make_checkpoint(tmp_path, seed=len(name), **shape)
    vocab = shape.get("vocab", 128)
    ids = random_ids(vocab, 1, 14)
    expected = Oracle(folder).logits(ids[0])[None]
    for tp in (1, *sizes):
        logits = load(folder, tp=tp, dtype=torch.float64)(ids)
        assert logits.shape == (1, 14, vocab)
        assert error(logits, expected) <= FLOAT64_BAR, f"tp {tp}"
    assert error(load(folder, stream=True)(ids), expected) <= FLOAT32_BAR


@pytest.mark.parametrize("model_type", VALUES)
def test_model_types(model_type: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, layers="l", model_type=model_type)
    ids = random_ids(128, 1, 5)
    assert error(load(folder, dtype=torch.float64)(ids)[0], Oracle(folder).logits(ids[0])) <= FLOAT64_BAR
