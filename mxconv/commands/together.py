"""One command as several processes: taking part in a group (`torchrun`, or `--processes N`), and starting one on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import mxconv
from mxconv.console import Console
from mxconv.errors import EXIT_SIGINT, Interrupted, MxconvError, ResourceError
from mxconv.membership import Membership

if TYPE_CHECKING:
    from mxconv.runtime.world import World

COMMAND = (sys.executable, "-m", "mxconv")
POLL_SECONDS = 0.05
GRACE_SECONDS = 6.0
"""What the others have to end by themselves when one has failed; their own watch ends them sooner."""
SIGNAL_SECONDS = 4.0
TERM_SECONDS = 2.0
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)


@contextmanager
def together(place: Membership | None, device: str, console: Console) -> Iterator[tuple[World, str]]:
    """(world, device) of this process: alone with `device` as it is, or a member with one of its own; see `processes.joined`."""
    if place is None:
        from mxconv.runtime.world import ALONE

        yield ALONE, device
        return
    from mxconv.runtime.processes import joined

    loud = os.dup(2)

    def quiet() -> None:
        """The first process speaks; what this one's libraries print goes nowhere either."""
        console.mute()
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os.close(nowhere)

    def speak(error: MxconvError, trace: str) -> None:
        teller = console
        if place.follower:
            teller = Console(stderr=os.fdopen(os.dup(loud), "w"), progress=False)
        for line in trace.splitlines():
            teller.detail(line, 0)
        teller.error(error)

    try:
        with joined(place, device, speak, quiet) as world:
            yield world, world.device
    finally:
        os.close(loud)


def arguments_of(context: click.Context, leave_out: str) -> list[str]:
    """The command line that gives `context` again, without the option `leave_out`."""
    arguments: list[str] = [context.command.name or ""]
    positional: list[str] = []
    for parameter in context.command.params:
        name = parameter.name or ""
        value = context.params.get(name)
        if context.get_parameter_source(name) is not click.core.ParameterSource.COMMANDLINE or name == leave_out:
            continue
        if isinstance(parameter, click.Argument):
            positional.append(str(value))
        elif isinstance(parameter, click.Option):
            flag = parameter.opts[-1]
            if parameter.count:
                arguments += [flag] * int(value or 0)
            elif parameter.is_flag:
                arguments.append(flag)
            else:
                for each in value if parameter.multiple and value is not None else (value,):
                    arguments += [flag, str(each)]
    return [*arguments, "--", *positional]


def launch(arguments: Sequence[str], count: int, console: Console) -> int:
    """Run `mxconv` with `arguments` as `count` processes on this machine; their exit code.

    The code is the one that all agree on: rank 0's, or that of the first failure (a process that was killed is 6). An interrupt or
    SIGTERM is passed on and ends all within seconds. Nothing that was started is left running: when this process is killed the
    kernel kills them too.
    """
    from mxconv.runtime.watch import open_store

    store, port = open_store()
    members = _Members(arguments=arguments, count=count, port=port, store=store)
    try:
        members.start()
        members.wait()
    except KeyboardInterrupt:
        return members.end_by(signal.SIGINT, EXIT_SIGINT)
    except Interrupted as stopped:
        return members.end_by(signal.SIGTERM, stopped.exit_code)
    finally:
        members.kill()
    return members.outcome(console)


@dataclass(slots=True, kw_only=True)
class _Members:
    """The processes of one launch."""

    arguments: Sequence[str]
    count: int
    port: int
    store: Any
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        """Start them, each in a session of its own: a terminal's Ctrl-C comes here alone and is passed on once."""
        root = str(Path(mxconv.__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        threads = str(max(1, len(os.sched_getaffinity(0)) // self.count))
        shared = {"OMP_NUM_THREADS": threads, "GLOO_SOCKET_IFNAME": "lo", **os.environ, "PYTHONPATH": path}
        for rank in range(self.count):
            place = Membership(
                rank=rank, size=self.count, local_rank=rank, address="127.0.0.1", port=self.port, agent_store=True,
                launcher=os.getpid(),
            )  # fmt: skip
            command = [*COMMAND, *self.arguments]
            self.running.append(
                subprocess.Popen(
                    command, env={**shared, **place.environment()}, stdin=subprocess.DEVNULL, start_new_session=True
                )
            )

    def codes(self) -> list[int | None]:
        """Exit codes, None for who still runs, negative for who was killed."""
        return [process.poll() for process in self.running]

    def wait(self, seconds: float | None = None) -> None:
        """Until all have ended; when one has failed or been killed the others get `GRACE_SECONDS`; at most `seconds`."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while None in (codes := self.codes()):
            if deadline is None and any(codes):
                deadline = time.monotonic() + GRACE_SECONDS
                self._tell_who_was_killed(codes)
            if deadline is not None and time.monotonic() > deadline:
                return
            time.sleep(POLL_SECONDS)

    def _tell_who_was_killed(self, codes: Sequence[int | None]) -> None:
        """The others learn it from their watch; only their parent knows by which signal."""
        from mxconv.runtime.watch import LAUNCHER, Failure, report

        for rank, code in enumerate(codes):
            if code is not None and code < 0:
                report(self.store, Failure(rank=rank, speaker=0 if rank else LAUNCHER, error=killed(rank, -code)))
                return

    def end_by(self, number: signal.Signals, code: int) -> int:
        """Pass a signal on; `code`, whatever the others make of it."""
        self.signal(number)
        self.wait(SIGNAL_SECONDS)
        return code

    def signal(self, number: signal.Signals) -> None:
        """To all that still run."""
        for process in self.running:
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        """Nobody is left: SIGTERM for who has not ended, then SIGKILL."""
        if None in self.codes():
            self.signal(signal.SIGTERM)
            self.wait(TERM_SECONDS)
            self.signal(signal.SIGKILL)
            for process in self.running:
                process.wait()

    def outcome(self, console: Console) -> int:
        """The exit code of all; says what failed if none of them could."""
        from mxconv.runtime.watch import known_failure, told

        codes = [process.wait() for process in self.running]
        failure = known_failure(self.store)
        if failure is None:
            bad = next((rank for rank, code in enumerate(codes) if code < 0), None)
            if bad is None:
                return codes[0] or next((code for code in codes if code), 0)
            error: MxconvError = killed(bad, -codes[bad])
        else:
            error = failure.error
        if not told(self.store):
            console.error(error)
        return error.exit_code


def killed(rank: int, number: int) -> MxconvError:
    """What ended a process that got signal `number`."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if number in CRASHES:
        return MxconvError(f"a bug in mxconv or a library: rank {rank} crashed with {name}", hint="please report it")
    hint = "the kernel kills for want of memory: see dmesg, lower --memory" if number == signal.SIGKILL else None
    return ResourceError(f"rank {rank} was ended by {name}", hint=hint)
