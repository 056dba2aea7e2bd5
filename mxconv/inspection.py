"""What `mxconv inspect` knows: what a checkpoint is, whether it is whole, and what a conversion of it would take.

Only headers and config are read. `Inspection` is the value; `render` and `document` show it to people and to machines.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxconv.artifact import Manifest, find_artifact
from mxconv.artifact.facts import require_facts
from mxconv.artifact.names import MANIFEST_NAME
from mxconv.config import ModelConfig, read_config
from mxconv.console import Console
from mxconv.documents import error_payload
from mxconv.draw import Column, count, plural, size
from mxconv.errors import EXIT_OK, MxconvError, UsageError
from mxconv.mapping.tables import TABLES
from mxconv.plan import Plan, Request, build_plan
from mxconv.plan.build import group_sizes, summary
from mxconv.plan.targets import tp_reasons, valid_tp
from mxconv.quantize.schemes import Scheme
from mxconv.source import Source, open_source

TP_SHOWN = (1, 2, 4, 8, 16)
# What comes on top of the units: a process with and without torch (240 and 42 MiB measured), and a large model's plan and headers.
BASE_BYTES, COPYING_BASE_BYTES = 350 << 20, 150 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A look at one checkpoint: `plan` when a request could be planned, else `failure` says why not."""

    source: Source
    summary: Mapping[str, Any]
    plan: Plan | None
    failure: MxconvError | None
    tp: Mapping[int, Sequence[str]]
    """TP size → why it does not work; empty when it does."""
    scheme: Scheme | None
    workers: int
    memory_bytes: int
    free_bytes: int | None

    @property
    def exit_code(self) -> int:
        """0, or the code of what is wrong."""
        return EXIT_OK if self.failure is None else self.failure.exit_code

    def document(self) -> dict[str, Any]:
        """JSON values."""
        found: dict[str, Any] = {
            "summary": dict(self.summary),
            "groups": [_group(g) for g in (self.plan.groups if self.plan else group_sizes(self.source, ()))],
            "tp": {str(n): {"ok": not reasons, "reasons": list(reasons)} for n, reasons in self.tp.items()},
            "notes": list(self.plan.notes if self.plan else self.source.notes) + advice(self.source),
            "dropped": dict(self.source.dropped),
            "problems": [] if self.failure is None else error_payload(self.failure)["problems"],
        }
        if self.plan is not None:
            found["plan"] = plan_facts(self.plan, self.workers, self.memory_bytes, self.free_bytes)
        return found

    def render(self, console: Console) -> None:
        """The report of architecture.md's example."""
        _render_summary(self.source, self.summary, console)
        _render_groups(self, console)
        console.line(tp_line(self.tp))
        if self.plan is not None:
            _render_plan(self, console)
        for note in [*(self.plan.notes if self.plan else self.source.notes), *advice(self.source)]:
            console.line(f"note: {note}")


def inspect_checkpoint(
    path: Path,
    request: Request,
    *,
    drop: Sequence[str] = (),
    workers: int = 1,
    memory_bytes: int = 1 << 30,
    output: Path | None = None,
) -> Inspection:
    """Look at `path` and plan `request` on it; failures of the plan are part of the result."""
    source = open_source(path, drop=drop)
    if request.layout is not None and request.layout not in TABLES:
        raise UsageError(f"unknown layout {request.layout!r}", expected=" or ".join(TABLES))
    plan: Plan | None = None
    failure: MxconvError | None = None
    try:
        plan = build_plan(source, request)
    except MxconvError as error:
        failure = error
    return _inspection(source, request, plan, failure, workers=workers, memory_bytes=memory_bytes, output=output)


def inspect_prepared(source: Source, plan: Plan, *, workers: int, memory_bytes: int, output: Path | None) -> Inspection:
    """The same look at a plan that is made already."""
    return _inspection(source, plan.request, plan, None, workers=workers, memory_bytes=memory_bytes, output=output)


def _inspection(
    source: Source, request: Request, plan: Plan | None, failure: MxconvError | None, *, workers: int, memory_bytes: int,
    output: Path | None,
) -> Inspection:  # fmt: skip
    table = TABLES[request.layout or source.config.dialect]
    shown = sorted({*TP_SHOWN, request.tp, *([] if not table.ranked else valid_tp(source, table, request.scheme)[:8])})
    reasons = {n: tp_reasons(source, table, request.scheme, n) for n in shown} if table.ranked else {1: []}
    return Inspection(
        source=source, summary=summary(source), plan=plan, failure=failure, tp=reasons, scheme=request.scheme,
        workers=workers, memory_bytes=memory_bytes, free_bytes=free_bytes(output),
    )  # fmt: skip


