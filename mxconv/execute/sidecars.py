"""Everything of an artifact that is no weight: config.json, index files, tokenizer and chat files, calibration files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mxconv.calibrate import FILE_NAME, TOKENS_NAME, Statistics
from mxconv.checkpoint import INDEX_NAME
from mxconv.plan.values import Plan
from mxconv.source import Source

# Files that travel with the weights when they lie beside the source's config.json.
SIDECAR_NAMES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json", "preprocessor_config.json",
    "LICENSE", "LICENSE-MODEL", "NOTICE",
)  # fmt: skip


def sidecars(source: Source, work: Path, statistics: Statistics | None) -> dict[str, bytes | Path]:
    """Name → source file (copied) or bytes."""
    found: dict[str, bytes | Path] = {name: source.root / name for name in SIDECAR_NAMES if (source.root / name).is_file()}
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
