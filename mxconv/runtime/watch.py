"""A thread in each of several processes that sees when another fails, dies or hangs, and ends its own, saying why.

The main thread cannot: it may wait inside a collective that never returns. All that is known stands in a store that the launcher
keeps (or rank 0, without one), under

    alive/R     a counter that rank R raises while it lives
    who/R       its machine and pid, for a look at /proc
    done/R      above 0 after a good end
    failed      the first failure: rank, error, who is to say it
    told        there when it has been said

A peer on this machine that is gone is seen within a second, one that does not answer (stopped, another machine lost) after
`LOST_SECONDS`. A process that neither computes nor reads for `IDLE_SECONDS`, nor waits for another, gives itself up. One that
spins for ever cannot be told from one that computes; the group's own timeout ends that.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # exported, and not said so

from mxconv.errors import EXIT_SIGINT, EXIT_SIGTERM, Interrupted, MxconvError, ResourceError
from mxconv.membership import Membership

TICK_SECONDS = 0.5
LOST_SECONDS = 15.0
IDLE_SECONDS = 20.0
APPEAR_SECONDS = 120.0
"""A peer may take this long to start: importing torch on a slow disk, another machine."""
TOLD_SECONDS = 3.0
SIGNAL_SECONDS = 2.0
"""What a signal leaves the main thread to end by itself."""
IDLE_SHARE = 0.02
"""CPU time over wall time below which a process does nothing; this thread itself takes a fifth of it."""
PAUSE_SECONDS = 5.0
"""A gap between two ticks that says this process itself was stopped: then nobody else is to blame."""

LAUNCHER = -1
"""The speaker of a failure that `mxconv … --processes N` tells itself, having the signal that ended its process."""

Speak = Callable[[MxconvError, str], None]
"""speak(error, traceback or ""): tell the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why all must end; `rank` failed, `speaker` says so. `code` is everybody's exit code."""

    rank: int
    speaker: int
    error: MxconvError
    trace: str = ""

    @property
    def code(self) -> int:
        """The exit code of every process."""
        return self.error.exit_code


def open_store() -> tuple[Store, int]:
    """A launcher's store on this machine, and the port where its processes find it."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return of_this_run(store), store.port


def of_this_run(store: Store) -> Store:
    """The part of `store` that is for these processes; torchrun starts again in the same store after a failure."""
    return PrefixStore(f"mxconv/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def report(store: Store, failure: Failure) -> None:
    """Make `failure` known, unless there is one already: in one request, so that a process killed here keeps nobody from it."""
    store.compare_set("failed", "", pickle.dumps(failure))  # type: ignore[arg-type]  # it takes bytes too


def known_failure(store: Store) -> Failure | None:
    """The first failure, None while there is none. The store holds what these processes wrote themselves."""
    if not store.check(["failed"]):
        return None
    found: Failure = pickle.loads(store.get("failed"))
    return found


def told(store: Store) -> bool:
    """Somebody has said what failed."""
    return store.check(["told"])


def start_of(pid: int) -> str | None:
    """The start time of a running process of this machine as /proc has it; None for one that is gone or a zombie."""
    try:
        after = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if after[0] in "ZXx" else after[19]


def _machine() -> str:
    """What two processes share that can see each other's pid."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


@dataclass(slots=True)
class _Peer:
    """What is known of another rank."""

    beats: int = 0
    heard: float = field(default_factory=time.monotonic)
    who: tuple[str, int, str | None] | None = None


