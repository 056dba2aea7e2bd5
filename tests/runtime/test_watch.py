"""The first failure is known to all, whoever is killed while reporting one."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from mxconv.errors import MxconvError, ResourceError
from mxconv.membership import Membership
from mxconv.runtime.watch import Failure, Watch, known_failure, of_this_run, open_store, report, told


def failure(rank: int) -> Failure:
    return Failure(rank=rank, speaker=0, error=ResourceError(f"rank {rank} ended", where="ä\0\xff"), trace="t\n" * 3)


def another(port: int) -> Store:
    """Another process's connection to the store at `port`."""
    return of_this_run(TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=30), wait_for_workers=False))


def test_the_first_failure_is_everybodys() -> None:
    mine, port = open_store()
    theirs = another(port)
    assert known_failure(mine) is None and known_failure(theirs) is None and not told(mine)
    report(theirs, failure(3))
    report(mine, failure(0))
    report(theirs, failure(1))
    for store in (mine, theirs):
        found = known_failure(store)
        assert found is not None and found.rank == 3 and found.trace == "t\n" * 3
        assert isinstance(found.error, ResourceError) and found.error.render() == failure(3).error.render()


def test_failures_at_once_are_one() -> None:
    store, port = open_store()
    gate = threading.Barrier(6)

    def run(rank: int) -> None:
        own = another(port)
        gate.wait()
        report(own, failure(rank))
        seen.append(known_failure(own))

    seen: list[Failure | None] = []
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = known_failure(store)
    assert first is not None and [each and each.rank for each in seen] == [first.rank] * 6


class KilledAfter:
    """A store whose process is killed at its request number `requests` + 1."""

    def __init__(self, store: Store, requests: int) -> None:
        self._store, self._left = store, requests

    def __getattr__(self, name: str) -> Any:
        def request(*arguments: Any) -> Any:
            if not self._left:
                raise MxconvError("killed")
            self._left -= 1
            return getattr(self._store, name)(*arguments)

        return request


@pytest.mark.parametrize("requests", [0, 1])
def test_who_is_killed_while_reporting_keeps_nobody_from_it(requests: int) -> None:
    store, _port = open_store()
    with suppress(MxconvError):
        report(KilledAfter(store, requests), failure(1))  # type: ignore[arg-type]
    report(store, failure(2))
    found = known_failure(store)
    assert found is not None and found.rank == (1 if requests else 2)


def test_one_process_says_one_thing() -> None:
    """The main thread and the watch's own may come to it together: this one failed, and it speaks for another."""
    store, port = open_store()
    said: list[str] = []

    def speak(error: MxconvError, trace: str) -> None:
        said.append(error.what)
        time.sleep(0.05)

    place = Membership(rank=0, size=2, local_rank=0, address="127.0.0.1", port=port, agent_store=True)
    watch = Watch(store, place, speak, leave=lambda code: None)
    threads = [threading.Thread(target=watch.say, args=(failure(rank).error, "")) for rank in range(2)]
    threads.append(threading.Thread(target=watch._follow, args=(failure(1),)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 1 and told(store)
