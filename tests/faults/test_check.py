"""`mxconv check`: seeded corruptions of real artifacts, of every kind, all found and each named; and the command itself."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mxconv.artifact import check_folder, read_manifest
from mxconv.artifact.manifest import render
from mxconv.checkpoint import read_shards
from mxconv.errors import MxconvError
from mxconv.execute import convert, quantize
from tests.conftest import REPOSITORY
from tests.faults.inprocess import run
from tests.synthetic import make_checkpoint


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """A quantized artifact of two ranks, an unquantized one of a single rank, and a checkpoint rebuilt from it."""
    root = tmp_path_factory.mktemp("artifacts")
    source = make_checkpoint(root / "source", hidden=128, intermediate=256, layers="ls", experts=2, files=3)
    quantize(source, root / "quantized", tp=2)
    convert(source, root / "converted")
    convert(root / "converted", root / "rebuilt", layout="minimax-m1")
    for made in ("quantized", "converted", "rebuilt"):
        assert not check_folder(root / made).problems
    return root / "quantized", root / "converted", root / "rebuilt"


@dataclass(frozen=True)
class Tensor:
    """Where a tensor's bytes lie."""

    path: str
    name: str
    offset: int
    size: int
    kind: tuple[str, tuple[int, ...]]


class Target:
    """A copy of an artifact that is spoiled and restored."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bytes = {path: (root / path).read_bytes() for path in [*read_manifest(root).files, "manifest.json"]}
        self.plan = read_manifest(root).plan_digest[:16]
        folders = sorted({(root / path).parent for path in self.bytes if path.endswith(".safetensors")})
        self.tensors = [
            Tensor(
                path=(folder / shards.files[t.file].relative).relative_to(root).as_posix(), name=t.name, offset=t.offset,
                size=t.size_bytes, kind=(t.dtype, t.shape),
            )
            for folder in folders
            for shards in [read_shards(folder)]
            for t in shards.tensors.values()
        ]  # fmt: skip

    def put(self, path: str, data: bytes) -> None:
        (self.root / path).write_bytes(data)

    def restore(self) -> None:
        for path, data in self.bytes.items():
            place = self.root / path
            if place.is_symlink():
                place.unlink()
            if not place.is_file() or place.stat().st_size != len(data) or place.read_bytes() != data:
                place.write_bytes(data)
        for path in sorted(self.root.rglob("*"), reverse=True):  # what is in a folder before the folder
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(self.root).as_posix() not in self.bytes:
                path.unlink()


# Each spoils a target and returns the words that `check` must say, () when nothing was changed.
Corruption = Callable[[Target, random.Random], tuple[str, ...]]


def flip(target: Target, draw: random.Random) -> tuple[str, ...]:
    """One bit of a file; inside a tensor it must be named."""
    path = draw.choice(sorted(target.bytes))
    data = bytearray(target.bytes[path])
    at = draw.randrange(len(data))
    data[at] ^= 1 << draw.randrange(8)
    target.put(path, bytes(data))
    hit = [f"'{t.name}'" for t in target.tensors if t.path == path and t.offset <= at < t.offset + t.size]
    return (path, *hit)


def flip_in_tensor(target: Target, draw: random.Random) -> tuple[str, ...]:
    """A few bits of one tensor."""
    tensor = draw.choice([t for t in target.tensors if t.size])
    data = bytearray(target.bytes[tensor.path])
    for at in {tensor.offset + draw.randrange(tensor.size) for _ in range(draw.randrange(1, 4))}:
        data[at] ^= 1 << draw.randrange(8)
    target.put(tensor.path, bytes(data))
    return tensor.path, f"'{tensor.name}'"


def truncate(target: Target, draw: random.Random) -> tuple[str, ...]:
    path = draw.choice(sorted(target.bytes))
    target.put(path, target.bytes[path][: draw.randrange(len(target.bytes[path]))])
    return (path,)


def append(target: Target, draw: random.Random) -> tuple[str, ...]:
    path = draw.choice(sorted(target.bytes))
    target.put(path, target.bytes[path] + draw.randbytes(draw.randrange(1, 20)))
    return (path,)


def zero(target: Target, draw: random.Random) -> tuple[str, ...]:
    """A page that the disk lost."""
    path = draw.choice(sorted(target.bytes))
    data = bytearray(target.bytes[path])
    at = draw.randrange(len(data))
    data[at : at + 512] = bytes(len(data[at : at + 512]))
    target.put(path, bytes(data))
    return (path,) if bytes(data) != target.bytes[path] else ()


def swap(target: Target, draw: random.Random) -> tuple[str, ...]:
    """Two tensors of one dtype and shape exchanged, within a file or across files: each file stays a valid one."""
    a = draw.choice([t for t in target.tensors if t.size])
    others = [t for t in target.tensors if t.kind == a.kind and t is not a]
    if not others:
        return ()
    b = draw.choice(others)
    datas = {path: bytearray(target.bytes[path]) for path in (a.path, b.path)}
    first, second = (bytes(target.bytes[t.path][t.offset : t.offset + t.size]) for t in (a, b))
    if first == second:
        return ()
    datas[a.path][a.offset : a.offset + a.size], datas[b.path][b.offset : b.offset + b.size] = second, first
    for path, data in datas.items():
        target.put(path, bytes(data))
    return a.path, f"'{a.name}'", b.path, f"'{b.name}'"


def delete(target: Target, draw: random.Random) -> tuple[str, ...]:
    """A file; not the manifest of a rebuilt checkpoint, which without it is one like any other (`check --expect` still tells)."""
    path = draw.choice(sorted(target.bytes))
    if path == "manifest.json" and b'"mxconv"' not in target.bytes["config.json"]:
        return ()
    (target.root / path).unlink()
    return (path,)


def add(target: Target, draw: random.Random) -> tuple[str, ...]:
    """A stray file, perhaps the copy of a right one, under any name: hidden, or one that runs themselves use at work."""
    folder = draw.choice(sorted({Path(path).parent.as_posix() for path in target.bytes}))
    ours = Path(draw.choice(sorted(target.bytes))).name
    stray = f"stray{draw.randrange(9)}{draw.choice(['.safetensors', '.json', '.py', ''])}"
    name = draw.choice(
        [stray, f".{stray}", f"{stray}.{target.plan}.part", f".{stray}.{target.plan}.part", f".{ours}.{target.plan}.part",
         ".mxconv.journal", "run.log.json", f".out.{target.plan}.building"]
    )  # fmt: skip
    path = Path(f"{folder}/{name}")
    content = draw.choice([b"", b"x", target.bytes[draw.choice(sorted(target.bytes))]])
    if path.as_posix() == ".mxconv.journal" and not content:
        return ()  # what a run that was killed at its very end may leave: noted, and empty
    if path.name == f".manifest.json.{target.plan}.part" and content == target.bytes["manifest.json"] and path.parent == Path():
        return ()
    target.put(path.as_posix(), content)
    return (path.as_posix(),)


def add_folder(target: Target, draw: random.Random) -> tuple[str, ...]:
    """An empty folder: readers count those of ranks."""
    folder = draw.choice(sorted({Path(path).parent.as_posix() for path in target.bytes}))
    path = Path(folder) / draw.choice(["rank7", "rank2/rank3", ".hidden", "x"])
    (target.root / path).mkdir(parents=True)
    return (path.parts[0] if folder == "." else f"{folder}/{path.relative_to(folder).parts[0]}",)


def link(target: Target, draw: random.Random) -> tuple[str, ...]:
    """A link in place of a file, to its very content outside; or one more link."""
    path = draw.choice(sorted(target.bytes))
    if draw.randrange(2):
        (target.root / f"{path}.link").symlink_to(target.root / path)
        return (f"{path}.link",)
    outside = target.root.with_name("outside")
    outside.write_bytes(target.bytes[path])
    (target.root / path).unlink()
    (target.root / path).symlink_to(outside)
    return (path,)


def replace_by_another(target: Target, draw: random.Random) -> tuple[str, ...]:
    """A file's content under another file's name."""
    a, b = draw.sample(sorted(target.bytes), 2)
    target.put(a, target.bytes[b])
    return (a,) if target.bytes[a] != target.bytes[b] else ()


def edit_config(target: Target, draw: random.Random) -> tuple[str, ...]:
    raw = json.loads(target.bytes["config.json"])
    key = draw.choice([key for key, value in raw.items() if isinstance(value, int | float)])
    raw[key] = not raw[key] if isinstance(raw[key], bool) else raw[key] + 1
    target.put("config.json", json.dumps(raw, indent=2).encode())
    return ("config.json",)


def edit_manifest(target: Target, draw: random.Random) -> tuple[str, ...]:
    """A digest, a size or a key of the manifest, the rest left as it was."""
    raw = json.loads(target.bytes["manifest.json"])
    fact = raw["files"][draw.choice(sorted(raw["files"]))]
    change = draw.randrange(4)
    if change == 0:
        fact["sha256"] = f"{draw.randrange(16**64):064x}"
    elif change == 1:
        fact["size_bytes"] += 1
    elif change == 2:
        raw["extra"] = 1
    else:
        del raw["files"][draw.choice(sorted(raw["files"]))]
    target.put("manifest.json", json.dumps(raw).encode())
    return ("manifest",)


CORRUPTIONS: tuple[Corruption, ...] = (
    flip, flip_in_tensor, truncate, append, zero, swap, delete, add, add_folder, link, replace_by_another, edit_config,
    edit_manifest,
)  # fmt: skip


def said(root: Path) -> tuple[str, int]:
    """All that `check` says, and its exit code."""
    try:
        check_folder(root, workers=2).require()
    except MxconvError as error:
        return error.render(), error.exit_code
    return "", 0


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.thorough)])
def test_seeded_corruptions_are_all_found_and_named(count: int, artifacts: tuple[Path, ...], tmp_path: Path) -> None:
    draw = random.Random(1010)
    targets = [Target(Path(shutil.copytree(root, tmp_path / root.name))) for root in artifacts]
    found = dict.fromkeys((corrupt.__name__ for corrupt in CORRUPTIONS), 0)
    while sum(found.values()) < count:
        corrupt, target = draw.choice(CORRUPTIONS), draw.choice(targets)
        words = corrupt(target, draw)
        if words:
            text, code = said(target.root)
            expected = {8} if "manifest.json" not in words else {3, 4, 8}
            assert code in expected, (corrupt.__name__, words, text)
            missing = [word for word in words if word not in text]
            assert not missing or words == ("manifest.json",), (corrupt.__name__, words, text)
            found[corrupt.__name__] += 1
        target.restore()
    assert min(found.values()) > count / 40, found
    for target in targets:
        assert said(target.root) == ("", 0)
    print(f"proof: {count:,} corruptions of {len(found)} kinds, all found and named")


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mxconv", *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "CI": "true"},
    )  # fmt: skip


def test_the_command_reports_and_names(artifacts: tuple[Path, ...], tmp_path: Path) -> None:
    root = Path(shutil.copytree(artifacts[0], tmp_path / "out"))
    result = process("check", root)
    assert result.returncode == 0 and "every byte matches the manifest" in result.stdout and "in 2 files" not in result.stdout
    (root / "run.log").write_text("anything")
    assert run("check", root).code == 0
    target = Target(root)
    words = flip_in_tensor(target, random.Random(5))
    result = process("check", root, "--json", "--workers", "1")
    document = json.loads(result.stdout)
    assert result.returncode == 8 and document["schema"] == "mxconv.check" and document["ok"] is False
    assert len(document["problems"]) == 1 and words[1] in document["problems"][0]["what"]
    assert words[0] in document["problems"][0]["where"]


def test_progress_is_shown_and_reaches_the_end(artifacts: tuple[Path, ...]) -> None:
    total = sum(fact.size_bytes for fact in read_manifest(artifacts[0]).files.values())
    result = run("check", artifacts[0])
    assert "checking" in result.err and result.code == 0
    report = check_folder(artifacts[0])
    assert report.size_bytes == total


def test_another_artifact_than_the_expected_does_not_hide_what_is_damaged(artifacts: tuple[Path, ...], tmp_path: Path) -> None:
    root = Path(shutil.copytree(artifacts[0], tmp_path / "out"))
    (root / "stray").touch()
    result = run("check", root, "--expect", "0" * 16, "--json")
    document = json.loads(result.out)
    assert result.code == 8 and document["schema"] == "mxconv.check" and document["ok"] is False
    assert [problem["what"] for problem in document["problems"]] == [
        "this is another artifact than the one expected", "file is not in the manifest",
    ]  # fmt: skip
    assert run("check", root, "--expect", "xyz").code == 2
    (root / "stray").unlink()
    assert run("check", root, "--expect", read_manifest(root).sha256[:16].upper()).code == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_check_amid_a_file(number: int, code: int, artifacts: tuple[Path, ...], tmp_path: Path) -> None:
    """Over a file of 64 GiB, which takes longer than any test may."""
    root, size = Path(shutil.copytree(artifacts[0], tmp_path / "out")), 64 << 30
    shutil.copy(root / "config.json", root / "vocab.json")
    body = json.loads((root / "manifest.json").read_text())
    body["files"]["vocab.json"] = {"size_bytes": size, "sha256": "0" * 64}
    body.pop("sha256")
    body["sha256"] = hashlib.sha256(render(body)).hexdigest()
    (root / "manifest.json").write_bytes(render(body))
    os.truncate(root / "vocab.json", size)
    with open(tmp_path / "said", "w+b") as said:
        started = subprocess.Popen(
            [sys.executable, "-m", "mxconv", "check", str(root)], stdout=said, stderr=said,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "CI": "true"},
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while not any("vocab.json" in os.readlink(fd) for fd in descriptors(started.pid)):
            assert time.monotonic() < deadline and started.poll() is None
            time.sleep(0.02)
        time.sleep(0.1)
        began = time.monotonic()
        started.send_signal(number)
        assert started.wait(timeout=60) == code
        assert time.monotonic() - began < 5
        said.seek(0)
        text = said.read().decode()
    assert "stopped by" in text and "Traceback" not in text


def descriptors(pid: int) -> list[Path]:
    try:
        return [path for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    except OSError:
        return []


def test_many_problems_are_listed_at_once(artifacts: tuple[Path, ...], tmp_path: Path) -> None:
    root = Path(shutil.copytree(artifacts[0], tmp_path / "out"))
    (root / "rank1" / "model.safetensors.index.json").unlink()
    (root / "stray").touch()
    with (root / "rank0" / "model-00001-of-00001.safetensors").open("ab") as file:
        file.write(b"\0")
    result = run("check", root)
    assert result.code == 8
    for words in ("3 problems", "file of the manifest is missing", "stray: file is not in the manifest", "file has grown"):
        assert words in result.err


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (lambda root: (root / "manifest.json").unlink(), 4, "no manifest.json"),
        (lambda root: (root / "manifest.json").write_text("{}"), 8, "manifest is not one that mxconv wrote"),
        (lambda root: (root / "manifest.json").write_text("\0"), 8, "manifest cannot be read"),
        (lambda root: (root / "manifest.json").write_text('{"schema":"x","files":[9]}'), 8, "manifest was changed"),
        (lambda root: (root / "config.json").write_text("{}"), 8, "config.json: file is truncated"),
        (lambda root: shutil.rmtree(root / "rank1"), 8, "rank1"),
    ],
)
def test_whole_files(spoil: Callable[[Path], object], code: int, words: str, artifacts: tuple[Path, ...], tmp_path: Path) -> None:
    root = Path(shutil.copytree(artifacts[0], tmp_path / "out"))
    spoil(root)
    result = run("check", root)
    assert result.code == code and words in result.err, result.err
