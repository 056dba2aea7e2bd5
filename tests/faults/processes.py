"""Jobs of the command line as processes that can be killed, and what may be found after one was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

REPOSITORY = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT: Mapping[str, str] = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CI": "true"}
WORKERS = 2
JOBS: Mapping[str, tuple[str, ...]] = {
    "convert": ("--tp", "2", "--workers", str(WORKERS)),
    "quantize": ("--tp", "2", "--workers", str(WORKERS), "--scheme", "w4afp8"),
}


def command(job: str, source: Path, output: Path, *more: str) -> list[str]:
    """The arguments of `job`."""
    return [job, str(source), str(output), *JOBS[job], "--json", *more]


@dataclass(slots=True)
class Running:
    """A job that was started: its pid, and where its streams go."""

    zygote: Zygote
    pid: int
    out: Path
    err: Path

    def wait(self) -> int:
        """The exit code (negative: the signal); also asserts that no process of the job's session is left."""
        code = self.zygote.answer()
        assert session_members(self.pid) == []
        return code

    def kill(self, number: int) -> None:
        """Send a signal; a job that has ended already is no matter."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return

    def events(self) -> list[dict[str, Any]]:
        """The whole JSON lines that were printed."""
        return [json.loads(line) for line in self.out.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def wait_for(self, word: str, seconds: float = 30) -> None:
        """Wait until `word` is in the output."""
        deadline = time.monotonic() + seconds
        while word not in self.out.read_text():
            if time.monotonic() > deadline or not Path(f"/proc/{self.pid}/exe").exists():
                return
            time.sleep(0.002)


class Zygote:
    """The forking process of `tests.faults.zygote`; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"], cwd=REPOSITORY, env=ENVIRONMENT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.answer()  # it is ready

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate(timeout=60)

    def answer(self) -> int:
        """The next number that it says."""
        if self.process.stdout is None:
            raise RuntimeError("no pipe")
        return int(self.process.stdout.readline())

    def start(self, argv: list[str], **options: Any) -> Running:
        """Begin a job; one at a time."""
        if self.process.stdin is None:
            raise RuntimeError("no pipe")
        out, err = self.folder / "stdout", self.folder / "stderr"
        out.write_text("")
        request = {"argv": argv, "out": str(out), "err": str(err), **options}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Running(self, self.answer(), out, err)

    def run(self, argv: list[str], **options: Any) -> tuple[int, Running]:
        """One job to its end."""
        job = self.start(argv, **options)
        return job.wait(), job


def session_members(session: int) -> list[int]:
    """Live processes of a session (zombies are dead)."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            found.append(int(entry))
    return found


def contents(root: Path) -> dict[str, bytes]:
    """The files of a finished artifact by path, without run.log."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != "run.log"}


def assert_nothing_wrong(root: Path, clean: Mapping[str, bytes]) -> bool:
    """Every file under a final name has the clean run's bytes; whether the artifact is published."""
    found = contents(root) if root.exists() else {}
    for path, data in found.items():
        hidden = Path(path).name.startswith(".")
        assert hidden or data == clean[path], f"{path} is wrong"
    published = "manifest.json" in found
    assert not published or {path for path in found if not Path(path).name.startswith(".")} == set(clean)
    return published


@contextmanager
def tmpfs(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A tmpfs of a size at `folder`; skips where it cannot be mounted."""
    import pytest

    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    """Another size or mode for a mounted tmpfs."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
