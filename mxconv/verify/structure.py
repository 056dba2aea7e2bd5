"""The artifact's files, headers and config against its manifest, its source, and the runtime's own expectation.

Nothing of the weights is read here. What is wrong is found by comparing statements: the manifest's, the headers', the config's,
the source's config, and the names and shapes that the runtime's loader works out for itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mxconv.artifact import Manifest, check_artifact, missing_files
from mxconv.artifact.names import JOURNAL_NAME, MANIFEST_NAME, RUN_LOG_NAME
from mxconv.artifact.tree import walk
from mxconv.checkpoint import Shards, rank_folders, read_shards
from mxconv.config import FULL, ModelConfig
from mxconv.errors import MxconvError
from mxconv.progress import Progress
from mxconv.runtime import Weights
from mxconv.verify.findings import Finding, from_error

CHECKS = (
    "files", "headers", "tensors", "config", "consumer config", "tokenizer and chat template", "embedding rows",
)  # fmt: skip

# Fields of ModelConfig → config.json key, per dialect; a field without an entry is a key of the same name.
_KEYS: Mapping[str, Mapping[str, str]] = {
    "minimax-m1": {
        "layer_types": "attn_type_list",
        "full_attention_alpha": "layernorm_full_attention_alpha", "full_attention_beta": "layernorm_full_attention_beta",
        "linear_attention_alpha": "layernorm_linear_attention_alpha", "linear_attention_beta": "layernorm_linear_attention_beta",
        "mlp_alpha": "layernorm_mlp_alpha", "mlp_beta": "layernorm_mlp_beta",
    },
    "minimax": {
        "full_attention_alpha": "full_attn_alpha_factor", "full_attention_beta": "full_attn_beta_factor",
        "linear_attention_alpha": "linear_attn_alpha_factor", "linear_attention_beta": "linear_attn_beta_factor",
        "mlp_alpha": "mlp_alpha_factor", "mlp_beta": "mlp_beta_factor",
        "rotary_dim": "rope_parameters", "rope_theta": "rope_parameters",
    },
}  # fmt: skip
_COMMON_KEYS = {
    "num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok", "eos_token_ids": "eos_token_id",
    "shared_intermediate_sizes": "shared_intermediate_size",
}  # fmt: skip
# How a config says it, not what it says: these may differ between dialects.
_SPELLING = frozenset(("dialect", "model_type", "rope_permuted", "rotary_dim_stated", "block_size", "raw"))


def look_at_files(root: Path, manifest: Manifest, *, hash_files: bool, progress: Progress) -> list[Finding]:
    """Files against the manifest: presence and size, or every byte; and files that it does not list."""
    if hash_files:
        problems = check_artifact(root, manifest, progress=progress).problems
    else:
        problems = tuple(missing_files(root, manifest))
        known = manifest.files.keys() | {MANIFEST_NAME, RUN_LOG_NAME, JOURNAL_NAME}
        for path in sorted(set(walk(root)) - known):
            problems += (MxconvError("file is not in the manifest", where=root / path),)
    return [finding for problem in problems for finding in from_error(problem, "files")]


def rank_shards(root: Path) -> list[Shards]:
    """The headers of each rank, in order (of the only set of files for one rank)."""
    return [read_shards(folder) for folder in rank_folders(root) or (root,)]


def look_at_headers(root: Path, manifest: Manifest, ranks: list[Shards]) -> Iterator[Finding]:
    """Headers and indexes that contradict each other or the manifest."""
    for rank, shards in enumerate(ranks):
        for problem in shards.problems:
            yield from (dataclasses.replace(finding, rank=rank) for finding in from_error(problem, "headers"))
        stated: dict[str, tuple[str, tuple[int, ...], str]] = {}
        for fact in manifest.files.values():
            if (root / fact.path).parent == shards.folder:
                stated |= {name: (tensor.dtype, tensor.shape, fact.path) for name, tensor in fact.tensors.items()}
        for name in sorted(stated.keys() | shards.tensors.keys()):
            found = _stored(root, shards, name)
            if stated and stated.get(name) != found:
                yield Finding(
                    check="headers", what="the manifest says otherwise", tensor=name, rank=rank, expected=_words(stated.get(name)),
                    got=_words(found),
                )  # fmt: skip


def _stored(root: Path, shards: Shards, name: str) -> tuple[str, tuple[int, ...], str] | None:
    tensor = shards.tensors.get(name)
    if tensor is None:
        return None
    return tensor.dtype, tensor.shape, str(shards.folder.relative_to(root) / shards.files[tensor.file].relative)


def _words(fact: tuple[str, tuple[int, ...], str] | None) -> str:
    return "absent" if fact is None else f"{fact[0]} {list(fact[1])} in {fact[2]}"


def look_at_tensors(weights: Weights, ranks: list[Shards]) -> Iterator[Finding]:
    """Tensors that the runtime does not expect, and experts kept unquantized that the config does not mention.

    That every expected tensor is there in its shape and dtype was seen when the weights were opened.
    """
    for rank, shards in enumerate(ranks):
        for name in sorted(shards.tensors.keys() - weights.expected_tensors(rank).keys()):
            yield Finding(check="tensors", what="the model has no such tensor", tensor=name, rank=rank)
    if weights.scheme is None:
        return
    block = weights.config.artifact or {}
    ignored = block.get("ignored_layers", [])
    if not isinstance(ignored, list):
        yield Finding(check="config", what="is no list of layers", key="mxconv.ignored_layers", got=repr(ignored))
        return
    for layer in range(weights.config.num_layers):
        experts = [name for name in weights.names(layer) if name.startswith("experts.")]
        for rank in range(weights.tp):
            kept = [name for name in experts if not weights.stored(layer, name, rank)[0].endswith("quant_weight")]
            if bool(kept) != (layer in ignored) or len(kept) not in (0, len(experts)):
                yield Finding(
                    check="tensors", rank=rank, key="mxconv.ignored_layers",
                    what=f"{len(kept)} of {len(experts)} expert projections of layer {layer} are not quantized",
                    expected=f"all of them in layers {ignored}, none in others",
                )  # fmt: skip


def look_at_config(artifact: ModelConfig, source: ModelConfig, origin: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Every setting that shapes the model, against the source's; `origin` is the source's config as the manifest keeps it."""
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(artifact, field.name), getattr(source, field.name)
        if field.name in _SPELLING or ours == theirs:
            continue
        key = _KEYS.get(artifact.dialect, {}).get(field.name) or _COMMON_KEYS.get(field.name, field.name)
        yield Finding(check="config", what="differs from the source", key=key, expected=_value(theirs), got=_value(ours))
    # A source that is an artifact itself passes on the config of the checkpoint that it was made from.
    if origin is not None and source.artifact is None and dict(origin) != dict(source.raw):
        key = min(key for key in origin.keys() | source.raw.keys() if origin.get(key) != source.raw.get(key))
        yield Finding(
            check="config", what="the manifest keeps another source's config: was this artifact made from this source?",
            file=MANIFEST_NAME, key=f"source.config.{key}", expected=repr(source.raw.get(key)), got=repr(origin.get(key)),
        )  # fmt: skip


def _value(value: object) -> str:
    if isinstance(value, tuple) and value and all(isinstance(item, str) for item in value):
        full = [index for index, kind in enumerate(value) if kind == FULL]
        return f"{len(value)} layers, softmax at {full}"
    return repr(list(value) if isinstance(value, tuple) else value)
