"""What the commands share: options as one table, and a session that turns failures into messages and exit codes."""

from __future__ import annotations

import logging
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any, TypeVar

import click

from mxconv.console import Console
from mxconv.errors import EXIT_SIGINT, EXIT_SIGTERM, Interrupted, MxconvError, OutputConflict, ResourceError, UsageError
from mxconv.settings import Settings, resolve

F = TypeVar("F", bound=Callable[..., Any])
# Not `readable`: what a path is and whether it can be used is for the rooms to say, with their exit codes.
PATH = click.Path(path_type=Path, readable=False)

# Values are parsed by settings.py, so that a flag, a variable and a file are read alike: every flag is text here.
# option → (its names, what click is told about it)
_TABLE: Mapping[str, tuple[tuple[str, ...], Mapping[str, Any]]] = {
    "tp": (("--tp",), {"metavar": "N", "help": "Tensor-parallel ranks."}),
    "layout": (("--layout",), {"metavar": "NAME", "help": "fastdeploy, minimax-m1, minimax, or source (an artifact's origin)."}),
    "scheme": (("--scheme",), {"metavar": "NAME", "help": "w4afp8, w4afp8_static, w4a8, block_wise_fp8 or tensor_wise_fp8."}),
    "group_size": (("--group-size",), {"metavar": "N", "help": "Inputs that share an int4 scale: a multiple of 128, or channel."}),
    "hadamard_block": (("--hadamard-block",), {"metavar": "N", "help": "Rotation of the int4 schemes: 128, 256, 512 or 1024."}),
    "device": (("--device",), {"metavar": "NAME", "help": "cpu, cuda or cuda:N."}),
    "workers": (("--workers",), {"metavar": "N", "help": "Units at a time (default: the cores)."}),
    "memory": (("--memory",), {"metavar": "SIZE", "help": "Memory for tensors, as 2GiB or 512M (default 1GiB)."}),
    "calibration": (("--calibration",), {"metavar": "FILE", "help": "Text, or token ids as .npy (default: a built-in text)."}),
    "ignore": (("--ignore",), {"metavar": "PATTERN", "multiple": True, "help": "Keep these layers' experts unquantized (a glob)."}),
    "drop": (("--drop",), {"metavar": "PATTERN", "multiple": True, "help": "Leave unexpected tensors out (a glob of names)."}),
    "keep_decay": (("--keep-decay",), {"is_flag": True, "default": None, "help": "Use stored decay that is not the formula."}),
    "resume": (("--resume",), {"is_flag": True, "help": "Go on with an interrupted run, or check a finished one."}),
    "overwrite": (("--overwrite",), {"is_flag": True, "help": "Replace what is in the output folder, at the very end."}),
    "dry_run": (("--dry-run",), {"is_flag": True, "help": "Plan and report; write nothing."}),
    "plan": (("--plan", "plan_file"), {"type": PATH, "metavar": "FILE", "help": "Write the whole plan as JSON."}),
    "config": (("--config",), {"metavar": "FILE", "help": "Settings file (default ./mxconv.toml)."}),
    "json": (("--json",), {"is_flag": True, "default": None, "help": "JSON for machines on stdout."}),
    "quiet": (("-q", "--quiet"), {"is_flag": True, "default": None, "help": "Errors, warnings and data only."}),
    "verbose": (("-v", "--verbose"), {"count": True, "help": "Say more; -vv for debug lines."}),
    "progress": (("--no-progress", "progress"), {"is_flag": True, "flag_value": False, "default": None, "help": "No progress."}),
}
EVERYWHERE = ("config", "json", "quiet", "verbose", "progress")


def options(*names: str) -> Callable[[F], F]:
    """A decorator that adds the options `names` and those that every command has."""

    def add(function: F) -> F:
        for name in reversed((*names, *EVERYWHERE)):
            names_of, told = _TABLE[name]
            function = click.option(*names_of, **told)(function)
        return function

    return add


