"""`mxconv bench`: tokens a second, and how near that is to what the machine can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from mxconv.commands.common import PATH, options, session
from mxconv.errors import UsageError
from mxconv.settings import Settings

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

Kind = Literal["folder", "synthetic"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Where an option says something: of what is measured, of which kind of model, and beside which other option."""

    label: str
    subjects: frozenset[str]
    kind: Kind | None = None
    needs: str | None = None


_MODELS = frozenset({"decode", "prefill", "moe"})
_ALL = _MODELS | {"quantize"}
FITS: Mapping[str, Fit] = {
    "folder": Fit(label="FOLDER", subjects=_MODELS, kind="folder"),
    "tp": Fit(label="--tp", subjects=_MODELS, kind="folder"),
    "shape": Fit(label="--shape", subjects=_ALL, kind="synthetic"),
    "scheme": Fit(label="--scheme", subjects=_ALL, kind="synthetic"),
    "group_size": Fit(label="--group-size", subjects=_ALL, kind="synthetic", needs="scheme"),
    "dtype": Fit(label="--dtype", subjects=_MODELS),
    "slots": Fit(label="--slots", subjects=frozenset({"decode"})),
    "context": Fit(label="--context", subjects=frozenset({"decode"})),
    "steps": Fit(label="--steps", subjects=frozenset({"decode"})),
    "tokens": Fit(label="--tokens", subjects=frozenset({"prefill"})),
}


@click.command("bench", epilog=EPILOG)
@click.argument("what", type=click.Choice(["decode", "prefill", "moe", "quantize"]))
@click.argument("folder", type=PATH, required=False)
@click.option("--shape", metavar="NAME", help="A synthetic model instead of FOLDER: m1, m1-tp8 or small.")
@click.option("--dtype", type=click.Choice(DTYPES), default=None, help="Of a model. Default: bfloat16 on cuda, float32 on cpu.")
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

    FOLDER is a checkpoint (computed in --tp ranks) or an artifact; without it a synthetic model is made, of --shape and --scheme.
    Ceilings (copy bandwidth, matrix products) are measured on the same device: "of ceiling" is the time that the least bytes and
    operations take, over the time taken. An option that what is measured has no use for is an error.
    """
    own = {"folder": folder, "shape": shape, "dtype": dtype, "slots": slots, "context": context, "steps": steps, "tokens": tokens}
    with session("bench", flags) as (settings, console):
        check_fit(what, {name for name, value in {**flags, **own}.items() if name in FITS and value is not None}, settings)
        import torch

        from mxconv.bench import report
        from mxconv.dispatch import open_device

        device = open_device(settings.device)
        standard = SIZES[device.type]
        usual = "bfloat16" if device.type == "cuda" or what == "quantize" else "float32"
        scheme = settings.scheme if folder is None and settings.stated("scheme") else None
        chosen = report.Options(
            what=what, folder=folder, shape=shape or ("m1-tp8" if device.type == "cuda" else "small"), scheme=scheme,
            group_size=settings.group_size, tp=settings.tp, device=device, dtype=getattr(torch, dtype or usual),
            slots=slots or standard[0], context=context or standard[1], steps=steps or standard[2], tokens=tokens or standard[3],
        )  # fmt: skip
        report.run(chosen, console)
        return 0


def check_fit(what: str, given: set[str], settings: Settings) -> None:
    """Raise UsageError for options `given` on the command line that measuring `what` has no use for.

    Settings from elsewhere are for whatever has a use for them.
    """
    of_folder = "folder" in given and what in FITS["folder"].subjects
    kind, words = ("folder", "a folder's model") if of_folder else ("synthetic", "a synthetic model")
    useful = [name for name, fit in FITS.items() if what in fit.subjects and fit.kind in (None, kind)]
    useless = [FITS[name].label for name in FITS if name in given and name not in useful]
    if useless:
        expected = " ".join(FITS[name].label for name in useful)
        raise UsageError(f"bench {what} of {words} has no use for {', '.join(useless)}", expected=f"any of {expected}")
    for name in sorted(given):
        needs = FITS[name].needs
        if needs is not None and not settings.stated(needs):
            raise UsageError(f"{FITS[name].label} says nothing without {FITS[needs].label}", hint=f"add {FITS[needs].label}")
