"""kill -9 at every named step and at random moments: nothing wrong under a final name, and a resume gives the clean run's bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mxconv.artifact import check_folder, failpoints, output, tree_digest
from mxconv.artifact.names import part_path
from mxconv.errors import IntegrityError, MxconvError
from tests.artifact import sample

PUBLISHED = ("manifest-linked", "journal-removed", *failpoints.REPLACING)


def in_child(work: Callable[[], object], *, kill_after: float | None = None) -> int:
    """Run `work` in a forked child; its wait status. The child dies by a failpoint, by SIGKILL after some seconds, or ends well."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def die_at(name: str, count: int, root: Path, **options: bool) -> int:
    def work() -> None:
        failpoints.arm(name, count)
        if name in failpoints.BY_RENAMES:
            output.exchange = lambda a, b: False
        sample.run(root, **options)

    return in_child(work)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("clean") / "out"
    sample.run(root)
    return tree_digest(root)


STEPS = [(name, count) for name in failpoints.NAMES for count in (1, 3) if name not in failpoints.REPLACING]
LINKED = [(name, count) for name in ("part-linked", "part-unlinked") for count in (5, 8, 9, 10)]  # the tenth is the manifest


@pytest.mark.parametrize(("name", "count"), STEPS + LINKED)
def test_killed_at_every_step_then_resumed(name: str, count: int, tmp_path: Path, clean: str) -> None:
    root = tmp_path / "out"
    status = die_at(name, count, root)
    once = name.startswith(("config", "manifest", "journal"))
    if count > 1 and once:
        assert status == 0 and tree_digest(root) == clean
        return
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    published = name in PUBLISHED or count == 10
    sample.assert_nothing_wrong(root, published=published)
    assert not published or not check_folder(root).problems
    committed = sum(b'"kind":"unit"' in line for line in journal_lines(root))
    _, computed = sample.run(root, resume=True)
    assert tree_digest(root) == clean
    assert len(computed) == (0 if published else len(sample.units()) - committed)


def journal_lines(root: Path) -> list[bytes]:
    path = root / ".mxconv.journal"
    return path.read_bytes().splitlines() if path.exists() else []


@pytest.mark.parametrize("name", failpoints.NAMES)
@pytest.mark.parametrize("again", ["resume", "overwrite", "both"])
def test_killed_while_overwriting(name: str, again: str, tmp_path: Path, clean: str) -> None:
    root = tmp_path / "out"
    sample.run(root, plan=sample.OTHER_PLAN)
    before = tree_digest(root)
    status = die_at(name, 1, root, overwrite=True)
    assert os.WIFSIGNALED(status)
    exchanged = name in failpoints.REPLACING
    if not exchanged:
        assert tree_digest(root) == before  # the old artifact is untouched until the exchange
    if again == "resume" and not exchanged:
        with pytest.raises(MxconvError) as raised:
            sample.run(root, resume=True)
        assert raised.value.exit_code == 5 and tree_digest(root) == before
        return
    _, computed = sample.run(root, resume=again != "overwrite", overwrite=again != "resume")
    assert tree_digest(root) == clean and os.listdir(tmp_path) == ["out"]
    if again == "overwrite":
        assert set(computed) == set(sample.units())


@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=pytest.mark.thorough)])
def test_killed_at_random_moments(kills: int, tmp_path: Path, clean: str) -> None:
    random_ = random.Random(2)
    root = tmp_path / "out"
    rounds = died = 0
    while died < kills:
        rounds += 1
        status = in_child(
            lambda: sample.run(root, resume=True, on_unit=lambda _: time.sleep(0.004)), kill_after=random_.uniform(0.0, 0.15)
        )
        died += os.WIFSIGNALED(status)
        sample.assert_nothing_wrong(root, published=(root / "manifest.json").exists())
        if (root / "manifest.json").exists():
            sample.run(root, resume=True)
            assert tree_digest(root) == clean
            shutil.rmtree(root)
    sample.run(root, resume=True)
    assert tree_digest(root) == clean
    print(f"proof: {died} kills of the writer, none lost a byte")


def crash_after(root: Path, units: int) -> None:
    """An unfinished run with `units` units committed."""
    status = die_at("unit-journaled", units, root)
    assert os.WIFSIGNALED(status)


def test_a_resume_redoes_only_what_is_not_on_the_disk(tmp_path: Path, clean: str) -> None:
    root = tmp_path / "out"
    crash_after(root, 11)
    part = next(root.glob("rank1/.model-00001*.part"))
    with open(part, "r+b") as file:  # a byte of rank 1's embed.0 and of nothing else
        file.seek(sample.files()[2].offsets["embed"])
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 255]))
    _, computed = sample.run(root, resume=True)
    assert "embed.0" in computed and len(computed) == len(sample.units()) - 11 + 1
    assert tree_digest(root) == clean


