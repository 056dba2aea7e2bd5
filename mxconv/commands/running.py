"""What `convert` and `quantize` do once a job is prepared: report a dry run, or run it and say what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mxconv.commands.common import require_one, write_plan
from mxconv.console import Console
from mxconv.draw import duration, rate, size
from mxconv.execute import Prepared, RunOptions, execute
from mxconv.inspection import free_bytes, inspect_prepared, needs_line, plan_facts
from mxconv.settings import Settings


def run_job(prepared: Prepared, output: Path, settings: Settings, console: Console, flags: Mapping[str, Any]) -> int:
    """Run `prepared` into `output`, or only report on it with --dry-run."""
    require_one(flags["resume"], flags["overwrite"], flags["dry_run"])
    plan = prepared.plan
    write_plan(flags["plan_file"], plan.document())
    if flags["dry_run"]:
        view = inspect_prepared(prepared.source, plan, workers=settings.workers, memory_bytes=settings.memory, output=output)
        view.render(console)
        for check in [unit.id for unit in plan.units if not unit.outputs]:
            console.detail(f"skipped in a dry run, since it reads weights: {check}")
        skipped = sum(not unit.outputs for unit in plan.units)
        if skipped:
            console.line(f"note: {skipped} checks that read weights were skipped")
        if not prepared.source.present:
            console.line("note: the shards are not here; this plan cannot be run")
        console.document("plan", view.document())
        return 0
    for note in plan.notes:
        console.note(note)
    console.note(needs_line(plan_facts(plan, settings.workers, settings.memory, free_bytes(output))))
    options = RunOptions(
        workers=settings.workers, memory_bytes=settings.memory, resume=flags["resume"], overwrite=flags["overwrite"],
        log={"source": str(prepared.source.root.resolve()), "settings": settings.log()}, device=settings.device,
    )  # fmt: skip
    result = execute(prepared, output, options, console)
    for note in result.notes:
        console.warn(note)
    files = [fact for fact in result.manifest.files.values() if fact.tensors]
    written = sum(fact.size_bytes for fact in files)
    if result.checked:
        console.line(f"{output}: finished already; {len(files)} files checked against the manifest, all right")
    else:
        again = f" ({result.done_before} of {result.units} units were done before)" if result.done_before else ""
        console.line(
            f"{output}: {size(written)} in {len(files)} files, {duration(result.seconds)}, "
            f"read {rate(plan.read_bytes / max(result.seconds, 1e-9))}, {result.workers} workers{again}"
        )
        console.line(f"manifest {result.manifest.sha256[:16]} · plan {plan.digest[:16]}")
    console.document(
        "run",
        {
            "output": output, "checked": result.checked, "units": result.units, "done_before": result.done_before,
            "seconds": result.seconds, "workers": result.workers, "files": len(files), "bytes": written,
            "read_bytes": plan.read_bytes, "plan_digest": plan.digest, "manifest_sha256": result.manifest.sha256,
            "notes": [*plan.notes, *result.notes],
        },
    )  # fmt: skip
    return 0
