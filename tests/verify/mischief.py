"""The command line in one of several processes that comes to grief on the way: `mischief.py KIND RANK [verify …]`.

Run by hand (or by a test) with `--processes N` it starts N of itself; under `torchrun` it is one of them. Rank RANK comes to grief
in its second layer, and says when in the file MISCHIEF_AT; every process writes its pid into the folder MISCHIEF_PIDS.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from mxconv.cli import main
from mxconv.commands import together
from mxconv.errors import ResourceError


def _raise() -> None:
    raise ResourceError("the disk gave out", where="shard 3")


def _bug() -> None:
    raise KeyError("a key that nobody has")


KINDS: Mapping[str, Callable[[], object]] = {
    "raise": _raise,
    "bug": _bug,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segv": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(1000),
    "slow": lambda: time.sleep(2),
    "none": lambda: None,
}


def patch(kind: str, rank: int) -> None:
    """Let grief come in the second layer of `rank`."""
    import torch

    from mxconv.verify import streams

    torch.set_num_threads(1)
    own = os.environ["RANK"]
    Path(os.environ["MISCHIEF_PIDS"], own).write_text(str(os.getpid()))
    advance = streams._Running.advance

    def grieved(self: Any, lanes: Any, number: int) -> None:
        if number == 1 and (kind == "slow" or own == str(rank)):
            Path(os.environ["MISCHIEF_AT"]).write_text(str(time.monotonic()))
            KINDS[kind]()
        advance(self, lanes, number)

    streams._Running.advance = grieved  # type: ignore[method-assign]


if __name__ == "__main__":
    kind, rank, *arguments = sys.argv[1:]
    if "RANK" in os.environ:
        original = together.together

        def joined(*arguments: Any) -> Any:
            """Not earlier: the command itself begins without torch."""
            patch(kind, int(rank))
            return original(*arguments)

        together.together = joined  # type: ignore[assignment]
    together.COMMAND = (sys.executable, __file__, kind, rank)
    main(arguments)
