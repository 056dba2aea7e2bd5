"""A user's file under a name that an unfinished run was going to use is in the way, or kept; a run.log is a plain file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mxconv.artifact import check_folder
from mxconv.errors import MxconvError
from tests.artifact import sample
from tests.artifact.test_crash import die_at

MINE = b'{"mine": 1}'


def unfinished(root: Path) -> None:
    def stop(unit: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample.run(root, on_unit=stop)


def test_overwriting_keeps_it(tmp_path: Path) -> None:
    root = tmp_path / "out"
    unfinished(root)
    (root / "config.json").write_bytes(MINE)
    sample.run(root, overwrite=True)
    assert (tmp_path / "out.replaced" / "config.json").read_bytes() == MINE


@pytest.mark.parametrize("make", [lambda path: path.write_bytes(MINE), lambda path: path.symlink_to("x"), os.mkdir])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "rank0/model.safetensors.index.json"])
def test_resuming_refuses_it_before_anything_is_computed(name: str, make: Callable[[Path], object], tmp_path: Path) -> None:
    root = tmp_path / "out"
    unfinished(root)
    make(root / name)
    with pytest.raises(MxconvError, match="not of this run") as refused:
        sample.run(root, resume=True, on_unit=lambda unit: pytest.fail("computed"))
    assert refused.value.exit_code == 5 and name in refused.value.render()
    os.rename(root / name, tmp_path / "mine")
    sample.run(root, resume=True)
    assert not check_folder(root).problems


def test_one_that_comes_while_the_run_is_at_work(tmp_path: Path) -> None:
    root = tmp_path / "out"
    with pytest.raises(MxconvError, match="not of this run") as refused:
        sample.run(root, on_unit=lambda unit: (root / "tokenizer.json").write_bytes(MINE))
    assert refused.value.exit_code == 5 and (root / "tokenizer.json").read_bytes() == MINE
    assert not (root / "manifest.json").exists()


def test_one_that_was_edited_after_the_run_put_it(tmp_path: Path) -> None:
    root = tmp_path / "out"
    assert os.WIFSIGNALED(die_at("config-linked", 1, root))
    (root / "tokenizer.json").write_bytes(MINE)
    with pytest.raises(MxconvError, match="not of this run") as refused:
        sample.run(root, resume=True)
    assert refused.value.exit_code == 5 and (root / "tokenizer.json").read_bytes() == MINE
    sample.run(root, overwrite=True)
    assert (tmp_path / "out.replaced" / "tokenizer.json").read_bytes() == MINE


def test_a_journal_that_speaks_of_no_small_file_knows_none(tmp_path: Path) -> None:
    root = tmp_path / "out"
    sample.run(root)
    (root / "manifest.json").unlink()
    unfinished(tmp_path / "other")
    os.rename(tmp_path / "other" / ".mxconv.journal", root / ".mxconv.journal")  # its own run's was removed at the end
    sample.run(root, overwrite=True)
    assert (tmp_path / "out.replaced").exists(), "a journal that speaks of no small file knows none"


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("target", path), os.mkdir])
def test_a_run_log_that_is_no_plain_file_is_in_the_way_before_anything_is_written(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    root = tmp_path / "out"
    root.mkdir()
    make(root / "run.log")
    with pytest.raises(MxconvError) as refused:
        sample.run(root)
    assert refused.value.exit_code == 5 and os.listdir(root) == ["run.log"]
