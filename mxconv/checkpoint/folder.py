"""Reading a checkpoint folder: its index, its shards' headers, and how the two agree."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mxconv.checkpoint.files import HeaderBudget, ReadFile, check_inside, read_file, special_kind
from mxconv.checkpoint.headers import MAX_HEADER_BYTES
from mxconv.checkpoint.stored import Shards, StoredFile, StoredTensor
from mxconv.errors import MAX_LISTED, IncompleteInput, Listed, MalformedInput, MxconvError, printable, reading_failed
from mxconv.jsonfiles import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_READERS = 8
MAX_HEADERS_BYTES = MAX_HEADER_BYTES
"""Of all shards of a folder: a parsed header takes ten times its size of memory. MiniMax-M1 has 1 MB in 413 files."""


@dataclass(slots=True)
class _Finds:
    """What one look at a folder collects."""

    problems: Listed = field(default_factory=Listed)
    notes: list[str] = field(default_factory=list)


def path_problem(value: object) -> str | None:
    """Why `value` is no acceptable file path of a weight_map, None when it is one: relative, forward, inside the folder."""
    if not isinstance(value, str) or not value:
        return "is no file name"
    if len(value.encode("utf-8", "surrogatepass")) > 1024 or not value.isprintable():
        return "is too long or holds control characters"
    if value.startswith(("/", "~")) or re.match(r"[A-Za-z]:", value):
        return "is an absolute path"
    if "\\" in value or any(part in ("", ".", "..") for part in value.split("/")):
        return "is not a plain path inside the folder"
    return None


def _read_index(folder: Path, root: Path, finds: _Finds) -> tuple[dict[str, str], Mapping[str, Any]]:
    """weight_map and metadata of the index; entries that are wrong are reported and left out."""
    path = folder / INDEX_NAME
    try:
        check_inside(root, path)
        raw = read_json(path)
    except MxconvError as error:
        finds.problems.extend([error])
        return {}, MappingProxyType({})
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    metadata = raw.get("metadata", {}) if isinstance(raw, dict) else {}
    if not isinstance(weight_map, dict) or not isinstance(metadata, dict):
        finds.problems.add(MalformedInput, "index is not {metadata: {…}, weight_map: {tensor: file}}", where=path)
        return {}, MappingProxyType({})
    if not weight_map:
        finds.problems.add(IncompleteInput, "index names no tensor", where=path)
    good = {}
    reasons = {file: path_problem(file) for file in weight_map.values() if isinstance(file, str)}
    for name, file in weight_map.items():
        if not name.isprintable():
            finds.problems.add(MalformedInput, "a tensor name holds control or escape characters", where=path, got=repr(name))
        elif reason := reasons[file] if isinstance(file, str) else path_problem(file):
            what = f"weight_map: the file of tensor {{}} {reason}"
            finds.problems.add(MalformedInput, what, repr(name), where=path, got=repr(file))
        else:
            good[name] = file
    return good, MappingProxyType(metadata)


def _read_files(folder: Path, root: Path, names: list[str], finds: _Finds) -> list[ReadFile | None]:
    budget = HeaderBudget(MAX_HEADERS_BYTES)
    if len(names) < _READERS:
        read = [read_file(folder, root, name, budget) for name in names]
    else:
        with ThreadPoolExecutor(_READERS) as pool:
            read = list(pool.map(lambda name: read_file(folder, root, name, budget), names))
    if budget.exceeded:
        what, expected = "the headers of its shards are larger than any checkpoint's", f"at most {MAX_HEADERS_BYTES} bytes together"
        finds.problems.add(MalformedInput, what, where=folder, expected=expected)
    return read


def _collect(
    names: list[str], read: list[ReadFile | None], finds: _Finds
) -> tuple[list[StoredFile], dict[str, StoredTensor], dict[str, str]]:
    """Files, tensors and the file of each tensor; a tensor in two files is a problem."""
    files: list[StoredFile] = []
    tensors: dict[str, StoredTensor] = {}
    holder: dict[str, str] = {}
    for name, result in zip(names, read, strict=True):
        if result is None:
            continue
        finds.problems.extend(result.problems)
        if result.file is None:
            continue
        for entry in result.entries:
            if entry.name in holder:
                also = f"also in {holder[entry.name]}"
                finds.problems.add(MalformedInput, "tensor {} is in two shards", repr(entry.name), where=result.file.path, got=also)
                continue
            holder[entry.name] = name
            tensors[entry.name] = StoredTensor(
                name=entry.name, dtype=entry.dtype, shape=entry.shape, file=len(files), offset=result.data_start + entry.begin
            )
        files.append(result.file)
    return files, tensors, holder


def _compare(
    folder: Path, index: Mapping[str, str], usable: set[str], missing: list[str], holder: Mapping[str, str], finds: _Finds
) -> None:
    """Index against headers. Tensors of files that could not be read are not reported again one by one."""
    counts = Counter(index.values())
    for name in missing:
        what, hint = f"shard is missing: the index puts {counts[name]} tensors into it", "download the file"
        finds.problems.add(IncompleteInput, what, where=folder / name, hint=hint)
    absent = sorted((file, tensor) for tensor, file in index.items() if file in usable and holder.get(tensor) != file)
    for file, tensor in absent:
        finds.problems.add(IncompleteInput, "tensor {} is not in the shard that the index names", tensor, where=folder / file)
    extra = sorted((file, tensor) for tensor, file in holder.items() if tensor not in index)
    for file, tensor in extra:
        finds.problems.add(IncompleteInput, "tensor {} is in the shard but not in the index", tensor, where=folder / file)


def _listing(folder: Path, finds: _Finds) -> list[str] | None:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        finds.problems.add(IncompleteInput, "folder is missing", where=folder)
    except NotADirectoryError:
        finds.problems.add(MalformedInput, "not a folder", where=folder, hint="give the folder of a Hugging Face checkpoint")
    except OSError as error:
        finds.problems.extend([reading_failed(error, folder, "folder")])
    return None


def _nothing_to_read(folder: Path, names: list[str]) -> MxconvError:
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    loose = [name for name in names if name.endswith(".safetensors")]
    if loose:
        return IncompleteInput(
            f"{len(loose)} safetensors files but no {INDEX_NAME} and no {SINGLE_NAME}", where=folder, got=loose[0]
        )
    if pickles:
        return MalformedInput(
            "the weights are pickle files only; they are never unpickled", where=folder, got=pickles[0],
            hint="convert them to safetensors where you trust them (for instance with save_pretrained)",
        )  # fmt: skip
    return IncompleteInput(
        f"neither {INDEX_NAME} nor {SINGLE_NAME}", where=folder, hint="give the folder of a Hugging Face checkpoint"
    )


def _note_ignored(folder: Path, names: list[str], used: set[str], finds: _Finds) -> None:
    kinds: dict[str, list[str]] = {}
    for name in names:
        if name in used:
            continue
        special = special_kind(folder / name)
        if special is not None:
            kinds.setdefault(f"it is {special}", []).append(name)
        elif name.endswith(PICKLE_SUFFIXES):
            kinds.setdefault("pickle files are never unpickled", []).append(name)
        elif name.endswith(".py"):
            kinds.setdefault("code in a checkpoint is never imported", []).append(name)
        elif name.endswith(".safetensors"):
            kinds.setdefault("no index names it", []).append(name)
    for reason, found in kinds.items():
        finds.notes += [f"{printable(name)}: ignored, {reason}" for name in found[:MAX_LISTED]]
        if len(found) > MAX_LISTED:
            finds.notes.append(f"{len(found) - MAX_LISTED} more files are ignored: {reason}")


def read_shards(folder: Path) -> Shards:
    """The shards of `folder`: `model.safetensors.index.json` and what it names, or a single `model.safetensors`.

    Only headers are read. Nothing is raised for bad input: see `Shards.problems` and `Shards.require`. Source of the format:
    huggingface/safetensors; of the index: transformers' `save_pretrained`.
    """
    folder = Path(folder)
    finds = _Finds()
    listing = _listing(folder, finds)
    if listing is None:
        return _shards(folder, [], {}, None, MappingProxyType({}), finds, present=False)
    root = Path(os.path.realpath(folder))
    index: dict[str, str] | None = None
    metadata: Mapping[str, Any] = MappingProxyType({})
    if INDEX_NAME in listing:
        index, metadata = _read_index(folder, root, finds)
        names = sorted(set(index.values()))
    elif SINGLE_NAME in listing:
        names = [SINGLE_NAME]
    else:
        finds.problems.extend([_nothing_to_read(folder, listing)])
        names = []
    _note_ignored(folder, listing, set(names), finds)
    read = _read_files(folder, root, names, finds)
    files, tensors, holder = _collect(names, read, finds)
    missing = [name for name, result in zip(names, read, strict=True) if result is None]
    present = len(missing) < len(names)
    if index is not None and present:
        usable = {file.relative for file, result in ((r.file, r) for r in read if r) if file is not None and not result.problems}
        _compare(folder, index, usable, missing, holder, finds)
        total = sum(tensor.size_bytes for tensor in tensors.values())
        stated = metadata.get("total_size")
        if not finds.problems and stated is not None and stated != total:
            finds.notes.append(f"index says total_size {printable(stated)}, the shards hold {total} bytes of tensors")
    return _shards(folder, files, tensors, index, metadata, finds, present=present)


def _shards(
    folder: Path, files: list[StoredFile], tensors: dict[str, StoredTensor], index: dict[str, str] | None,
    metadata: Mapping[str, Any], finds: _Finds, *, present: bool,
) -> Shards:  # fmt: skip
    return Shards(
        folder=folder, files=tuple(files), tensors=MappingProxyType(tensors),
        index=None if index is None else MappingProxyType(index), index_metadata=metadata,
        problems=finds.problems.problems(), notes=tuple(finds.notes), present=present,
    )  # fmt: skip


def rank_folders(root: Path) -> tuple[Path, ...]:
    """`rank0`, `rank1` … of an artifact in order; () when there are none.

    Raises MalformedInput when a name that begins with `rank` is no such folder (a consumer counts those names to learn the
    TP size), IncompleteInput when a number is missing.
    """
    root = Path(root)
    found: dict[int, Path] = {}
    try:
        names = sorted(name for name in os.listdir(root) if name.startswith("rank"))
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:  # an artifact that cannot be seen must not pass for a checkpoint
        raise reading_failed(error, root, "folder") from None
    for name in names:
        path = root / name
        if not path.is_dir():
            continue
        number = re.fullmatch(r"rank(0|[1-9]\d{0,5})", name)
        if number is None or path.is_symlink():
            raise MalformedInput("is no rank folder of an artifact", where=path, expected="rank0, rank1 …, no links")
        found[int(number.group(1))] = path
    missing = sorted(set(range(len(found))) - set(found))
    if missing:
        raise IncompleteInput(f"rank folder rank{missing[0]} is missing", where=root, got=", ".join(p.name for p in found.values()))
    return tuple(found[i] for i in range(len(found)))
