"""verify by several processes: the report of the single one, one exit code, and an end within seconds when one of them fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mxconv.quantize.schemes import SCHEMES
from mxconv.runtime.watch import start_of
from mxconv.runtime.world import ALONE, World
from tests.members import REPOSITORY, in_processes
from tests.mutants import MUTANTS, make_base, make_source
from tests.spoil import Folder
from tests.verify.together import HANGS_SECONDS, PROMISED_SECONDS, REQUEST, Command, alone, plain, reports


def all_reports(world: World, jobs: list[tuple[list[Path], Path]]) -> list[dict[str, Any]]:
    """`reports` of several sources' artifacts."""
    return [document for artifacts, source in jobs for document in reports(world, artifacts, source)]


def spoilt(name: str, source: Path, folder: Path) -> Path:
    """The artifact of a mutant."""
    out = folder / name.replace(" ", "-")
    mutant = MUTANTS[name]
    mutant.spoil(changed := Folder(make_base(mutant.base, source, out), source))
    changed.save()
    return out


WRONG = ("activation scale zero", "experts of another rank", "a norm that differs between ranks", "activation scale doubled")
"""What one rank alone stumbles over in the passes, what is explained, what only the merged ranks show, what is gathered again."""


def test_the_report_is_the_single_ones(made: Callable[..., Path], small: Path, tmp_path: Path) -> None:
    """Two processes, right and wrong artifacts: every figure, finding and word, to the last digit."""
    artifacts = [made(scheme, 2) for scheme in (None, "w4afp8", "w4afp8_static", "block_wise_fp8")]
    source = make_source(tmp_path / "source")
    jobs = [(artifacts, small), ([spoilt(name, source, tmp_path) for name in WRONG], source)]
    expected = all_reports(ALONE, jobs)
    assert [document["ok"] for document in expected] == [True] * 5 + [False] * 4 + [True]
    together = in_processes(2, all_reports, jobs)
    for found in together:
        for mine, theirs in zip(found, expected, strict=True):
            assert mine["processes"] == 2 and plain(mine) == plain(theirs)


def test_one_report_and_exit_code_0(command: Command) -> None:
    """Under `--processes`; the others say nothing."""
    ended = command.run("none", 0, "--json")
    assert (ended.code, ended.left) == (0, [])
    assert json.loads(ended.out)["processes"] == 2
    assert ended.err.count("verify: logits") == 1 and "rror" not in ended.err


def test_exit_code_8_of_torchrun(command: Command, tmp_path: Path) -> None:
    """torchrun itself makes 1 of every failure and says what the processes ended with; the report is there once."""
    wrong = tmp_path / "wrong"
    shutil.copytree(command.artifact, wrong)
    changed = Folder(wrong, command.source)
    MUTANTS["experts of another rank"].spoil(changed)
    changed.save()
    command.artifact = wrong
    ended = command.run("none", 0, torchrun=True)
    assert ended.code == 1 and "exitcode: 8" in ended.err.replace(" ", "").replace("exitcode:", "exitcode: ")
    assert ended.out.count("structure  ") == 1 and ended.out.count("FAIL experts") + ended.out.count("FAIL rank 0") >= 1
    assert ended.left == []


@pytest.mark.parametrize(("kind", "rank", "code", "words"), [
    ("raise", 1, 6, "shard 3: the disk gave out"),
    pytest.param("kill", 1, 6, "rank 1 was ended by SIGKILL", marks=pytest.mark.thorough),
    ("kill", 0, 6, "rank 0 was ended by SIGKILL"),
])  # fmt: skip
def test_a_failing_or_killed_rank_ends_all(command: Command, kind: str, rank: int, code: int, words: str) -> None:
    ended = command.run(kind, rank, "--json")
    assert (ended.code, ended.left) == (code, [])
    assert ended.err.count(words) == 1 and 0 < ended.seconds < PROMISED_SECONDS
    (problem,) = json.loads(ended.out)["problems"]
    assert problem["exit_code"] == code and words.endswith(problem["what"])


def test_a_rank_killed_under_torchrun_ends_all(command: Command) -> None:
    ended = command.run("kill", 1, torchrun=True)
    assert ended.code == 1 and ended.left == [] and 0 < ended.seconds < PROMISED_SECONDS
    assert ended.out == "" and ended.err.count("ended without a word") == 1, ended.err


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.thorough)]
)
def test_an_interrupt_ends_all(command: Command, number: signal.Signals, code: int) -> None:
    running = command.start("slow", 0)
    command.in_grief(running)
    running.send_signal(number)
    began = time.monotonic()
    ended = command.end(running)
    assert time.monotonic() - began < 10  # the 6 s that the launcher leaves them, and its own way out
    assert (ended.code, ended.out, ended.left) == (code, "", [])
    assert ended.err.count("error: stopped by") == 1


