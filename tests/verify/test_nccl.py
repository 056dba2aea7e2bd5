"""verify by several processes over NCCL, a GPU each: the verdicts of a single one, and an end of all when one comes to grief."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mxconv.quantize.schemes import SCHEMES
from mxconv.runtime.world import World
from tests.members import in_processes, need_gpus
from tests.verify.together import PROMISED_SECONDS, Command, alone, plain, reports

pytestmark = pytest.mark.gpu
ON_GPUS = ("--device", "cuda")


def test_one_rank_over_nccl(made: Callable[..., Path], small: Path) -> None:
    """One GPU: the report of the plain run on it."""
    artifacts = [made(scheme, 1) for scheme in (None, "w4afp8")]
    (found,) = in_processes(1, reports, artifacts, small, "cuda:0", device="cuda")
    expected = alone(artifacts, small, "cuda:0")
    assert [plain(document) for document in found] == [plain(document) for document in expected]


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_a_gpu_a_rank(tiny_a: Path, made_of_tiny_a: Callable[..., Path], processes: int) -> None:
    """Every scheme over NCCL: the verdicts and exit codes of one process on one GPU, the unquantized passes to 2e-6."""
    need_gpus(processes)
    artifacts = [made_of_tiny_a(scheme, processes) for scheme in (None, *SCHEMES)]
    expected = alone(artifacts, tiny_a, "cuda")
    for found in in_processes(processes, on_own_gpu, artifacts, tiny_a, device="cuda", seconds=600):
        for mine, theirs in zip(found, expected, strict=True):
            assert mine["ok"] == theirs["ok"] is True
            assert mine["sections"].keys() == theirs["sections"].keys()
            assert mine["sections"]["numerics"]["findings"] == theirs["sections"]["numerics"]["findings"] == []
            assert mine["sections"]["parallel"]["figures"]["logits_l2"] <= 2e-6


@pytest.fixture
def two_gpus() -> None:
    """Skips where there are fewer."""
    need_gpus(2)


@pytest.mark.parametrize("torchrun", [False, True])
def test_one_report_over_nccl(command: Command, torchrun: bool, two_gpus: None) -> None:
    ended = command.run("none", 0, "--json", *ON_GPUS, torchrun=torchrun)
    assert (ended.code, ended.left) == (0, []), ended.err
    assert json.loads(ended.out)["processes"] == 2 and ended.err.count("verify: logits") == 1


@pytest.mark.parametrize(("kind", "rank", "code", "words"), [
    ("raise", 1, 6, "shard 3: the disk gave out"), ("kill", 1, 6, "rank 1 was ended by SIGKILL"),
    ("kill", 0, 6, "rank 0 was ended by SIGKILL"), ("stop", 1, 6, "has not answered"), ("hang", 1, 6, "it hangs"),
    ("segv", 1, 1, "SIGSEGV"), ("bug", 0, 1, "a bug in mxconv: KeyError"),
])  # fmt: skip
def test_grief_over_nccl_ends_all(command: Command, kind: str, rank: int, code: int, words: str, two_gpus: None) -> None:
    ended = command.run(kind, rank, *ON_GPUS)
    assert (ended.code, ended.left) == (code, []), ended.err
    assert ended.err.count(words) == 1 and 0 < ended.seconds < PROMISED_SECONDS


def test_a_rank_killed_over_nccl_under_torchrun_ends_all(command: Command, two_gpus: None) -> None:
    ended = command.run("kill", 1, *ON_GPUS, torchrun=True)
    assert ended.code == 1 and ended.left == [] and 0 < ended.seconds < PROMISED_SECONDS
    assert ended.out == "" and ended.err.count("ended without a word") == 1, ended.err


def on_own_gpu(world: World, artifacts: list[Path], source: Path) -> list[dict[str, Any]]:
    """`reports` on this process's GPU."""
    return reports(world, artifacts, source, f"cuda:{torch.cuda.current_device()}")
