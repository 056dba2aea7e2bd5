"""A real group of processes over gloo in which tests run their own functions.

    found = in_processes(4, f, arguments)      # [what f(world, *arguments) gave in rank 0, in rank 1 …]

`f` is a function of a test module, so that the members can import it; starting them costs seconds, so that one call does much.
Who takes longer than `seconds` hangs.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent


def in_processes(count: int, function: Callable[..., Any], *arguments: Any, seconds: float = 600, device: str = "cpu") -> list[Any]:
    """Call `function(world, *arguments)` in `count` processes; what each gave. Raises AssertionError with their stderr."""
    from mxconv.membership import Membership
    from mxconv.runtime.watch import open_store

    _store, port = open_store()
    with TemporaryDirectory() as folder:
        Path(folder, "job").write_bytes(pickle.dumps((function.__module__, function.__qualname__, arguments, device)))
        members = []
        for rank in range(count):
            place = Membership(rank=rank, size=count, local_rank=rank, address="127.0.0.1", port=port, agent_store=True)
            environment = {**os.environ, **place.environment(), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "tests.members", folder]
            members.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        try:
            words = [member.communicate(timeout=seconds)[1] for member in members]
        finally:
            for member in members:
                member.kill()
        assert [member.returncode for member in members] == [0] * count, "\n".join(words)
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(count)]


def need_gpus(count: int) -> None:
    """Skip the test where there are fewer."""
    import pytest
    import torch

    if torch.cuda.device_count() < count:
        pytest.skip(f"{count} GPUs are needed")


def _member(folder: str) -> None:
    import importlib

    import torch

    from mxconv.membership import read_membership
    from mxconv.runtime.processes import joined

    torch.set_num_threads(1)
    module, name, arguments, device = pickle.loads(Path(folder, "job").read_bytes())
    function = getattr(importlib.import_module(module), name)
    place = read_membership(os.environ)
    assert place is not None
    with joined(place, device, _speak, lambda: None) as world:
        found = function(world, *arguments)
    Path(folder, str(place.rank)).write_bytes(pickle.dumps(found))


def _speak(error: Exception, trace: str) -> None:
    sys.stderr.write(f"{trace}{error}\n")


if __name__ == "__main__":
    _member(sys.argv[1])
