"""`mxconv inspect`: what is it, does it fit, what will happen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mxconv.commands.common import PATH, choose_layout, options, session, write_plan

EPILOG = """\b
Examples:
  mxconv inspect MiniMax-M1
  mxconv inspect MiniMax-M1 --scheme w4afp8 --tp 8
  mxconv inspect out --json
"""


@click.command("inspect", epilog=EPILOG)
@click.argument("checkpoint", type=PATH)
@options("scheme", "tp", "layout", "group_size", "hadamard_block", "ignore", "drop", "workers", "memory", "plan")
def command(checkpoint: Path, plan_file: Path | None, **flags: Any) -> int:
    """Say what CHECKPOINT is and what a conversion of it would do.

    Reads headers and config alone; an index without its shards is enough. With --scheme: the plan of that quantization.
    """
    with session("inspect", flags) as (settings, console):
        from mxconv.inspection import inspect_artifact, inspect_checkpoint

        artifact = inspect_artifact(checkpoint)
        if artifact is not None and artifact.manifest.body["scheme"] is not None:
            artifact.render(console)
            console.document("inspect", artifact.document())
            return 0
        from mxconv.plan import Request
        from mxconv.quantize.schemes import get_scheme

        scheme = None
        if settings.stated("scheme"):
            scheme = get_scheme(settings.scheme, group_size=settings.group_size, hadamard_block=settings.hadamard_block)
        request = Request(
            layout=choose_layout(settings, checkpoint),
            tp=settings.tp or 1,
            scheme=scheme,
            ignore=settings.ignore,
            drop=settings.drop,
        )
        view = inspect_checkpoint(
            checkpoint, request, drop=settings.drop, workers=settings.workers, memory_bytes=settings.memory
        )  # fmt: skip
        view.render(console)
        if view.plan is not None:
            write_plan(plan_file, view.plan.document())
        console.document("inspect", view.document())
        if view.failure is not None:
            console.error(view.failure)
        return view.exit_code
