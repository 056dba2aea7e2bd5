"""`mxconv quantize`: tensor-parallel shards with the routed experts in int4 or fp8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mxconv.commands.common import PATH, options, session
from mxconv.commands.running import run_job
from mxconv.errors import UsageError

EPILOG = """\b
Examples:
  mxconv quantize MiniMax-M1 out --scheme w4afp8 --tp 8
  mxconv quantize MiniMax-M1 out --scheme w4a8 --tp 8 --calibration ids.npy
  mxconv quantize MiniMax-M1 out --tp 8 --resume          # after an interruption
"""


@click.command("quantize", epilog=EPILOG)
@click.argument("source", type=PATH)
@click.argument("output", type=PATH)
@click.option("--statistics", type=PATH, metavar="PATH", help="What `mxconv calibrate` wrote, in place of calibrating now.")
@options(
    "scheme", "tp", "group_size", "hadamard_block", "layout", "calibration", "ignore", "drop", "keep_decay", "device", "workers",
    "memory", "dry_run", "plan", "resume", "overwrite",
)  # fmt: skip
def command(source: Path, output: Path, statistics: Path | None, keep_decay: bool | None, **flags: Any) -> int:
    """Write SOURCE into the new folder OUTPUT with its routed experts quantized; everything else is kept as it is."""
    with session("quantize", flags, stream=not flags["dry_run"]) as (settings, console):
        from mxconv.execute import prepare
        from mxconv.plan import Request
        from mxconv.quantize.schemes import get_scheme

        if settings.layout != "fastdeploy":
            raise UsageError(f"layout {settings.layout!r} holds no quantized experts", expected="fastdeploy")
        scheme = get_scheme(settings.scheme, group_size=settings.group_size, hadamard_block=settings.hadamard_block)
        request = Request(
            tp=settings.tp or 1, scheme=scheme, ignore=settings.ignore, drop=settings.drop, keep_decay=bool(keep_decay)
        )  # fmt: skip
        calibration = settings.calibration if scheme.static else None
        if not scheme.static and settings.sources["calibration"] == "--calibration":
            raise UsageError(f"scheme {scheme.name} scales activations as it runs and takes no --calibration")
        prepared = prepare(
            source, request, calibration=None if statistics else calibration, statistics=statistics, device=settings.device
        )  # fmt: skip
        return run_job(prepared, output, settings, console, flags)
