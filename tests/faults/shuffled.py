"""Jobs run in this process with a seeded order of units; as a program, many of them under the hash seed that it was started with.

    PYTHONHASHSEED=7 python -m tests.faults.shuffled MODEL FOLDER IDS SEED

prints one JSON object a run: job, digest of the tree, and the order in which the units began.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mxconv.artifact import tree_digest
from mxconv.execute import RunOptions, convert, quantize, run

JOBS: Mapping[str, Callable[..., object]] = {"convert": convert, "quantize": quantize}
UMASKS = (0o000, 0o022, 0o077)


@contextlib.contextmanager
def _order(seed: int | None, begun: list[str]) -> Iterator[None]:
    """Units begin in the order that `seed` draws, None for the plan's own; `begun` gets their names."""
    run_unit, position = run._run_unit, run._position
    draw = random.Random(seed)

    def traced(unit: run.Unit, *rest: Any) -> None:
        begun.append(unit.id)
        run_unit(unit, *rest)

    run._run_unit = traced
    if seed is not None:
        run._position = lambda *_: (draw.randrange(1 << 30), 0, 0)
    try:
        yield
    finally:
        run._run_unit, run._position = run_unit, position


def run_shuffled(
    job: str, model: Path, out: Path, *, workers: int, seed: int | None, umask: int, **options: Any
) -> tuple[str, tuple[str, ...]]:
    """One run into `out`, which goes again; its tree digest and the order of its units. Modes must follow the umask."""
    begun: list[str] = []
    before = os.umask(umask)
    try:
        with _order(seed, begun):
            JOBS[job](model, out, tp=2, options=RunOptions(workers=workers), **options)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
    if modes != {0o666 & ~umask}:
        raise RuntimeError(f"modes {modes} under umask {umask:o}")
    digest = tree_digest(out)
    shutil.rmtree(out)
    return digest, tuple(begun)


def main(model: Path, folder: Path, ids: Path, seed: int) -> None:
    """Every job at 1, 2 and 8 workers, each in an order of its own and under another umask, twice."""
    jobs: Mapping[str, tuple[str, Mapping[str, Any]]] = {
        "convert": ("convert", {}), "quantize": ("quantize", {}), "static": ("quantize", {"scheme": "w4a8", "calibration": ids}),
    }  # fmt: skip
    for name, (job, options) in jobs.items():
        for turn, workers in enumerate((1, 2, 8)):
            for again in range(2):
                umask, drawn = UMASKS[(seed + turn) % 3], seed + turn * 2 + again
                digest, order = run_shuffled(job, model, folder / "out", workers=workers, seed=drawn, umask=umask, **options)
                sys.stdout.write(json.dumps({"job": name, "digest": digest, "order": order}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