@contextmanager
def session(
    command: str, flags: Mapping[str, Any], *, stream: bool = False, follower: bool = False
) -> Iterator[tuple[Settings, Console]]:
    """Settings and a console for one command; an error inside is shown and ends the process with its exit code.

    A `follower` is one of several processes of a command and leaves JSON on stdout to the first.
    """
    given = {name: (value or None) if name == "verbose" else value for name, value in flags.items()}
    console = Console(json=bool(flags.get("json")) and not follower, stream=stream)
    signals: list[int] = []
    try:
        settings = resolve(given, command=command)
        console = Console(
            json=settings.json and not follower, stream=stream, quiet=settings.quiet, verbose=settings.verbose,
            progress=settings.progress,
        )  # fmt: skip
        with console, _terminable(signals), _logged(console):
            for note in settings.notes:
                console.note(note)
            for line in settings.describe():
                console.detail(line)
            yield settings, console
    except (SystemExit, GeneratorExit, click.ClickException, click.exceptions.Exit):
        raise
    except BaseException as error:
        failure = _failure(error, signals)
        console.error(failure)
        raise SystemExit(failure.exit_code) from None


def _failure(error: BaseException, signals: list[int]) -> MxconvError:
    """What a user is told of `error`. After a signal that is the signal: out of the middle of an import it comes as anything."""
    if isinstance(error, Interrupted):
        return error
    if signals or isinstance(error, KeyboardInterrupt):
        words, code = ("SIGTERM", EXIT_SIGTERM) if SIGTERM in signals else ("interrupt", EXIT_SIGINT)
        return Interrupted(f"stopped by {words}", exit_code=code)
    if isinstance(error, MxconvError):
        return error
    if isinstance(error, MemoryError):
        return ResourceError("out of memory", hint="lower --memory or --workers, or give the machine more")
    if isinstance(error, OSError):  # what no room had words for: the machine's failure, no bug
        return ResourceError(
            f"input or output failed: {error.strerror or error}", where=error.filename,
            hint="check the disk and its permissions, then run the same command again; a conversion goes on with --resume",
        )  # fmt: skip
    traceback.print_exception(error)
    return MxconvError(f"a bug in mxconv: {type(error).__name__}: {error}", hint="please report it with the lines above")


@contextmanager
def _terminable(signals: list[int]) -> Iterator[None]:
    """SIGTERM and SIGINT end a command through its clean-up, noted in `signals` (a run with a journal handles them itself)."""

    def terminate(number: int, frame: object) -> None:
        signals.append(number)
        raise Interrupted("stopped by SIGTERM", exit_code=EXIT_SIGTERM)

    def interrupt(number: int, frame: object) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    handlers: dict[int, Any] = {SIGTERM: terminate, SIGINT: interrupt}
    if signal.getsignal(SIGINT) == signal.SIG_IGN:  # a job in the background may be told to ignore it
        del handlers[SIGINT]
    try:
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _logged(console: Console) -> Iterator[None]:
    logger = logging.getLogger("mxconv")
    handler = console.logging_handler()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if console.verbose > 1 else logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def choose_layout(settings: Settings, source: Path) -> str | None:
    """The layout to write; None, the source's own form, when an artifact is converted and nothing else was asked for."""
    from mxconv.config import read_config

    if settings.layout == "source":
        return None
    if not settings.stated("layout") and read_config(source).artifact is not None:
        return None
    return settings.layout


def require_one(resume: bool, overwrite: bool, dry_run: bool) -> None:
    """Raise UsageError for flags that contradict each other."""
    if dry_run and (resume or overwrite):
        raise UsageError("--dry-run writes nothing", hint="leave out --resume and --overwrite")


def write_plan(path: Path | None, document: Mapping[str, Any]) -> None:
    """The whole plan as canonical JSON in a new file."""
    if path is not None:
        from mxconv.plan.values import canonical_json

        write_new(path, canonical_json(document) + b"\n")


def write_new(path: Path, data: bytes, *, replace: bool = False) -> None:
    """Write `data` whole to `path`, which must be free unless `replace`. Raises OutputConflict or ResourceError."""
    part = path.with_name(f".{path.name}.part")
    try:
        if not replace and path.exists():
            raise OutputConflict("file exists already", where=path, hint="choose another name")
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        raise ResourceError(f"cannot write: {error.strerror}", where=path, hint="choose another place") from None
