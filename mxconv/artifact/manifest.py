"""manifest.json: what an artifact is made of, and from what. It is written last; without it there is no artifact.

    schema       "mxconv-manifest/1"
    plan_digest  SHA-256 that names the plan: the same plan and sources give the same bytes
    files        path → {size_bytes, sha256, tensors: name → {dtype, shape, sha256}} of every file but manifest.json and run.log;
                 `tensors` for safetensors files alone
    sha256       SHA-256 of this document's own bytes without this key
    …            what the planner adds: source, tool and kernel versions, numeric conventions, statistics digest

The document is JSON in UTF-8 with sorted keys, one line a top-level key and one a file; any other spelling is refused, so that no
edit of it goes unnoticed. It holds no time, host or path: those are in run.log. All digests are lower-case hex.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mxconv.artifact.names import JOURNAL_NAME, MANIFEST_NAME
from mxconv.checkpoint.files import check_inside
from mxconv.checkpoint.folder import path_problem
from mxconv.errors import IncompleteInput, IntegrityError, MalformedInput, MxconvError, reading_failed
from mxconv.jsonfiles import parse_json, read_json, read_regular

SCHEMA = "mxconv-manifest/1"
OWN_KEYS = frozenset(("schema", "plan_digest", "files", "sha256"))
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFact:
    """A tensor as the manifest records it; `sha256` is of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFact:
    """A file as the manifest records it; `tensors` is empty for what is no safetensors file."""

    path: str
    size_bytes: int
    sha256: str
    tensors: Mapping[str, TensorFact]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A validated manifest; `body` is the whole document, the planner's own keys included."""

    plan_digest: str
    files: Mapping[str, FileFact]
    sha256: str
    body: Mapping[str, Any]


def render(body: Mapping[str, Any]) -> bytes:
    """The one spelling of a manifest."""
    lines = [f'"files": {_object(body["files"], "  ")}' if key == "files" else _member(key, body[key]) for key in sorted(body)]
    return ("{\n " + ",\n ".join(lines) + "\n}\n").encode()


def _member(key: str, value: Any) -> str:
    # the C encoder is ten times faster than an indented dump, which is written in Python
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return f"{json.dumps(key, ensure_ascii=False)}: {text}"


def _object(members: Mapping[str, Any], indent: str) -> str:
    return "{\n" + ",\n".join(indent + _member(key, members[key]) for key in sorted(members)) + "\n }"


def build_manifest(*, plan_digest: str, files: Mapping[str, FileFact], extra: Mapping[str, Any]) -> bytes:
    """The bytes of the manifest over `files`, with the planner's keys `extra`. Raises MxconvError when those collide with ours."""
    if OWN_KEYS & extra.keys():
        raise MxconvError(f"manifest keys {sorted(OWN_KEYS & extra.keys())} belong to the store")
    body: dict[str, Any] = {**extra, "schema": SCHEMA, "plan_digest": plan_digest}
    body["files"] = {path: _file_entry(fact) for path, fact in files.items()}
    body["sha256"] = hashlib.sha256(render(body)).hexdigest()
    return render(body)


def _file_entry(fact: FileFact) -> dict[str, Any]:
    entry: dict[str, Any] = {"size_bytes": fact.size_bytes, "sha256": fact.sha256}
    if fact.tensors:
        entry["tensors"] = {
            name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "sha256": tensor.sha256}
            for name, tensor in fact.tensors.items()
        }
    return entry


def _digest(value: object) -> str:
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        raise ValueError("a digest is not 64 hexadecimal digits")
    return value


