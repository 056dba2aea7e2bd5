"""Which folders a run may write into, who holds them, and what --overwrite does with the old one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mxconv.artifact import ArtifactWriter, check_folder, disposal, open_output, output, require_artifact, system, tree_digest
from mxconv.errors import OutputConflict
from mxconv.progress import Progress
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
        open_output(root, plan_digest=sample.PLAN) as early,
        ArtifactWriter(first, files=sample.files(), units=sample.units()),
    ):
        with pytest.raises(OutputConflict, match="another run"):
            ArtifactWriter(early, files=sample.files(), units=sample.units())
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(OutputConflict, match="another run"):
                open_output(root, plan_digest=sample.PLAN, **options)


def test_a_run_at_work_is_not_overwritten(tmp_path: Path) -> None:
    root = tmp_path / "out"

    def attack(unit: str) -> None:
        if unit == "layer.2":
            for plan in (sample.PLAN, sample.OTHER_PLAN):
                with pytest.raises(OutputConflict, match="another run"):
                    sample.run(root, plan=plan, overwrite=True)

    sample.run(root, on_unit=attack)
    assert require_artifact(root).plan_digest == sample.PLAN and os.listdir(tmp_path) == ["out"]


def test_what_is_being_replaced_is_not_written_to(tmp_path: Path) -> None:
    root = tmp_path / "out"
    unfinished(root)

    def attack(unit: str) -> None:
        if unit == "layer.2":
            with pytest.raises(OutputConflict, match="another run"):
                sample.run(root, resume=True)
            with pytest.raises(OutputConflict, match="another run"):
                sample.run(root, plan=sample.PLAN, overwrite=True)

    sample.run(root, plan=sample.OTHER_PLAN, overwrite=True, on_unit=attack)
    assert require_artifact(root).plan_digest == sample.OTHER_PLAN and os.listdir(tmp_path) == ["out"]


def journal_of_another(root: Path) -> None:
    root.mkdir()
    (root / ".mxconv.journal").write_text("dear diary")


def sealed_for_others(root: Path) -> None:
    """A sealed manifest that does not list what lies beside it."""
    sample.run(root)
    for name in ("rank0", "rank1"):
        shutil.rmtree(root / name)
    (root / "rank0").mkdir()
    (root / "rank0" / "results.csv").write_text("1,2")


# What the folder was before --overwrite; one thing in each that no run put there.
FOREIGN: dict[str, Callable[[Path], object]] = {
    "a manifest of another tool": lambda root: (root.mkdir(), (root / "manifest.json").write_text('{"name": "extension"}')),
    "a manifest that is a folder": lambda root: (root / "manifest.json" / "x").mkdir(parents=True),
    "an empty journal": lambda root: (root.mkdir(), (root / ".mxconv.journal").touch(), (root / "thesis").write_text("x")),
    "a journal of another tool": journal_of_another,
    "a finished artifact and a note": lambda root: (sample.run(root), (root / "rank1" / "note.txt").write_text("x")),
    "a finished artifact and an empty folder": lambda root: (sample.run(root), (root / "later").mkdir()),
    "a finished artifact with an edited chat template": (
        lambda root: (sample.run(root), (root / "chat_template.jinja").write_text("mine"))
    ),
    "a finished artifact with a link for a shard": (
        lambda root: (sample.run(root), (root / "rank0" / "model-00001-of-00002.safetensors").unlink(),
                      (root / "rank0" / "model-00001-of-00002.safetensors").symlink_to("elsewhere"))
    ),
    "a finished artifact and a part of no file": (
        lambda root: (sample.run(root), (root / "rank0" / f".x.{sample.PLAN[:16]}.part").write_text("x"))
    ),
    "an edited manifest": lambda root: (
        sample.run(root), (root / "manifest.json").write_bytes((root / "manifest.json").read_bytes() + b"\n")
    ),
    "a manifest for other files": sealed_for_others,
    "an unfinished run and a note": lambda root: (unfinished(root), (root / "note.txt").write_text("x")),
    "an unfinished run and a shard that it has no name for": (
        lambda root: (unfinished(root), (root / "rank1" / "model-00003-of-00002.safetensors").write_text("x"))
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_overwrite_removes_nothing_that_mxconv_did_not_make(case: str, tmp_path: Path) -> None:
    root, kept = tmp_path / "out", tmp_path / "out.replaced"
    FOREIGN[case](root)
    before = tree_digest(root)
    folders = sorted(path.relative_to(root) for path in root.rglob("*"))
    sample.run(root, plan=sample.OTHER_PLAN, overwrite=True)
    assert require_artifact(root).plan_digest == sample.OTHER_PLAN
    assert tree_digest(kept) == before and sorted(path.relative_to(kept) for path in kept.rglob("*")) == folders
    assert sorted(os.listdir(tmp_path)) == ["out", "out.replaced"]


def test_what_came_while_the_old_folder_is_removed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "out"
    sample.run(root, plan=sample.OTHER_PLAN)
    own_files = disposal._own_files

    def late(folder: Path) -> list[str] | None:
        found = own_files(folder)
        (folder / "rank0" / "late").write_text("x")
        return found

    monkeypatch.setattr(disposal, "_own_files", late)
    sample.run(root, overwrite=True)
    assert [path.name for path in (tmp_path / "out.replaced").rglob("*") if path.is_file()] == ["late"]


@pytest.mark.parametrize("damage", ["cut shard", "lost shard", "lost tokenizer"])
def test_a_damaged_artifact_is_still_mxconvs(damage: str, tmp_path: Path) -> None:
    root = tmp_path / "out"
    sample.run(root)
    shard = root / sample.files()[0].path
    {"cut shard": lambda: os.truncate(shard, 99), "lost shard": shard.unlink, "lost tokenizer": (root / "tokenizer.json").unlink}[
        damage
    ]()
    sample.run(root, overwrite=True)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("stray", ["README.md", "rank0/notes.txt", "rank7/", ".hidden", f"rank0/.evil.{sample.PLAN[:16]}.part"])
def test_a_run_does_not_go_on_among_foreign_files(stray: str, tmp_path: Path) -> None:
    root = tmp_path / "out"
    unfinished(root)
    place = root / stray
    place.mkdir() if stray.endswith("/") else place.write_text("hi")
    assert stray.rstrip("/") in refuses(root, resume=True)
    place.rmdir() if stray.endswith("/") else place.unlink()
    assert len(sample.run(root, resume=True)[1]) < len(sample.units())
    assert not check_folder(root).problems


def test_what_comes_during_a_run_is_noticed_before_it_is_published(tmp_path: Path) -> None:
    root = tmp_path / "out"
    with pytest.raises(OutputConflict, match="README"):
        sample.run(root, on_unit=lambda unit: (root / "README.md").write_text("hi"))
    assert not (root / "manifest.json").exists()
    (root / "README.md").unlink()
    assert sample.run(root, resume=True)[1] == [] and not check_folder(root).problems


class Noted(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, line: str) -> None:
        self.notes.append(line)


def test_a_run_that_ends_before_its_first_file_leaves_no_folder(tmp_path: Path) -> None:
    root = tmp_path / "out"
    with open_output(root, plan_digest=sample.PLAN):
        assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path) == []
    sample.run(root)
    with open_output(root, plan_digest=sample.OTHER_PLAN, overwrite=True) as opened:
        assert sorted(os.listdir(tmp_path)) == [opened.work.name, "out"]
    assert os.listdir(tmp_path) == ["out"]


def test_an_interrupted_build_is_named_to_later_runs(tmp_path: Path) -> None:
    root, noted = tmp_path / "out", Noted()
    sample.run(root, plan=sample.OTHER_PLAN)
    with pytest.raises(Stop):
        sample.run(root, overwrite=True, on_unit=stop_at("layer.3"))
    with open_output(root, plan_digest=sample.OTHER_PLAN, resume=True, progress=noted):
        pass
    assert len(noted.notes) == 1 and f".out.{sample.PLAN[:16]}.building" in noted.notes[0]
    noted.notes.clear()
    with open_output(root, plan_digest=sample.PLAN, resume=True, overwrite=True, progress=noted):
        pass
    assert not noted.notes


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
