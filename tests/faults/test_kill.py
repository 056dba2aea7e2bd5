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

import numpy as np
import pytest

from mxconv.artifact import failpoints, tree_digest
from mxconv.artifact.journal import read_records
from tests.faults.conftest import Clean
from tests.faults.processes import ENVIRONMENT, JOBS, WORKERS, Zygote, assert_nothing_wrong, command, contents, session_members

PUBLISHED = ("manifest-linked", "journal-removed", *failpoints.REPLACING)


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


@pytest.mark.parametrize("name", [name for name in failpoints.NAMES if name not in failpoints.BY_RENAMES])
def test_killed_at_a_named_step(name: str, zygote: Zygote, model: Path, clean: Mapping[str, Clean], tmp_path: Path) -> None:
    """`convert` as a fresh process armed by the environment; `--overwrite` of another artifact for the last two steps."""
    root, wanted = tmp_path / "out", clean["convert"]
    replacing = name in failpoints.REPLACING
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


@pytest.mark.parametrize("name", [name for name in failpoints.NAMES if name not in failpoints.REPLACING])
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


def stand_there(old: str, root: Path, model: Path, zygote: Zygote) -> None:
    """What --overwrite meets: the unfinished run of another plan, a foreign folder, or an artifact with somebody's note in it."""
    if old == "foreign":
        root.mkdir()
        (root / "manifest.json").write_text('{"name": "extension"}')
    else:
        die = {"failpoint": ["unit-journaled", 5]} if old == "unfinished" else {}
        code, _ = zygote.run(["convert", str(model), str(root), "--tp", "1", "--json"], **die)
        assert code == (-signal.SIGKILL if die else 0)
    if old in ("foreign", "noted"):
        (root / "thesis").write_text("years of work")


@pytest.mark.parametrize("old", ["unfinished", "foreign", "noted"])  # an artifact: tests/artifact/test_crash.py, every step
@pytest.mark.parametrize("name", ["journal-removed", *failpoints.REPLACING])
def test_killed_while_overwriting(
    name: str, old: str, zygote: Zygote, model: Path, clean: Mapping[str, Clean], tmp_path: Path
) -> None:
    root, kept, wanted = tmp_path / "out", tmp_path / "out.replaced", clean["convert"]
    stand_there(old, root, model, zygote)
    before = tree_digest(root)
    by_renames = name in failpoints.BY_RENAMES
    code, run = zygote.run(command("convert", model, root, "--overwrite"), failpoint=[name, 1], no_exchange=by_renames)
    assert code == -signal.SIGKILL, run.err.read_text()
    if name not in failpoints.REPLACING:
        assert tree_digest(root) == before
    code, run = zygote.run(command("convert", model, root, "--overwrite", "--resume"), no_exchange=by_renames)
    assert code == 0, run.err.read_text()
    assert tree_digest(root) == wanted.digest
    assert sorted(os.listdir(tmp_path)) == (["out", "out.replaced"] if old in ("foreign", "noted") else ["out"])
    assert old not in ("foreign", "noted") or tree_digest(kept) == before


@pytest.mark.parametrize("moment", ["overwritten", "overwriting"])
def test_a_run_at_work_is_left_alone(moment: str, zygote: Zygote, model: Path, clean: Mapping[str, Clean], tmp_path: Path) -> None:
    """One run is stopped amid its units; others, with every flag, must end with 5 and change nothing."""
    root, started = tmp_path / "out", tmp_path / "started"
    if moment == "overwriting":
        assert zygote.run(["convert", str(model), str(root), "--tp", "1", "--json"])[0] == 0
    run = zygote.start(command("convert", model, root, "--overwrite"), started=str(started))
    while not started.exists() or len(started.read_text().splitlines()) < 5:
        time.sleep(0.002)
    run.kill(signal.SIGSTOP)
    others = []
    for flags in (["--overwrite"], ["--resume"], ["--overwrite", "--resume", "--tp", "1"]):
        arguments = [sys.executable, "-m", "mxconv", *command("convert", model, root, *flags)]
        others.append(subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False))
    run.kill(signal.SIGCONT)
    assert run.wait() == 0, run.err.read_text()
    for other in others:
        assert other.returncode == 5 and "another run" in other.stderr, (other.args, other.stderr)
    assert tree_digest(root) == clean["convert"].digest
    assert sorted(os.listdir(tmp_path)) == ["out", "started"]


@pytest.mark.parametrize("kills", [8, pytest.param(60, marks=pytest.mark.thorough)])
def test_a_static_scheme_killed_at_random_moments(kills: int, zygote: Zygote, model: Path, tmp_path: Path) -> None:
    """Calibration included: a run goes on with the statistics that it wrote, and measures again those that it did not."""
    random_, ids, started = random.Random(17), tmp_path / "ids.npy", tmp_path / "started"
    np.save(ids, np.random.default_rng(0).integers(0, 512, (2, 64)))
    flags = ["--scheme", "w4a8", "--calibration", str(ids), "--tp", "2", "--workers", str(WORKERS), "--json"]

    def arguments(root: Path) -> list[str]:
        return ["quantize", str(model), str(root), *flags, "--resume"]

    began = time.monotonic()
    assert zygote.run(arguments(tmp_path / "clean"), started=str(started))[0] == 0
    seconds, wanted, files = time.monotonic() - began, tree_digest(tmp_path / "clean"), contents(tmp_path / "clean")
    died = calibrating = reused = trees = 0
    while died < kills:
        root, trees = tmp_path / f"out{trees}", trees + 1
        assert trees <= 3 * kills, "kills miss the runs"
        for _ in range(random_.randint(1, 4)):
            run = zygote.start(arguments(root), started=str(started))
            time.sleep(random_.uniform(0.05, 0.9) * seconds)
            run.kill(signal.SIGKILL)
            code = run.wait()
            assert code in (0, -signal.SIGKILL), run.err.read_text()
            assert_nothing_wrong(root, files)
            died += code != 0
            calibrating += code != 0 and not (root / "statistics.json").exists()
        reused += (root / "statistics.json").exists()
        code, run = zygote.run(arguments(root), started=str(started))
        assert code == 0, run.err.read_text()
        assert tree_digest(root) == wanted
        shutil.rmtree(root)
    assert calibrating and reused, (calibrating, reused)
    print(f"proof: static scheme: {died} kills of {trees} trees, {calibrating} before its statistics stood")
