"""One digest, whatever the workers, the order of the units, the hash seed, the umask, and the number of threads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from mxconv.artifact import tree_digest
from tests.faults.conftest import Clean
from tests.faults.processes import ENVIRONMENT, REPOSITORY
from tests.faults.shuffled import JOBS, UMASKS, run_shuffled


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("job", JOBS)
def test_workers_order_umask(job: str, workers: int, model: Path, clean: Mapping[str, Clean], tmp_path: Path) -> None:
    seen, orders = set(), set()
    for seed in (None, 1, 2):
        for umask in UMASKS:
            for again in range(2):
                drawn = None if seed is None else seed * 2 + again
                digest, order = run_shuffled(job, model, tmp_path / "out", workers=workers, seed=drawn, umask=umask)
                seen.add(digest)
                orders.add(order)
    assert seen == {clean[job].digest}
    assert len(orders) > 3  # the shuffling reached the workers


def test_hash_seeds_and_everything_else(model: Path, clean: Mapping[str, Clean], tmp_path: Path) -> None:
    """Hash seeds × workers × orders × umasks × two runs, of a job that copies, one that computes, and one that calibrates."""
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 512, (2, 64)))
    runs = []
    for seed, hash_seed in enumerate(("0", "4294967295", "random")):
        arguments = [str(model), str(tmp_path), str(tmp_path / "ids.npy"), str(seed * 100)]
        done = subprocess.run(
            [sys.executable, "-m", "tests.faults.shuffled", *arguments], cwd=REPOSITORY, capture_output=True, text=True,
            env={**ENVIRONMENT, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        runs += [json.loads(line) for line in done.stdout.splitlines()]
    digests = {job: {run["digest"] for run in runs if run["job"] == job} for job in ("convert", "quantize", "static")}
    assert digests["convert"] == {clean["convert"].digest} and digests["quantize"] == {clean["quantize"].digest}
    assert len(digests["static"]) == 1
    assert len(runs) == 3 * 3 * 6 and len({(run["job"], *run["order"]) for run in runs}) == len(runs)
    print(f"proof: {len(runs)} runs under 3 hash seeds, one tree a job")


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
