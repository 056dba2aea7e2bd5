"""The demo: inspect, quantize, verify and generate with the bundled model, each by the function that its command calls."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path

from mxconv.console import Console
from mxconv.data import demo_model
from mxconv.draw import duration, size
from mxconv.errors import EXIT_OK, MxconvError, OutputConflict
from mxconv.execute import RunOptions, execute, prepare
from mxconv.inspection import inspect_prepared
from mxconv.plan import Request
from mxconv.quantize.schemes import get_scheme
from mxconv.runtime import generate, load
from mxconv.settings import Settings
from mxconv.text import Tokenizer
from mxconv.verify import Options, Report, verify
from mxconv.verify.logits import SERVED

SCHEME, TP = "w4afp8", 2
PROMPT = "def add(self, value):\n"
TOKENS = 48


def run_demo(console: Console, output: Path | None, settings: Settings) -> int:
    """Run the demo in `output`, or in a temporary folder of its own; the exit code of its verification."""
    began = time.monotonic()
    source = demo_model()
    with ExitStack() as stack:
        if output is None:
            out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mxconv-demo-"))) / "out"
        elif output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise OutputConflict("the output folder is not empty", where=output, hint="choose another folder")
        else:
            out = output
        prepared = prepare(source, Request(tp=TP, scheme=get_scheme(SCHEME)))
        console.line(f"$ mxconv inspect {source} --scheme {SCHEME} --tp {TP}")
        inspect_prepared(prepared.source, prepared.plan, workers=settings.workers, memory_bytes=settings.memory, output=out).render(
            console
        )
        console.line()
        console.line(f"$ mxconv quantize {source} {out} --scheme {SCHEME} --tp {TP}")
        result = execute(prepared, out, RunOptions(workers=settings.workers, memory_bytes=settings.memory), console)
        written = sum(fact.size_bytes for fact in result.manifest.files.values())
        console.line(f"{size(written)} in {duration(result.seconds)}, manifest {result.manifest.sha256[:16]}")
        console.line()
        console.line(f"$ mxconv verify {out} --source {source}")
        report = verify(out, Options(source=source), console)
        report.render(console)
        _draw_layers(report, console)
        console.line()
        texts = _generate(source, out, console)
        seconds = time.monotonic() - began
        console.line()
        console.line(f"demo done in {duration(seconds)}" + (f"; the artifact is in {output}" if output else ""))
        console.document("demo", {"verify": report.document(), "texts": texts, "seconds": seconds})
        if not report.ok:
            return report.exit_code
    return EXIT_OK


def _draw_layers(report: Report, console: Console) -> None:
    """Each layer's hidden-state error as a bar."""
    errors = report.section("logits").figures["layers"][SERVED]
    console.line()
    console.chart("relative error of the hidden states after each layer", [f"  layer {i}" for i in range(len(errors))], errors)


def _generate(source: Path, artifact: Path, console: Console) -> dict[str, str]:
    """Greedy text of both sides, one under the other, and how far they agree."""
    tokenizer = Tokenizer.open(source)
    if tokenizer is None:
        raise MxconvError("the bundled model has lost its tokenizer")
    prompt = tokenizer.encode(PROMPT)
    ids: dict[str, list[int]] = {}
    for label, folder in (("bf16", source), (SCHEME, artifact)):
        console.line(f"$ mxconv generate {folder} --prompt {PROMPT!r} --max-tokens {TOKENS}")
        ids[label] = list(generate(load(folder), prompt, max_tokens=TOKENS, eos_ids=tokenizer.eos_ids or None))
    sides = [(PROMPT + tokenizer.decode(made)).splitlines() for made in ids.values()]
    rows = [[f"  │ {line}" for line in row] for row in zip_longest(*sides, fillvalue="")]
    console.table(None, [f"  │ {label}" for label in ids], rows)
    one, two = ids.values()
    same = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    console.line(f"the first {same} of {len(one)} tokens are the same")
    return {label: tokenizer.decode(made) for label, made in ids.items()}

