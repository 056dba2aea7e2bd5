"""Power loss at any moment of a run, unsynced writes dropped: nothing wrong has a final name, a resume gives the same bytes."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from mxconv.artifact import tree_digest
from tests.artifact import sample
from tests.artifact.power import Disk


def resume(root: Path) -> None:
    """A resume that needs no durable disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fdatasync", lambda fd: None)
        patch.setattr(os, "fsync", lambda fd: None)
        sample.run(root, resume=True)


@pytest.mark.parametrize(
    ("states", "seed"), [(1_000, 77), (1_000, 78), *(pytest.param(2_000, seed, marks=pytest.mark.thorough) for seed in range(9))]
)
def test_power_loss(states: int, seed: int, tmp_path: Path) -> None:
    root = tmp_path / "run" / "out"
    root.parent.mkdir()
    disk = Disk(root)
    with pytest.MonkeyPatch.context() as patch, disk.recording(patch):
        sample.run(root, order=random.Random(1))
    clean = tree_digest(root)
    kinds = {event.kind for event in disk.events}
    assert kinds == {"change", "sync", "names", "sync-names"} and len(disk.events) > 200
    random_ = random.Random(seed)
    seen: set[bool] = set()
    for state in range(states):
        target = tmp_path / "cut" / "out"
        target.mkdir(parents=True)
        at = len(disk.events) if state == 0 else random_.randint(1, len(disk.events))
        disk.cut(at, random_, target)
        published = (target / "manifest.json").exists()
        seen.add(published)
        sample.assert_nothing_wrong(target, published=published)
        resume(target)
        assert tree_digest(target) == clean, at
        shutil.rmtree(target.parent)
    assert seen == {True, False}
    print(f"proof: {states} states after a cut, none wrong, each resumed to the same bytes")


@pytest.mark.parametrize("cuts", [12, pytest.param(120, marks=pytest.mark.thorough)])
def test_power_loss_during_the_resume_after_a_power_loss(cuts: int, tmp_path: Path) -> None:
    root = tmp_path / "run" / "out"
    root.parent.mkdir()
    first = Disk(root)
    with pytest.MonkeyPatch.context() as patch, first.recording(patch):
        sample.run(root, order=random.Random(1))
    clean, random_, states = tree_digest(root), random.Random(79), 0
    for cut in range(cuts):
        again = tmp_path / f"again{cut}" / "out"
        again.mkdir(parents=True)
        first.cut(random_.randint(len(first.events) // 4, len(first.events)), random_, again)
        second = Disk(again)
        stood = second.stand()
        with pytest.MonkeyPatch.context() as patch, second.recording(patch):
            sample.run(again, resume=True)
        for _ in range(12):
            target = tmp_path / "cut" / "out"
            target.mkdir(parents=True)
            at = random_.randint(stood, len(second.events))
            second.cut(at, random_, target)
            sample.assert_nothing_wrong(target, published=(target / "manifest.json").exists())
            resume(target)
            assert tree_digest(target) == clean, (cut, at)
            shutil.rmtree(target.parent)
            states += 1
        shutil.rmtree(again.parent)
    print(f"proof: power: {states} states after a cut amid a resume after a cut, none wrong, each resumed to the same bytes")
