"""From finished shards to an artifact: index, tokenizer and other small files, config.json, manifest.json, in that order."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mxconv.artifact.failpoints import reach
from mxconv.artifact.manifest import FileFact, Manifest, TensorFact, build_manifest, read_manifest
from mxconv.artifact.names import MANIFEST_NAME, RUN_LOG_NAME, part_path
from mxconv.artifact.parts import FileHash, link
from mxconv.artifact.small import SmallFile
from mxconv.artifact.system import sync_directory, writing
from mxconv.artifact.writer import ArtifactWriter
from mxconv.checkpoint.folder import path_problem
from mxconv.errors import MxconvError
from mxconv.placement import PlacedFile

CONFIG_NAME = "config.json"


def publish(
    writer: ArtifactWriter,
    *,
    indexes: Mapping[str, bytes],
    sidecars: Mapping[str, bytes | SmallFile],
    config: bytes,
    manifest: Mapping[str, Any],
    check: Callable[[], None] = lambda: None,
) -> Manifest:
    """Wait for the shards, write everything else, and make the folder an artifact; its manifest.

    `indexes` and `sidecars` map paths below the artifact to bytes, or to source files that are copied; `config` is config.json;
    `manifest` holds the planner's keys (see `artifact.manifest`); `check` is called while shards are waited for and may raise to
    end the run. Under `--overwrite` the finished folder then takes the place of
    the old one. Raises ResourceError when the disk gives out, IntegrityError when a source file changed since it was looked at,
    OutputConflict when something foreign lies in the folder; the run can be resumed at any point.
    """
    work, plan = writer.output.work, writer.output.plan_digest
    facts = {file.path: _shard_fact(file, hashes) for file, hashes in zip(writer.files, writer.finish(check).values(), strict=True)}
    for step, small in (("small", indexes), ("small", sidecars), ("config", {CONFIG_NAME: config})):
        for path, content in small.items():
            data = content if isinstance(content, bytes) else content.read()
            if path in facts or path not in writer.others or path in (MANIFEST_NAME, RUN_LOG_NAME) or path_problem(path):
                raise MxconvError("a file of the artifact has an impossible path", where=path)
            writer.claim(path, data)
            put(work, path, data, plan, step)
            facts[path] = FileFact(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), tensors={})
    writer.refuse_strays()  # something may have come while the run was at work
    put(work, MANIFEST_NAME, build_manifest(plan_digest=plan, files=facts, extra=manifest), plan, "manifest")
    writer.end()
    writer.output.replace_old()
    return read_manifest(writer.output.root)


def _shard_fact(file: PlacedFile, hashes: FileHash) -> FileFact:
    tensors = {t.name: TensorFact(dtype=t.dtype, shape=t.shape, sha256=hashes.tensors[t.name]) for t in file.tensors}
    return FileFact(path=file.path, size_bytes=hashes.size_bytes, sha256=hashes.sha256, tensors=tensors)


def put(work: Path, path: str, data: bytes, plan_digest: str, step: str) -> None:
    """Write a small file whole: part, sync, link. One that a killed run left is replaced if it differs."""
    final = work / path
    part = part_path(final, plan_digest)
    with writing(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            done = 0
            while done < len(data):
                done += os.write(fd, data[done:])
            os.fdatasync(fd)
        finally:
            os.close(fd)
        reach(f"{step}-written")
        if os.path.lexists(final):
            os.replace(part, final)
            sync_directory(final.parent)
        else:
            link(part, final)
    reach(f"{step}-linked")


def append_run_log(root: Path, record: Mapping[str, Any]) -> None:
    """Add a JSON line to run.log, with time and host: what does not shape bytes (workers, memory, paths, seconds).

    run.log is in no digest and not in the manifest.
    """
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "host": socket.gethostname(), **record}
    path = root / RUN_LOG_NAME
    with writing(path):
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            os.write(fd, json.dumps(line).encode() + b"\n")  # escaped: a path may hold bytes that are no UTF-8
        finally:
            os.close(fd)
