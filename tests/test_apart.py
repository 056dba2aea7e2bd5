"""Work on a thread of its own: its outcome, and that nobody waits for it after an interruption."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from mxconv.apart import left_behind, run_apart


class _Ended(Exception):
    pass


def test_result_and_failure_come_back() -> None:
    assert run_apart(lambda wanted: 7) == 7
    with pytest.raises(ZeroDivisionError):
        run_apart(lambda wanted: 1 // 0)
    assert not left_behind()


@pytest.mark.parametrize("how", ["check", "SIGINT"])
def test_it_is_left_at_once_and_ends_when_it_asks(how: str) -> None:
    go, ended = threading.Event(), threading.Event()

    def work(wanted: Callable[[], None]) -> None:
        if how == "SIGINT":
            os.kill(os.getpid(), signal.SIGINT)
        go.wait(30)  # as a matrix product, it asks nobody
        try:
            wanted()
        finally:
            ended.set()

    def check() -> None:
        if how == "check":
            raise _Ended

    began = time.monotonic()
    with pytest.raises((_Ended, KeyboardInterrupt)):
        run_apart(work, check)
    assert time.monotonic() - began < 5 and left_behind() and not ended.is_set()
    go.set()
    assert ended.wait(5)
    for _ in range(100):
        if not left_behind():
            return
        time.sleep(0.01)
    pytest.fail("the work went on")