def _size(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("a size or shape is not a non-negative integer")
    return value


def _tensor_fact(entry: Any) -> TensorFact:
    if set(entry) != {"dtype", "shape", "sha256"} or not isinstance(entry["dtype"], str) or not isinstance(entry["shape"], list):
        raise ValueError("a tensor is not {dtype, shape, sha256}")
    return TensorFact(dtype=entry["dtype"], shape=tuple(_size(n) for n in entry["shape"]), sha256=_digest(entry["sha256"]))


def _file_fact(path: str, entry: Any) -> FileFact:
    reason = path_problem(path)
    if reason:
        raise ValueError(f"file path {path!r} {reason}")
    if not {"size_bytes", "sha256"} <= set(entry) <= {"size_bytes", "sha256", "tensors"}:
        raise ValueError(f"the entry of {path!r} is not {{size_bytes, sha256, tensors}}")
    tensors = {name: _tensor_fact(tensor) for name, tensor in entry.get("tensors", {}).items()}
    return FileFact(
        path=path, size_bytes=_size(entry["size_bytes"]), sha256=_digest(entry["sha256"]), tensors=MappingProxyType(tensors)
    )


def parse_manifest(raw: bytes, value: Any, where: str) -> Manifest:
    """The manifest in the bytes `raw`, of which `value` is the JSON.

    Raises IntegrityError when the document is not spelled as it was written or does not match its own digest, MalformedInput
    when it is of another version or not a manifest.
    """
    if not isinstance(value, dict) or not isinstance(value.get("schema"), str):
        raise IntegrityError("manifest is not one that mxconv wrote", where=where)
    body = {key: part for key, part in value.items() if key != "sha256"}
    try:
        intact = render(value) == raw and hashlib.sha256(render(body)).hexdigest() == value.get("sha256")
    except (ValueError, LookupError, TypeError, RecursionError):  # no files or a list of them, NaN, half a surrogate pair
        intact = False
    if not intact:
        raise IntegrityError("manifest was changed: it does not match its own SHA-256", where=where)
    if value["schema"] != SCHEMA:
        raise MalformedInput("manifest is of another version of mxconv", where=where, expected=SCHEMA, got=value["schema"])
    try:
        files = {path: _file_fact(path, entry) for path, entry in value["files"].items()}
        plan = _digest(value["plan_digest"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MalformedInput(f"manifest is malformed: {error}", where=where) from None
    return Manifest(plan_digest=plan, files=MappingProxyType(files), sha256=value["sha256"], body=MappingProxyType(value))


def read_manifest(root: Path) -> Manifest:
    """The manifest of the artifact in `root`; IncompleteInput when there is none, else as `parse_manifest`."""
    path = Path(root) / MANIFEST_NAME
    try:
        check_inside(Path(os.path.realpath(root)), path)
        raw = read_regular(path)
        value = parse_json(raw, path)
    except IncompleteInput:
        raise IncompleteInput("there is no manifest.json, so this is no finished artifact", where=root) from None
    except MalformedInput as error:
        raise IntegrityError(f"manifest cannot be read: {error.what}", where=path) from None
    return parse_manifest(raw, value, str(path))


def find_artifact(root: Path) -> Manifest | None:
    """The manifest of `root`, None for a folder that shows no sign of being an artifact (a source checkpoint).

    Raises IncompleteInput for an artifact that was never finished: rank folders, a journal or an `mxconv` block in config.json,
    and no manifest.
    """
    root = Path(root)
    if os.path.lexists(root / MANIFEST_NAME):
        return read_manifest(root)
    sign = _sign_of_artifact(root)
    if sign is None:
        return None
    raise IncompleteInput(
        f"not a finished artifact: there is {sign} but no {MANIFEST_NAME}", where=root,
        hint="finish it with the command that began it and --resume",
    )  # fmt: skip


def require_artifact(root: Path) -> Manifest:
    """As `find_artifact`, but a folder that is no artifact raises IncompleteInput too."""
    manifest = find_artifact(root)
    if manifest is None:
        raise IncompleteInput(f"not an artifact: there is no {MANIFEST_NAME}", where=root, hint="make one with convert or quantize")
    return manifest


def _sign_of_artifact(root: Path) -> str | None:
    try:
        names = os.listdir(root)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # an unfinished run that cannot be seen must not pass for a checkpoint
        raise reading_failed(error, root, "folder") from None
    if JOURNAL_NAME in names:
        return "the journal of an unfinished run"
    rank = next((name for name in sorted(names) if re.fullmatch(r"rank\d+", name) and (root / name).is_dir()), None)
    if rank:
        return f"a folder {rank}/"
    if "config.json" in names:
        try:
            config = read_json(root / "config.json")
        except MxconvError:
            return None
        if isinstance(config, dict) and "mxconv" in config:
            return "an mxconv block in config.json"
    return None
