"""verify by several processes, for the tests: reports to compare, and commands whose processes may come to grief."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mxconv.runtime.watch import start_of
from mxconv.runtime.world import ALONE, World
from mxconv.verify import Options, verify
from tests.members import REPOSITORY

MISCHIEF = Path(__file__).with_name("mischief.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node")
REQUEST = ("--windows", "2", "--window", "300")
HANGS_SECONDS = 300
"""Whoever takes as long, on however loaded a machine, hangs."""
PROMISED_SECONDS = 30
"""docs/verify.md: so long after one fails all have ended."""


def plain(document: Any) -> Any:
    """A report without what may differ: times, and how many processes there were."""
    if isinstance(document, dict):
        return {key: plain(value) for key, value in document.items() if key not in ("seconds", "processes")}
    return [plain(value) for value in document] if isinstance(document, list) else document


def reports(world: World, artifacts: list[Path], source: Path, device: str = "cpu") -> list[dict[str, Any]]:
    """The documents of `artifacts`, in every process; with hashes, and once without a source."""
    options = Options(source=source, windows=2, window=300, device=device)
    found = [verify(artifact, options, world=world).document() for artifact in artifacts]
    hashed = Options(windows=2, window=300, hash_files=True, device=device)
    return [*found, verify(artifacts[0], hashed, world=world).document()]


def alone(artifacts: list[Path], source: Path, device: str = "cpu") -> list[dict[str, Any]]:
    """The same by this process."""
    return reports(ALONE, artifacts, source, device)


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str
    seconds: float
    pids: list[int] = field(default_factory=list)

    @property
    def left(self) -> list[int]:
        """Processes that are still there."""
        return [pid for pid in self.pids if start_of(pid)]


@dataclass(slots=True, kw_only=True)
class Command:
    """verify of one artifact as several processes, one of which may come to grief."""

    artifact: Path
    source: Path
    pids: Path

    @property
    def grief(self) -> Path:
        """Holds the time at which one came to grief."""
        return self.pids.with_name("grief")

    def start(self, kind: str, rank: int, *more: str, torchrun: bool = False) -> subprocess.Popen[str]:
        """The running command; two processes."""
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        environment |= {"MISCHIEF_PIDS": str(self.pids), "MISCHIEF_AT": str(self.grief)}
        script = [str(MISCHIEF), kind, str(rank), "verify", str(self.artifact), "--source", str(self.source), *REQUEST, *more]
        command = [*TORCHRUN, "2", *script] if torchrun else [sys.executable, *script, "--processes", "2"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, kind: str, rank: int, *more: str, **how: bool) -> Outcome:
        """The command to its end."""
        return self.end(self.start(kind, rank, *more, **how))

    def end(self, running: subprocess.Popen[str]) -> Outcome:
        """Wait for the end; `seconds` count from when one came to grief."""
        out, err = running.communicate(timeout=HANGS_SECONDS)
        took = time.monotonic() - float(self.grief.read_text()) if self.grief.exists() else 0.0
        return Outcome(code=running.returncode, out=out, err=err, seconds=took, pids=self.known())

    def known(self) -> list[int]:
        """Pids of the processes."""
        return [int(text) for path in sorted(self.pids.iterdir()) if (text := path.read_text())]

    def at_work(self, running: subprocess.Popen[str]) -> None:
        """Wait until both processes are about to join."""
        deadline = time.monotonic() + HANGS_SECONDS
        while len(self.known()) < 2 and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)

    def in_grief(self, running: subprocess.Popen[str]) -> None:
        """Wait until one has come to grief."""
        while running.poll() is None and not self.grief.exists():
            time.sleep(0.05)
