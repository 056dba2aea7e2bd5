"""The JSON that machines read: one envelope for every document, values made plain, errors as data.

Each document is an object whose first keys are `schema` ("mxconv.<kind>") and `version`. A version is raised when a key
changes its meaning or goes away; new keys may appear at any time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence, Set
from typing import Any

from mxconv.errors import MxconvError, Problems, printable

SCHEMA_VERSION = 1


def plain(value: Any) -> Any:
    """`value` in JSON's own types: mappings, sequences, sets (sorted), paths, numpy scalars; a number that is not finite is null.

    Raises TypeError for anything else, so that no object is printed by its address.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return plain(value.item())
    raise TypeError(f"{type(value).__name__} has no JSON form")


def stamped(kind: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    """`payload` in the envelope of a `kind` document."""
    return {"schema": f"mxconv.{kind}", "version": SCHEMA_VERSION, **plain(payload)}


def dumps(document: Mapping[str, Any], *, indent: int | None = None) -> str:
    """JSON text in ASCII, keys in the order given; one line unless `indent`."""
    separators = (",", ":") if indent is None else None
    return json.dumps(document, indent=indent, ensure_ascii=True, allow_nan=False, separators=separators)


def error_payload(error: BaseException) -> dict[str, Any]:
    """A failure as data: `kind`, `exit_code`, and `problems`, each with kind, exit_code, what, where, expected, got, hint."""
    if not isinstance(error, MxconvError):
        error = MxconvError(printable(f"{type(error).__name__}: {error}", 4096))
    problems = error.problems if isinstance(error, Problems) else (error,)
    keys = ("kind", "exit_code", "what", "where", "expected", "got", "hint")
    listed = [{key: getattr(problem, key) for key in keys} for problem in problems]
    return {"kind": error.kind, "exit_code": error.exit_code, "problems": listed}
