"""What the tests of verify share: small sources and right artifacts of them, one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mxconv.execute import convert, quantize
from mxconv.quantize.schemes import SCHEMES
from tests.synthetic import make_checkpoint

SMALL = {
    "layers": "lsl", "hidden": 128, "intermediate": 256, "heads": 4, "kv_heads": 2, "head_dim": 32, "rotary_dim": 16, "seed": 11,
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small products are faster on one thread, and other tests may run beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint that quantizes at TP 1 and 2."""
    return make_checkpoint(tmp_path_factory.mktemp("small") / "source", **SMALL)


@pytest.fixture(scope="session")
def made(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`made(scheme, tp)`: the artifact of `small`, made once; scheme None is convert. Not to be changed."""
    root = tmp_path_factory.mktemp("artifacts")

    def make(scheme: str | None, tp: int) -> Path:
        out = root / f"{scheme}-{tp}"
        if not out.exists():
            _make(small, scheme, tp, out)
        return out

    return make


def _make(source: Path, scheme: str | None, tp: int, out: Path) -> None:
    if scheme is None:
        convert(source, out, tp=tp)
        return
    ids = out.parent / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, 128, (8, 64)))
    quantize(source, out, scheme=scheme, tp=tp, calibration=ids if SCHEMES[scheme].static else None)
