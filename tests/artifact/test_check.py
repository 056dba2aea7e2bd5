"""`check`: every corruption of an artifact is found and named; source checkpoints are judged by their headers."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mxconv.artifact import CheckReport, check_folder, read_manifest
from mxconv.artifact.journal import Journal
from mxconv.artifact.manifest import render
from mxconv.artifact.names import part_path
from mxconv.artifact.tree import walk
from mxconv.errors import IncompleteInput, IntegrityError, MxconvError
from mxconv.progress import Progress
from tests.artifact import sample
from tests.checkpoint.raw import write_sharded


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine") / "out"
    sample.run(root)
    return root


def found(root: Path) -> str:
    """All that `check` says against an artifact, "" when it says nothing; one error raised counts as said."""
    try:
        report = check_folder(root, workers=2)
    except MxconvError as error:
        assert error.exit_code in (4, 8)
        return error.render()
    assert {problem.exit_code for problem in report.problems} <= {8}
    return "\n".join(problem.render() for problem in report.problems)


class Counting(Progress):
    total = done = 0

    def start(self, title: str, total_bytes: int) -> None:
        self.total = total_bytes

    def advance(self, amount_bytes: int, item: str = "") -> None:
        self.done += amount_bytes


def test_a_right_artifact(pristine: Path) -> None:
    counting = Counting()
    report = check_folder(pristine, workers=1, progress=counting)
    assert isinstance(report, CheckReport) and not report.problems and not report.notes and report.kind == "artifact"
    assert report.tensors == sum(len(file.tensors) for file in sample.files())
    assert report.sha256 == read_manifest(pristine).sha256
    assert counting.total == counting.done == report.size_bytes
    (pristine / "run.log").write_text("{}")
    assert found(pristine) == ""
    (pristine / "run.log").unlink()


def flip(root: Path, path: str, at: int, bit: int = 0) -> None:
    raw = bytearray((root / path).read_bytes())
    raw[at] ^= 1 << bit
    (root / path).write_bytes(raw)


@pytest.mark.parametrize("name", ["embed", "head", "l2.codes", "l2.scale"])
def test_a_flipped_bit_is_named_to_its_tensor(name: str, pristine: Path, tmp_path: Path) -> None:
    root = shutil.copytree(pristine, tmp_path / "out")
    file = sample.files()[2]
    flip(root, file.path, file.offsets[name] + 3, 5)
    lines = found(root)
    assert lines.count("\n") == 0 and f"'{name}'" in lines and file.path in lines


def swap(root: Path, a: tuple[int, str], b: tuple[int, str]) -> None:
    """Exchange the bytes of two tensors of one size."""
    files = sample.files()
    raws = {number: bytearray((root / files[number].path).read_bytes()) for number in (a[0], b[0])}
    size = next(t.size_bytes for t in files[a[0]].tensors if t.name == a[1])
    x, y = files[a[0]].offsets[a[1]], files[b[0]].offsets[b[1]]
    raws[a[0]][x : x + size], raws[b[0]][y : y + size] = raws[b[0]][y : y + size], raws[a[0]][x : x + size]
    for number, raw in raws.items():
        (root / files[number].path).write_bytes(raw)


CORRUPTIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "swap within a file": (lambda root: swap(root, (0, "l0.codes"), (0, "l2.codes")), "'l0.codes'"),
    "swap across ranks": (lambda root: swap(root, (0, "l0.codes"), (2, "l0.codes")), "rank1"),
    "whole shard of another rank": (
        lambda root: shutil.copy(root / sample.files()[0].path, root / sample.files()[2].path),
        "rank1/model-00001",
    ),
    "header": (lambda root: flip(root, sample.files()[1].path, 30), "header was changed"),
    "header length": (lambda root: flip(root, sample.files()[1].path, 0), "header was changed"),
    "truncated": (lambda root: os.truncate(root / sample.files()[3].path, 100), "truncated"),
    "appended": (lambda root: (root / sample.files()[3].path).open("ab").write(b"\0"), "grown"),
    "deleted shard": (lambda root: (root / sample.files()[3].path).unlink(), "missing"),
    "deleted tokenizer": (lambda root: (root / "tokenizer.json").unlink(), "tokenizer.json"),
    "extra file": (lambda root: (root / "rank0" / "stray.bin").write_bytes(b""), "stray.bin: file is not in the manifest"),
    "extra hidden file": (lambda root: (root / ".x.part").write_bytes(b""), ".x.part"),
    "edited config": (lambda root: flip(root, "config.json", 3), "config.json: content was changed"),
    "edited index": (lambda root: flip(root, "rank1/model.safetensors.index.json", 3), "rank1/model.safetensors.index.json"),
    "edited manifest": (lambda root: flip(root, "manifest.json", 40), "manifest"),
    "deleted manifest": (lambda root: (root / "manifest.json").unlink(), "no manifest.json"),
    "a fifo in place of a shard": (
        lambda root: ((root / sample.files()[3].path).unlink(), os.mkfifo(root / sample.files()[3].path)),
        "not a regular file",
    ),
    "a link out of the folder": (
        lambda root: (
            shutil.move(root / "tokenizer.json", root.parent / "tokenizer.json"),
            (root / "tokenizer.json").symlink_to(root.parent / "tokenizer.json"),
        ),
        "out of the checkpoint folder",
    ),
    "an extra empty folder": (lambda root: (root / "rank2").mkdir(), "rank2: folder is not in the manifest"),
    "extra empty folders in one another": (lambda root: (root / "rank0" / "a" / "b").mkdir(parents=True), "rank0/a: folder"),
    "a shard under the name of a part": (
        lambda root: shutil.copy(root / sample.files()[0].path, root / "rank0" / f"evil.{sample.PLAN[:16]}.part"),
        "evil",
    ),
    "a part of a shard": (
        lambda root: shutil.copy(root / sample.files()[0].path, part_path(root / sample.files()[0].path, sample.PLAN)),
        ".part: file",
    ),
    "a part of the manifest that is something else": (
        lambda root: part_path(root / "manifest.json", sample.PLAN).write_bytes(b"payload"),
        ".manifest.json",
    ),
    "something else as the journal": (lambda root: (root / ".mxconv.journal").write_bytes(b"payload"), ".mxconv.journal: file"),
    "another plan's journal": (lambda root: Journal(root, sample.OTHER_PLAN).close(), ".mxconv.journal: file"),
    "a journal with more behind it": (
        lambda root: (Journal(root, sample.PLAN).close(), (root / ".mxconv.journal").open("ab").write(b"payload")),
        ".mxconv.journal: file",
    ),
    "a journal in another folder": (
        lambda root: (Journal(root, sample.PLAN).close(), shutil.move(root / ".mxconv.journal", root / "rank0")),
        "rank0/.mxconv.journal: file",
    ),
    "a manifest outside": (
        lambda root: (
            shutil.move(root / "manifest.json", root.parent / "m.json"),
            (root / "manifest.json").symlink_to(root.parent / "m.json"),
        ),
        "out of the checkpoint folder",
    ),
    "an extra link": (lambda root: (root / "also.json").symlink_to("config.json"), "also.json"),
}


@pytest.mark.parametrize("case", CORRUPTIONS)
def test_corruption_is_found_and_named(case: str, pristine: Path, tmp_path: Path) -> None:
    corrupt, words = CORRUPTIONS[case]
    root = shutil.copytree(pristine, tmp_path / "out")
    corrupt(root)
    assert words in found(root)


@pytest.mark.parametrize("count", [250, pytest.param(10_000, marks=pytest.mark.thorough)])
def test_random_corruptions_are_all_found(count: int, pristine: Path, tmp_path: Path) -> None:
    random_ = random.Random(11)
    root = shutil.copytree(pristine, tmp_path / "out")
    paths = list(walk(root))
    for _ in range(count):
        path = root / random_.choice(paths)
        raw = path.read_bytes()
        kind = random_.choice(["flip", "flip", "cut", "append", "zero"])
        damaged = bytearray(raw)
        at = random_.randrange(len(raw))
        if kind == "flip":
            damaged[at] ^= 1 << random_.randrange(8)
        elif kind == "cut":
            del damaged[at:]
        elif kind == "append":
            damaged += bytes(random_.randrange(1, 9))
        else:
            damaged[at : at + 16] = bytes(len(damaged[at : at + 16]))
        if bytes(damaged) == raw:
            continue
        path.write_bytes(damaged)
        assert path.name in found(root)
        path.write_bytes(raw)
    assert found(root) == ""
    print(f"proof: {count:,} damaged bytes and lengths, all found")


def test_an_artifact_behind_the_links_of_a_hub_cache(pristine: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = shutil.copytree(pristine, repository / "snapshots" / "abc")
    (repository / "blobs").mkdir()
    for i, path in enumerate(walk(snapshot)):
        blob = repository / "blobs" / str(i)
        shutil.move(snapshot / path, blob)
        (snapshot / path).symlink_to(os.path.relpath(blob, (snapshot / path).parent))
    assert found(snapshot) == ""


def reseal(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and make its own digest right again."""
    body = json.loads((root / "manifest.json").read_text())
    body.pop("sha256")
    change(body)
    body["sha256"] = hashlib.sha256(render(body)).hexdigest()
    (root / "manifest.json").write_bytes(render(body))


