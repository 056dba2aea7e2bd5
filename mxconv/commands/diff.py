"""`mxconv diff`: which weights differ, and by how much."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mxconv.commands.common import PATH, options, session

if TYPE_CHECKING:
    from mxconv.comparison import Comparison, Difference
    from mxconv.console import Console

EPILOG = """\b
Examples:
  mxconv diff out-bf16 MiniMax-M1               # nothing differs: exit code 0
  mxconv diff MiniMax-M1 out --only '*.down'    # how far quantization moved each down projection
  mxconv diff out-tp4 out-tp8 --json

Exit codes: 0 when nothing differs, 8 when something does.
"""
EXIT_DIFFERENT = 8


@click.command("diff", epilog=EPILOG)
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@click.option("--only", default="*", metavar="PATTERN", help="Compare these weights alone (a glob, as layers.3.*).")
@click.option("--top", type=click.IntRange(min=0), default=20, show_default=True, help="Rows of the table.")
@options("keep_decay", "workers", "memory")
def command(a: Path, b: Path, only: str, top: int, keep_decay: bool | None, **flags: Any) -> int:
    """Compare two checkpoints or artifacts weight by weight, across layouts, dialects, TP sizes and schemes.

    Weights of one dtype are compared by their bits, others by value; quantized experts are decoded. The worst come first.
    """
    with session("diff", flags) as (settings, console):
        from mxconv.comparison import compare

        found = compare(
            a, b, only=only, workers=settings.workers, memory_bytes=settings.memory, keep_decay=bool(keep_decay), progress=console
        )
        console.document("diff", found.document())
        _render(found, top, console)
        return 0 if found.equal else EXIT_DIFFERENT


def _render(found: Comparison, top: int, console: Console) -> None:
    from mxconv.draw import Column

    for note in found.notes:
        console.note(note)
    if found.equal:
        console.line(f"ok   {found.compared:,} weights compared, none differs")
        return
    if found.config:
        console.table("config", ["field", "first", "second"], [(key, *map(str, pair)) for key, pair in found.config.items()])
    measured = [each for each in found.differences if each.reason is None]
    told = [each for each in found.differences if each.reason is not None]
    if told:
        console.table("not comparable", ["weight", "why"], [(each.name, each.reason) for each in told[:top]])
    if measured:
        heads = [Column("weight"), *(Column(head, "right") for head in ("rel L2", "max abs", "differing", "of", "first"))]
        console.table("worst first", heads, [_row(each) for each in measured[:top]])
    hidden = max(0, len(measured) - top) + max(0, len(told) - top)
    if hidden:
        console.line(f"  … and {hidden:,} more (--top {len(found.differences)}, or --json for all)")
    config = f", {len(found.config)} fields of the config" if found.config else ""
    console.line(f"FAIL {len(found.differences):,} differences in {found.compared:,} weights compared{config}")


def _row(each: Difference) -> tuple[str, ...]:
    index = ", ".join(map(str, each.first))
    return each.name, f"{each.relative_l2:.3g}", f"{each.max_abs:.3g}", f"{each.differing:,}", f"{each.elements:,}", f"[{index}]"
