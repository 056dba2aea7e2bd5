"""The shipped JSON schema against real manifests of every scheme and form, against what it must refuse, and against the code."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from jsonschema import Draft202012Validator

from mxconv.artifact.manifest import SCHEMA
from mxconv.execute import convert, quantize
from mxconv.quantize.schemes import SCHEMES
from mxconv.tensors import DTYPE_BYTES
from tests.synthetic import make_checkpoint


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(files("mxconv.data").joinpath("manifest.schema.json").read_text())
    Draft202012Validator.check_schema(found)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An artifact of every kind, by name."""
    root = tmp_path_factory.mktemp("made")
    shape: dict[str, Any] = {"hidden": 128, "intermediate": 256, "layers": "ls", "experts": 4, "vocab": 70}
    source = make_checkpoint(root / "source", **shape)
    kept = make_checkpoint(root / "kept", **{**shape, "dialect": "minimax", "heads": 6, "decay": "transformers"})
    np.save(root / "ids.npy", np.arange(60) % 70)
    for scheme in SCHEMES:
        static = scheme in ("w4afp8_static", "w4a8", "tensor_wise_fp8")
        quantize(source, root / scheme, scheme=scheme, tp=2, calibration=root / "ids.npy" if static else None)
    quantize(source, root / "wide", hadamard_block=256)
    quantize(source, root / "ignoring", ignore=["model.layers.0.*"])
    convert(source, root / "convert", tp=2)
    convert(root / "convert", root / "rebuilt", layout="minimax-m1")
    convert(source, root / "minimax", layout="minimax")
    convert(kept, root / "kept-decay", keep_decay=True)
    return {path.name: path for path in root.iterdir() if (path / "manifest.json").exists()}


def test_every_manifest_is_valid(made: dict[str, Path], schema: dict[str, Any]) -> None:
    assert len(made) == len(SCHEMES) + 6
    for name, root in made.items():
        problems = [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(manifest(root))]
        assert not problems, (name, problems[:3])


def manifest(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "manifest.json").read_text())
    return found


SPOILED: dict[str, Callable[[dict[str, Any]], object]] = {
    "another version": lambda m: m.update(schema="mxconv-manifest/2"),
    "no source": lambda m: m.pop("source"),
    "a short digest": lambda m: m.update(sha256="ab"),
    "an upper-case digest": lambda m: m.update(plan_digest="A" * 64),
    "no file": lambda m: m["files"].clear(),
    "a path that leads out": lambda m: m["files"].update({"../x": next(iter(m["files"].values()))}),
    "an absolute path": lambda m: m["files"].update({"/x": next(iter(m["files"].values()))}),
    "itself": lambda m: m["files"].update({"manifest.json": next(iter(m["files"].values()))}),
    "a file with a time": lambda m: next(iter(m["files"].values())).update(mtime=1),
    "a negative size": lambda m: next(iter(m["files"].values())).update(size_bytes=-1),
    "an unknown dtype": lambda m: _tensor(m).update(dtype="F4"),
    "a shape in words": lambda m: _tensor(m).update(shape=["2"]),
    "an unknown scheme": lambda m: m.update(scheme="w3"),
    "a scheme without conventions": lambda m: m.update(numeric_conventions=None),
    "conventions without a scheme": lambda m: m.update(scheme=None),
    "tp 0": lambda m: m.update(tp=0),
    "a tool that is another": lambda m: m["tool"].update(name="x"),
}


def _tensor(body: dict[str, Any]) -> dict[str, Any]:
    fact: dict[str, Any] = next(next(iter(fact["tensors"].values())) for fact in body["files"].values() if "tensors" in fact)
    return fact


@pytest.mark.parametrize("case", SPOILED)
def test_what_is_no_manifest_is_refused(case: str, made: dict[str, Path], schema: dict[str, Any]) -> None:
    body = copy.deepcopy(manifest(made["w4afp8"]))
    SPOILED[case](body)
    assert not Draft202012Validator(schema).is_valid(body)


def test_schema_and_code_say_the_same(schema: dict[str, Any]) -> None:
    assert schema["properties"]["schema"]["const"] == schema["$id"] == SCHEMA
    assert schema["properties"]["scheme"]["enum"] == [None, *SCHEMES]
    assert schema["$defs"]["dtype"]["enum"] == list(DTYPE_BYTES)


def test_every_file_that_is_written_opens_in_the_safetensors_package(made: dict[str, Path]) -> None:
    """And holds what the manifest says, by the package's own reading."""
    import hashlib

    seen = 0
    for root in made.values():
        for path, fact in manifest(root)["files"].items():
            if "tensors" not in fact:
                assert not path.endswith(".safetensors")
                continue
            found = dict(safetensors.deserialize((root / path).read_bytes()))
            assert found.keys() == fact["tensors"].keys()
            for name, tensor in fact["tensors"].items():
                held = found[name]
                assert (held["dtype"], list(held["shape"])) == (tensor["dtype"], tensor["shape"])
                assert hashlib.sha256(bytes(held["data"])).hexdigest() == tensor["sha256"]
                seen += 1
    assert seen > 300
