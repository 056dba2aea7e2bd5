"""Overwriting keeps a user's file under a name that an unfinished run was going to use; a run.log is a plain file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mxconv.errors import MxconvError
from tests.artifact import sample

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
