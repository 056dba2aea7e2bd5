"""`mxconv calibrate`: statistics of expert inputs as a file, for the static schemes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mxconv.commands.common import PATH, options, session
from mxconv.errors import OutputConflict

EPILOG = """\b
Examples:
  mxconv calibrate MiniMax-M1 statistics --calibration text.txt
  mxconv quantize  MiniMax-M1 out --scheme w4a8 --tp 8 --statistics statistics
"""


@click.command("calibrate", epilog=EPILOG)
@click.argument("source", type=PATH)
@click.argument("output", type=PATH)
@options("calibration", "drop", "keep_decay", "device")
def command(source: Path, output: Path, keep_decay: bool | None, **flags: Any) -> int:
    """Run SOURCE on calibration text and write statistics.json and calibration.npy into the new folder OUTPUT."""
    with session("calibrate", flags, stream=True) as (settings, console):
        from mxconv.calibrate.observe import calibrate
        from mxconv.calibrate.tokens import load_tokens
        from mxconv.execute.jobs import store_statistics
        from mxconv.source import open_source

        if output.exists() and any(output.iterdir()) if output.is_dir() else output.exists():
            raise OutputConflict("the output folder is not empty", where=output, hint="choose another folder")
        opened = open_source(source, drop=settings.drop)
        opened.require_weights()
        ids = load_tokens(source, settings.calibration, opened.config.vocab_size)
        statistics = calibrate(
            source, ids, source_digest=opened.headers_digest(), device=settings.device, keep_decay=bool(keep_decay),
            progress=console,
        )  # fmt: skip
        output.mkdir(parents=True, exist_ok=True)
        store_statistics(output, statistics, ids, statistics.digest)
        console.line(f"{output}: {statistics.windows} windows of {statistics.window} tokens, statistics {statistics.digest[:16]}")
        if statistics.unseen:
            listed = ", ".join(f"layer {layer} expert {expert}" for layer, expert in statistics.unseen[:12])
            console.warn(f"{len(statistics.unseen)} experts saw no token and take their layer's largest absmax: {listed}")
        console.document(
            "calibrate",
            {
                "output": output, "sha256": statistics.digest, "tokens_sha256": statistics.tokens_digest,
                "windows": statistics.windows, "window": statistics.window, "unseen": [list(pair) for pair in statistics.unseen],
            },
        )  # fmt: skip
        return 0