def without_files(root: Path) -> None:
    reseal(root, lambda body: body["files"].clear())
    for path in set(walk(root)) - {"manifest.json"}:
        (root / path).unlink()
    for folder in ("rank0", "rank1"):
        (root / folder).rmdir()


def one_rank_less(root: Path) -> None:
    shutil.rmtree(root / "rank1")
    reseal(root, lambda body: [body["files"].pop(path) for path in list(body["files"]) if path.startswith("rank1")])


SEALED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (without_files, "lists no config.json or no tensor"),
    "a rank less": (one_rank_less, "not those of tp ranks"),
    "no source": (lambda root: reseal(root, lambda body: body.pop("source")), "source is missing"),
    "a hostile weight map": (
        lambda root: reseal(root, lambda body: body["source"].update(weight_map={"a": "../x.safetensors"})),
        "source is missing",
    ),
}


@pytest.mark.parametrize("case", SEALED)
def test_a_sealed_manifest_must_be_one_that_a_run_writes(case: str, pristine: Path, tmp_path: Path) -> None:
    change, words = SEALED[case]
    root = shutil.copytree(pristine, tmp_path / "out")
    change(root)
    problems = check_folder(root).problems
    assert len(problems) == 1 and problems[0].exit_code == 3 and words in problems[0].render()


