"""What a checkpoint folder holds, as values: tensors with absolute byte offsets, files, and everything that is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxconv.errors import IncompleteInput, MxconvError, raise_all
from mxconv.tensors import DTYPE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor in a file: `offset` is the absolute byte in `Shards.files[file]`, the bytes are C-contiguous."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """One safetensors file as it was when its header was read; size, mtime and inode tell later whether it still is."""

    path: Path
    relative: str
    """The path below the folder, as the index spells it."""
    size_bytes: int
    mtime_ns: int
    inode: int
    metadata: Mapping[str, str]
    header_sha256: str
    """SHA-256 (hex) of the 8-byte length and the JSON header: names, dtypes, shapes and offsets of this file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """What one folder with one index (or one single file) holds.

    `index` is the weight_map, None for a single file without one. `problems` lists everything wrong with files, headers and
    index at once; nothing of it has been raised. `notes` are things that a person should know and that are no error.
    """

    folder: Path
    files: tuple[StoredFile, ...]
    tensors: Mapping[str, StoredTensor]
    index: Mapping[str, str] | None
    index_metadata: Mapping[str, Any]
    problems: tuple[MxconvError, ...]
    notes: tuple[str, ...]
    present: bool
    """False when there is an index and not one of its shard files: enough for `inspect` and `--dry-run`."""

    def fingerprint(self) -> dict[str, list[int | str]]:
        """File → [size, mtime in ns, SHA-256 of its header]: tells a later run whether the source is as it was."""
        return {file.relative: [file.size_bytes, file.mtime_ns, file.header_sha256] for file in self.files}

    def require(self) -> None:
        """Raise every problem, or IncompleteInput when no shard is present; return when all is there."""
        raise_all(self.problems)
        if not self.present:
            raise IncompleteInput(
                f"there is an index but none of its {len(set((self.index or {}).values()))} shard files",
                where=self.folder, hint="download the shards; inspect and --dry-run work without them",
            )  # fmt: skip
