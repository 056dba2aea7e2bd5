"""Making a plan: source headers and a request in, every output byte accounted for, no weight read."""

from __future__ import annotations

import fnmatch
import gc
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mxconv.config import LINEAR
from mxconv.errors import MxconvError, UsageError, raise_all
from mxconv.mapping.bind import Bound
from mxconv.mapping.parameters import Parameter
from mxconv.placement import PlacedFile, deal, place_file
from mxconv.plan.decay_units import check_units, decay_units
from mxconv.plan.experts import quantize_units
from mxconv.plan.pieces import copy_units
from mxconv.plan.targets import Target, make_target, request_problems, target_layout
from mxconv.plan.values import PLAN_VERSION, GroupSize, Plan, Request, Unit, digest, placement_document, plan_document
from mxconv.source import Source
from mxconv.tensors import TensorSpec

_DIGITS = re.compile(r"(\d+)")
GROUP_ORDER = ("embedding", "attention", "lightning", "router", "experts", "shared", "norm", "decay")


@contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection: half a million values that all stay would be walked over and over (a third of the time)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_collector_paused()
def build_plan(source: Source, request: Request) -> Plan:
    """The plan of `request` on `source`.

    Raises every problem of the source and of the request together (`Problems`); without problems the plan is complete:
    running it can only fail on bytes that nobody has read yet, or on the machine.
    """
    layout, _ = target_layout(source, request)
    ignored, ignore_problems = ignored_layers(source, request)
    problems = [*source.problems, *request_problems(source, request, layout), *ignore_problems]
    raise_all(problems)
    quantized = [layer for layer in range(source.config.num_layers) if layer not in ignored] if request.scheme is not None else []
    kept = tuple(p for p in source.parameters if p.expert is None or p.layer not in set(quantized))
    target = make_target(source, request, kept, ignored)
    units = tuple(_units(source, request, target, quantized))
    files, rank_files, file_of = _place(units, request.tp, target)
    numerics = _numerics(source, request, target, ignored)
    placement = placement_document(target.layout, request.tp, files)
    document = plan_document(numerics=numerics, placement=placement, units=units, config=target.config)
    return Plan(
        request=request, layout=target.layout, source_digest=source.headers_digest(), source_summary=summary(source),
        config=target.config, config_text=target.config_text, target=target.model, files=files,
        rank_files=rank_files, file_of=file_of, units=units,
        groups=group_sizes(source, units), notes=(*source.notes, *_notes(source, request, ignored)),
        dropped=source.dropped, ignored_layers=ignored, numerics=numerics, numerics_digest=digest(numerics),
        placement_digest=digest(placement), index_metadata=target.index_metadata, with_index=target.with_index,
        digest=digest(document),
    )  # fmt: skip


def ignored_layers(source: Source, request: Request) -> tuple[tuple[int, ...], list[MxconvError]]:
    """Layers whose experts `--ignore` keeps whole, and the patterns that name no expert or only some of a layer."""
    experts: dict[int, list[str]] = defaultdict(list)
    for param in source.parameters:
        if param.expert is not None and param.layer is not None:
            experts[param.layer] += [c.name for c, _ in source.bound.holders.get(param.name, ())]
    layers: set[int] = set()
    problems: list[MxconvError] = []
    for pattern in request.ignore:
        hits = {layer: sum(fnmatch.fnmatchcase(name, pattern) for name in names) for layer, names in experts.items()}
        if request.scheme is None or not any(hits.values()):
            problems.append(
                UsageError(
                    "--ignore matches no tensor that would be quantized", got=pattern, hint="give a glob of expert tensor names"
                )
            )
        partly = [layer for layer, count in hits.items() if 0 < count < len(experts[layer])]
        if partly:
            problems.append(
                UsageError(
                    f"--ignore {pattern} keeps some experts of layer {partly[0]} and not others", expected="whole layers",
                    hint=f"--ignore 'model.layers.{partly[0]}.*' keeps that layer",
                )
            )  # fmt: skip
        layers |= {layer for layer, count in hits.items() if count and count == len(experts[layer])}
    return tuple(sorted(layers)), problems


def _units(source: Source, request: Request, target: Target, quantized: Sequence[int]) -> Iterable[Unit]:
    yield from check_units(source)
    groups = {}
    for container in target.containers:
        found = target.table.match(container.name)
        if found is not None:
            rule, numbers = found
            linear = "l" in numbers and source.config.layer_types[numbers["l"]] == LINEAR
            groups[container.name] = "lightning" if rule.group == "attention" and linear else rule.group
    yield from copy_units(target.containers, source.bound, groups)
    if request.scheme is not None:
        yield from quantize_units(source.config, request.scheme, source.bound, request.tp, quantized)
    if target.table.rope_permuted:
        yield from decay_units(target.model, target.weight_map)


def natural(name: str) -> tuple[object, ...]:
    """Sort key that orders numbers in names as numbers."""
    return tuple(int(piece) if piece.isdigit() else piece for piece in _DIGITS.split(name))


