"""Which process this is among several that run one command together: the variables that `torchrun` sets.

`torchrun` and `mxconv verify --processes N` start N processes with the same arguments. Each learns its place from RANK,
WORLD_SIZE and LOCAL_RANK, and where the others meet from MASTER_ADDR and MASTER_PORT. A shell may have some of these for reasons
of its own (Slurm, a pod of a cluster): only all five together make a member. Imports no torch: the command line asks here first.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass

from mxconv.errors import ResourceError, UsageError, printable

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""`True`: the launcher keeps the store where the processes meet, and it outlives every one of them; otherwise rank 0 keeps it."""
LAUNCHER = "MXCONV_LAUNCHER"
"""The pid of the `mxconv … --processes N` that started this process; not set by others."""
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """One process of `size`; `local_rank` counts those on its own machine."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    agent_store: bool = False
    launcher: int | None = None
    """The parent that waits for all of them and tells what became of whom; torchrun is none."""

    @property
    def follower(self) -> bool:
        """Another process speaks for this one."""
        return self.rank > 0

    def environment(self) -> dict[str, str]:
        """The variables that say this."""
        values = (self.rank, self.size, self.local_rank, self.address, self.port)
        launcher = {} if self.launcher is None else {LAUNCHER: str(self.launcher)}
        return {**dict(zip(VARIABLES, map(str, values), strict=True)), AGENT_STORE: str(self.agent_store), **launcher}

    def end_with_launcher(self) -> None:
        """Have the kernel kill this process as soon as its launcher is gone: while it imports, connects or is stopped, too.

        The kernel counts as parent the thread that started the process: the launcher's waits until all have ended.
        """
        if self.launcher is None:
            return
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != self.launcher:  # it was gone before
            os._exit(ResourceError.exit_code)


def read_membership(environ: Mapping[str, str]) -> Membership | None:
    """What `environ` says; None for a process of its own. Raises UsageError for numbers that contradict each other."""
    if not all(environ.get(name) for name in VARIABLES):
        return None
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", *({LAUNCHER} & environ.keys())):
        if not environ[name].isdecimal():
            raise UsageError(f"the variable {name} is no number", expected="what torchrun sets", got=printable(environ[name]))
        numbers[name] = int(environ[name])
    found = Membership(
        rank=numbers["RANK"], size=numbers["WORLD_SIZE"], local_rank=numbers["LOCAL_RANK"], address=environ["MASTER_ADDR"],
        port=numbers["MASTER_PORT"], agent_store=environ.get(AGENT_STORE) == "True",
        launcher=numbers.get(LAUNCHER),
    )  # fmt: skip
    if not found.rank < found.size or found.local_rank > found.rank:
        raise UsageError(
            "the variables of torchrun contradict each other", expected="LOCAL_RANK <= RANK < WORLD_SIZE",
            got=f"LOCAL_RANK {found.local_rank}, RANK {found.rank}, WORLD_SIZE {found.size}",
        )  # fmt: skip
    return found
