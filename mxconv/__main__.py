"""`mxconv` and `python -m mxconv`: the process around the command line, also under `torchrun`.

Ctrl-C ends it with 130 and a line, never a traceback, from the first import on, and SIGTERM with 143. While a command works, its
session handles both; before there is nothing to clean up, and after it all is said: then they are ignored.
"""

from __future__ import annotations

# `signal` itself spends milliseconds on enums, and a Ctrl-C in them is a traceback
import _signal as signal  # type: ignore[import-not-found]
import os
import sys


def _stop_at_once(number: int, frame: object) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(128 + number)


def main() -> None:
    """Run the command line and end the process with its code."""
    # A job in the background may be told to ignore one.
    heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    for number in heard:
        signal.signal(number, _stop_at_once)
    code: object = 0
    try:
        from mxconv.cli import main as command_line

        command_line()
    except SystemExit as done:
        code = done.code
    except KeyboardInterrupt:  # a second one, while the first was being told
        code = 130
    for number in heard:
        signal.signal(number, signal.SIG_IGN)  # the interpreter's own end is no time for another code or a traceback
    _end(code)


def _end(code: object) -> None:
    from mxconv.apart import left_behind

    if left_behind():
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                continue  # nobody reads it any more
        os._exit(code if isinstance(code, int) else 1)
    sys.exit(code)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
