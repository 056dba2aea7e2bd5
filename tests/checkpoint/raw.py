"""Raw safetensors bytes for tests: headers that no writer would write."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any


def entry(dtype: str = "F32", shape: tuple[int, ...] = (1,), begin: int = 0, end: int = 4) -> dict[str, Any]:
    """One tensor's entry of a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def file_bytes(header: str | bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """Length, header and data; `length` overrides the header's own."""
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def write(path: Path, header: str | bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> Path:
    """`file_bytes` under `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file_bytes(header, data, length))
    return path


def write_sharded(folder: Path, files: dict[str, dict[str, bytes]], index: dict[str, str] | None = None) -> Path:
    """U8 tensors (name → bytes) dealt to files, with the index that fits them or the one given."""
    for file, tensors in files.items():
        header, data = {}, b""
        for name, content in tensors.items():
            header[name] = entry("U8", (len(content),), len(data), len(data) + len(content))
            data += content
        write(folder / file, header, data)
    weight_map = {name: file for file, tensors in files.items() for name in tensors} if index is None else index
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
