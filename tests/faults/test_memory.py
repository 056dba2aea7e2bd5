"""Bounded memory: the peak of a run does not grow with the model, and a run keeps to a hard limit."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.processes import ENVIRONMENT
from tests.synthetic import make_checkpoint

JOBS = {"convert": ["--tp", "2"], "quantize": ["--tp", "2", "--scheme", "w4afp8"]}
MIB = 1 << 20


# The kernel hands the peak of the process that calls exec on to what it becomes; a small process in between starts anew.
LAUNCHER = """
import resource, subprocess, sys
kind, limit = int(sys.argv[1]), int(sys.argv[2])
set_limit = (lambda: resource.setrlimit(kind, (limit, limit))) if limit else None
done = subprocess.run(sys.argv[3:], preexec_fn=set_limit, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""


def peak(job: str, source: Path, output: Path, kind: int = 0, limit: int = 0) -> int:
    """Peak resident bytes of one real process, which must end well, under a limit of the kind when one is given."""
    command = [sys.executable, "-m", "mxconv", job, str(source), str(output), *JOBS[job], "--workers", "2", "-q"]
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, str(kind), str(limit), *command], env=ENVIRONMENT, stdout=subprocess.PIPE, check=True,
        timeout=120,
    )  # fmt: skip
    return int(done.stdout) << 10


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same layers, 4 and 12 of them: about 60 and 170 MiB."""
    folder = tmp_path_factory.mktemp("models")
    shape = {"hidden": 512, "intermediate": 1024, "experts": 4, "heads": 8, "head_dim": 64, "files": 8}
    small = make_checkpoint(folder / "small", layers="lsls", **shape)
    return small, make_checkpoint(folder / "large", layers="lsls" * 3, **shape)


@pytest.mark.parametrize("job", JOBS)
def test_the_peak_does_not_grow_with_the_model(job: str, models: tuple[Path, Path], tmp_path: Path) -> None:
    small, large = (peak(job, source, tmp_path / f"out{number}") for number, source in enumerate(models))
    print(f"proof: {job}: peak {small / MIB:.0f} MiB and {large / MIB:.0f} MiB")
    assert large - small < 24 * MIB


@pytest.mark.parametrize(("job", "kind", "mib"), [("convert", resource.RLIMIT_AS, 640), ("quantize", resource.RLIMIT_DATA, 512)])
def test_a_hard_limit_is_kept(job: str, kind: int, mib: int, models: tuple[Path, Path], tmp_path: Path) -> None:
    """`convert` under a limit of all its addresses; torch maps gigabytes of libraries, so `quantize` under one of its data."""
    peak(job, models[1], tmp_path / "out", kind, mib * MIB)


def test_too_little_memory_is_said_before_a_byte_is_written(models: tuple[Path, Path], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mxconv", "convert", str(models[0]), str(tmp_path / "out"), "--memory", "2MiB"], env=ENVIRONMENT,
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 6 and "--memory" in done.stderr and not (tmp_path / "out").exists()
