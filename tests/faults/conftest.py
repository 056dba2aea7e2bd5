"""What the fault campaigns share: a model, a process that forks jobs, and what a clean run writes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from mxconv.artifact import tree_digest
from tests.faults.processes import JOBS, Zygote, command, contents
from tests.synthetic import make_checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Clean:
    """An uninterrupted run: its files, its tree digest, its units, and the seconds that it takes when traced."""

    files: Mapping[str, bytes]
    digest: str
    units: int
    seconds: float


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 MB in three shards, both kinds of layers, every kind of unit."""
    folder = tmp_path_factory.mktemp("model") / "model"
    return make_checkpoint(folder, hidden=256, intermediate=256, layers="lsls", experts=4, vocab=512, files=3)


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """The forking process."""
    with Zygote(tmp_path_factory.mktemp("zygote")) as process:
        yield process


@pytest.fixture(scope="session")
def clean(zygote: Zygote, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Clean]:
    """The clean run of each job."""
    runs = {}
    for job in JOBS:
        folder, seconds = tmp_path_factory.mktemp("clean"), 60.0
        for again in range(3):
            root, began = folder / f"{job}{again}", time.monotonic()
            code, run = zygote.run(command(job, model, root), started=str(folder / "started"))
            assert code == 0, run.err.read_text()
            seconds = min(seconds, time.monotonic() - began)
        runs[job] = Clean(files=contents(root), digest=tree_digest(root), units=run.events()[-1]["units"], seconds=seconds)
    return runs
