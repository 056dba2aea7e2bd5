"""Where every output byte goes: tensors are dealt to files, and files get headers, before a weight is read.

Tensors in the order given fill files of up to `MAX_FILE_BYTES`. Inside a file the order is dtype (widest first),
then name, without holes: byte for byte the header that safetensors' own writer produces. The header is JSON padded with
spaces to a multiple of 8, with the one metadata key that transformers asks for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mxconv.tensors import DTYPE_ORDER, TensorSpec

MAX_FILE_BYTES = 4 << 30
METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedFile:
    """One output file: `path` relative to the artifact, `offsets` absolute bytes of each tensor in the file."""

    path: str
    tensors: tuple[TensorSpec, ...]
    offsets: Mapping[str, int]
    header: bytes
    """The JSON header, padded, without the 8-byte length."""
    size_bytes: int

    @property
    def data_start(self) -> int:
        """Byte at which tensor data begins."""
        return 8 + len(self.header)


def place_file(path: str, tensors: Iterable[TensorSpec]) -> PlacedFile:
    """The file that holds `tensors`, header and offsets computed."""
    ordered = tuple(sorted(tensors, key=lambda t: (-DTYPE_ORDER[t.dtype], t.name)))
    entries: dict[str, object] = {"__metadata__": METADATA}
    position, relative = 0, {}
    for tensor in ordered:
        relative[tensor.name] = position
        entries[tensor.name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, position + tensor.size_bytes]
        }  # fmt: skip
        position += tensor.size_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header = text + b" " * (-len(text) % 8)
    start = 8 + len(header)
    offsets = MappingProxyType({name: start + offset for name, offset in relative.items()})
    return PlacedFile(path=path, tensors=ordered, offsets=offsets, header=header, size_bytes=start + position)


def deal(tensors: Iterable[TensorSpec], folder: str, first: int, max_bytes: int = MAX_FILE_BYTES) -> tuple[PlacedFile, ...]:
    """Files `folder`/model-NNNNN-of-NNNNN.safetensors, numbered from `first`, filled in order up to `max_bytes` of data."""
    groups: list[list[TensorSpec]] = []
    room = 0
    for tensor in tensors:
        if not groups or tensor.size_bytes > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(tensor)
        room -= tensor.size_bytes
    last = first + len(groups) - 1 if first else len(groups)
    prefix = f"{folder}/" if folder else ""
    return tuple(place_file(f"{prefix}model-{first + i:05d}-of-{last:05d}.safetensors", group) for i, group in enumerate(groups))
