"""`kill -9` at random moments and at every named step of real jobs; a resume gives the bytes of a run that nobody disturbed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from mxconv.artifact import failpoints, tree_digest
from mxconv.artifact.journal import read_records
from tests.faults.conftest import Clean
from tests.faults.processes import ENVIRONMENT, JOBS, WORKERS, Zygote, assert_nothing_wrong, command, session_members

PUBLISHED = ("manifest-linked", "journal-removed", "exchanged", "old-removed")


def journaled(root: Path) -> int:
    """Units that the journal proves."""
    path = root / ".mxconv.journal"
    records, _ = read_records(path.read_bytes()) if path.exists() else ([], 0)
    return len({record["unit"] for record in records if record["kind"] == "unit"})


@pytest.mark.parametrize("kills", [30, pytest.param(150, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("job", JOBS)
def test_killed_at_random_moments(
    job: str, kills: int, zygote: Zygote, model: Path, clean: Mapping[str, Clean], tmp_path: Path
) -> None:
    random_, wanted, source = random.Random(job), clean[job], tree_digest(model)
    died = trees = in_work = 0
    while died < kills:
        trees += 1
        assert trees <= 2 * kills, "kills miss the runs"
        root, started = tmp_path / f"out{trees}", tmp_path / f"started{trees}"
        here, limit = 0, random_.randint(1, 20)  # kills of this tree
        while True:
            proved = journaled(root)
            run = zygote.start(command(job, model, root, "--resume"), started=str(started))
            if here < limit and died < kills:
                time.sleep(random_.uniform(0.1, 0.9) * wanted.seconds)
                run.kill(signal.SIGKILL)
            code = run.wait()
            published = assert_nothing_wrong(root, wanted.files)
            if code == 0:
                break
            assert code == -signal.SIGKILL, run.err.read_text()
            died, here = died + 1, here + 1
            in_work += journaled(root) > 0 and not published
        result = run.events()[-1]
        assert result["checked"] or result["done_before"] == proved  # whatever was committed is kept
        begun = started.read_text().splitlines()
        assert 0 <= len(begun) - wanted.units <= here * WORKERS, (here, len(begun))
        assert tree_digest(root) == wanted.digest
        shutil.rmtree(root)
    assert in_work >= kills // 4, "too few kills met a run at work"
    assert tree_digest(model) == source
    print(f"proof: {job}: {died} kills of {trees} trees, {in_work} amid the units")


@pytest.mark.parametrize("name", failpoints.NAMES)
def test_killed_at_a_named_step(name: str, zygote: Zygote, model: Path, clean: Mapping[str, Clean], tmp_path: Path) -> None:
    """`convert` as a fresh process armed by the environment; `--overwrite` of another artifact for the last two steps."""
    root, wanted = tmp_path / "out", clean["convert"]
    replacing = name in ("exchanged", "old-removed")
    if replacing:
        assert zygote.run(["convert", str(model), str(root), "--tp", "1", "--json"])[0] == 0
    arguments = command("convert", model, root, *(["--overwrite"] if replacing else []))
    process = subprocess.Popen(
        [sys.executable, "-m", "mxconv", *arguments], env={**ENVIRONMENT, failpoints.VARIABLE: name}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert session_members(process.pid) == []
    assert assert_nothing_wrong(root, wanted.files) == (name in PUBLISHED)
    code, run = zygote.run(command("convert", model, root, "--resume"))
    assert code == 0, run.err.read_text()
    assert tree_digest(root) == wanted.digest and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("name", [name for name in failpoints.NAMES if name not in ("exchanged", "old-removed")])
@pytest.mark.parametrize("count", [1, 2])
def test_quantize_killed_at_a_named_step(
    name: str, count: int, zygote: Zygote, model: Path, clean: Mapping[str, Clean], tmp_path: Path
) -> None:
    root, wanted = tmp_path / "out", clean["quantize"]
    code, _ = zygote.run(command("quantize", model, root), failpoint=[name, count])
    once = name.startswith(("journal", "config", "manifest"))
    assert code == (0 if once and count > 1 else -signal.SIGKILL)
    assert assert_nothing_wrong(root, wanted.files) == (name in PUBLISHED or code == 0)
    proved = journaled(root)
    code, run = zygote.run(command("quantize", model, root, "--resume"))
    assert code == 0, run.err.read_text()
    result = run.events()[-1]
    assert result["checked"] or result["done_before"] == proved
    assert tree_digest(root) == wanted.digest
