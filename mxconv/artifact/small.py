"""Small files beside the weights of a source: bounded, regular, inside their folder, and the same from the plan to the copy."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from mxconv.checkpoint.files import check_inside
from mxconv.errors import IncompleteInput, IntegrityError, MalformedInput
from mxconv.jsonfiles import read_regular

MAX_BYTES = 256 << 20
"""More than any tokenizer has (the largest in use are about 40 MB), and as much as an index may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallFile:
    """A file as it was when it was first looked at; `sha256` is of its content (hex)."""

    path: Path
    size_bytes: int
    sha256: str

    def read(self) -> bytes:
        """The content, the one that was looked at. Raises IntegrityError when it changed, ResourceError when it cannot be read."""
        try:
            data = read_inside(self.path)
        except (IncompleteInput, MalformedInput) as error:
            raise IntegrityError(f"the source changed during the run: {error.what}", where=self.path) from None
        digest = hashlib.sha256(data).hexdigest()
        if digest != self.sha256:
            raise IntegrityError(
                "the source changed during the run", where=self.path, expected=f"sha256 {self.sha256}", got=f"sha256 {digest}"
            )
        return data


def look_at(path: Path) -> SmallFile:
    """The file `path` as it is now; raises what `read_inside` raises."""
    data = read_inside(path)
    return SmallFile(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def read_inside(path: Path) -> bytes:
    """The bytes of a regular file of at most `MAX_BYTES` that no link leads out of its folder.

    Raises IncompleteInput when it is gone, MalformedInput when it is something else, ResourceError when it cannot be read.
    """
    check_inside(Path(os.path.realpath(path.parent)), path)
    return read_regular(path, MAX_BYTES)
