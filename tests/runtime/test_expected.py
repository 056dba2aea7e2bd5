"""The trained models' expected logits, which agree with the original code: the bars of the runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mxconv.runtime import load
from tests.runtime.helpers import FLOAT32_BAR, FLOAT64_BAR, error, split_call

BARS = {torch.float32: FLOAT32_BAR, torch.float64: FLOAT64_BAR}


def expected(shared: Path, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(short ids, their logits, long ids, logits of their last 16 positions)."""
    data = np.load(shared / "models" / f"{name}-expected.npz")
    short, long = torch.from_numpy(data["short_ids"]).long(), torch.from_numpy(data["long_ids"]).long()
    return short, torch.from_numpy(data["short_logits"]), long, torch.from_numpy(data["long_logits_last16"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["demo", "tiny-a"])
def test_prefill(shared: Path, name: str, tp: int, dtype: torch.dtype) -> None:
    short, short_logits, long, long_logits = expected(shared, name)
    model = load(shared / "models" / name, tp=tp, dtype=dtype, stream=tp == 2)
    logits = model(short)
    assert logits.dtype == torch.float32 and logits.shape == (4, 64, 4096)
    assert error(logits, short_logits) <= BARS[dtype]
    assert error(model(long, last=16), long_logits) <= BARS[dtype]


@pytest.mark.parametrize("cuts", [[519], [256, 257, 512], [1, 2, 3, 300, *range(505, 520)], list(range(500, 520))])
@pytest.mark.parametrize(
    ("name", "tp", "dtype"), [("demo", 1, torch.float64), ("demo", 8, torch.float32), ("tiny-a", 1, torch.float32)]
)
def test_decode_after_prefill(shared: Path, name: str, tp: int, dtype: torch.dtype, cuts: list[int]) -> None:
    _, _, long, long_logits = expected(shared, name)
    model = load(shared / "models" / name, tp=tp, dtype=dtype)
    assert error(split_call(model, long, cuts)[:, -16:], long_logits) <= BARS[dtype]


def test_decode_from_the_first_token(shared: Path) -> None:
    short, short_logits, _, _ = expected(shared, "demo")
    model = load(shared / "models" / "demo", dtype=torch.float64)
    assert error(split_call(model, short, list(range(1, 64))), short_logits) <= FLOAT64_BAR
