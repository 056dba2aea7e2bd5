"""The source's side of the logits as a file: at 456B it costs hours, and it is the same for every scheme and every TP size.

A safetensors file with

    hidden        F32  [windows, T, H]      the source after its last layer, before the final norm, float32, TP 1
    probes        F32  [layers, probes, H]  after every layer, at the sampled tokens of streams.py
    floor_hidden  BF16 [windows, T, H]      the same pass in bfloat16: the noise floor
    floor_probes  F32  [layers, probes, H]
    facts         U8   [n]                  JSON: versions, digests of source headers, prompts and tensors

A file that was made from another source, other prompts or by another version of the metrics is refused with UsageError (exit 2):
the request names a file that does not answer it. One whose bytes are not what its own facts say is refused with IntegrityError
(exit 8).
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mxconv.checkpoint import ByteReader, Shards, StoredTensor
from mxconv.checkpoint.files import read_file
from mxconv.config import ModelConfig
from mxconv.errors import IncompleteInput, IntegrityError, MalformedInput, OutputConflict, ResourceError, UsageError, raise_all
from mxconv.placement import PlacedFile, place_file
from mxconv.tensors import TORCH_NAMES, TensorSpec
from mxconv.verify.metrics import METRICS_VERSION
from mxconv.verify.streams import Trace

VERSION = 1
FACTS = "facts"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The source's traces: float32, and bfloat16 beside it."""

    source: Trace
    floor: Trace

    def tensors(self) -> dict[str, Tensor]:
        """By their names in the file."""
        return {
            "hidden": self.source.hidden.float(), "probes": self.source.probes,
            "floor_hidden": self.floor.hidden.bfloat16(), "floor_probes": self.floor.probes,
        }  # fmt: skip


def source_digest(config: ModelConfig, ranks: Sequence[Shards]) -> str:
    """SHA-256 (hex) of a source's config and of every file's header: names, dtypes, shapes, offsets."""
    headers = [sorted((file.relative, file.header_sha256, file.size_bytes) for file in shards.files) for shards in ranks]
    text = json.dumps([dict(config.raw), headers], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def identity(source: str, prompts: str, *, keep_decay: bool) -> dict[str, Any]:
    """What a reference must have been made from and by; `source` and `prompts` are digests."""
    return {
        "version": VERSION, "metrics_version": METRICS_VERSION, "source_sha256": source, "prompts_sha256": prompts,
        "keep_decay": keep_decay,
    }  # fmt: skip


def write_reference(path: Path, reference: Reference, facts: Mapping[str, Any]) -> None:
    """Write the file whole or not at all. Raises ResourceError when the disk gives out, OutputConflict when `path` is taken."""
    blobs = {name: _bytes(tensor) for name, tensor in reference.tensors().items()}
    stated = {**facts, "tensors": {name: hashlib.sha256(blob).hexdigest() for name, blob in blobs.items()}}
    blobs[FACTS] = memoryview(json.dumps(stated, sort_keys=True, indent=1).encode())
    specs = [
        TensorSpec(name=name, dtype=_DTYPES[tensor.dtype], shape=tuple(tensor.shape))
        for name, tensor in reference.tensors().items()
    ]
    placed = place_file(path.name, [*specs, TensorSpec(name=FACTS, dtype="U8", shape=(len(blobs[FACTS]),))])
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        _write(part, placed, blobs)
        os.link(part, path)
    except FileExistsError:
        raise OutputConflict("the reference file is there already", where=path) from None
    except OSError as error:
        raise ResourceError(f"the reference cannot be written: {error.strerror}", where=path) from None
    finally:
        part.unlink(missing_ok=True)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().data.cast("B")


def _write(part: Path, placed: PlacedFile, blobs: Mapping[str, memoryview]) -> None:
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with os.fdopen(fd, "wb") as file:
        file.write(len(placed.header).to_bytes(8, "little") + placed.header)
        for tensor in placed.tensors:
            file.write(blobs[tensor.name])
        file.flush()
        os.fsync(file.fileno())


def read_reference(path: Path, expected: Mapping[str, Any], device: torch.device) -> Reference:
    """The reference in `path`, which must have been made from `expected` (see `identity`).

    Raises UsageError when it was not, MalformedInput or IncompleteInput when it is no such file, IntegrityError when its bytes
    were changed.
    """
    folder = path.parent
    found = read_file(folder, Path(os.path.realpath(folder)), path.name)
    if found is None:
        raise IncompleteInput("the reference file is missing", where=path)
    raise_all(found.problems)
    if found.file is None:
        raise MalformedInput("not a reference file", where=path)
    tensors = {
        entry.name: StoredTensor(
            name=entry.name, dtype=entry.dtype, shape=entry.shape, file=0, offset=found.data_start + entry.begin
        )
        for entry in found.entries
    }
    shards = Shards(
        folder=folder, files=(found.file,), tensors=MappingProxyType(tensors), index=None, index_metadata=MappingProxyType({}),
        problems=(), notes=(), present=True,
    )  # fmt: skip
    with ByteReader(shards) as reader:
        facts = _facts(reader, tensors, path)
        _check_identity(facts, expected, path)
        loaded = {name: _load(reader, tensors, name, digest, path, device) for name, digest in facts["tensors"].items()}
    try:
        source = Trace(hidden=loaded["hidden"], probes=loaded["probes"].cpu())
        return Reference(source=source, floor=Trace(hidden=loaded["floor_hidden"], probes=loaded["floor_probes"].cpu()))
    except KeyError as missing:
        raise MalformedInput(f"the reference has no tensor {missing}", where=path) from None


def _facts(reader: ByteReader, tensors: Mapping[str, StoredTensor], path: Path) -> dict[str, Any]:
    facts: Any = None
    if FACTS in tensors:
        try:
            facts = json.loads(bytes(reader.read(tensors[FACTS])))
        except (ValueError, RecursionError):
            facts = None
    if not isinstance(facts, dict) or not isinstance(facts.get("tensors"), dict):
        raise MalformedInput("not a reference that mxconv wrote: its facts cannot be read", where=path)
    return facts


def _check_identity(facts: Mapping[str, Any], expected: Mapping[str, Any], path: Path) -> None:
    words = {
        "version": "is of another version of the file", "metrics_version": "is of another version of the metrics",
        "source_sha256": "was made from another source", "prompts_sha256": "was made on other tokens",
        "keep_decay": "was made with another choice of decay rates",
    }  # fmt: skip
    for key, value in expected.items():
        if facts.get(key) != value:
            raise UsageError(
                f"the reference {words[key]}", where=path, expected=value, got=facts.get(key),
                hint="give another file name, or remove this one: it is made anew",
            )  # fmt: skip


def _load(
    reader: ByteReader, tensors: Mapping[str, StoredTensor], name: str, digest: str, path: Path, device: torch.device
) -> Tensor:
    stored = tensors.get(name)
    if stored is None or stored.dtype not in ("F32", "BF16"):
        raise MalformedInput(f"the reference has no usable tensor {name}", where=path)
    data = reader.read(stored)
    if hashlib.sha256(data.data).hexdigest() != digest:
        raise IntegrityError(f"the reference was changed: tensor {name} is not what was written", where=path, hint="remove it")
    return torch.from_numpy(data).view(getattr(torch, TORCH_NAMES[stored.dtype])).view(stored.shape).to(device)
