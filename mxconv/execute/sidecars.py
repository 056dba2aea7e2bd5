"""Everything of an artifact that is no weight: config.json, index files, tokenizer and chat files, calibration files.

What of it comes from the source is looked at together with the headers, while a run is planned, and must be the same when it is
used: at the end of the run, and in a run that resumes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from mxconv.artifact.names import MANIFEST_NAME
from mxconv.artifact.small import SmallFile, look_at
from mxconv.calibrate import FILE_NAME, TOKENS_NAME, Statistics
from mxconv.checkpoint import INDEX_NAME
from mxconv.errors import IntegrityError, MxconvError, reading_failed
from mxconv.jsonfiles import parse_json
from mxconv.plan.values import Plan
from mxconv.source import Source

CONFIG_NAME = "config.json"

# Files that travel with the weights when they lie beside the source's config.json.
SIDECAR_NAMES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json", "preprocessor_config.json",
    "LICENSE", "LICENSE-MODEL", "NOTICE",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """The source's small files: those that are copied, those that the plan was made from, and what is wrong with any."""

    copied: Mapping[str, SmallFile]
    """Name in the artifact → file."""
    planned_from: Mapping[str, SmallFile]
    """config.json, the indexes, and the manifest of an artifact, by their path below the source."""
    problems: tuple[MxconvError, ...]

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of every file: a run is resumed only on those that it began with."""
        return {path: file.sha256 for path, file in {**self.planned_from, **self.copied}.items()}

    def check_unchanged(self) -> None:
        """Raise IntegrityError when a file is not what it was while the run was planned."""
        for file in (*self.planned_from.values(), *self.copied.values()):
            file.read()

    @property
    def config_text(self) -> str:
        """The text of the source's config.json. Raises IntegrityError when it changed."""
        return self.planned_from[CONFIG_NAME].read().decode("utf-8")


def look_beside(source: Source) -> Beside:
    """The small files of `source` as they are now; nothing is raised, see `Beside.problems`."""
    problems: list[MxconvError] = []

    def look(path: Path) -> SmallFile | None:
        try:
            os.lstat(path)  # not `lexists`, for which a file on a failing disk is not there
            return look_at(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            problems.append(reading_failed(error, path))
        except MxconvError as error:
            problems.append(error)
        return None

    indexes = [(shards.folder / INDEX_NAME).relative_to(source.root).as_posix() for shards in source.ranks]
    planned = [CONFIG_NAME, *indexes, *([MANIFEST_NAME] if source.manifest is not None else [])]
    seen = {path: look(source.root / path) for path in planned}
    copied = {name: look(source.root / name) for name in SIDECAR_NAMES}
    config = seen[CONFIG_NAME]
    try:
        if config is not None and _text(parse_json(config.read(), config.path)) != _text(dict(source.config.raw)):
            raise IntegrityError("the source changed while it was opened", where=source.root / CONFIG_NAME)
    except MxconvError as error:
        problems.append(error)
    told = {problem.render() for problem in source.problems}
    return Beside(
        copied=MappingProxyType({name: file for name, file in copied.items() if file is not None}),
        planned_from=MappingProxyType({path: file for path, file in seen.items() if file is not None}),
        problems=tuple(problem for problem in problems if problem.render() not in told),
    )


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def other_paths(plan: Plan, beside: Beside, *, calibrated: bool) -> list[str]:
    """The paths of an artifact that are no shards, without its manifest."""
    return [*index_files(plan), *beside.copied, CONFIG_NAME, *((FILE_NAME, TOKENS_NAME) if calibrated else ())]


def sidecars(beside: Beside, work: Path, statistics: Statistics | None) -> dict[str, bytes | SmallFile]:
    """Name → source file (copied) or bytes."""
    found: dict[str, bytes | SmallFile] = dict(beside.copied)
    if statistics is not None:
        found[FILE_NAME] = (work / FILE_NAME).read_bytes()
        found[TOKENS_NAME] = (work / TOKENS_NAME).read_bytes()
    return found


def config_bytes(plan: Plan, slopes: Mapping[str, Sequence[str]]) -> bytes:
    """config.json; kept decay slopes, known only after reading, go into its `mxconv` block."""
    if plan.config_text is not None:
        return plan.config_text.encode()
    config = dict(plan.config)
    if slopes:
        config["mxconv"] = {**config["mxconv"], "slopes": {layer: list(values) for layer, values in slopes.items()}}
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"


def index_files(plan: Plan) -> dict[str, bytes]:
    """Path → index of each rank (or of the checkpoint), as save_pretrained writes it."""
    if not plan.with_index:
        return {}
    found = {}
    for rank, indexes in enumerate(plan.rank_files):
        folder = f"rank{rank}/" if len(plan.rank_files) > 1 else ""
        files = [plan.files[i] for i in indexes]
        weight_map = {tensor.name: file.path.removeprefix(folder) for file in files for tensor in file.tensors}
        total = sum(tensor.size_bytes for file in files for tensor in file.tensors)
        index = {"metadata": {**plan.index_metadata, "total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        found[f"{folder}{INDEX_NAME}"] = json.dumps(index, indent=2).encode() + b"\n"
    return found
