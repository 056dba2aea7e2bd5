"""Opening a folder for the runtime: what it is, whether it is whole, and whether it fits the request."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mxconv.checkpoint import ByteReader, Shards, StoredTensor, rank_folders, read_shards
from mxconv.config import LINEAR, ModelConfig, read_config
from mxconv.errors import IncompleteInput, MalformedInput, MxconvError, UsageError, printable, raise_all
from mxconv.quantize.schemes import FP8_BLOCK, Scheme, scheme_from_block
from mxconv.runtime import decay, lightning
from mxconv.runtime.coded import PACKED_CODES
from mxconv.runtime.expectation import differences
from mxconv.runtime.layouts import LAYOUTS
from mxconv.runtime.loader import StoredWeights, Weights
from mxconv.runtime.merged import MergedWeights
from mxconv.runtime.sizes import check_tp, vocabulary_rows
from mxconv.tensors import TORCH_NAMES

MANIFEST = "manifest.json"
VOCABULARY_BLOCK = 8192
log = logging.getLogger(__name__)


def open_weights(path: str | Path, *, tp: int | None = None, merge: bool = False, keep_decay: bool = False) -> Weights:
    """The weights of the checkpoint or artifact in folder `path`, files checked against the runtime's expectation.

    `tp`: ranks to simulate for a source (None: 1); an artifact with files for each rank has its own number. `merge` puts an
    artifact's ranks together into one. `keep_decay` takes stored decay rates where they differ from the formula.
    Raises UsageError (a tp that does not fit), MalformedInput, IncompleteInput (also: an artifact without manifest), Problems.
    """
    root = Path(path)
    config = read_config(root)
    block = config.artifact
    if block is None:
        if _unfinished(root):
            raise _no_manifest(root)
        weights = _source(root, config, 1 if tp is None else tp, keep_decay)
    else:
        weights = _artifact(root, config, block, tp, keep_decay)
    return MergedWeights(weights) if merge and weights.tp > 1 else weights


def _unfinished(root: Path) -> bool:
    """Whether the folder looks like an artifact that was never published."""
    journals = any(root.glob("*journal*")) or any(root.glob(".*.part"))
    return not (root / MANIFEST).is_file() and (journals or bool(rank_folders(root)))


def _no_manifest(root: Path) -> IncompleteInput:
    return IncompleteInput(
        f"the folder holds an artifact without {MANIFEST}: it was never finished", where=root,
        hint="run the same command again with --resume",
    )  # fmt: skip


def _artifact(root: Path, config: ModelConfig, block: Mapping[str, object], tp: int | None, keep_decay: bool) -> Weights:
    where = str(root / "config.json")
    if not (root / MANIFEST).is_file():
        raise _no_manifest(root)
    name, own = block.get("layout"), block.get("tp")
    if not isinstance(name, str) or name not in LAYOUTS:
        raise UsageError("the runtime does not read this layout", where=where, expected=" or ".join(LAYOUTS), got=repr(name))
    if not LAYOUTS[name].per_rank:
        return _source(root, config, 1 if tp is None else tp, keep_decay)
    if isinstance(own, bool) or not isinstance(own, int):
        raise MalformedInput("mxconv block: tp is not a number of ranks", where=where, got=repr(own))
    if tp not in (None, own):
        raise UsageError(
            f"this artifact is cut into {own} ranks and cannot be read as {tp}", where=root, expected=f"tp {own}", got=f"tp {tp}",
            hint="leave tp out, or merge=True for one rank",
        )  # fmt: skip
    check_tp(config, own)
    folders = rank_folders(root) if own > 1 else (root,)
    if len(folders) != own:
        expected = f"rank0 … rank{own - 1}"
        raise IncompleteInput("rank folders are missing or too many", where=root, expected=expected, got=len(folders))
    shards = [read_shards(folder) for folder in folders]
    for each in shards:
        each.require()
    scheme = scheme_from_block(block, where)
    if scheme is not None:
        _check_scheme(config, scheme, own, where)
    weights = StoredWeights(
        config, LAYOUTS[name], name, shards, tp=own, scheme=scheme, kept_rates=decay.block_rates(config, where)
    )
    _check_files(weights, shards)
    return weights


def _check_scheme(config: ModelConfig, scheme: Scheme, tp: int, where: str) -> None:
    """Groups, blocks and rotations must not straddle what a rank holds."""
    inner = {"up_gate_proj": config.hidden_size, "down_proj": config.intermediate_size // tp}
    run = {"group": scheme.group_size or 1, "block": FP8_BLOCK}.get(scheme.granularity, 1)
    for projection, size in inner.items():
        step = math.lcm(run, scheme.rotation[projection] or 1, PACKED_CODES[scheme.weight])
        if size % step:
            raise MalformedInput(
                f"scheme {scheme.name} cannot hold {projection}: its groups or rotation do not divide the input", where=where,
                expected=f"a multiple of {step}", got=size,
            )  # fmt: skip


def _source(root: Path, config: ModelConfig, tp: int, keep_decay: bool) -> Weights:
    check_tp(config, tp)
    shards = read_shards(root)
    shards.require()
    kept = _stored_rates(config, shards, decay.block_rates(config, str(root / "config.json")), keep_decay)
    weights = StoredWeights(config, LAYOUTS[config.dialect], config.dialect, [shards], tp=tp, kept_rates=kept)
    _check_files(weights, [shards])
    if config.tie_word_embeddings and "lm_head.weight" in shards.tensors:
        _check_tied(weights, root)
    return weights


def _check_files(weights: StoredWeights, shards: Sequence[Shards]) -> None:
    problems: list[MxconvError] = []
    for rank, each in enumerate(shards):
        expected = weights.expected_tensors(rank)
        problems.extend(differences(expected, each.tensors, each.folder))
        extra = sorted(set(each.tensors) - set(expected))
        if extra:
            log.warning("%s: %d tensors are not part of the model and not read: %s", each.folder, len(extra), printable(extra[:4]))
    raise_all(problems)


def _check_tied(weights: StoredWeights, root: Path) -> None:
    """A head stored beside tied embeddings must equal them."""
    rows = vocabulary_rows(weights.config, "embed", 1)
    for start in range(0, rows, VOCABULARY_BLOCK):
        stop = min(start + VOCABULARY_BLOCK, weights.config.vocab_size)
        if start < stop and not torch.equal(weights.rows("embed", 0, start, stop), weights.rows("lm_head", 0, start, stop)):
            raise MalformedInput(
                "tie_word_embeddings is true and the stored lm_head differs from the embedding", where=root,
                hint="set tie_word_embeddings to false in a copy of config.json if the stored head is meant",
            )  # fmt: skip


def _stored_rates(
    config: ModelConfig, shards: Shards, recorded: Mapping[int, Sequence[float]], keep: bool
) -> Mapping[int, Sequence[float]]:
    """`recorded` rates, and with `keep` those of the layers whose stored buffers differ; see decay.py for what is raised."""
    kept = dict(recorded)
    with ByteReader(shards) as reader:
        for layer, names in _buffers(config, shards).items():
            buffers = {name: _read(reader, tensor) for name, tensor in names.items()}
            known = recorded.get(layer) or lightning.decay_rates(config.num_attention_heads, layer, config.num_layers)
            try:
                decay.check_formula(buffers, known, layer=layer, block=config.block_size)
            except MalformedInput:
                if not keep:
                    raise
                kept[layer] = decay.own_rates(buffers, layer=layer, block=config.block_size)
    return kept


def _buffers(config: ModelConfig, shards: Shards) -> dict[int, dict[str, StoredTensor]]:
    """Lightning layer → the decay buffers that transformers saved for it, those of another shape left for `differences`."""
    shapes = decay.buffer_shapes(config.num_attention_heads, config.block_size)
    found: dict[int, dict[str, StoredTensor]] = {}
    for layer, kind in enumerate(config.layer_types):
        for name, shape in shapes.items() if kind == LINEAR and config.dialect == "minimax" else ():
            tensor = shards.tensors.get(f"model.layers.{layer}.self_attn.{name}")
            if tensor is not None and tensor.shape == shape:
                found.setdefault(layer, {})[name] = tensor
    return found


def _read(reader: ByteReader, tensor: StoredTensor) -> Tensor:
    return torch.from_numpy(reader.read(tensor)).view(getattr(torch, TORCH_NAMES[tensor.dtype])).view(tensor.shape)