def _place(
    units: Iterable[Unit], ranks: int, target: Target
) -> tuple[tuple[PlacedFile, ...], tuple[tuple[int, ...], ...], dict[tuple[int, str], int]]:
    """Deal the output tensors of every rank to files; rebuilt checkpoints get the files of their weight map."""
    tensors: list[dict[str, TensorSpec]] = [{} for _ in range(ranks)]
    for unit in units:
        for output in unit.outputs:
            tensors[output.rank][output.spec.name] = output.spec
    files: list[PlacedFile] = []
    rank_files = []
    for rank, specs in enumerate(tensors):
        if target.weight_map is not None:
            together: dict[str, list[TensorSpec]] = defaultdict(list)
            for name, spec in specs.items():
                together[target.weight_map[name]].append(spec)
            placed = tuple(place_file(path, group) for path, group in sorted(together.items()))
        else:
            ordered = [specs[name] for name in sorted(specs, key=natural)]
            placed = deal(ordered, f"rank{rank}" if ranks > 1 else "", target.table.first_file)
        rank_files.append(tuple(range(len(files), len(files) + len(placed))))
        files += placed
    file_of = {
        (rank, tensor.name): index
        for rank, indexes in enumerate(rank_files)
        for index in indexes
        for tensor in files[index].tensors
    }
    return tuple(files), tuple(rank_files), file_of


def _numerics(source: Source, request: Request, target: Target, ignored: tuple[int, ...]) -> dict[str, Any]:
    """What decides the values of an artifact, whatever its ranks and files."""
    if source.manifest is not None:
        origin: dict[str, Any] = {"artifact": source.manifest.body["plan"]["numerics_digest"]}
    else:
        tensors = {name: [spec.dtype, list(spec.shape)] for name, spec in source.specs[0].items()}
        origin = {"config": dict(source.config.raw), "tensors_sha256": digest(tensors)}
    return {
        "version": PLAN_VERSION,
        "source": origin,
        "dialect": target.layout,
        "scheme": None if request.scheme is None else request.scheme.block(),
        "ignored_layers": list(ignored),
        "dropped": dict(source.dropped),
        "keep_decay": request.keep_decay,
        "calibration": request.calibration,
    }


def _notes(source: Source, request: Request, ignored: tuple[int, ...]) -> list[str]:
    notes = []
    if target_layout(source, request)[0] == "fastdeploy":
        notes.append("no released engine loads this layout for MiniMax-M1 as it is: docs/layouts.md says what each consumer does")
    if source.tied_head_stored:
        notes.append("lm_head.weight is stored beside tied embeddings: it must equal the embedding, and is not stored twice")
    buffers = sum(reason.startswith("a decay buffer") for reason in source.dropped.values())
    if buffers:
        notes.append(f"{buffers} decay buffers: compared with the model's formula when weights are read, then dropped")
    if ignored:
        notes.append(
            f"{len(ignored)} layers keep their experts unquantized (--ignore): the fastdeploy consumer has one moe_quant_type for "
            "all layers and does not load such a mixture"
        )
    if request.scheme is not None and request.scheme.name == "tensor_wise_fp8":
        notes.append("tensor_wise_fp8 experts do not load in FastDeploy since its #3547 (2025-08)")
    if request.scheme is not None and request.scheme.name == "block_wise_fp8":
        notes.append("block_wise_fp8 needs FD_USE_DEEP_GEMM=1 in FastDeploy")
    return notes


def summary(source: Source) -> dict[str, Any]:
    """The source in a few numbers."""
    stored = sum(spec.size_bytes for specs in source.specs for spec in specs.values())
    return {
        "path": str(source.root),
        "dialect": source.table.name,
        "model_type": source.config.model_type,
        "layers": source.config.num_layers,
        "linear_layers": sum(kind == LINEAR for kind in source.config.layer_types),
        "experts": source.config.num_experts,
        "experts_per_token": source.config.experts_per_token,
        "parameters": sum(_elements(param) for param in source.parameters),
        "files": sum(len(shards.files) or len(set((shards.index or {}).values())) for shards in source.ranks),
        "tensors": sum(len(specs) for specs in source.specs),
        "bytes": stored,
        "present": source.present,
    }


def _elements(param: Parameter) -> int:
    total = 1
    for n in param.shape:
        total *= n
    return total


def group_sizes(source: Source, units: Iterable[Unit]) -> tuple[GroupSize, ...]:
    """Tensors, parameters and bytes of each group, before and after."""
    after: dict[str, int] = defaultdict(int)
    becomes: dict[str, str] = {}
    for unit in units:
        after[unit.group] += sum(output.size_bytes for output in unit.outputs)
        if unit.op == "quantize":
            becomes[unit.group] = unit.outputs[0].spec.dtype
    return tuple(
        GroupSize(
            group=group, tensors=len(names), parameters=elements, dtypes=tuple(sorted(dtypes)), source_bytes=size,
            target_bytes=after[group], becomes=becomes.get(group, "keep"),
        )
        for group, (names, elements, dtypes, size) in source_groups(source.bound, source).items()
    )  # fmt: skip


def source_groups(bound: Bound, source: Source) -> Mapping[str, tuple[set[str], int, set[str], int]]:
    """Group → (tensor names, parameters, dtypes, bytes) of the source."""
    found: dict[str, list[Any]] = {}
    for container in bound.containers:
        rule = bound.rules[container.name]
        match = source.table.match(container.name)
        linear = match is not None and "l" in match[1] and source.config.layer_types[match[1]["l"]] == LINEAR
        group = "lightning" if rule.group == "attention" and linear else rule.group
        entry = found.setdefault(group, [set(), 0, set(), 0])
        entry[0].add(container.name)
        entry[1] += sum(_room(part.box) for part in container.parts)
        entry[2].add(container.dtype)
        entry[3] += container.size_bytes
    return {group: tuple(found[group]) for group in GROUP_ORDER if group in found}


def _room(box: Iterable[tuple[int, int]]) -> int:
    total = 1
    for start, stop in box:
        total *= stop - start
    return total
