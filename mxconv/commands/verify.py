"""`mxconv verify`: an artifact against its source."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mxconv.commands.common import PATH, options, session, write_new
from mxconv.commands.together import arguments_of, launch, together
from mxconv.errors import UsageError
from mxconv.membership import read_membership

EPILOG = """\b
Examples:
  mxconv verify out --source MiniMax-M1
  mxconv verify out --source MiniMax-M1 --reference m1.reference --junit verify.xml
  mxconv verify out --source MiniMax-M1 --limit kl_mean=0.05 --windows 32
  mxconv verify out --source MiniMax-M1 --processes 8 --device cuda
  torchrun --nproc-per-node 8 -m mxconv verify out --source MiniMax-M1 --device cuda
"""


@click.command("verify", epilog=EPILOG)
@click.argument("artifact", type=PATH)
@click.option("--source", type=PATH, metavar="FOLDER", help="The checkpoint that the artifact was made from.")
@click.option("--windows", type=click.IntRange(min=1), default=16, show_default=True, help="Windows of text for the logits.")
@click.option("--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens a window.")
@click.option("--text", type=PATH, metavar="FILE", help="Text for the logits (default: a built-in text).")
@click.option("--tokens", type=PATH, metavar="FILE", help="Token ids as .npy, in place of a text.")
@click.option("--reference", type=PATH, metavar="FILE", help="Keep the source's side in this file, or use the one that is there.")
@click.option("--limit", "limits", multiple=True, metavar="NAME=NUMBER", help="Another limit; docs/verify.md lists them.")
@click.option("--junit", type=PATH, metavar="FILE", help="Write a JUnit XML file for CI.")
@click.option("--hash", "hash_files", is_flag=True, help="Hash every file against the manifest too, as `mxconv check` does.")
@click.option("--seed", type=int, default=0, show_default=True, help="For random ids, where there is neither tokenizer nor tokens.")
@click.option(
    "--processes", type=click.IntRange(min=1), metavar="N", help="Run as N processes on this machine, a rank or several each."
)
@options("tp", "keep_decay", "device", "memory")
@click.pass_context
def command(
    context: click.Context, /, artifact: Path, source: Path | None, windows: int, window: int, text: Path | None,
    tokens: Path | None, reference: Path | None, junit: Path | None, hash_files: bool, seed: int, keep_decay: bool | None,
    processes: int | None, **flags: Any,
) -> int:  # fmt: skip
    """Check the structure of ARTIFACT, every weight of every rank, its ranks against each other, and its logits.

    Exits 8 when something is wrong, and names it down to the tensor and the rank.
    """
    with session("verify", flags, follower=_follows(os.environ)) as (settings, console):
        place = read_membership(os.environ)
        if place is not None:
            place.end_with_launcher()
        if processes is not None:
            if place is not None:
                raise UsageError("--processes starts processes, and this is one of several already (torchrun)", hint="leave it out")
            return launch(arguments_of(context, "processes"), processes, console)
        from mxconv.verify import Options, verify

        with together(place, settings.device, console) as (world, device):
            request = Options(
                source=source, tp=settings.tp if settings.stated("tp") else None, device=device, windows=windows,
                window=window, text=text, tokens=tokens, reference=reference, limits=settings.limits, keep_decay=bool(keep_decay),
                memory_bytes=settings.memory, seed=seed, hash_files=hash_files,
            )  # fmt: skip
            report = verify(artifact, request, console, world)
            if world.rank == 0:
                report.render(console, details=not settings.quiet)
                if junit is not None:
                    write_new(junit, report.junit(), replace=True)
                console.document("verify", report.document())
        return report.exit_code


def _follows(environ: Mapping[str, str]) -> bool:
    """Whether another process of the same command speaks; variables that make no sense are complained about by all."""
    try:
        place = read_membership(environ)
    except UsageError:
        return False
    return place is not None and place.follower
