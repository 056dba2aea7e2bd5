"""manifest.json: one spelling, its own digest, versions, and what is an artifact at all."""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from mxconv.artifact import find_artifact, missing_files, read_manifest, require_artifact
from mxconv.artifact.manifest import FileFact, TensorFact, build_manifest, render
from mxconv.errors import IncompleteInput, IntegrityError, MalformedInput, MxconvError
from tests.artifact import sample


def write_body(root: Path, body: dict[str, Any], *, sign: bool = True) -> None:
    body.pop("sha256", None)
    if sign:
        body["sha256"] = hashlib.sha256(render(body)).hexdigest()
    (root / "manifest.json").write_bytes(render(body))


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    sample.run(tmp_path / "out")
    return tmp_path / "out"


def test_what_is_written_is_what_is_read(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    raw = (artifact / "manifest.json").read_bytes()
    body = json.loads(raw)
    assert render(body) == raw and body["schema"] == "mxconv-manifest/1" and body["sha256"] == manifest.sha256
    del body["sha256"]
    assert hashlib.sha256(render(body)).hexdigest() == manifest.sha256
    fact = manifest.files[sample.files()[0].path].tensors["head"]
    assert (fact.dtype, fact.shape) == ("BF16", (16, 40))


def test_it_holds_no_time_host_or_path(artifact: Path) -> None:
    import socket
    import time

    text = (artifact / "manifest.json").read_text()
    assert socket.gethostname() not in text and str(artifact.parent) not in text
    assert not re.search(rf"{time.gmtime().tm_year}-\d\d-\d\d", text)


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.thorough)])
def test_no_damage_goes_unnoticed(count: int, artifact: Path) -> None:
    path = artifact / "manifest.json"
    raw = path.read_bytes()
    random_ = random.Random(5)
    for _ in range(count):
        damaged = bytearray(raw)
        at = random_.randrange(len(raw))
        kind = random_.randrange(4)
        if kind == 0:
            damaged[at] ^= 1 << random_.randrange(8)
        elif kind == 1:
            del damaged[at]
        elif kind == 2:
            damaged.insert(at, random_.choice(b" \n\t0a}"))
        else:
            del damaged[at:]
        if bytes(damaged) == raw:
            continue
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError):
            read_manifest(artifact)


def test_another_spelling_of_the_same_document_is_an_edit(artifact: Path) -> None:
    body = json.loads((artifact / "manifest.json").read_text())
    (artifact / "manifest.json").write_text(json.dumps(body, indent=1))
    with pytest.raises(IntegrityError, match="changed"):
        read_manifest(artifact)


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{", b"null", b'{"schema":"mxconv-manifest/1"}', b"[" * 200_000, b"\xff", b'{"a":NaN}']
)
def test_what_is_no_manifest(raw: bytes, artifact: Path) -> None:
    (artifact / "manifest.json").write_bytes(raw)
    with pytest.raises(IntegrityError):
        find_artifact(artifact)


def test_another_version_is_named(artifact: Path) -> None:
    body = json.loads((artifact / "manifest.json").read_text())
    body["schema"] = "mxconv-manifest/2"
    write_body(artifact, body)
    with pytest.raises(MalformedInput, match="mxconv-manifest/2"):
        read_manifest(artifact)


MUTATIONS = {
    "path out of the folder": lambda b: b["files"].update({"../x": b["files"].pop("config.json")}),
    "absolute path": lambda b: b["files"].update({"/etc/passwd": b["files"].pop("config.json")}),
    "short digest": lambda b: b["files"]["config.json"].update(sha256="ab"),
    "negative size": lambda b: b["files"]["config.json"].update(size_bytes=-1),
    "size as text": lambda b: b["files"]["config.json"].update(size_bytes="12"),
    "unknown field": lambda b: b["files"]["config.json"].update(mode=420),
    "files as a list": lambda b: b["files"].update({"config.json": []}),
    "tensor without shape": lambda b: b["files"]["config.json"].update(tensors={"a": {"dtype": "F32", "sha256": "0" * 64}}),
    "plan digest missing": lambda b: b.pop("plan_digest"),
}


@pytest.mark.parametrize("case", MUTATIONS)
def test_a_well_signed_but_malformed_manifest(case: str, artifact: Path) -> None:
    body = json.loads((artifact / "manifest.json").read_text())
    MUTATIONS[case](body)
    write_body(artifact, body)
    with pytest.raises(MalformedInput):
        read_manifest(artifact)


def test_the_planners_keys_may_not_be_the_stores() -> None:
    with pytest.raises(MxconvError, match="files"):
        build_manifest(plan_digest=sample.PLAN, files={}, extra={"files": {}})


def test_text_of_any_script_and_awkward_names_survive() -> None:
    tensor = TensorFact(dtype="F32", shape=(1,), sha256="0" * 64)
    fact = FileFact(path="a", size_bytes=1, sha256="0" * 64, tensors={'重み "x" \\ }': tensor})
    raw = build_manifest(plan_digest=sample.PLAN, files={"a": fact}, extra={"note": "ß\u2028\n"})
    assert render(json.loads(raw)) == raw and "重み" in raw.decode()


def test_unfinished_and_foreign_folders(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text('{"model_type": "minimax_m1"}')
    assert find_artifact(plain) is None
    with pytest.raises(IncompleteInput, match="not an artifact"):
        require_artifact(plain)
    for name, make in {
        "rank": lambda root: (root / "rank0").mkdir(),
        "journal": lambda root: (root / ".mxconv.journal").touch(),
        "block": lambda root: (root / "config.json").write_text('{"mxconv": {"tp": 1}}'),
    }.items():
        root = tmp_path / name
        root.mkdir()
        make(root)
        with pytest.raises(IncompleteInput, match="not a finished artifact"):
            find_artifact(root)


def test_a_deleted_manifest_leaves_no_artifact(artifact: Path) -> None:
    (artifact / "manifest.json").unlink()
    with pytest.raises(IncompleteInput):
        find_artifact(artifact)


def test_readers_can_see_missing_and_cut_files_without_hashing(artifact: Path) -> None:
    manifest = require_artifact(artifact)
    assert missing_files(artifact, manifest) == []
    (artifact / "tokenizer.json").unlink()
    with open(artifact / sample.files()[0].path, "ab") as file:
        file.write(b"x")
    codes = sorted(problem.exit_code for problem in missing_files(artifact, manifest))
    assert codes == [4, 8]
