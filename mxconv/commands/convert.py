"""`mxconv convert`: another layout, every value kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mxconv.commands.common import PATH, choose_layout, options, session
from mxconv.commands.running import run_job

EPILOG = """\b
Examples:
  mxconv convert MiniMax-M1 out --tp 8                    # fused bf16 shards for 8 ranks
  mxconv convert out MiniMax-M1-again                     # back to what it was made from, bit for bit
  mxconv convert MiniMax-M1 M1-hf --layout minimax        # for unpatched transformers, loaded in float32
"""


@click.command("convert", epilog=EPILOG)
@click.argument("source", type=PATH)
@click.argument("output", type=PATH)
@options("tp", "layout", "drop", "keep_decay", "workers", "memory", "dry_run", "plan", "resume", "overwrite")
def command(source: Path, output: Path, keep_decay: bool | None, **flags: Any) -> int:
    """Write SOURCE, a checkpoint or an unquantized artifact, into the new folder OUTPUT in another layout."""
    with session("convert", flags, stream=not flags["dry_run"]) as (settings, console):
        from mxconv.execute import prepare
        from mxconv.plan import Request

        request = Request(
            layout=choose_layout(settings, source), tp=settings.tp or 1, drop=settings.drop, keep_decay=bool(keep_decay)
        )
        return run_job(prepare(source, request), output, settings, console, flags)
