"""Work that hears no signal for minutes, on a thread of its own, so that an interruption need not wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")
POLL_SECONDS = 0.05
_THREAD_NAME = "mxconv-apart"


class _Unwanted(Exception):
    """Nobody waits for this work any more."""


def run_apart(work: Callable[[Callable[[], None]], T], check: Callable[[], None] = lambda: None) -> T:
    """`work(wanted)` on another thread: its result, or its exception raised here.

    Python hands a signal to the main thread between two of its own steps, and one matrix product can take minutes. Here the
    main thread only waits: it takes a KeyboardInterrupt, or what `check` raises, at once. The work is then left behind. It ends
    when it next calls `wanted`; until then it may only read and compute, since nobody waits for it, and a process that is to
    end must not join it (`left_behind`).
    """
    outcome: Future[T] = Future()
    unwanted = threading.Event()

    def wanted() -> None:
        if unwanted.is_set():
            raise _Unwanted

    def run() -> None:
        try:
            outcome.set_result(work(wanted))
        except BaseException as error:  # raised again by result()
            outcome.set_exception(error)

    threading.Thread(target=run, name=_THREAD_NAME, daemon=True).start()
    try:
        while not wait([outcome], POLL_SECONDS).done:
            check()
    except BaseException:
        unwanted.set()
        raise
    return outcome.result()


def left_behind() -> bool:
    """Whether work that nobody waits for is still running: it may be inside a library that must not be torn down under it."""
    return any(thread.name == _THREAD_NAME for thread in threading.enumerate())
