"""Calibration statistics as a value and a file: activation absmax per projection, expert and rotation.

Floats are written as hexadecimal, so that the file says exactly what was measured. Experts that saw no token have none of their
own; they get the largest absmax of their layer's other experts, and `unseen` lists them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mxconv.errors import IncompleteInput, MalformedInput
from mxconv.jsonfiles import read_json
from mxconv.quantize.schemes import PROJECTIONS

VERSION = 1
FILE_NAME = "statistics.json"
TOKENS_NAME = "calibration.npy"

Key = tuple[int, int, str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What one calibration pass measured. `values`: (layer, expert, projection, rotation) → absmax, float32 values."""

    source_digest: str
    """Of the headers of the checkpoint that was run (`Source.headers_digest`)."""
    tokens_digest: str
    windows: int
    window: int
    rotations: tuple[int, ...]
    tokens: Mapping[tuple[int, int], int]
    """(layer, expert) → tokens routed to it."""
    values: Mapping[Key, float]

    def absmax(self, layer: int, expert: int, projection: str, rotation: int) -> float:
        """Largest |x| of the projection's input after the rotation; the layer's peer maximum for an expert without tokens.

        Raises IncompleteInput when this rotation or layer was not measured.
        """
        own = self.values.get((layer, expert, projection, rotation))
        if own is not None:
            return own
        peers = [v for (at, _, name, b), v in self.values.items() if (at, name, b) == (layer, projection, rotation)]
        if not peers:
            raise IncompleteInput(
                f"statistics have no absmax of layer {layer} {projection} at rotation {rotation}", hint="run mxconv calibrate again"
            )
        return max(peers)

    @property
    def unseen(self) -> tuple[tuple[int, int], ...]:
        """(layer, expert) of the experts that saw no token."""
        return tuple(sorted(key for key, count in self.tokens.items() if count == 0))

    def document(self) -> dict[str, Any]:
        """JSON values, in a fixed order."""
        layers: dict[str, Any] = {}
        for (layer, expert), count in sorted(self.tokens.items()):
            entry = layers.setdefault(
                str(layer), {"tokens": [], **{name: {str(b): [] for b in self.rotations} for name in PROJECTIONS}}
            )
            entry["tokens"].append(count)
            for name in PROJECTIONS:
                for b in self.rotations:
                    value = self.values.get((layer, expert, name, b))
                    entry[name][str(b)].append(None if value is None else float(value).hex())
        return {
            "version": VERSION, "source_digest": self.source_digest, "tokens_digest": self.tokens_digest, "windows": self.windows,
            "window": self.window, "rotations": list(self.rotations), "layers": layers,
        }  # fmt: skip

    def to_bytes(self) -> bytes:
        """The file: indented JSON, the same bytes for the same statistics."""
        return json.dumps(self.document(), indent=1, sort_keys=True).encode() + b"\n"

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def read_statistics(path: Path) -> Statistics:
    """The statistics in file `path`. Raises MalformedInput when it is not such a file."""
    raw = read_json(path)
    try:
        if raw["version"] != VERSION:
            raise MalformedInput("statistics of another version", where=path, expected=VERSION, got=raw["version"])
        tokens: dict[tuple[int, int], int] = {}
        values: dict[Key, float] = {}
        for layer, entry in raw["layers"].items():
            for expert, count in enumerate(entry["tokens"]):
                tokens[int(layer), expert] = int(count)
            for name in PROJECTIONS:
                for rotation, column in entry[name].items():
                    for expert, text in enumerate(column):
                        if text is not None:
                            values[int(layer), expert, name, int(rotation)] = _absmax(text)
        return Statistics(
            source_digest=str(raw["source_digest"]), tokens_digest=str(raw["tokens_digest"]), windows=int(raw["windows"]),
            window=int(raw["window"]), rotations=tuple(int(b) for b in raw["rotations"]),
            tokens=MappingProxyType(tokens), values=MappingProxyType(values),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MalformedInput(f"not a statistics file: {error!r}", where=path, hint="mxconv calibrate writes one") from None


def _absmax(text: str) -> float:
    value = float.fromhex(text)
    if not 0 <= value < float("inf"):
        raise ValueError(f"absmax {text} is not a finite size")
    return value
