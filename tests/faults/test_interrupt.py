"""SIGINT and SIGTERM at random moments: the process ends within seconds and says how to go on, wherever it is met."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mxconv.artifact import parts, tree_digest
from mxconv.errors import Interrupted
from mxconv.execute import RunOptions, convert, run
from mxconv.progress import Progress
from tests.faults.conftest import Clean
from tests.faults.inprocess import run as in_process
from tests.faults.processes import ENVIRONMENT, JOBS, Zygote, assert_nothing_wrong, command

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.mark.parametrize("interrupts", [8, pytest.param(25, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("job", JOBS)
def test_interrupted_at_random_moments(
    job: str, interrupts: int, zygote: Zygote, model: Path, clean: Mapping[str, Clean], tmp_path: Path
) -> None:
    random_, wanted = random.Random(job), clean[job]
    root, ended, slowest, tries = tmp_path / "out0", 0, 0.0, 0
    while ended < interrupts:
        tries += 1
        assert tries <= 4 * interrupts, "signals miss the runs"
        run = zygote.start(command(job, model, root, "--resume"), started=str(tmp_path / "started"))
        run.wait_for('"event":"start"')
        time.sleep(random_.uniform(0.0, 0.6) * wanted.seconds)
        number = random_.choice(list(CODES))
        began = time.monotonic()
        run.kill(number)
        code = run.wait()
        slowest = max(slowest, time.monotonic() - began)
        assert slowest < 5
        published = assert_nothing_wrong(root, wanted.files)
        if code == 0:
            assert published
            root = tmp_path / f"out{tries}"
            continue
        ended += 1
        assert code == CODES[number]
        assert "--resume" in run.err.read_text() and "Traceback" not in run.err.read_text()
        assert run.events()[-1]["event"] == "error"
    code, run = zygote.run(command(job, model, root, "--resume"))
    assert code == 0 and tree_digest(root) == wanted.digest
    print(f"proof: {job}: {ended} interrupts, the slowest took {slowest:.2f} s")


class _Signals(Progress):
    """Sends SIGINT to this process when a phase begins."""

    def __init__(self, title: str) -> None:
        self.title = title

    def start(self, title: str, total_bytes: int) -> None:
        if title == self.title:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("phase", ["checking what an earlier run wrote", "checking"])
def test_hashing_what_stands_can_be_interrupted(phase: str, model: Path, tmp_path: Path) -> None:
    """On the real model these hash hundreds of GB, an hour's work."""
    root, options = tmp_path / "out", RunOptions(resume=True)
    if phase == "checking":
        convert(model, root)
    else:
        with pytest.raises(Interrupted):
            convert(model, root, progress=_StopsAfter(20))
    with pytest.raises(Interrupted) as raised:
        convert(model, root, options=options, progress=_Signals(phase))
    assert raised.value.exit_code == 130 and "--resume" in (raised.value.hint or "")
    convert(model, root, options=options)
    convert(model, tmp_path / "clean")
    assert tree_digest(root) == tree_digest(tmp_path / "clean")


class _StopsAfter(Progress):
    """Sends SIGINT after some units."""

    def __init__(self, units: int) -> None:
        self.left = units

    def advance(self, amount_bytes: int, item: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


def test_the_last_hashing_of_files_can_be_interrupted(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All units are done and files of 4 GiB are still hashed and synced: the run ends between two chunks."""
    sha256, slow = hashlib.sha256, threading.Event()

    class _Slow:
        def __init__(self, data: bytes = b"") -> None:
            self.inner = sha256(data)

        def update(self, data: Any) -> None:
            if slow.is_set():
                time.sleep(0.5)
            self.inner.update(data)

        def hexdigest(self) -> str:
            return self.inner.hexdigest()

    publish = run.publish

    def last(*arguments: Any, **options: Any) -> object:  # the units are done
        slow.set()
        os.kill(os.getpid(), signal.SIGINT)
        return publish(*arguments, **options)

    monkeypatch.setattr(run, "publish", last)
    monkeypatch.setattr(parts.hashlib, "sha256", _Slow)
    monkeypatch.setattr(parts, "CHUNK_BYTES", 1 << 16)
    hash_file = parts.hash_file

    def late(*arguments: Any, **options: Any) -> parts.FileHash:
        slow.wait(30)  # until the units are done
        return hash_file(*arguments, **options)

    monkeypatch.setattr(parts, "hash_file", late)
    began = time.monotonic()
    with pytest.raises(Interrupted):
        convert(model, tmp_path / "out")
    assert time.monotonic() - began < 5
    monkeypatch.undo()
    convert(model, tmp_path / "out", options=RunOptions(resume=True))
    convert(model, tmp_path / "clean")
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "clean")


STUCK = """
import sys, time
from mxconv.calibrate import observe
def stuck(*given):  # one product of a large model, on a slow machine
    time.sleep(60)
observe._absmax = stuck
from mxconv.__main__ import main
main()
"""


@pytest.mark.parametrize("number", CODES)
def test_calibration_is_interrupted_however_long_an_operation_takes(number: int, model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(96).reshape(2, 48))
    words = ["quantize", model, tmp_path / "out", "--scheme", "w4a8", "--calibration", tmp_path / "ids.npy"]
    with subprocess.Popen(
        [sys.executable, "-c", STUCK, *map(str, words), "--json"], text=True, env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        while "calibrate" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(0.3)
        began = time.monotonic()
        process.send_signal(number)
        code = process.wait(30)
        assert time.monotonic() - began < 5 and code == CODES[number]
        said = process.stderr.read()
    assert "--resume" in said and "Traceback" not in said
    if number == signal.SIGTERM:
        assert in_process(*words, "--resume").code == 0
        assert in_process(*words[:2], tmp_path / "clean", *words[3:]).code == 0
        assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "clean")


NAMED = [("SIGINT", 130), ("SIGTERM", 143)]
HEAVY_IMPORT = """
import os, signal, sys, types
from mxconv import cli
def interrupted_import(*given, **options):  # a signal in the midst of numpy's import comes out as an ImportError
    try:
        os.kill(os.getpid(), signal.{name})
        for _ in range(1000): pass
    except BaseException:
        raise ImportError("cannot load module more than once per process")
sys.modules["mxconv.inspection"] = types.SimpleNamespace(inspect_artifact=interrupted_import, inspect_checkpoint=None)
from mxconv.__main__ import main
sys.argv = ["mxconv", "inspect", "x"]
main()
"""
AT_ONCE = """
import os, signal, sys
import click
class Slow(click.Group):
    def __init_subclass__(cls): os.kill(os.getpid(), signal.{name})
click.Group = Slow
from mxconv.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("script", "code"), [(script.format(name=name), code) for script in (HEAVY_IMPORT, AT_ONCE) for name, code in NAMED]
)
def test_a_signal_in_the_midst_of_an_import_is_no_bug(script: str, code: int) -> None:
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=60)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr and "bug" not in result.stderr and result.stderr.startswith("error: ")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_when_all_is_said_changes_nothing(name: str) -> None:
    script = f"import atexit, os, signal, sys\natexit.register(lambda: os.kill(os.getpid(), signal.{name}))\n"
    script += 'sys.argv = ["mxconv", "--version"]\nfrom mxconv.__main__ import main\nmain()'
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=60)
    assert (run.returncode, run.stderr) == (0, "") and "mxconv" in run.stdout
