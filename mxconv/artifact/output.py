"""Where a run may write: the rules for an output folder that exists already, its lock, and the exchange that replaces it.

| the folder          | nothing asked | `--resume`                              | `--overwrite`                        |
|---------------------|---------------|-----------------------------------------|--------------------------------------|
| absent or empty     | a new run     | a new run                               | a new run                            |
| an unfinished run   | 5             | goes on; 5 when it is of another plan   | built beside, exchanged at the end   |
| a finished artifact | 5             | is checked; 5 when it is of another plan| built beside, exchanged at the end   |
| anything else       | 5             | 5                                       | built beside; the old folder is kept |
| a run at work       | 5             | 5                                       | 5                                    |

`--overwrite --resume` goes on with a build beside it that was interrupted. A folder in which one file is not mxconv's own is kept
as well (`artifact.disposal`); one of another run is not resumed into (`ArtifactWriter`).
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from mxconv.artifact.disposal import dispose
from mxconv.artifact.failpoints import reach
from mxconv.artifact.journal import busy, held, read_remains
from mxconv.artifact.leftovers import leftovers, other_builds
from mxconv.artifact.manifest import SCHEMA, Manifest, read_manifest
from mxconv.artifact.names import ASIDE_SUFFIX, JOURNAL_NAME, MANIFEST_NAME, RUN_LOG_NAME, beside_path
from mxconv.artifact.system import exchange, sync_directory, try_lock, writing
from mxconv.errors import MxconvError, OutputConflict
from mxconv.jsonfiles import read_regular
from mxconv.progress import SILENT, Progress

State = Literal["empty", "unfinished", "finished", "other"]

# What to say of a folder that is taken, and what to do.
_TAKEN: Mapping[State, tuple[str, str]] = {
    "finished": ("a finished artifact is there already", "--resume checks it, --overwrite replaces it"),
    "unfinished": ("an unfinished run is there", "--resume goes on with it, --overwrite replaces it"),
    "other": ("the output folder is not empty", "choose another folder, or --overwrite (the old one is kept beside it)"),
}


def state_of(folder: Path) -> State:
    """What lies in an output folder, by what it says of itself; a folder that is absent is empty."""
    try:
        names = set(os.listdir(folder))
        log = folder / RUN_LOG_NAME
        if RUN_LOG_NAME in names and stat.S_ISREG(os.lstat(log).st_mode):
            names.remove(RUN_LOG_NAME)
    except FileNotFoundError:
        return "empty"
    except NotADirectoryError:
        return "other"
    if not names:
        return "empty"
    if MANIFEST_NAME in names:
        return "finished" if _is_manifest(folder / MANIFEST_NAME) else "other"
    return "unfinished" if JOURNAL_NAME in names else "other"


def _is_manifest(path: Path) -> bool:
    """Whether a file is a manifest of any version of mxconv's, damaged or not: many tools have a manifest.json."""
    try:
        return f'"{SCHEMA.partition("/")[0]}/'.encode() in read_regular(path)
    except MxconvError:
        return False


