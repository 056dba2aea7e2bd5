"""Source: an opened checkpoint or artifact — config, headers, and every tensor bound to the parameters that it holds.

Nothing but headers is read here. Whether the bytes are right is the business of check units, `check` and `verify`.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mxconv.artifact import Manifest, find_artifact
from mxconv.artifact.facts import require_facts
from mxconv.artifact.names import MANIFEST_NAME
from mxconv.checkpoint import Shards, StoredTensor, rank_folders, read_shards
from mxconv.config import ModelConfig, read_config
from mxconv.errors import IncompleteInput, MxconvError, UsageError, raise_all
from mxconv.mapping.bind import Bound, bind, expected_specs
from mxconv.mapping.parameters import Parameter, parameters
from mxconv.mapping.rules import Table
from mxconv.mapping.tables import TABLES
from mxconv.tensors import TensorSpec

TIED_HEAD = "lm_head.weight"
DENSE_NAMES = ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_gate_proj.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One checkpoint, opened: `ranks` has one entry for a source checkpoint, R for an artifact of R ranks."""

    root: Path
    config: ModelConfig
    table: Table
    ranks: tuple[Shards, ...]
    specs: tuple[Mapping[str, TensorSpec], ...]
    """Name → spec on each rank: from the headers, or from the config where only an index is there."""
    parameters: tuple[Parameter, ...]
    bound: Bound
    dense_mlp: bool
    dropped: Mapping[str, str]
    tied_head_stored: bool
    manifest: Manifest | None
    """Of an artifact; None for a checkpoint, and for one that was rebuilt from an artifact."""
    notes: tuple[str, ...]
    problems: tuple[MxconvError, ...]

    @property
    def present(self) -> bool:
        """The shards are there, not an index alone."""
        return all(shards.present for shards in self.ranks)

    @property
    def tp(self) -> int:
        """Tensor-parallel ranks that the files hold (1 for a source checkpoint)."""
        return len(self.ranks)

    def stored(self, rank: int, name: str) -> StoredTensor:
        """Where tensor `name` of `rank` lies in its files."""
        return self.ranks[rank].tensors[name]

    def dtype_of(self, parameter: str) -> str:
        """The dtype in which a parameter is stored."""
        return self.bound.holders[parameter][0][0].dtype

    def require_weights(self) -> None:
        """Raise every problem found, or IncompleteInput when an index is all there is."""
        raise_all(self.problems)
        if not self.present:
            raise IncompleteInput(
                "no shard is there, only an index",
                where=self.root,
                expected=f"{len(self.ranks[0].index or {})} tensors in their files",
                hint="download the shards; inspect and --dry-run work without them",
            )

    def fingerprint(self) -> dict[str, list[int | str]]:
        """Size, mtime and header hash of every file: a run is resumed only on the source that it began with."""
        ranks = enumerate(shards.fingerprint() for shards in self.ranks)
        return {f"rank{rank}: {path}": facts for rank, files in ranks for path, facts in files.items()}

    def headers_digest(self) -> str:
        """SHA-256 over config and every tensor's name, dtype, shape, file and offset: what a plan was made from."""
        tensors = [
            [rank, t.name, t.dtype, list(t.shape), shards.files[t.file].relative, t.offset]
            for rank, shards in enumerate(self.ranks)
            for t in sorted(shards.tensors.values(), key=lambda t: t.name)
        ]
        text = json.dumps([dict(self.config.raw), tensors], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def open_source(path: str | os.PathLike[str], *, drop: Sequence[str] = ()) -> Source:
    """Open the checkpoint or artifact at `path`.

    Problems of headers and names are collected in the result, since `inspect` shows a broken checkpoint too; a config
    that cannot be read at all is raised. `drop`: glob patterns of tensor names to leave out on purpose.
    """
    root = Path(path)
    manifest = find_artifact(root)  # before the config: an interrupted run has none yet, and says so
    config = read_config(root)
    if config.artifact is None:
        manifest = None
    if manifest is not None:
        require_facts(manifest, str(root / MANIFEST_NAME))
    folders: Sequence[Path] = rank_folders(root) or (root,)
    if (config.artifact or {}).get("scheme") is not None:
        # Quantized experts hold codes, not parameters: an artifact of that kind is checked and verified, never a source.
        raise UsageError(
            "a quantized artifact cannot be a source: its experts hold rounded codes, and there is no way back",
            where=root, got=f"scheme {(config.artifact or {}).get('scheme')}", hint="start from the checkpoint it was made from",
        )  # fmt: skip
    table = TABLES[_layout(config)]
    ranks = tuple(read_shards(folder) for folder in folders)
    problems = [problem for shards in ranks for problem in shards.problems]
    notes = [note for shards in ranks for note in shards.notes]
    if manifest is not None and len(ranks) != config.raw["mxconv"].get("tp"):
        problems.append(
            IncompleteInput(
                "rank folders are missing", where=root, expected=f"{config.raw['mxconv'].get('tp')} ranks", got=len(ranks)
            )
        )
    if not (root / "tokenizer.json").exists():
        notes.append("no tokenizer.json lies beside the weights: what is made of them has none either; calibration takes token ids")
    names = [set(shards.tensors) | set(shards.index or {}) for shards in ranks]
    dense = config.num_experts == 1 and any(name in names[0] for name in DENSE_NAMES)
    dropped = _dropped(names, drop)
    notes += [f"--drop {pattern} matches no tensor" for pattern in drop if _DROPPED + pattern not in dropped.values()]
    tied = config.tie_word_embeddings and TIED_HEAD in names[0]
    specs = tuple(
        {name: spec for name, spec in _specs(table, config, shards, notes).items()
         if name not in dropped and not (tied and name == TIED_HEAD)}
        for shards in ranks
    )  # fmt: skip
    params = tuple(parameters(config, dense_mlp=dense))
    bound = bind(table, config, params, specs, [_unread(shards) for shards in ranks])
    if any(shards.problems and not shards.tensors and not shards.index for shards in ranks):
        bound = replace(bound, problems=())  # nothing could be read: that is the problem, not each tensor
    return Source(
        root=root, config=config, table=table, ranks=ranks, specs=specs, parameters=params, bound=bound, dense_mlp=dense,
        dropped={**dropped, **bound.dropped}, tied_head_stored=tied, manifest=manifest, notes=tuple(notes),
        problems=(*problems, *bound.problems),
    )  # fmt: skip


_DROPPED = "dropped as asked: "


def _dropped(names: Sequence[Collection[str]], patterns: Sequence[str]) -> dict[str, str]:
    """Tensor → which pattern leaves it out."""
    return {name: _DROPPED + p for p in patterns for each in names for name in each if fnmatch.fnmatchcase(name, p)}


def _unread(shards: Shards) -> set[str]:
    """Names that the index puts into files which are missing or damaged; their problem has been told once already."""
    return set(shards.index or {}) - set(shards.tensors) if shards.present else set()


def _layout(config: ModelConfig) -> str:
    block = config.artifact
    return str(block.get("layout")) if block is not None and block.get("layout") in TABLES else config.dialect


def _specs(table: Table, config: ModelConfig, shards: Shards, notes: list[str]) -> Mapping[str, TensorSpec]:
    """Header specs, or, for an index alone, shapes of the config with the dtypes that explain the index's total size."""
    if shards.present or not shards.index:
        return {t.name: TensorSpec(name=t.name, dtype=t.dtype, shape=t.shape) for t in shards.tensors.values()}
    guesses: tuple[dict[str, str], ...] = ({"router": "F32"}, {}, {"router": "F32", "norm": "F32"})
    total = shards.index_metadata.get("total_size")
    for guess in guesses:
        specs = expected_specs(table, config, shards.index, guess)
        if sum(spec.size_bytes for spec in specs.values()) == total:
            kept = "".join(f", {group} float32" for group in guess)
            notes.append(f"no shards here: shapes from the config; bf16{kept} gives exactly the index's total_size {total:,} bytes")
            break
    else:
        specs = expected_specs(table, config, shards.index, guesses[0])
        notes.append(f"no shards here: shapes from the config, dtypes assumed; the index's total_size is {total}")
    unknown = {name: TensorSpec(name=name, dtype="BF16", shape=()) for name in shards.index if name not in specs}
    return {**specs, **unknown}
