"""Whether the planner's part of a manifest is what it says.

A manifest proves that it was not changed, not who wrote it: a hostile one is sealed as well as any other, and its
`source.weight_map` names files that `convert` writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from mxconv.artifact.manifest import Manifest
from mxconv.checkpoint.folder import path_problem
from mxconv.errors import MalformedInput, MxconvError, raise_all
from mxconv.tensors import DTYPE_BYTES

DIALECTS = ("minimax-m1", "minimax")

Check = Callable[[Any], bool]


def _is(*kinds: type) -> Check:
    return lambda value: type(value) in kinds


def _members(checks: Mapping[str, Check]) -> Check:
    return lambda value: isinstance(value, dict) and all(key in value and check(value[key]) for key, check in checks.items())


def _named(check: Check) -> Check:
    """An object whose keys are printable names and whose values all pass."""
    return lambda value: isinstance(value, dict) and all(key.isprintable() and check(each) for key, each in value.items())


def _text_of(config: Any, text: Any) -> bool:
    try:
        return isinstance(text, str) and bool(json.loads(text) == config)
    except (ValueError, RecursionError):
        return False


def _is_shard(path: Any) -> bool:
    """A place inside the folder where no other file of an artifact can be wanted: no manifest, config, journal or tokenizer."""
    hidden = isinstance(path, str) and any(part.startswith(".") for part in path.split("/"))
    return path_problem(path) is None and not hidden and path.endswith(".safetensors")


_SOURCE: Mapping[str, Check] = MappingProxyType(
    {
        "dialect": lambda value: value in DIALECTS,
        "config": _is(dict),
        "config_text": _is(str),
        "dtypes": _named(lambda value: isinstance(value, str) and value in DTYPE_BYTES),
        "weight_map": _named(_is_shard),
        "index_metadata": _is(dict),
        "with_index": _is(bool),
    }
)
_FACTS: Mapping[str, Check] = MappingProxyType(
    {
        "tool": _members({"name": _is(str), "version": _is(str)}),
        "layout": _is(str),
        "tp": lambda value: type(value) is int and value > 0,
        "scheme": _is(str, type(None)),
        "numeric_conventions": _is(dict, type(None)),
        "plan": _members({"numerics_digest": _is(str), "source_digest": _is(str)}),
        "ignored_layers": _is(list),
        "dropped": _is(dict),
        "statistics": _is(dict, type(None)),
        "warnings": _is(dict),
        "source": _members(_SOURCE),
    }
)


def require_facts(manifest: Manifest, where: str) -> None:
    """Raise MalformedInput unless every key that a reader of artifacts uses is there and of its kind (docs/manifest.md)."""
    raise_all(fact_problems(manifest, where)[:1])


def fact_problems(manifest: Manifest, where: str) -> list[MxconvError]:
    """What is wrong with the planner's part of a manifest, one problem a key, and with the files that every artifact has."""
    body = manifest.body
    problems: list[MxconvError] = [
        MalformedInput(f"manifest is malformed: {key} is missing or not what it must be", where=where, got=_wrong(key, body))
        for key, check in _FACTS.items()
        if key not in body or not check(body[key])
    ]
    if problems:
        return problems
    source = body["source"]
    if source["weight_map"].keys() != source["dtypes"].keys():
        what = "manifest is malformed: source.weight_map and source.dtypes name different tensors"
        problems.append(MalformedInput(what, where=where))
    if not _text_of(source["config"], source["config_text"]):
        problems.append(MalformedInput("manifest is malformed: source.config_text is not source.config", where=where))
    shards = [path for path, fact in manifest.files.items() if fact.tensors]
    if "config.json" not in manifest.files or not shards:
        problems.append(MalformedInput("manifest is malformed: it lists no config.json or no tensor", where=where))
    ranks = {path.partition("/")[0] for path in shards}
    if shards and body["tp"] > 1 and ranks != {f"rank{rank}" for rank in range(body["tp"])}:
        what = "manifest is malformed: its shards are not those of tp ranks"
        problems.append(MalformedInput(what, where=where, expected=body["tp"], got=sorted(ranks)))
    return problems


def _wrong(key: str, body: Mapping[str, Any]) -> str | None:
    """Which member of `source` it is."""
    if key != "source" or not isinstance(body.get(key), dict):
        return None
    return ", ".join(name for name, check in _SOURCE.items() if name not in body[key] or not check(body[key][name]))