@pytest.mark.parametrize("damage", ["cut", "removed", "flipped line"])
def test_a_damaged_journal_is_cut_and_the_rest_is_done_again(damage: str, tmp_path: Path, clean: str) -> None:
    root = tmp_path / "out"
    crash_after(root, 6)
    journal = root / ".mxconv.journal"
    raw = journal.read_bytes()
    if damage == "cut":
        journal.write_bytes(raw[:-9])
    elif damage == "removed":
        journal.write_bytes(b"")
    else:
        at = raw.index(b'"unit"', raw.index(b"\n", len(raw) // 2))
        journal.write_bytes(raw[:at] + b"?" + raw[at + 1 :])
    _, computed = sample.run(root, resume=True)
    assert len(computed) > len(sample.units()) - 6 and tree_digest(root) == clean


@pytest.mark.parametrize("damage", ["flip", "cut", "header", "replaced by a link"])
def test_a_damaged_finished_file_goes_back_into_the_making(damage: str, tmp_path: Path, clean: str) -> None:
    root = tmp_path / "out"
    status = die_at("file-recorded", 4, root)
    assert os.WIFSIGNALED(status)
    path = root / sample.files()[0].path
    raw = bytearray(path.read_bytes())
    at = {"flip": sample.files()[0].offsets["l2.codes"], "header": 20}.get(damage)
    if at is not None:
        raw[at] ^= 4
        path.write_bytes(raw)
    elif damage == "cut":
        path.write_bytes(raw[:-50])
    else:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(MxconvError) as raised:
            sample.run(root, resume=True)
        assert raised.value.exit_code == 5
        assert (tmp_path / "elsewhere").read_bytes() == raw
        return
    _, computed = sample.run(root, resume=True)
    assert tree_digest(root) == clean
    assert len(computed) == {"flip": 1, "header": 0}.get(damage, len(computed)) and (damage == "header" or computed)


def test_a_redone_unit_that_differs_from_a_finished_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0's file stands, rank 1's is damaged: the unit runs again, and must give rank 0 the bytes that stand there."""
    root = tmp_path / "out"
    die_at("file-recorded", 4, root)
    path = root / sample.files()[2].path
    raw = bytearray(path.read_bytes())
    raw[sample.files()[2].offsets["l2.codes"]] ^= 1
    path.write_bytes(raw)
    original = sample.region_bytes
    monkeypatch.setattr(sample, "region_bytes", lambda placed, region: original(placed, region) ^ 1)
    with pytest.raises(IntegrityError, match="came out otherwise"):
        sample.run(root, resume=True)


def test_a_source_that_changed_between_two_runs_is_refused(tmp_path: Path, clean: str) -> None:
    root = tmp_path / "out"

    def stop(unit: str) -> None:
        if unit == "layer.3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample.run(root, on_unit=stop, source={"model.safetensors": [10, 1, "ab"]})
    with pytest.raises(IntegrityError, match="source changed"):
        sample.run(root, resume=True, source={"model.safetensors": [10, 2, "ab"]})
    sample.run(root, resume=True, source={"model.safetensors": [10, 1, "ab"]})
    assert tree_digest(root) == clean


def test_an_unknown_failpoint_is_named() -> None:
    with pytest.raises(MxconvError, match="no-such-step"):
        failpoints.arm("no-such-step")
    failpoints.reach("journal-created")  # nothing is armed


@pytest.mark.parametrize(
    ("value", "code"), [("part-linked", -9), ("part-linked:2", -9), ("part-linked:3", 0), ("nonsense", 2), ("", 0)]
)
def test_the_environment_arms_a_failpoint(value: str, code: int) -> None:
    script = """
import sys
from mxconv.artifact.failpoints import reach
from mxconv.errors import MxconvError
try:
    reach("part-linked")
    reach("part-linked")
except MxconvError as error:
    sys.exit(error.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "MXCONV_FAILPOINT": value}, timeout=60, check=False)
    assert done.returncode == code


def test_a_part_that_goes_on_parses_no_more(tmp_path: Path) -> None:
    """Killed between length and link, then damaged: while the damaged unit is redone, the part must not look whole."""
    root = tmp_path / "out"
    assert os.WIFSIGNALED(die_at("length-synced", 1, root))
    part = next(part for part in root.rglob(".model*.part") if part.read_bytes()[:8] != bytes(8))
    number = next(
        i for i, file in enumerate(sample.files()) if part.parent == (root / file.path).parent and Path(file.path).name in part.name
    )
    with open(part, "r+b") as file:
        file.seek(sample.files()[number].offsets[f"l{number % 2}.codes"])
        file.write(b"damaged")
    heads: list[bytes] = []
    sample.run(root, resume=True, on_unit=lambda _: heads or heads.append(part.read_bytes()[:8]))
    assert heads == [bytes(8)]


def test_a_second_name_of_a_finished_file_goes(tmp_path: Path, clean: str) -> None:
    root = tmp_path / "out"
    assert os.WIFSIGNALED(die_at("file-recorded", 4, root))
    final = root / sample.files()[0].path
    os.link(final, part_path(final, sample.PLAN))
    _, computed = sample.run(root, resume=True)
    assert not computed and tree_digest(root) == clean


def test_small_files_of_a_killed_run_are_not_believed_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "out"
    assert os.WIFSIGNALED(die_at("config-linked", 1, root))
    (root / "tokenizer.json").write_bytes(sample.SIDECARS["tokenizer.json"][:5])
    monkeypatch.setattr(sample, "CONFIG", b'{"model_type": "minimax_m1", "mxconv": {"scheme": "w4a8"}}')
    sample.run(root, resume=True)
    assert (root / "tokenizer.json").read_bytes() == sample.SIDECARS["tokenizer.json"]
    assert (root / "config.json").read_bytes() == sample.CONFIG and not check_folder(root).problems
