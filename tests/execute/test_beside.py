"""The small files beside the weights: looked at while planning, the same to the end and in a resumed run, or the run is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mxconv.artifact import failpoints, tree_digest
from mxconv.errors import IntegrityError, MxconvError
from mxconv.execute import RunOptions, convert, prepare, run
from mxconv.plan import Request
from tests.synthetic import make_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = make_checkpoint(tmp_path / "source", hidden=128, intermediate=256, layers="ls", experts=2, files=2)
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "LICENSE").write_text("free")
    return folder


def edit_config(source: Path) -> None:
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": 7}))


def edit_index(source: Path) -> None:
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "metadata": {**index.get("metadata", {}), "note": "x"}}))


def respell_config(source: Path) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))


CHANGES: dict[str, Callable[[Path], object]] = {
    "config.json": edit_config,
    "config.json spelled otherwise": respell_config,
    "index": edit_index,
    "tokenizer.json": lambda source: (source / "tokenizer.json").write_text('{"model": []}'),
    "tokenizer.json gone": lambda source: (source / "tokenizer.json").unlink(),
    "tokenizer.json a FIFO": lambda source: ((source / "tokenizer.json").unlink(), os.mkfifo(source / "tokenizer.json")),
}


class Killed(Exception):
    pass


def killed(source: Path, out: Path) -> None:
    def die() -> None:
        raise Killed

    failpoints.arm("unit-journaled", 3, die)
    try:
        with pytest.raises(Killed):
            convert(source, out)
    finally:
        failpoints.disarm()


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_during_a_run(change: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean, copy, out = tmp_path / "clean", Path(shutil.copytree(source, tmp_path / "copy")), tmp_path / "out"
    convert(source, clean)
    run_units = run._run_units

    def changing(*arguments: object) -> None:
        run_units(*arguments)
        CHANGES[change](copy)

    with monkeypatch.context() as patch:
        patch.setattr(run, "_run_units", changing)
        with pytest.raises(IntegrityError, match="changed during the run"):
            convert(copy, out)
    assert not (out / "manifest.json").exists()
    for path in ("config.json", "model.safetensors.index.json", "tokenizer.json"):
        (copy / path).unlink(missing_ok=True)
        shutil.copy(source / path, copy / path)
    convert(copy, out, options=RunOptions(resume=True))
    assert tree_digest(out) == tree_digest(clean)


@pytest.mark.parametrize("change", [name for name in CHANGES if "FIFO" not in name] + ["merges.txt new"])
def test_a_change_before_a_resumed_run(change: str, source: Path, tmp_path: Path) -> None:
    killed(source, tmp_path / "out")
    (source / "merges.txt").write_text("a b") if "new" in change else CHANGES[change](source)
    with pytest.raises(MxconvError) as raised:
        convert(source, tmp_path / "out", options=RunOptions(resume=True))
    assert raised.value.exit_code == 5 if change == "config.json" else isinstance(raised.value, IntegrityError)  # it is in the plan
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("change", [name for name in CHANGES if "FIFO" not in name] + ["merges.txt new"])
def test_a_change_after_the_end(change: str, source: Path, tmp_path: Path) -> None:
    """The artifact is whole, and not the one that a run would make now."""
    convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", options=RunOptions(resume=True))
    before = tree_digest(tmp_path / "out")
    (source / "merges.txt").write_text("a b") if "new" in change else CHANGES[change](source)
    with pytest.raises(MxconvError) as raised:
        convert(source, tmp_path / "out", options=RunOptions(resume=True))
    assert raised.value.exit_code == (5 if change == "config.json" else 8)  # it is in the plan
    assert change == "config.json" or ("changed since" in raised.value.render() and change.split()[0] in raised.value.render())
    assert tree_digest(tmp_path / "out") == before


def test_an_artifact_as_source_that_is_the_same(source: Path, tmp_path: Path) -> None:
    """What goes back or on is held against its own record: nothing changed, nothing is said."""
    convert(source, tmp_path / "out", tp=2)
    for options in (RunOptions(), RunOptions(resume=True)):
        convert(tmp_path / "out", tmp_path / "back", layout=None, options=options)
        convert(tmp_path / "out", tmp_path / "on", tp=1, options=options)
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    with pytest.raises(IntegrityError, match="changed since"):
        convert(tmp_path / "out", tmp_path / "back", layout=None, options=RunOptions(resume=True))


def test_a_config_with_other_line_ends_goes_back_bit_for_bit(source: Path, tmp_path: Path) -> None:
    text = (source / "config.json").read_bytes().replace(b"\n", b"\r\n")
    (source / "config.json").write_bytes(text)
    convert(source, tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "back", layout=None)
    assert (tmp_path / "back" / "config.json").read_bytes() == text


def link_out(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/etc/passwd")


SPOILED: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "larger than any": (lambda source: os.truncate(source / "LICENSE", 50 << 30), 3, "LICENSE: file is too large"),
    "a link out": (lambda source: link_out(source / "tokenizer.json"), 3, "leads out of the checkpoint folder"),
    "a FIFO": (lambda source: os.mkfifo(source / "vocab.json"), 3, "vocab.json: not a regular file"),
    "a folder": (lambda source: (source / "NOTICE").mkdir(), 3, "NOTICE: not a regular file"),
    "a link to nothing": (lambda source: (source / "merges.txt").symlink_to("gone"), 4, "merges.txt: file is missing"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_file_that_cannot_be_copied_is_told_with_the_plan(case: str, source: Path) -> None:
    spoil, code, words = SPOILED[case]
    spoil(source)
    with pytest.raises(MxconvError) as raised:
        prepare(source, Request())
    assert raised.value.exit_code == code and words in raised.value.render()


def test_all_problems_are_told_together(source: Path) -> None:
    for spoil, _, _ in SPOILED.values():
        spoil(source)
    next(source.glob("*.safetensors")).unlink()
    with pytest.raises(MxconvError) as raised:
        prepare(source, Request(tp=5))
    said = raised.value.render()
    assert all(words in said for _, _, words in SPOILED.values())
    assert "shard is missing" in said and raised.value.exit_code == 3
