"""`mxconv demo`: the whole job on the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mxconv.commands.common import PATH, options, session

EPILOG = """\b
Examples:
  mxconv demo
  mxconv demo --output demo-out
"""


@click.command("demo", epilog=EPILOG)
@click.option(
    "--output", type=PATH, metavar="FOLDER", help="Keep the artifact in this new folder (default: a temporary one, removed)."
)
@options("workers")
def command(output: Path | None, **flags: Any) -> int:
    """Inspect, quantize (w4afp8, TP 2), verify and generate with the small trained model that comes with mxconv."""
    with session("demo", flags) as (settings, console):
        from mxconv.demo import run_demo

        return run_demo(console, output, settings)
