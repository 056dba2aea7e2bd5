"""What the tests of verify share: small sources and right artifacts of them, one thread."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mxconv.execute import convert, quantize
from mxconv.quantize.schemes import SCHEMES
from mxconv.runtime.watch import start_of
from tests.synthetic import make_checkpoint
from tests.verify.together import Command

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


def maker(source: Path, root: Path) -> Callable[..., Path]:
    """`make(scheme, tp)`: the artifact of `source`, made once in `root`; scheme None is convert. Not to be changed."""

    def make(scheme: str | None, tp: int) -> Path:
        out = root / f"{scheme}-{tp}"
        if not out.exists():
            _make(source, scheme, tp, out)
        return out

    return make


@pytest.fixture(scope="session")
def made(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Artifacts of `small`, see `maker`."""
    return maker(small, tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="session")
def made_of_tiny_a(tiny_a: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Artifacts of the trained model, see `maker`."""
    return maker(tiny_a, tmp_path_factory.mktemp("tiny-a"))


@pytest.fixture
def command(made: Callable[..., Path], small: Path, tmp_path: Path) -> Iterator[Command]:
    """A command whose processes are gone afterwards, whatever the test found."""
    (tmp_path / "pids").mkdir()
    command = Command(artifact=made("w4afp8", 2), source=small, pids=tmp_path / "pids")
    yield command
    for pid in command.known():
        if start_of(pid):
            os.kill(pid, signal.SIGKILL)


def _make(source: Path, scheme: str | None, tp: int, out: Path) -> None:
    if scheme is None:
        convert(source, out, tp=tp)
        return
    ids = out.parent / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, 128, (8, 64)))
    quantize(source, out, scheme=scheme, tp=tp, calibration=ids if SCHEMES[scheme].static else None)
