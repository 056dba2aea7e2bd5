"""A process that has imported the product and forks one child a job, so that a campaign of kills does not spend its time importing.

Each child is a process of its own in a session of its own and runs the command line's entry with real standard streams. Requests
come as JSON lines on stdin: `argv`, `out` and `err` (files), and optionally `failpoint` [name, count], `started` (a file that gets
a line for each unit begun), `no_disk_check`, `no_reserve`, `no_exchange`, and `user` (whose rights it gets). The answers are the
child's pid and then its wait status.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any

PAUSE_SECONDS = 0.004  # before each traced unit, so that a small model is at work long enough to be met there


def _adjust(request: dict[str, Any]) -> None:
    from mxconv.artifact import failpoints, output, parts
    from mxconv.execute import run

    if request.get("failpoint"):
        failpoints.arm(*request["failpoint"])
    if request.get("no_disk_check"):
        run.require_disk = lambda plan, root: None
    if request.get("no_reserve"):
        parts.fallocate = os.ftruncate
    if request.get("no_exchange"):
        output.exchange = lambda a, b: False
    if request.get("started"):
        log = os.open(request["started"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        run_unit = run._run_unit

        def traced(unit: Any, *rest: Any) -> None:
            os.write(log, f"{unit.id}\n".encode())
            time.sleep(PAUSE_SECONDS)
            run_unit(unit, *rest)

        run._run_unit = traced


def _child(request: dict[str, Any]) -> None:
    os.setsid()
    for number, path in ((1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
    status = 70
    try:
        from mxconv.cli import main

        _adjust(request)
        if request.get("user"):
            os.setgroups([])
            os.setgid(request["user"])
            os.setuid(request["user"])
        main(request["argv"])
    except SystemExit as done:
        status = done.code if isinstance(done.code, int) else 70
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Serve requests until stdin ends."""
    import torch

    import mxconv.commands.convert
    import mxconv.commands.quantize
    import mxconv.execute.encoding  # noqa: F401

    torch.set_num_threads(1)
    print(os.getpid(), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _child(request)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