class Watch:
    """The thread. `speak` tells the user at the rank that is to speak; `leave` ends this process at once with a code."""

    def __init__(self, store: Store, place: Membership, speak: Speak, leave: Callable[[int], Any] = os._exit) -> None:
        self.store, self.place, self.speak, self.leave = store, place, speak, leave
        self.lost_seconds, self.idle_seconds = LOST_SECONDS, IDLE_SECONDS
        self.ending = False
        """The main thread is on its way out: nothing is wrong any more but how long it takes."""
        self.resigned = False
        """The main thread waits for this one to say why it lost the others."""
        self._peers = {rank: _Peer() for rank in range(place.size) if rank != place.rank}
        self._main = threading.main_thread()
        self._stopped = threading.Event()
        self._signals, self._wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._signalled: tuple[int, float] | None = None
        self._saying, self._said = threading.Lock(), False
        self._busy = time.monotonic(), 0.0, 0
        self._ticked = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="mxconv watch", daemon=True)

    def start(self) -> None:
        """Begin, from the main thread: signals are noticed even while it waits in a collective."""
        self._before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after a good end."""
        self.ending = True
        self._stopped.set()
        self._thread.join()
        signal.set_wakeup_fd(self._before)
        self.store.add(f"done/{self.place.rank}", 1)
        os.close(self._signals)
        os.close(self._wakeup)

    def _run(self) -> None:
        try:
            me = _machine(), os.getpid(), start_of(os.getpid())
            self.store.set(f"who/{self.place.rank}", pickle.dumps(me))  # type: ignore[arg-type]
            self.store.add(f"alive/{self.place.rank}", 1)
            while not self._stopped.wait(TICK_SECONDS):
                self._tick()
        except Exception as error:  # whatever a store that went away raises
            if not self._stopped.is_set():
                self._end_without_a_store(error)

    def _tick(self) -> None:
        now, paused = time.monotonic(), time.monotonic() - self._ticked > PAUSE_SECONDS
        self._ticked = now
        self.store.add(f"alive/{self.place.rank}", 1)
        if paused:
            self._busy = now, self._busy[1], self._busy[2]
            for peer in self._peers.values():
                peer.heard = now
        failure = known_failure(self.store)
        if failure is not None:
            self._follow(failure)
        self._look_at_signals(now)
        if not self.ending:
            self.look_at_peers(now)
            if not self.resigned:
                self._look_at_myself(now)

    def _follow(self, failure: Failure) -> None:
        """End because of `failure`: the speaker says it, the others give it the time to."""
        if failure.speaker == self.place.rank:
            if failure.rank == self.place.rank and self.ending:
                return  # the main thread says it itself
            self.say(failure.error, failure.trace)
        elif self.ending:
            return
        elif failure.speaker != LAUNCHER:  # which speaks when all have ended
            self.await_told()
        self.leave(failure.code)

    def say(self, error: MxconvError, trace: str) -> None:
        """Tell the user, once: two may fail, and the main thread and this one both come here."""
        with self._saying:
            if not self._said:
                self._said = True
                self.speak(error, trace)
                self.store.set("told", "1")

    def await_told(self) -> bool:
        """Wait until what failed has been said, a few seconds at most."""
        deadline = time.monotonic() + TOLD_SECONDS
        while not told(self.store) and time.monotonic() < deadline:
            time.sleep(0.05)
        return told(self.store)

    def look_at_peers(self, now: float) -> None:
        """Report a peer that is gone or silent."""
        for rank, peer in self._peers.items():
            beats = self.store.add(f"alive/{rank}", 0)
            if beats != peer.beats:
                peer.beats, peer.heard = beats, now
            if peer.who is None and self.store.check([f"who/{rank}"]):
                peer.who = pickle.loads(self.store.get(f"who/{rank}"))
            lost = self._lost(rank, peer, now)
            if lost and not self.store.add(f"done/{rank}", 0):
                speaker = 0 if rank else 1 if self.place.launcher is None else LAUNCHER
                report(self.store, Failure(rank=rank, speaker=speaker, error=ResourceError(lost)))

    def _lost(self, rank: int, peer: _Peer, now: float) -> str:
        silent = now - peer.heard
        machine, pid, start = peer.who or ("", 0, None)
        # A launcher of ours sees it first, and by which signal it was.
        if machine and machine == _machine() and self.place.launcher is None and start_of(pid) != start:
            return f"rank {rank} (process {pid}) ended without a word: killed, out of memory, or crashed"
        if peer.beats and silent > self.lost_seconds:
            return f"rank {rank} has not answered for {silent:.0f} s: stopped, or its machine is lost"
        if not peer.beats and silent > APPEAR_SECONDS:
            return f"rank {rank} did not appear within {silent:.0f} s"
        return ""

    def _look_at_signals(self, now: float) -> None:
        """A signal that the main thread does not come to handle ends the process here."""
        try:
            numbers = [number for number in os.read(self._signals, 64) if number in (signal.SIGINT, signal.SIGTERM)]
        except BlockingIOError:
            numbers = []
        if numbers and self._signalled is None:
            self._signalled = numbers[0], now
        if self._signalled is not None and now - self._signalled[1] > SIGNAL_SECONDS:
            interrupt = self._signalled[0] == signal.SIGINT
            words, code = ("interrupt", EXIT_SIGINT) if interrupt else ("SIGTERM", EXIT_SIGTERM)
            report(self.store, Failure(rank=self.place.rank, speaker=0, error=Interrupted(f"stopped by {words}", exit_code=code)))

    def _look_at_myself(self, now: float) -> None:
        """Report this process when it does nothing at all."""
        since, seconds, read = self._busy
        current = time.process_time(), _bytes_read(self._main)
        busy = current[0] - seconds > IDLE_SHARE * max(now - since, TICK_SECONDS) or current[1] != read
        if busy or _waits(self._main):
            self._busy = now, *current
        elif now - since > self.idle_seconds:
            words = f"rank {self.place.rank} has neither computed nor read anything for {now - since:.0f} s: it hangs"
            report(self.store, Failure(rank=self.place.rank, speaker=0, error=ResourceError(words)))

    def _end_without_a_store(self, error: Exception) -> None:
        try:
            keeper = "the launcher" if self.place.agent_store else "rank 0"
            # With a launcher gone nobody reads any more; without one each process can speak for itself alone.
            if not self.ending and not (self.place.agent_store and self.place.follower):
                self.speak(ResourceError(f"{keeper} is gone: {type(error).__name__}"), "")
        finally:  # a terminal that is gone too does not keep it
            self.leave(ResourceError.exit_code)


def _bytes_read(thread: threading.Thread) -> int:
    """Bytes that `thread` read so far, from wherever; this one's own reads of /proc do not count."""
    try:
        return int(Path(f"/proc/self/task/{thread.native_id}/io").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _waits(thread: threading.Thread) -> bool:
    """Whether `thread` is in a call of torch.distributed, or in an uninterruptible read of a slow disk."""
    home = os.path.dirname(dist.__file__)
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if frame.f_code.co_filename.startswith(home):
            return True
        frame = frame.f_back
    try:
        return Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rsplit(")", 1)[1].split()[0] == "D"
    except (OSError, IndexError):
        return False
