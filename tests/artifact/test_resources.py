"""Disks that fill up or fail, at any call: exit code 6, nothing wrong under a final name, and the run goes on afterwards."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mxconv.artifact import parts, small, system, tree_digest
from mxconv.errors import MalformedInput, MxconvError, ResourceError
from tests.artifact import sample


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("clean") / "out"
    sample.run(root)
    return tree_digest(root)


def failing(call: Callable[..., int], after: int, code: int) -> Callable[..., int]:
    """`call`, which fails with `code` from its `after`-th use on."""
    count = [0]

    def wrapped(*arguments: object, **options: object) -> int:
        count[0] += 1
        if count[0] > after:
            raise OSError(code, os.strerror(code))
        return call(*arguments, **options)

    return wrapped


CALLS = ["pwrite", "fdatasync", "write", "link", "ftruncate"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_begins_to_fail(name: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean: str) -> None:
    for after in (0, 1, 3, 7, 20):
        root = tmp_path / f"out{after}"
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing(getattr(os, name), after, code))
            try:
                sample.run(root)
            except ResourceError as error:
                assert error.exit_code == 6 and error.hint
                assert sample.wrong_files(root) == [] and not (root / "manifest.json").exists()
            else:
                assert after > 0
        sample.run(root, resume=True)
        assert tree_digest(root) == clean


def test_a_disk_without_room_is_met_before_the_first_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "fallocate", failing(lambda *_: 0, 2, errno.ENOSPC))
    units: list[str] = []
    with pytest.raises(ResourceError, match="disk is full") as raised:
        sample.run(tmp_path / "out", on_unit=units.append)
    assert not units and "--resume" in (raised.value.hint or "")


def test_a_disk_that_fails_under_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean: str) -> None:
    root = tmp_path / "out"

    def stop(unit: str) -> None:
        if unit == "layer.2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample.run(root, on_unit=stop)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing(os.preadv, 3, errno.EIO))
        with pytest.raises(ResourceError, match="input/output error"):
            sample.run(root, resume=True)
    sample.run(root, resume=True)
    assert tree_digest(root) == clean


def test_no_fallocate_no_exchange_no_writeback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean: str) -> None:
    """A system without the three calls: the same bytes, by the plain ways."""
    monkeypatch.setattr(system, "_libc", lambda: object())
    sample.run(tmp_path / "out", plan=sample.OTHER_PLAN)
    sample.run(tmp_path / "out", overwrite=True)
    assert tree_digest(tmp_path / "out") == clean and os.listdir(tmp_path) == ["out"]


def test_fallocate_reserves(tmp_path: Path) -> None:
    with open(tmp_path / "x", "w+b") as file:
        system.fallocate(file.fileno(), 1 << 20)
        info = os.fstat(file.fileno())
    assert info.st_size == 1 << 20
    if info.st_blocks == 0:
        pytest.skip("this filesystem does not reserve")
    assert info.st_blocks * 512 >= 1 << 20


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(ResourceError, match="permission"):
        sample.run(locked / "out")


def test_sidecars_are_copied_from_regular_files_inside_their_folder_only(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_bytes(b"{}")
    assert small.look_at(source / "tokenizer.json").read() == b"{}"
    (tmp_path / "secret").write_bytes(b"secret")
    (source / "link.json").symlink_to(tmp_path / "secret")
    os.mkfifo(source / "fifo.json")
    (source / "folder.json").mkdir()
    for name in ("link.json", "fifo.json", "folder.json"):
        with pytest.raises(MalformedInput):
            small.look_at(source / name)
    with pytest.raises(MxconvError) as raised:
        small.look_at(source / "absent.json")
    assert raised.value.exit_code == 4
