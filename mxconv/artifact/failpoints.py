"""Named places where a run can be made to die, so that crash safety is tested at every step and not only at random moments.

`MXCONV_FAILPOINT=name` kills the process (SIGKILL, no clean-up of any kind) when the step `name` is reached, `name:n` when it is
reached for the n-th time. Without the variable a failpoint costs a comparison.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

from mxconv.errors import UsageError

VARIABLE = "MXCONV_FAILPOINT"

# In the order in which a run reaches them.
NAMES = (
    "journal-created",
    "part-created",
    "region-written",
    "unit-journaled",
    "header-written",
    "header-synced",
    "length-written",
    "length-synced",
    "part-linked",
    "part-unlinked",
    "file-recorded",
    "small-written",
    "small-linked",
    "config-written",
    "config-linked",
    "manifest-written",
    "manifest-linked",
    "journal-removed",
    "old-aside",
    "new-in-place",
    "exchanged",
    "old-removed",
)

# Of these, what only a run with --overwrite reaches; the first two only where two names cannot be exchanged in one step.
REPLACING = ("old-aside", "new-in-place", "exchanged", "old-removed")
BY_RENAMES = REPLACING[:2]


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class _Armed:
    """The step that is armed, how often it must still be reached, and what happens then."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.name, self.left, self.action = "", 0, _kill
        text = os.environ.get(VARIABLE, "")
        if text:
            name, _, count = text.partition(":")
            self.set(name, int(count) if count.isdecimal() else 1, _kill)

    def set(self, name: str, count: int, action: Callable[[], None]) -> None:
        """Arm the `count`-th arrival at `name`; an empty name disarms."""
        self.name, self.left, self.action = name, count, action


_armed = _Armed()


def arm(name: str, count: int = 1, action: Callable[[], None] = _kill) -> None:
    """Let the `count`-th arrival at step `name` call `action` (by default: SIGKILL to this process)."""
    if name not in NAMES:
        raise UsageError(f"no failpoint has the name {name!r}", expected=" ".join(NAMES))
    _armed.set(name, count, action)


def disarm() -> None:
    """No step fails."""
    _armed.set("", 0, _kill)


def reach(name: str) -> None:
    """This step is done; die here when it is armed."""
    if not _armed.name:
        return
    if _armed.name not in NAMES:
        raise UsageError(f"{VARIABLE} names no failpoint", expected=" ".join(NAMES), got=_armed.name)
    if name != _armed.name:
        return
    with _armed.lock:
        _armed.left -= 1
        dies = _armed.left == 0
    if dies:
        _armed.action()
