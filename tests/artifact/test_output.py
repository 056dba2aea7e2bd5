"""Which folders a run may write into, who holds them, and what --overwrite does with the old one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mxconv.artifact import ArtifactWriter, open_output, output, require_artifact, system, tree_digest
from mxconv.errors import OutputConflict
from tests.artifact import sample


class Stop(Exception):
    pass


def stop_at(unit: str) -> object:
    def on_unit(name: str) -> None:
        if name == unit:
            raise Stop

    return on_unit


def unfinished(root: Path, plan: str = sample.PLAN) -> None:
    with pytest.raises(Stop):
        sample.run(root, plan=plan, on_unit=stop_at("layer.3"))


def refuses(root: Path, **options: bool) -> str:
    before = tree_digest(root) if root.is_dir() else root.read_bytes()
    with pytest.raises(OutputConflict) as raised:
        sample.run(root, **options)
    assert (tree_digest(root) if root.is_dir() else root.read_bytes()) == before
    return raised.value.render()


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for root in (tmp_path / "empty", tmp_path / "a" / "b" / "absent"):
        sample.run(root, resume=True)
        require_artifact(root)


def test_a_finished_artifact(tmp_path: Path) -> None:
    root = tmp_path / "out"
    sample.run(root)
    digest = tree_digest(root)
    assert "--resume" in refuses(root) and "--overwrite" in refuses(root)
    assert sample.run(root, resume=True)[1] == [] and tree_digest(root) == digest
    assert "another plan" in refuses(root, plan=sample.OTHER_PLAN, resume=True)  # type: ignore[arg-type]


def test_an_unfinished_run(tmp_path: Path) -> None:
    root = tmp_path / "out"
    unfinished(root)
    assert "--resume" in refuses(root)
    assert "another plan" in refuses(root, plan=sample.OTHER_PLAN, resume=True)  # type: ignore[arg-type]
    assert len(sample.run(root, resume=True)[1]) < len(sample.units())


def test_foreign_files_are_never_mixed_with_ours(tmp_path: Path) -> None:
    root = tmp_path / "out"
    root.mkdir()
    (root / "thesis.tex").write_text("years of work")
    refuses(root)
    refuses(root, resume=True)
    sample.run(root, overwrite=True)
    assert require_artifact(root) and not (root / "thesis.tex").exists()
    assert (tmp_path / "out.replaced" / "thesis.tex").read_text() == "years of work"
    assert sorted(os.listdir(tmp_path)) == ["out", "out.replaced"]


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        assert "is a file" in refuses(tmp_path / "out", **options)


@pytest.mark.parametrize("old", ["finished", "finished other", "unfinished", "unfinished other"])
@pytest.mark.parametrize("atomic", [True, False])
def test_overwrite_replaces_what_mxconv_made(old: str, atomic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "out"
    plan = sample.OTHER_PLAN if "other" in old else sample.PLAN
    unfinished(root, plan) if "unfinished" in old else sample.run(root, plan=plan)
    if not atomic:
        monkeypatch.setattr(output, "exchange", lambda a, b: False)
    seen: list[bool] = []
    _, computed = sample.run(root, overwrite=True, on_unit=lambda _: seen.append((root / "manifest.json").exists()))
    assert set(computed) == set(sample.units())
    assert require_artifact(root).plan_digest == sample.PLAN and os.listdir(tmp_path) == ["out"]
    assert all(seen) == ("unfinished" not in old)  # the old artifact stood all the time


def test_an_interrupted_overwrite_goes_on_with_both_flags(tmp_path: Path) -> None:
    root = tmp_path / "out"
    sample.run(root, plan=sample.OTHER_PLAN)
    with pytest.raises(Stop):
        sample.run(root, overwrite=True, on_unit=stop_at("layer.3"))
    _, computed = sample.run(root, overwrite=True, resume=True)
    assert 0 < len(computed) < len(sample.units())
    assert require_artifact(root).plan_digest == sample.PLAN and os.listdir(tmp_path) == ["out"]


def test_overwrite_alone_begins_anew(tmp_path: Path) -> None:
    root = tmp_path / "out"
    sample.run(root, plan=sample.OTHER_PLAN)
    with pytest.raises(Stop):
        sample.run(root, overwrite=True, on_unit=stop_at("layer.3"))
    _, computed = sample.run(root, overwrite=True)
    assert set(computed) == set(sample.units())


@pytest.mark.parametrize("flags", [{}, {"resume": True}])
def test_a_second_writer_is_refused(flags: dict[str, bool], tmp_path: Path) -> None:
    root = tmp_path / "out"
    with (
        open_output(root, plan_digest=sample.PLAN) as first,
        ArtifactWriter(first, files=sample.files(), units=sample.units()),
        pytest.raises(OutputConflict),
    ):
        open_output(root, plan_digest=sample.PLAN, **flags)
    with open_output(root, plan_digest=sample.PLAN, resume=True):
        pass


def test_two_overwriters_of_one_plan_exclude_each_other(tmp_path: Path) -> None:
    root = tmp_path / "out"
    sample.run(root, plan=sample.OTHER_PLAN)
    with open_output(root, plan_digest=sample.PLAN, overwrite=True) as first:
        assert first.work != root
        with pytest.raises(OutputConflict, match="another run"):
            open_output(root, plan_digest=sample.PLAN, overwrite=True)


def test_without_folder_locks_the_journal_keeps_a_second_writer_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "try_lock", lambda fd: None)
    root = tmp_path / "out"
    with (
        open_output(root, plan_digest=sample.PLAN) as first,
        ArtifactWriter(first, files=sample.files(), units=sample.units()),
        open_output(root, plan_digest=sample.PLAN, resume=True) as second,
        pytest.raises(OutputConflict, match="another run"),
    ):
        ArtifactWriter(second, files=sample.files(), units=sample.units())


@pytest.mark.parametrize("step", [1, 2])
def test_a_crash_between_the_renames_that_stand_in_for_an_exchange(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "out"
    sample.run(root, plan=sample.OTHER_PLAN)
    monkeypatch.setattr(output, "exchange", lambda a, b: False)
    rename, count = os.rename, [0]

    def dying(a: object, b: object) -> None:
        if Path(str(a)).name in ("out", f".out.{sample.PLAN[:16]}.building") or str(a).endswith(".old"):
            count[0] += 1
            if count[0] == step + 1:
                raise Stop
        rename(a, b)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", dying)
        with pytest.raises(Stop):
            sample.run(root, overwrite=True)
    assert root.exists() == (step == 2)
    sample.run(root, overwrite=True, resume=True)
    assert require_artifact(root).plan_digest == sample.PLAN and os.listdir(tmp_path) == ["out"]


def test_the_root_may_be_a_link_and_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    sample.run(tmp_path / "out")
    sample.run(tmp_path / "out", plan=sample.OTHER_PLAN, overwrite=True)
    assert (tmp_path / "out").is_symlink() and require_artifact(tmp_path / "disk").plan_digest == sample.OTHER_PLAN


def test_a_link_planted_where_a_part_will_be_is_not_followed(tmp_path: Path) -> None:
    root = tmp_path / "out"
    unfinished(root)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    part = next(root.glob("rank0/.model-00001*.part"))
    part.unlink()
    part.symlink_to(victim)
    with pytest.raises(OutputConflict):
        sample.run(root, resume=True)
    assert victim.read_text() == "precious"


def test_exchange_swaps_two_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x").touch()
    if not system.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this filesystem cannot exchange names")
    assert (tmp_path / "b" / "x").exists() and not (tmp_path / "a" / "x").exists()