class Breaking(Progress):
    """Ends the check from a worker (as a run does) or from outside (as Ctrl-C does), some time into a large file."""

    def __init__(self, where: str) -> None:
        self.where, self.done = where, 0

    def advance(self, amount_bytes: int, item: str = "") -> None:
        self.done += amount_bytes
        if self.done > 64 << 20:
            if self.where == "worker":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT) if self.done < 80 << 20 else None


@pytest.mark.parametrize("where", ["worker", "outside"])
def test_an_interrupted_check_ends_amid_a_file(where: str, pristine: Path, tmp_path: Path) -> None:
    root, size = shutil.copytree(pristine, tmp_path / "out"), 4 << 30
    os.truncate(root / "tokenizer.json", size)
    reseal(root, lambda body: body["files"]["tokenizer.json"].update(size_bytes=size))
    breaking = Breaking(where)
    with pytest.raises(KeyboardInterrupt):
        check_folder(root, workers=2, progress=breaking)
    assert breaking.done < size / 4  # each worker stops at its next chunk, not at the end of its file


def test_an_unfinished_run_is_no_artifact(tmp_path: Path) -> None:
    def stop(unit: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample.run(tmp_path / "out", on_unit=stop)
    with pytest.raises(IncompleteInput):
        check_folder(tmp_path / "out")


def test_a_journal_left_by_a_kill_after_the_manifest_is_only_noted(pristine: Path, tmp_path: Path) -> None:
    root = shutil.copytree(pristine, tmp_path / "out")
    (root / ".mxconv.journal").write_bytes(b"")
    report = check_folder(root)
    assert not report.problems and "--resume" in report.notes[0]
    sample.run(root, resume=True)
    assert not check_folder(root).notes


def test_a_source_checkpoint_is_checked_by_its_headers(demo: Path, tmp_path: Path) -> None:
    report = check_folder(demo)
    assert report.kind == "checkpoint" and not report.problems and report.tensors > 0 and "not its weights" in report.notes[-1]
    root = shutil.copytree(demo, tmp_path / "demo")
    shard = next(root.glob("*.safetensors"))
    shard.chmod(0o644)
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(IncompleteInput, match="truncated"):
        check_folder(root).require()


def test_a_source_without_shards_or_config_is_incomplete(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"model-1.safetensors": {"a": b"1"}})
    assert "config.json" in check_folder(tmp_path).problems[0].render()
    (tmp_path / "model-1.safetensors").unlink()
    assert check_folder(tmp_path).problems[0].exit_code == 4


def test_report_raises_all(pristine: Path, tmp_path: Path) -> None:
    root = shutil.copytree(pristine, tmp_path / "out")
    flip(root, "config.json", 2)
    (root / "tokenizer.json").unlink()
    with pytest.raises(MxconvError) as raised:
        check_folder(root).require()
    assert raised.value.exit_code == 8 and isinstance(raised.value, MxconvError) and not isinstance(raised.value, IntegrityError)


def test_thousands_of_strays_are_counted_not_listed(pristine: Path, tmp_path: Path) -> None:
    root = shutil.copytree(pristine, tmp_path / "out")
    for number in range(3000):
        (root / f"stray{number}").touch()
    problems = check_folder(root).problems
    assert len(problems) < 50 and f"{3000 - len(problems) + 1} more" in problems[-1].render()
