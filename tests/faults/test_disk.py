"""A disk that is too small, fills up, or is read-only: exit code 6, nothing wrong under a final name, and the run goes on later."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from mxconv.artifact import tree_digest
from tests.faults.conftest import Clean
from tests.faults.processes import JOBS, Zygote, assert_nothing_wrong, command, remount, tmpfs

ROOM = f"size={256 << 20}"
# Whether the plan's look at the disk and the reservation of whole files are left out, so that the disk is met later and later.
LEFT_OUT = ({}, {"no_disk_check": True}, {"no_disk_check": True, "no_reserve": True})


@pytest.mark.parametrize("job", JOBS)
def test_disks_of_fifty_sizes(job: str, zygote: Zygote, model: Path, clean: Mapping[str, Clean], tmp_path: Path) -> None:
    wanted = clean[job]
    whole = sum(len(data) for data in wanted.files.values())
    random_, full, refused, later, fitted = random.Random(job), 0, 0, 0, 0
    with tmpfs(tmp_path / "disk", 256 << 20) as disk:
        for number in range(50):
            options = LEFT_OUT[number % 3]
            share = (number + random_.random()) / 50
            remount(disk, f"size={(32 << 10) + int(share * 1.1 * whole)}")
            root = disk / "out"
            code, run = zygote.run(command(job, model, root), **options)
            said = run.err.read_text()
            published = assert_nothing_wrong(root, wanted.files)
            if code == 0:
                fitted += 1
                assert published
            else:
                assert code == 6 and "Traceback" not in said, said
                if "cannot hold the output" in said:
                    refused += 1
                    assert not root.exists() or not os.listdir(root)
                else:
                    full += 1
                    later += bool(run.events()) and any(event["event"] == "progress" for event in run.events())
                    assert "the disk is full" in said and "--resume" in said, said
            remount(disk, ROOM)
            code, run = zygote.run(command(job, model, root, "--resume"))
            assert code == 0, run.err.read_text()
            assert tree_digest(root) == wanted.digest
            shutil.rmtree(root)
    assert refused >= 10 and full >= 20 and fitted >= 1, (refused, full, fitted)
    print(f"proof: {job}: 50 disks, {refused} refused by the plan, {full} filled up, {fitted} were large enough")


@pytest.mark.parametrize("job", JOBS)
def test_another_writer_fills_the_disk(job: str, zygote: Zygote, model: Path, clean: Mapping[str, Clean], tmp_path: Path) -> None:
    """The plan fits when it begins; then something else takes the room, before or after the files are reserved."""
    wanted, random_, full = clean[job], random.Random(job), 0
    whole = sum(len(data) for data in wanted.files.values())
    with tmpfs(tmp_path / "disk", 256 << 20) as disk:
        for number in range(12):
            remount(disk, f"size={int(whole * 1.02) + (2 << 20)}")
            root, other = disk / "out", disk / "other"
            run = zygote.start(command(job, model, root), started=str(tmp_path / "started"), no_reserve=number % 2 == 0)
            run.wait_for('"event":"start"')
            with open(other, "wb", buffering=0) as file:
                try:
                    for _ in range(random_.randrange(1, 400)):
                        file.write(bytes(64 << 10))
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    pass
            code = run.wait()
            said = run.err.read_text()
            assert assert_nothing_wrong(root, wanted.files) == (code == 0) or code == 6
            assert code in (0, 6), said
            if code == 6:
                full += 1
                assert "the disk is full" in said and "--resume" in said, said
            other.unlink()
            code, run = zygote.run(command(job, model, root, "--resume"))
            assert code == 0, run.err.read_text()
            assert tree_digest(root) == wanted.digest
            shutil.rmtree(root)
    assert full >= 3, full
    print(f"proof: {job}: 12 runs beside another writer, {full} met a full disk")


def test_a_plan_that_cannot_fit_is_refused_and_leaves_nothing(zygote: Zygote, model: Path, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", 1 << 20) as disk:
        code, run = zygote.run(command("convert", model, disk / "deep" / "out"))
        assert code == 6 and "the disk cannot hold the output" in run.err.read_text()
        assert os.listdir(disk) == []
        assert run.events()[-1]["problems"][0]["exit_code"] == 6


def test_a_refused_overwrite_leaves_nothing_beside(zygote: Zygote, model: Path, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", 64 << 20) as disk:
        root = disk / "out"
        assert zygote.run(command("convert", model, root))[0] == 0
        before = tree_digest(root)
        remount(disk, "size=10m")
        code, run = zygote.run(command("convert", model, root, "--tp", "1", "--overwrite"))
        assert code == 6 and "nothing was written" in run.err.read_text()
        assert os.listdir(disk) == ["out"] and tree_digest(root) == before


@pytest.mark.parametrize("moment", ["before", "unfinished", "finished"])
def test_a_read_only_disk(moment: str, zygote: Zygote, model: Path, clean: Mapping[str, Clean], tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", 64 << 20) as disk:
        root = disk / "out"
        if moment == "unfinished":
            assert zygote.run(command("convert", model, root), failpoint=["unit-journaled", 20])[0] == -9
        elif moment == "finished":
            assert zygote.run(command("convert", model, root))[0] == 0
        remount(disk, "ro")
        code, run = zygote.run(command("convert", model, root, "--resume"))
        said = run.err.read_text()
        if moment == "finished":  # it is only checked
            assert code == 0, said
        else:
            assert code == 6 and "read-only" in said and "Traceback" not in said, said
        remount(disk, "rw")
        assert zygote.run(command("convert", model, root, "--resume"))[0] == 0
        assert tree_digest(root) == clean["convert"].digest


def test_folders_that_another_user_owns(zygote: Zygote, model: Path) -> None:
    """As a user without rights: output below a folder that is not writable, not searchable, or not readable."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory(prefix="mxconv-other-") as name:
        top = Path(name)
        os.chmod(top, 0o755)
        shutil.copytree(model, top / "model")
        for mode in (0o555, 0o700, 0o711, 0o744):
            folder = top / f"{mode:o}"
            (folder / "out").mkdir(parents=True)
            os.chmod(folder / "out", 0o700)
            os.chmod(folder, mode)
            for output in (folder / "new", folder / "out", folder / "out" / "deep"):
                code, run = zygote.run(["convert", str(top / "model"), str(output), "--json"], user=65534)
                said = run.err.read_text()
                assert code == 6 and "permission" in said and "Traceback" not in said, (oct(mode), output, said)
