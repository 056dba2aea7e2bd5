"""What a request writes: the containers of the target form, its config.json, and whether this model fits into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mxconv.config import ModelConfig, parse_config
from mxconv.errors import MalformedInput, MxconvError, UsageError
from mxconv.mapping.bind import container_of, divisible, lay_out
from mxconv.mapping.containers import Container
from mxconv.mapping.fastdeploy import fastdeploy_config
from mxconv.mapping.minimax import minimax_config, minimax_problems
from mxconv.mapping.minimax_m1 import m1_config
from mxconv.mapping.parameters import Parameter
from mxconv.mapping.rules import Table
from mxconv.mapping.tables import TABLES
from mxconv.plan.experts import quantize_problems
from mxconv.plan.values import Request
from mxconv.quantize.schemes import Scheme
from mxconv.source import TIED_HEAD, Source

BLOCK_VERSION = 1
HIGHEST_TP = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The form that a request writes. `weight_map` is set where the files of the source's own form are rebuilt."""

    layout: str
    table: Table
    config: Mapping[str, Any]
    model: ModelConfig
    containers: tuple[Container, ...]
    weight_map: Mapping[str, str] | None
    index_metadata: Mapping[str, Any]
    with_index: bool
    config_text: str | None = None
    """config.json as the source spelled it, where its own form is rebuilt."""


def target_layout(source: Source, request: Request) -> tuple[str, bool]:
    """(layout, whether it is the source's own form): None in the request means the form that the artifact was made from."""
    own = source.manifest.body["source"]["dialect"] if source.manifest is not None else source.config.dialect
    layout = request.layout or own
    if layout not in TABLES:
        raise UsageError(f"unknown layout {layout!r}", expected=" or ".join(TABLES))
    return layout, source.manifest is not None and layout == own


def request_problems(source: Source, request: Request, layout: str) -> list[MxconvError]:
    """Everything that keeps `request` from being planned, with the valid TP sizes where a size is the reason."""
    table = TABLES[layout]
    problems: list[MxconvError] = []
    if request.scheme is not None and layout != "fastdeploy":
        problems.append(UsageError(f"layout {layout} holds no quantized experts", expected="layout fastdeploy"))
    if request.scheme is not None and source.dense_mlp:
        problems.append(
            UsageError("this model has a dense mlp and no routed experts to quantize", hint="mxconv convert keeps it as it is")
        )
    if not table.ranked and request.tp != 1:
        problems.append(UsageError(f"layout {layout} has no tensor-parallel ranks", expected="--tp 1", got=f"--tp {request.tp}"))
    elif request.tp < 1:
        problems.append(UsageError("--tp must be at least 1", got=request.tp))
    elif reasons := tp_reasons(source, table, request.scheme, request.tp):
        valid = valid_tp(source, table, request.scheme)
        reason = "; ".join(reasons)
        if valid:
            problems.append(
                UsageError(f"tp {request.tp} does not divide this model: {reason}", expected=f"tp {' or '.join(map(str, valid))}")
            )
        else:
            problems.append(UsageError(f"no tp fits this model: {reason}"))
    if layout == "minimax":
        problems += minimax_problems(source.config, dense_mlp=source.dense_mlp)
    return problems


def tp_reasons(source: Source, table: Table, scheme: Scheme | None, ranks: int) -> list[str]:
    """Why `ranks` ranks do not work, in words; empty when they do."""
    if not table.ranked:
        return []
    reasons = [f"{label} cannot be cut into {ranks}" for label in divisible(table, source.config, source.parameters, ranks)]
    return reasons + (quantize_problems(source.config, scheme, ranks) if scheme is not None else [])


def valid_tp(source: Source, table: Table, scheme: Scheme | None) -> list[int]:
    """TP sizes up to 64 that divide everything that must divide."""
    return [ranks for ranks in range(1, HIGHEST_TP + 1) if not tp_reasons(source, table, scheme, ranks)]


def quantization_fields(scheme: Scheme) -> dict[str, Any]:
    """`quantization_config` of the fastdeploy layout without its constant first key (formats.md §2)."""
    fields: dict[str, Any] = {"moe_quant_type": scheme.quant_type}
    if scheme.dynamic_flag is not None:
        fields["moe_dynamic_quant"] = scheme.dynamic_flag
    block = max(scheme.rotation.values())
    if block:
        fields["hadamard_block_size"] = block
    return {**fields, "is_permuted": scheme.is_permuted}


