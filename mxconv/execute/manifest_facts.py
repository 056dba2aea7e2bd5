"""What an artifact's manifest says beside its files: plan, source, versions, numeric conventions in words and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxconv.artifact import Manifest
from mxconv.calibrate import Statistics
from mxconv.checkpoint import INDEX_NAME
from mxconv.errors import IntegrityError
from mxconv.execute.sidecars import CONFIG_NAME, SIDECAR_NAMES, Beside
from mxconv.plan.values import Plan
from mxconv.quantize.schemes import Scheme
from mxconv.source import Source
from mxconv.version import NUMERICS_VERSION, VERSION

_SCALES = {
    "group": "one float32 scale for {g} inputs of an output row: absmax of the (rotated) group",
    "channel": "one float32 scale an output row over the whole source row (all ranks): absmax of the (rotated) row",
    "block": "one float32 scale a block of 128 outputs × 128 inputs: absmax of the block / 448",
    "tensor": "one float32 scale a tensor (gate and up together, all ranks): absmax of the rotated tensor / 448",
}
_CODES = {
    "int4": "int4 codes −7..7 (−8 never), q = rint(fl(fl(w/scale)·7)) half to even, two's complement, packed along in, low nibble "
    "= even input; weight = q·weight_scale/7",
    "e4m3": "e4m3fn codes clamped to ±448, stored as int8 bytes; weight = q·weight_scale",
}
_ACTIVATIONS = {
    "static": "one calibrated scale a projection, activation_scale",
    "token": "absmax of each token over the rank's own slice, after the rotation",
    "token_group": "absmax of each token's runs of 128",
}


def conventions(scheme: Scheme) -> dict[str, Any]:
    """The scheme's arithmetic, for people and for independent decoders (formats.md §2, §5)."""
    rule = scheme.activation
    return {
        **scheme.block(),
        "codes": _CODES[scheme.weight],
        "code_range": [-7, 7] if scheme.weight == "int4" else [-448, 448],
        "scale": _SCALES[scheme.granularity].format(g=scheme.group_size),
        "scale_axes": scheme.scale_orientation,
        "zero": "a group, row, block or tensor of zeros has scale 1",
        "activation": f"{rule.code}, {_ACTIVATIONS[rule.scale]}; x ≈ xq·absmax/{rule.divisor:g}, half to even, "
        f"clamped to ±{rule.code_max:g}",
        "activation_scale": ("absmax/448" if rule.stored_divided else "absmax") if scheme.static else None,
        "method": "rtn",
    }


def source_record(source: Source, beside: Beside) -> Mapping[str, Any]:
    """Config, dtypes, weight map and index of the checkpoint that an artifact goes back to, bit for bit."""
    if source.manifest is not None:
        record: Mapping[str, Any] = source.manifest.body["source"]
        return record
    shards = source.ranks[0]
    files = {tensor.name: shards.files[tensor.file].relative for tensor in shards.tensors.values()}
    gone = {name for name, reason in source.dropped.items() if reason.startswith("dropped as asked")}
    names = sorted(name for name in files if name not in gone)
    return {
        "dialect": source.table.name,
        "config": dict(source.config.raw),
        "config_text": beside.config_text,
        "dtypes": {name: shards.tensors[name].dtype for name in names},
        "weight_map": {name: files[name] for name in names},
        "index_metadata": dict(shards.index_metadata),
        "with_index": shards.index is not None,
    }


RECORDED: Mapping[str, str] = {
    "config": CONFIG_NAME, "config_text": CONFIG_NAME,
    "weight_map": INDEX_NAME, "index_metadata": INDEX_NAME, "with_index": INDEX_NAME,
}  # fmt: skip
"""Key of a source record → the file of the source that it is of."""


def require_same_source(manifest: Manifest, source: Source, beside: Beside) -> None:
    """Raise IntegrityError when a small file of the source is not what the finished artifact of this plan was made with.

    The weights' headers are in the plan; whether their bytes are the same only reading all of them would tell.
    """
    then, now = manifest.body["source"], source_record(source, beside)
    changed = {file for key, file in RECORDED.items() if key in then and then[key] != now[key]}
    made_with = {name: fact.sha256 for name, fact in manifest.files.items() if name in SIDECAR_NAMES}
    copied = {name: file.sha256 for name, file in beside.copied.items()}
    changed |= {name for name in made_with.keys() | copied.keys() if made_with.get(name) != copied.get(name)}
    if changed:
        raise IntegrityError(
            "the source changed since this artifact was made", where=", ".join(sorted(changed)[:5]),
            hint="begin anew with --overwrite",
        )  # fmt: skip


def manifest_facts(
    plan: Plan, source: Source, beside: Beside, statistics: Statistics | None, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The keys of manifest.json that are not about files. No time, no host, no path: the same plan gives the same bytes."""
    request = plan.request
    return {
        "tool": {"name": "mxconv", "version": VERSION, "numerics": NUMERICS_VERSION},
        "layout": plan.layout,
        "tp": request.tp,
        "scheme": None if request.scheme is None else request.scheme.name,
        "numeric_conventions": None if request.scheme is None else conventions(request.scheme),
        "plan": {
            "numerics": dict(plan.numerics),
            "numerics_digest": plan.numerics_digest,
            "placement_digest": plan.placement_digest,
            "source_digest": plan.source_digest,
        },
        "request": {"ignore": list(request.ignore), "drop": list(request.drop), "keep_decay": request.keep_decay},
        "ignored_layers": list(plan.ignored_layers),
        "dropped": dict(plan.dropped),
        "statistics": None if statistics is None else _statistics(statistics),
        "warnings": dict(facts),
        "source": dict(source_record(source, beside)),
    }


def _statistics(statistics: Statistics) -> dict[str, Any]:
    return {
        "sha256": statistics.digest,
        "tokens_sha256": statistics.tokens_digest,
        "windows": statistics.windows,
        "window": statistics.window,
        "unseen_experts": [list(pair) for pair in statistics.unseen],
    }