def free_bytes(output: Path | None) -> int | None:
    """Free bytes where the output will lie, None when nobody said where."""
    if output is None:
        return None
    folder = output
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:  # the run itself will say what is wrong there
        return None


def plan_facts(plan: Plan, workers: int, memory_bytes: int, free_bytes: int | None) -> dict[str, Any]:
    """The needs of a run: bytes, files, units, memory, disk, digests."""
    usable = max(1, min(workers, memory_bytes // max(1, plan.largest_unit_bytes)))
    scheme = plan.request.scheme
    return {
        "layout": plan.layout,
        "tp": plan.request.tp,
        "scheme": None if scheme is None else scheme.name,
        "bits_per_expert_weight": None if scheme is None else scheme.bits_per_weight,
        "output_bytes": plan.output_bytes,
        "rank_bytes": [sum(plan.files[i].size_bytes for i in indexes) for indexes in plan.rank_files],
        "files": len(plan.files),
        "tensors": sum(len(file.tensors) for file in plan.files),
        "units": len(plan.units),
        "read_bytes": plan.read_bytes,
        "largest_unit_bytes": plan.largest_unit_bytes,
        "workers": usable,
        "memory_bytes": (COPYING_BASE_BYTES if scheme is None else BASE_BYTES) + usable * plan.largest_unit_bytes,
        "disk_bytes": plan.output_bytes,
        "free_bytes": free_bytes,
        "digest": plan.digest,
        "numerics_digest": plan.numerics_digest,
        "placement_digest": plan.placement_digest,
        "ignored_layers": list(plan.ignored_layers),
    }


def needs_line(facts: Mapping[str, Any]) -> str:
    """`needs: disk … · memory … · reads …` of `plan_facts`."""
    disk = f"disk {size(facts['disk_bytes'])}" + ("" if facts["free_bytes"] is None else f" (free: {size(facts['free_bytes'])})")
    memory = f"memory about {size(facts['memory_bytes'])} with {facts['workers']} workers"
    return f"needs: {disk} · {memory} · reads {size(facts['read_bytes'])} once"


def tp_line(tp: Mapping[int, Sequence[str]]) -> str:
    """`tp 1 2 4 8 ok · tp 16 no: …`."""
    good = [str(n) for n, reasons in tp.items() if not reasons]
    bad = [f"tp {n} no: {reasons[0]}" for n, reasons in tp.items() if reasons]
    return " · ".join([f"tp {' '.join(good)} ok" if good else "no tp works", *bad[:2]])


def advice(source: Source) -> list[str]:
    """What a user of this checkpoint should know, from formats.md and model.md."""
    config, notes = source.config, []
    if config.dialect == "minimax" and not config.rotary_dim_stated:
        notes.append(
            f"config has no rotary_dim: rotary embeddings turn the whole head of {config.head_dim}. MiniMax-M1 turns half of it: "
            "if this is a copy of M1, its config lost rotary_dim, and every engine computes another model (KL .02)"
        )
    if config.dialect == "minimax" and config.rotary_dim < config.head_dim and not config.rope_permuted:
        notes.append(
            "stock transformers ignores rotary_dim and turns the whole head: it computes another model from this checkpoint; "
            "mxconv convert --layout minimax writes one that it computes right"
        )
    power = config.num_attention_heads & (config.num_attention_heads - 1) == 0
    if config.dialect == "minimax" and not power and "decay" not in " ".join(source.dropped.values()):
        notes.append("heads are no power of two: stock transformers computes other decay slopes than the original model")
    if beyond := [token for token in config.eos_token_ids if token >= config.vocab_size]:
        notes.append(f"end-of-sequence token {beyond[0]} lies outside the vocabulary of {config.vocab_size}")
    stop_files = ("generation_config.json", "tokenizer_config.json")
    if not config.eos_token_ids and not any((source.root / name).exists() for name in stop_files):
        notes.append("no file beside the weights names an end-of-sequence token: servers will not know when to stop")
    return notes


def _group(group: Any) -> dict[str, Any]:
    return {
        "group": group.group, "tensors": group.tensors, "parameters": group.parameters, "dtypes": list(group.dtypes),
        "source_bytes": group.source_bytes, "target_bytes": group.target_bytes, "becomes": group.becomes,
    }  # fmt: skip


def _render_summary(source: Source, facts: Mapping[str, Any], console: Console) -> None:
    config = source.config
    linear = facts["linear_layers"]
    experts = "dense mlp" if source.dense_mlp else f"{config.num_experts} experts, top-{config.experts_per_token}"
    console.title(
        f"{config.model_type} · {config.num_layers} layers ({linear} lightning, {config.num_layers - linear} softmax) · {experts}"
        f" · {count(facts['parameters'])} parameters"
    )
    here = any(shards.index for shards in source.ranks)
    missing = "" if source.present else " · only the index is here" if here else " · no shard is here"
    console.line(
        f"{plural(facts['files'], 'file')} · {plural(facts['tensors'], 'tensor')} · {size(facts['bytes'])} · "
        f"dialect {facts['dialect']}{missing}"
    )


def _render_groups(view: Inspection, console: Console) -> None:
    sides = ("left", "right", "right", "left", "right", "left", "right")
    columns = [Column("", "right" if side == "right" else "left") for side in sides]
    groups = view.plan.groups if view.plan else group_sizes(view.source, ())
    rows = []
    for group in groups:
        dtypes = "+".join(group.dtypes).lower()
        becomes, after = "", ""
        if view.plan is not None:
            becomes = f"→ {scheme_words(view.scheme)}" if group.becomes != "keep" and view.scheme else "  keep"
            after = size(group.target_bytes)
        rows.append(
            (
                f"  {group.group}",
                f"{group.tensors:,}",
                count(group.parameters),
                dtypes, size(group.source_bytes),
                becomes,
                after,
            )
        )
    console.table(None, columns, rows)


def scheme_words(scheme: Scheme) -> str:
    """`int4 g128`, `e4m3 128×128` …"""
    words = {"group": f"g{scheme.group_size}", "channel": "per channel", "block": "128×128", "tensor": "per tensor"}
    return f"{scheme.weight} {words[scheme.granularity]}"


def _render_plan(view: Inspection, console: Console) -> None:
    if view.plan is None:
        return
    facts = plan_facts(view.plan, view.workers, view.memory_bytes, view.free_bytes)
    ranks = sorted(set(facts["rank_bytes"]))
    each = size(ranks[-1]) if len(ranks) == 1 else f"{size(ranks[0])} to {size(ranks[-1])}"
    what = (
        "convert"
        if view.scheme is None
        else f"quantize {view.scheme.name} ({view.scheme.bits_per_weight:.2f} bits an expert weight)"
    )
    console.line(
        f"{what} to {facts['layout']}, tp {facts['tp']}: {plural(facts['tensors'], 'tensor')} in {plural(facts['files'], 'file')}, "
        f"{each} a rank, {size(facts['output_bytes'])} in all"
    )
    console.line(needs_line(facts))
    console.line(
        f"plan {facts['digest'][:16]} · numerics {facts['numerics_digest'][:16]} · placement {facts['placement_digest'][:16]}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactInspection:
    """A look at a finished artifact, from its manifest."""

    root: Path
    config: ModelConfig
    manifest: Manifest

    def document(self) -> dict[str, Any]:
        """JSON values."""
        body = self.manifest.body
        keys = ("layout", "tp", "scheme", "numeric_conventions", "ignored_layers", "dropped", "statistics", "warnings", "tool")
        weights = [fact for fact in self.manifest.files.values() if fact.tensors]
        return {
            "artifact": {key: body.get(key) for key in keys},
            "files": len(self.manifest.files),
            "weight_files": len(weights),
            "tensors": sum(len(fact.tensors) for fact in weights),
            "bytes": sum(fact.size_bytes for fact in self.manifest.files.values()),
            "plan_digest": self.manifest.plan_digest,
            "source": {key: body["source"][key] for key in ("dialect",)} | {"tensors": len(body["source"]["dtypes"])},
        }

    def render(self, console: Console) -> None:
        """A few lines and the conventions."""
        facts, body = self.document(), self.manifest.body
        console.title(f"mxconv artifact · {body['layout']} · tp {body['tp']} · {body['scheme'] or 'unquantized'}")
        console.line(
            f"{facts['weight_files']} weight files · {facts['tensors']:,} tensors · {size(facts['bytes'])} · made from "
            f"{facts['source']['dialect']}, {facts['source']['tensors']:,} tensors"
        )
        for name, value in (body["numeric_conventions"] or {}).items():
            console.line(f"  {name}: {value}")
        console.line(f"plan {self.manifest.plan_digest[:16]} · written by mxconv {body['tool']['version']}")
        for key, value in (body["warnings"] or {}).items():
            console.line(f"note: {key}: {value}")


def inspect_artifact(path: Path) -> ArtifactInspection | None:
    """The artifact at `path`, None when it is a source checkpoint. Raises IncompleteInput for an unfinished artifact."""
    manifest = find_artifact(path)  # before the config: an interrupted run has none yet, and says so
    config = read_config(path)
    if manifest is None or config.artifact is None:
        return None
    require_facts(manifest, str(path / MANIFEST_NAME))
    return ArtifactInspection(root=path, config=config, manifest=manifest)


__all__ = [
    "ArtifactInspection", "Inspection", "free_bytes", "inspect_artifact", "inspect_checkpoint", "inspect_prepared", "needs_line",
    "plan_facts",
]  # fmt: skip