def children(pid: int) -> list[int]:
    """Processes that the main thread of `pid` started."""
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("when", ["at once", "as they meet", "at work"])
def test_a_launcher_that_is_killed_leaves_nobody(command: Command, when: str) -> None:
    """The kernel ends them at once; a second's work is left to a process that has just begun."""
    running = command.start("hang", 0)
    while len(members := children(running.pid)) < 2:
        assert running.poll() is None
        time.sleep(0.01)
    if when == "as they meet":
        command.at_work(running)
    elif when == "at work":
        command.in_grief(running)
    running.kill()
    running.wait()
    deadline = time.monotonic() + 10  # not more: so long a process may look for a store that is gone
    while time.monotonic() < deadline and any(map(start_of, members)):
        time.sleep(0.05)
    left = [pid for pid in members if start_of(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


THOROUGH = [("stop", 0), ("stop", 1), ("hang", 0), ("hang", 1), ("segv", 1), ("bug", 0), ("bug", 1)]


@pytest.mark.thorough
@pytest.mark.parametrize(("kind", "rank"), THOROUGH)
def test_every_kind_of_grief(command: Command, kind: str, rank: int) -> None:
    words = {"stop": "has not answered", "hang": "it hangs", "segv": "SIGSEGV", "bug": "a bug in mxconv: KeyError"}
    ended = command.run(kind, rank)
    assert ended.code == (6 if kind in ("stop", "hang") else 1)
    assert ended.err.count(words[kind]) == 1 and ended.left == [] and 0 < ended.seconds < PROMISED_SECONDS


def test_requests_that_do_not_fit(command: Command) -> None:
    """Three processes for two ranks, `--processes` under torchrun, a GPU for several."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "mxconv", "verify", str(command.artifact), "--source", str(command.source), *REQUEST]
    run = subprocess.run(
        [*call, "--processes", "3"], env=environment, capture_output=True, text=True, timeout=HANGS_SECONDS, check=False
    )
    assert run.returncode == 2 and run.stderr.count("error:") == 1 and "over 3 processes" in run.stderr and run.stdout == ""
    run = subprocess.run(
        [*call, "--processes", "2", "--device", "cuda"], env=environment | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True,
        text=True, timeout=HANGS_SECONDS, check=False,
    )  # fmt: skip
    assert run.returncode == 2 and run.stderr.count("error:") == 1 and "fewer GPUs than processes" in run.stderr, run.stderr
    member = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    run = subprocess.run(
        [*call, "--processes", "2"], env=environment | member, capture_output=True, text=True, timeout=HANGS_SECONDS, check=False
    )
    assert run.returncode == 2 and "several already" in run.stderr


@pytest.mark.thorough
def test_the_benchmark_at_a_small_size(tmp_path: Path) -> None:
    """benchmarks/tensor_parallel.py on gloo: every part."""
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "tensor_parallel.py"), "--device", "cpu", "--shape", "small"]
    command += ["--sizes", "1", "2", "--schemes", "w4afp8", "--tokens", "64", "--slots", "2", "--context", "16", "--windows", "1"]
    command += ["--json"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, str(tmp_path / "out.json")], env=environment, capture_output=True, text=True, timeout=3 * HANGS_SECONDS,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["layer"]) == 8 and all(row["ms"] > 0 for row in found["layer"])
    assert [row["own_shard_only"] for row in found["load"]] == [True, True]
    assert [(row["codes"], row["same_verdicts"]) for row in found["verify"]] == [([0, 0], True)]


@pytest.mark.thorough
@pytest.mark.parametrize("processes", [2, 4, 8])
def test_tiny_a(tiny_a: Path, made_of_tiny_a: Callable[..., Path], processes: int) -> None:
    """The trained model at TP 2, 4 and 8: the report of the single process, logits and all."""
    artifacts = [made_of_tiny_a(scheme, processes) for scheme in (None, *SCHEMES)]
    expected = alone(artifacts, tiny_a)
    for found in in_processes(processes, reports, artifacts, tiny_a, seconds=1200):
        assert [plain(document) for document in found] == [plain(document) for document in expected]
