"""Run command lines under an audit hook and print, as JSON, everything that they were not allowed to do.

    python -m tests.faults.audited SPEC.json

SPEC: {"jobs": [[argument, …], …], "source": folder, "write": [folders that may be written], "marker": text that only the source
holds}. One list a job comes back: {"code": exit code, "violations": [[event, what], …], "events": how many were looked at}.

Reading is allowed in the source, the folders that may be written, the package, the Python installation and what the system's
loader needs; writing only in the latter's first. Sockets, processes, unpickled classes, compiled text that came out of the source
and code objects from it are allowed nowhere.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.conftest import REPOSITORY

# Any of these is one too many. `pickle.find_class` is what unpickling a class or function raises.
FORBIDDEN = (
    "pickle.find_class", "socket.", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile",
    "marshal.loads.source", "urllib.Request", "http.client", "ftplib", "smtplib", "webbrowser", "shutil.unpack_archive",
)  # fmt: skip
# Of the system: shared libraries and their cache, processor and memory facts, time zones, terminal descriptions.
SYSTEM = ("/lib", "/lib64", "/usr", "/proc", "/sys", "/etc/ld.so", "/etc/localtime", "/etc/nsswitch.conf", "/dev/urandom")
# Events that change names or modes, and how many of their arguments are paths.
CHANGES = {
    "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.truncate": 1, "os.chmod": 1,
}  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """The hook: it cannot be taken out again, so it is told when to look."""

    def __init__(self, source: str, write: list[str], marker: str) -> None:
        self.source, self.marker = os.path.realpath(source), marker
        self.write = tuple(map(os.path.realpath, write))
        installed = {sys.prefix, sys.base_prefix, sys.exec_prefix, *(path for path in sys.path if path)}
        self.read = (self.source, *self.write, os.path.realpath(REPOSITORY), *map(os.path.realpath, installed), *SYSTEM)
        self.on = self.inside = False
        self.seen = 0
        self.violations: list[tuple[str, str]] = []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on or self.inside:
            return
        self.inside = True  # looking must not be looked at
        try:
            self.seen += 1
            self.look(event, args)
        finally:
            self.inside = False

    def look(self, event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN) and event != "socket.gethostname":  # a system call, which run.log records; no socket
            self.violations.append((event, repr(args)[:300]))
        elif event == "open":
            self.opened(*args[:3])
        elif event in CHANGES:
            for path in args[: CHANGES[event]]:
                self.changed(event, path)
        elif event == "compile":
            text = args[0].decode("utf-8", "replace") if isinstance(args[0], bytes) else str(args[0] or "")
            if self.marker in text or self.within(args[1], (self.source, *self.write)):
                self.violations.append((event, f"{args[1]!r}: {text[:80]!r}"))
        elif event == "exec":
            code = args[0]
            constants = repr(getattr(code, "co_consts", ""))
            if self.marker in constants or self.within(getattr(code, "co_filename", ""), (self.source, *self.write)):
                self.violations.append((event, repr(code)))
        elif event == "import" and self.within(args[1], (self.source, *self.write)):
            self.violations.append((event, repr(args[:2])))

    def opened(self, path: Any, mode: Any, flags: Any) -> None:
        if isinstance(path, int):
            return
        writing = bool((flags or 0) & WRITING) or (isinstance(mode, str) and any(c in mode for c in "wax+"))
        if not self.within(path, self.write if writing else self.read) and os.fsdecode(path) != "/dev/null":
            self.violations.append(("open for writing" if writing else "open", f"{os.fsdecode(path)} ({mode}, {flags})"))

    def changed(self, event: str, path: Any) -> None:
        if not isinstance(path, int) and not self.within(path, self.write):
            self.violations.append((event, repr(path)))

    def within(self, path: Any, folders: tuple[str, ...]) -> bool:
        if not isinstance(path, str | bytes | os.PathLike) or not os.fspath(path):
            return False
        # The folder is resolved, the last name is not: what a link itself says is looked at when it is followed.
        real = os.path.realpath(os.fsdecode(path))
        return any(real == folder or real.startswith(f"{folder}/") for folder in folders)


def job(arguments: list[str], watch: Watch) -> dict[str, Any]:
    """One command line; the hook looks only while it runs."""
    from mxconv.cli import main

    watch.violations, watch.seen = [], 0
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        watch.on = True
        try:
            main(arguments)
        except SystemExit as done:
            code = done.code
        finally:
            watch.on = False
    return {"code": code, "violations": watch.violations, "events": watch.seen, "said": (out.getvalue() + err.getvalue())[-600:]}


def run(spec: Path) -> None:
    """All jobs of a spec, in order."""
    asked = json.loads(spec.read_text())
    watch = Watch(asked["source"], asked["write"], asked["marker"])
    sys.addaudithook(watch)
    json.dump([job(arguments, watch) for arguments in asked["jobs"]], sys.stdout)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
