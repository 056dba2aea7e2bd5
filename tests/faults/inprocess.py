"""The command line without a process: `run(*arguments)` gives exit code, stdout and stderr of a command in this one."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

from mxconv.cli import main


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


def run(*arguments: object) -> Result:
    """Run `mxconv arguments…` here; an exception that is no SystemExit is a bug and goes through."""
    out, err = io.StringIO(), io.StringIO()
    code: object = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as done:
            code = done.code
    return Result(code=code if isinstance(code, int) else 0, out=out.getvalue(), err=err.getvalue())
