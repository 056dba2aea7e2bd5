"""Settings: what a run is asked for, from four places. flag > `MXCONV_*` > `mxconv.toml` > default.

`SETTINGS` is the whole list; a new setting is a new row there and a field of `Settings`. In `mxconv.toml` a key stands at
the top, for every command, or under a command's table, which wins:

    memory = "2GiB"
    [quantize]
    scheme = "w4afp8"
    [limits]
    kl_mean = 0.05

Relative paths in the file are relative to the file. A key that is not known is an error, a variable `MXCONV_X` that is not
known a note. `limits` is merged name by name, every other setting is taken whole from the first place that has it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from mxconv import dispatch, parsing
from mxconv.errors import MxconvError, UsageError, printable, raise_all
from mxconv.jsonfiles import read_regular
from mxconv.parsing import Rejected
from mxconv.quantize.schemes import DEFAULT_SCHEME, HADAMARD_BLOCKS, SCHEMES

FILE_NAME = "mxconv.toml"
MAX_FILE_BYTES = 1 << 20
COMMANDS = ("inspect", "convert", "quantize", "calibrate", "verify", "check", "diff", "generate", "bench", "demo")
# Switches of other rooms, read by them.
OTHER_VARIABLES = frozenset(("MXCONV_CONFIG", "MXCONV_FAILPOINT", "MXCONV_KERNELS", "MXCONV_LAUNCHER"))


def available_cores() -> int:
    """Cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One row: how its value is read and what it is for. `parse` turns text or a TOML value into the field's type."""

    name: str
    parse: Callable[[Any], Any]
    help: str
    default: Any = None
    default_from: Callable[[], Any] | None = None
    shapes_bytes: bool = False
    """The setting decides what is written, so it belongs in the manifest; the others go to run.log."""

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return f"MXCONV_{self.name.upper()}"


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        setting.name: setting
        for setting in (
            Setting(name="tp", parse=parsing.integer(1), help="tensor-parallel ranks to write", shapes_bytes=True),
            Setting(name="layout", parse=parsing.word, help="layout to write", default="fastdeploy", shapes_bytes=True),
            Setting(
                name="scheme", parse=parsing.choice(SCHEMES), help=f"quantization scheme: {', '.join(SCHEMES)}",
                default=DEFAULT_SCHEME, shapes_bytes=True,
            ),
            Setting(
                name="group_size", parse=parsing.group_size, help="inputs that share an int4 scale: a multiple of 128, or channel",
                shapes_bytes=True,
            ),
            Setting(
                name="hadamard_block", parse=parsing.integer_of(HADAMARD_BLOCKS), help="rotation block of the int4 schemes",
                shapes_bytes=True,
            ),
            Setting(name="device", parse=parsing.device, help="cpu, cuda or cuda:N", default="cpu"),
            Setting(
                name="workers", parse=parsing.integer(1), help="workers at a time (default: the cores)",
                default_from=available_cores,
            ),
            Setting(name="memory", parse=parsing.size, help="memory for tensors, as 2GiB or 512M", default=1 << 30),
            Setting(
                name="calibration", parse=parsing.path, help="calibration text, or token ids as .npy", shapes_bytes=True
            ),
            Setting(
                name="ignore", parse=parsing.words, help="patterns of experts to keep unquantized", default=(), shapes_bytes=True
            ),
            Setting(
                name="drop", parse=parsing.words, help="patterns of unexpected tensors to leave out", default=(), shapes_bytes=True
            ),
            Setting(name="limits", parse=parsing.limits, help="limits of verify, as NAME=NUMBER", default=MappingProxyType({})),
            Setting(name="json", parse=parsing.flag, help="print JSON for machines", default=False),
            Setting(name="quiet", parse=parsing.flag, help="say nothing but errors, warnings and data", default=False),
            Setting(name="verbose", parse=parsing.integer(0), help="say more; 2 for debug lines", default=0),
            Setting(name="progress", parse=parsing.flag, help="show progress", default=True),
        )
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one run, and where each came from (`flag`, the variable's name, the file and key, or `default`)."""

    tp: int | None
    layout: str
    scheme: str
    group_size: int | Literal["channel"] | None
    hadamard_block: int | None
    device: str
    workers: int
    memory: int
    calibration: Path | None
    ignore: tuple[str, ...]
    drop: tuple[str, ...]
    limits: Mapping[str, float]
    json: bool
    quiet: bool
    verbose: int
    progress: bool
    sources: Mapping[str, str] = field(repr=False)
    notes: tuple[str, ...] = field(default=(), repr=False)

    def stated(self, name: str) -> bool:
        """Someone set it: it is not the default."""
        return self.sources[name] != "default"

    def log(self) -> dict[str, dict[str, Any]]:
        """Every setting with its value and source, for run.log."""
        return {name: {"value": getattr(self, name), "from": self.sources[name]} for name in SETTINGS}

    def describe(self) -> list[str]:
        """A line a setting that is not the default, for `-v`."""
        return [f"{name} = {getattr(self, name)} (from {self.sources[name]})" for name in SETTINGS if self.stated(name)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """One place with values that are still as they were written there, and how that place names a key."""

    values: Mapping[str, Any]
    label: Callable[[str], str]
    base: Path | None = None


def resolve(
    flags: Mapping[str, Any], *, command: str | None = None, environ: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Settings:
    """The settings for `command`, from its flags, the environment and mxconv.toml.

    `flags`: option name → value as click gives it; None and () mean that it was not given; `config` names the file to read
    instead of ./mxconv.toml; names that are no setting are the command's own and are left alone. Raises UsageError for a
    value, a key or a file that cannot be, with its place, all of them at once.
    """
    environ = os.environ if environ is None else environ
    file, problems = _read_file(flags.get("config") or environ.get("MXCONV_CONFIG"), cwd or Path.cwd(), command)
    given = {name: value for name, value in flags.items() if name in SETTINGS and value is not None and value != ()}
    stated = {name: environ[s.variable] for name, s in SETTINGS.items() if environ.get(s.variable)}
    places = [
        _Place(values=given, label=lambda name: f"--{name.replace('_', '-')}"),
        _Place(values=stated, label=lambda name: SETTINGS[name].variable),
        *file,
    ]
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, setting in SETTINGS.items():
        values[name], sources[name] = _settle(setting, places, problems)
    try:
        dispatch.chosen(environ)  # now, not when a first operation asks: verify reads for hours before
    except UsageError as unknown:
        problems.append(unknown)
    raise_all(problems)
    return Settings(**values, sources=MappingProxyType(sources), notes=_unknown_variables(environ))


def _settle(setting: Setting, places: list[_Place], problems: list[MxconvError]) -> tuple[Any, str]:
    """The setting's value and source. What a lower place says is still checked: a wrong line does not wait for its turn."""
    default = setting.default_from() if setting.default_from else setting.default
    found: list[tuple[Any, str]] = []
    for place in places:
        if setting.name not in place.values:
            continue
        label = place.label(setting.name)
        try:
            value = setting.parse(place.values[setting.name])
        except Rejected as rejected:
            problems.append(UsageError(f"{setting.name} is wrong", where=label, expected=rejected.expected, got=rejected.got))
            continue
        if isinstance(value, Path) and place.base is not None:
            value = place.base / value
        found.append((value, label))
    if setting.name == "limits" and found:
        merged = {name: limit for value, _ in reversed(found) for name, limit in value.items()}
        return MappingProxyType(merged), ", ".join(label for _, label in found)
    return found[0] if found else (default, "default")


def _read_file(named: Any, cwd: Path, command: str | None) -> tuple[list[_Place], list[MxconvError]]:
    """The places of the file (the command's table, then the top), and what is wrong with its keys."""
    path = Path(named) if named else cwd / FILE_NAME
    if not named and not path.exists():
        return [], []
    import tomllib

    try:
        content = tomllib.loads(read_regular(path, MAX_FILE_BYTES).decode("utf-8"))
    except MxconvError as error:
        what = f"settings file cannot be used: {error.what}"
        raise UsageError(what, where=path, expected=error.expected, got=error.got) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"settings file is not TOML: {printable(error)}", where=path) from None
    top = {key: value for key, value in content.items() if key not in COMMANDS}
    tables = {key: value for key, value in content.items() if key in COMMANDS}
    problems = _unknown_keys(path, "", top)
    for name, table in tables.items():
        if isinstance(table, dict):
            problems += _unknown_keys(path, f"{name}.", table)
        else:
            problems.append(UsageError("this is the name of a command's table", where=f"{path}: {name}", expected=f"[{name}]"))
    places = [_Place(values=top, label=lambda key: f"{path}: {key}", base=path.parent)]
    own = tables.get(command or "", {})
    if isinstance(own, dict):
        places.insert(0, _Place(values=own, label=lambda key: f"{path}: {command}.{key}", base=path.parent))
    return places, problems


def _unknown_keys(path: Path, prefix: str, values: Mapping[str, Any]) -> list[MxconvError]:
    known = [*SETTINGS, *(() if prefix else COMMANDS)]
    problems: list[MxconvError] = []
    for key in values:
        if key not in SETTINGS:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            problems.append(UsageError(f"unknown key {prefix + key!r}", where=path, hint=hint))
    return problems


def _unknown_variables(environ: Mapping[str, str]) -> tuple[str, ...]:
    known = {setting.variable for setting in SETTINGS.values()} | OTHER_VARIABLES
    notes = []
    for name in sorted(environ):
        if name.startswith("MXCONV_") and name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            guess = f"; did you mean {near[0]}?" if near else ""
            notes.append(f"environment variable {name} is not one that mxconv reads{guess}")
    return tuple(notes)