def artifact_block(request: Request, layout: str, ignored_layers: tuple[int, ...]) -> dict[str, Any]:
    """The `mxconv` block of an artifact's config.json."""
    block: dict[str, Any] = {"version": BLOCK_VERSION, "layout": layout, "tp": request.tp}
    if request.scheme is not None:
        block |= request.scheme.block()
        block["ignored_layers"] = list(ignored_layers)
    else:
        block |= {
            "scheme": None, "granularity": None, "group_size": None, "rotation": None, "rotation_words": "none",
            "summary": "every weight as the source has it",
        }  # fmt: skip
    return block


def make_target(source: Source, request: Request, kept: tuple[Parameter, ...], ignored_layers: tuple[int, ...]) -> Target:
    """The containers and the config that `request` writes for the parameters `kept` (those not quantized)."""
    layout, own = target_layout(source, request)
    table = TABLES[layout]
    if own and source.manifest is not None:
        return _own_form(source, table, source.manifest.body["source"])
    block = artifact_block(request, layout, ignored_layers)
    if source.config.artifact is not None and "slopes" in source.config.artifact:
        block["slopes"] = source.config.artifact["slopes"]  # decay that was kept once is kept in every later form
    if layout == "fastdeploy":
        fields = quantization_fields(request.scheme) if request.scheme is not None else None
        config = fastdeploy_config(source.config, quantization=fields, block=block)
    elif layout == "minimax":
        config = {**minimax_config(source.config), "mxconv": block}
    else:
        config = {**{k: v for k, v in m1_config(source.config).items() if k not in _ARTIFACT_ONLY}, "mxconv": block}
    dtypes = {param.name: source.dtype_of(param.name) for param in kept}
    if source.manifest is not None:
        dtypes |= _original_dtypes(source.manifest.body["source"])
    containers = lay_out(table, source.config, kept, request.tp, dtypes)
    return Target(
        layout=layout, table=table, config=config, model=parse_config(config, "the config.json to be written"),
        containers=containers, weight_map=None, index_metadata={}, with_index=True,
    )  # fmt: skip


_ARTIFACT_ONLY = frozenset(("mxconv", "moe_num_experts", "is_quantized", "quantization_config"))


def _own_form(source: Source, table: Table, origin: Mapping[str, Any]) -> Target:
    """The checkpoint that an artifact was made from: its names, dtypes, files and config, as the manifest keeps them."""
    model = parse_config(origin["config"], "manifest.json: source.config")
    containers = []
    for name, dtype in origin["dtypes"].items():
        found = table.match(name)
        if found is None:
            raise MalformedInput("manifest names a tensor that its dialect does not have", where="manifest.json", got=name)
        rule, numbers = found
        if rule.dropped:
            continue
        container = container_of(rule, model, numbers.get("l"), numbers.get("e"), 0, 1, dtype)
        if container is None:
            raise MalformedInput("manifest names a tensor that cannot be laid out", where="manifest.json", got=name)
        if name == TIED_HEAD and model.tie_word_embeddings:
            container = _as_embedding(container)
        containers.append(container)
    return Target(
        layout=table.name, table=table, config=origin["config"], model=model, containers=tuple(containers),
        weight_map=origin["weight_map"], index_metadata=origin["index_metadata"], with_index=origin["with_index"],
        config_text=origin["config_text"],
    )  # fmt: skip


def _as_embedding(head: Container) -> Container:
    """A tied head that the source had stored anyway is written from the embedding that it equals."""
    return replace(head, parts=tuple(replace(part, parameter="embed") for part in head.parts))


def _original_dtypes(origin: Mapping[str, Any]) -> dict[str, str]:
    """Parameter → dtype in the checkpoint that an artifact was made from (its router may have been bf16)."""
    table, model = TABLES[origin["dialect"]], parse_config(origin["config"], "manifest.json: source.config")
    dtypes: dict[str, str] = {}
    for name, dtype in origin["dtypes"].items():
        found = table.match(name)
        if found is not None and found[0].holds:
            rule, numbers = found
            container = container_of(rule, model, numbers.get("l"), numbers.get("e"), 0, 1, dtype)
            dtypes |= {part.parameter: dtype for part in container.parts} if container is not None else {}
    return dtypes
