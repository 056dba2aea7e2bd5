"""One digest, whatever the workers, the order of the units, the hash seed, the umask, and the number of threads."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from mxconv.artifact import tree_digest
from mxconv.execute import RunOptions, convert, quantize, run
from tests.faults.conftest import Clean
from tests.faults.processes import ENVIRONMENT

RUNS: Mapping[str, Callable[..., object]] = {"convert": convert, "quantize": quantize}


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("job", RUNS)
def test_workers_order_umask(
    job: str, workers: int, model: Path, clean: Mapping[str, Clean], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, orders = set(), set()
    for seed in (None, 1, 2):
        for umask in (0o000, 0o022, 0o077):
            for again in range(2):
                begun: list[str] = []
                run_unit = run._run_unit

                def traced(unit: run.Unit, *rest: object, begun: list[str] = begun, run_unit: Callable = run_unit) -> None:
                    begun.append(unit.id)
                    run_unit(unit, *rest)

                before = os.umask(umask)
                try:
                    with monkeypatch.context() as patch:
                        patch.setattr(run, "_run_unit", traced)
                        if seed is not None:
                            random_ = random.Random(seed * 2 + again)
                            patch.setattr(run, "_position", lambda *_, random_=random_: (random_.randrange(1 << 30), 0, 0))
                        RUNS[job](model, tmp_path / "out", tp=2, options=RunOptions(workers=workers))
                finally:
                    os.umask(before)
                orders.add(tuple(begun))
                seen.add(tree_digest(tmp_path / "out"))
                assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").rglob("*") if p.is_file()} == {0o666 & ~umask}
                shutil.rmtree(tmp_path / "out")
    assert seen == {clean[job].digest}
    assert len(orders) > 3  # the shuffling reached the workers


@pytest.mark.parametrize(
    ("job", "seed", "workers", "umask"),
    [("convert", "0", 8, 0o077), ("convert", "random", 1, 0o002), ("convert", "4294967295", 2, 0o022),
     ("quantize", "0", 8, 0o077), ("quantize", "random", 1, 0o002)],
)  # fmt: skip
def test_hash_seeds(job: str, seed: str, workers: int, umask: int, model: Path, clean: Mapping[str, Clean], tmp_path: Path) -> None:
    arguments = [job, str(model), str(tmp_path / "out"), "--tp", "2", "--workers", str(workers), "-q"]
    environment = {**ENVIRONMENT, "PYTHONHASHSEED": seed}
    subprocess.run([sys.executable, "-m", "mxconv", *arguments], env=environment, umask=umask, check=True, timeout=120)
    assert tree_digest(tmp_path / "out") == clean[job].digest


def test_a_calibrated_run_does_not_depend_on_threads_or_workers(model: Path, tmp_path: Path) -> None:
    """Activation scales come out of matrix products, whose sums could follow the number of threads."""
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 512, (2, 200)))
    seen = set()
    for threads in (1, 2, 4):
        root = tmp_path / f"out{threads}"
        arguments = ["quantize", str(model), str(root), "--scheme", "w4a8", "--calibration", str(tmp_path / "ids.npy"), "-q"]
        subprocess.run(
            [sys.executable, "-m", "mxconv", *arguments, "--workers", str(threads)], check=True, timeout=120,
            env={**ENVIRONMENT, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
        )  # fmt: skip
        seen.add(tree_digest(root))
    assert len(seen) == 1
