"""`mxconv bench`: tokens a second, and how near that is to what the machine can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mxconv.commands.common import PATH, options, session
from mxconv.errors import UsageError

EPILOG = """\b
Examples:
  mxconv bench decode out --device cuda --slots 64 --context 4096
  mxconv bench prefill --shape m1-tp8 --scheme w4afp8 --device cuda
  mxconv bench moe --shape m1 --scheme block_wise_fp8 --device cuda
  mxconv bench quantize --device cuda
\b
Shapes: m1 (one lightning and one softmax layer of MiniMax-M1), m1-tp8 (one of 8 ranks of them), small. Weights are random; the
default is m1-tp8 on a GPU and small on a CPU.
"""
DTYPES = ("float32", "bfloat16")
# What is sensible differs: (slots, context, steps, tokens of a prompt) by kind of device.
SIZES = {"cuda": (64, 4096, 32, 32768), "cpu": (8, 256, 16, 1024)}


@click.command("bench", epilog=EPILOG)
@click.argument("what", type=click.Choice(["decode", "prefill", "moe", "quantize"]))
@click.argument("folder", type=PATH, required=False)
@click.option("--shape", metavar="NAME", help="A synthetic model instead of FOLDER: m1, m1-tp8 or small.")
@click.option("--dtype", type=click.Choice(DTYPES), default=None, help="Default: bfloat16 on cuda, float32 on cpu.")
@click.option("--slots", type=click.IntRange(min=1), default=None, help="decode: sequences side by side.")
@click.option("--context", type=click.IntRange(min=1), default=None, help="decode: tokens that each sequence holds.")
@click.option("--steps", type=click.IntRange(min=1), default=None, help="decode: steps a run.")
@click.option("--tokens", type=click.IntRange(min=1), default=None, help="prefill: tokens of the prompt.")
@options("scheme", "tp", "group_size", "device")
def command(
    what: str, folder: Path | None, shape: str | None, dtype: str | None, slots: int | None, context: int | None,
    steps: int | None, tokens: int | None, **flags: Any,
) -> int:  # fmt: skip
    """Measure decode, prefill, moe (the experts of a layer) or quantize.

    FOLDER is a checkpoint or artifact; without it a synthetic model is made. Ceilings (copy bandwidth, matrix products) are
    measured first, on the same device: "of ceiling" is the time that the least bytes and operations take, over the time taken.
    """
    with session("bench", flags) as (settings, console):
        import torch

        from mxconv.bench import report
        from mxconv.dispatch import open_device

        device = open_device(settings.device)
        if folder is not None and (shape is not None or (settings.stated("scheme") and what != "quantize")):
            raise UsageError("--shape and --scheme make a synthetic model; a folder has its own", got=folder)
        standard = SIZES[device.type]
        chosen = report.Options(
            what=what, folder=folder, shape=shape or ("m1-tp8" if device.type == "cuda" else "small"),
            scheme=settings.scheme if settings.stated("scheme") else None, group_size=settings.group_size, tp=settings.tp,
            device=device, dtype=getattr(torch, dtype or ("bfloat16" if device.type == "cuda" else "float32")),
            slots=slots or standard[0], context=context or standard[1], steps=steps or standard[2], tokens=tokens or standard[3],
        )  # fmt: skip
        report.run(chosen, console)
        return 0