class Output:
    """The output folder of one run, locked; a context manager.

    `work` is where files are written: `root` itself, or the folder beside it that will replace it. Both are locked to the end.
    `finished` is the manifest when the artifact of this very plan is there already: it is to be checked, and nothing is to be
    written.
    """

    def __init__(self, root: Path, work: Path, plan_digest: str, progress: Progress) -> None:
        self.root, self.work, self.plan_digest = root, work, plan_digest
        self.finished: Manifest | None = None
        self._progress = progress
        self._locks: dict[Path, int] = {}
        self._made = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Unlock; a folder that was made for this run and got no file, since the run was refused, goes again."""
        if self._made:
            with contextlib.suppress(OSError):
                self.work.rmdir()
        for path in list(self._locks):
            self.release(path)

    def lock(self) -> None:
        """Lock the folder that is to be replaced and the one that is written to; OutputConflict when another run holds one."""
        if self.work != self.root:
            self.hold(self.root)
        self.make()

    def make(self) -> None:
        """Create and lock the folder that is written to."""
        with writing(self.work):
            if not self.work.exists():
                self.work.mkdir(parents=True, exist_ok=True)
                self._made = True
                sync_directory(self.work.parent)
        self.hold(self.work)

    def hold(self, path: Path) -> None:
        """Lock a folder. Raises OutputConflict when another run holds it."""
        with writing(path):
            fd = self._locks[path] = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        taken = try_lock(fd)
        if taken is None:
            self._progress.note(f"{path}: this filesystem cannot lock folders; only the journal is locked")
            taken = not held(path)
        if not taken or os.fstat(fd).st_ino != _inode(path):
            raise busy(path)

    def release(self, path: Path) -> None:
        """Unlock a folder."""
        os.close(self._locks.pop(path))

    def replace_old(self) -> None:
        """Exchange the finished build with the folder that it replaces, and remove that one if mxconv made all of it."""
        if self.work == self.root:
            return
        with writing(self.root):
            if not exchange(self.work, self.root):
                _rename_twice(self.work, self.root)
            sync_directory(self.root.parent)
        reach("exchanged")
        dispose(self.work, self.root, self._progress)
        reach("old-removed")


def _inode(path: Path) -> int:
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return -1


def _rename_twice(new: Path, root: Path) -> None:
    # for filesystems without an atomic exchange; a crash in between leaves no root, and the next run finds the build beside it
    aside = new.with_suffix(ASIDE_SUFFIX)
    os.rename(root, aside)
    reach("old-aside")
    os.rename(new, root)
    reach("new-in-place")
    os.rename(aside, new)


def open_output(
    root: Path, *, plan_digest: str, resume: bool = False, overwrite: bool = False, progress: Progress = SILENT
) -> Output:
    """Lock and prepare the output folder `root` by the rules above.

    Raises OutputConflict when the folder is taken, ResourceError when it cannot be written, IntegrityError when the manifest of
    the artifact that is to be resumed was changed.
    """
    root = Path(os.path.realpath(root))
    with writing(root):
        if root.exists() and not root.is_dir():
            raise OutputConflict("the output path is a file", where=root, hint="choose a folder")
        beside = beside_path(root, plan_digest)
        _recover_rename(root, beside)
        for build in other_builds(root, plan_digest):
            progress.note(f"{build}: left by an interrupted --overwrite with other settings; remove it unless that is to go on")
        state = state_of(root)
        in_place = state == "empty" or not overwrite or (resume and _plan_of(root, state) == plan_digest)
        if in_place:
            _refuse(root, state, resume)
    output = Output(root, root if in_place else beside, plan_digest, progress)
    try:
        output.lock()
        if in_place:
            _prepare_root(output, resume, progress)
        else:
            _prepare_beside(output, resume, progress)
    except BaseException:
        output.close()
        raise
    return output


def _recover_rename(root: Path, beside: Path) -> None:
    """After a crash inside `_rename_twice`: the new artifact gets its name, what it replaced is put where it is disposed of."""
    aside = beside.with_suffix(ASIDE_SUFFIX)
    if not aside.exists():
        return
    with writing(root):
        fd = os.open(aside, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if try_lock(fd) is False:  # its run is no victim of a crash but amid the exchange
                raise busy(root)
            if not root.exists():
                os.rename(beside if state_of(beside) == "finished" else aside, root)
            if aside.exists() and not beside.exists():
                os.rename(aside, beside)
        finally:
            os.close(fd)


def _plan_of(folder: Path, state: State) -> str | None:
    """The plan that a folder's manifest or journal names, None when it names none that can be read."""
    if state != "finished":
        remains = read_remains(folder)
        return None if remains is None else remains.plan
    try:
        return read_manifest(folder).plan_digest
    except MxconvError:
        return None


def _refuse(root: Path, state: State, resume: bool) -> None:
    if state == "empty" or (resume and state != "other"):
        return
    what, hint = _TAKEN[state]
    raise OutputConflict(what, where=root, hint=hint)


def _prepare_root(output: Output, resume: bool, progress: Progress) -> None:
    state = state_of(output.root)  # again, now that nobody else can change it
    _refuse(output.root, state, resume)
    if state != "finished":
        return
    manifest = read_manifest(output.root)
    if manifest.plan_digest != output.plan_digest:
        raise OutputConflict(
            "the finished artifact there is of another plan", where=output.root, expected=f"plan {output.plan_digest}",
            got=f"plan {manifest.plan_digest}", hint="choose another folder, or --overwrite",
        )  # fmt: skip
    _finish(output, manifest)
    beside = beside_path(output.root, output.plan_digest)
    if beside.exists():  # left by a run that was killed between exchange and removal, unless one is at work there
        output.hold(beside)
        dispose(beside, output.root, progress)


def _prepare_beside(output: Output, resume: bool, progress: Progress) -> None:
    state = state_of(output.work)
    if resume and state == "finished" and _plan_of(output.work, state) == output.plan_digest:
        _finish(output, read_manifest(output.work))
        output.replace_old()
    elif state != "empty" and not (resume and state == "unfinished"):
        dispose(output.work, output.root, progress)
        output.release(output.work)
        output.make()


def _finish(output: Output, manifest: Manifest) -> None:
    """The artifact is complete; a run that was killed right after its manifest left a part and its journal."""
    with writing(output.work):
        for path in leftovers(output.work, manifest):
            (output.work / path).unlink(missing_ok=True)
    output.finished = manifest
