"""Mutated configs, indexes and manifests through the command line: always an answer, never a traceback, never a wrong yes."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from mxconv.artifact.manifest import render
from mxconv.checkpoint import read_shards
from mxconv.execute import convert, quantize
from tests.checkpoint.raw import write_sharded
from tests.faults.inprocess import run
from tests.synthetic import make_checkpoint

INDEX = "model.safetensors.index.json"
# What a value may be replaced by: other types, edges of ranges, and what breaks arithmetic further on.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 1 << 31, 1 << 62, 1 << 200, -(1 << 63), 0.0, -0.0, 0.5, 1e-320, 1e308, float("nan"),
    float("inf"), "", "a", "../x", "\x1b[31m", "\ud800", "128", [], [0], [[]], [None], {}, {"a": 1}, [1] * 300, "x" * 5000,
)  # fmt: skip

KEYS = ("mxconv", "auto_map", "rope_parameters", "quantization_config", "x", "dtype")


def mutated(value: Any, draw: random.Random) -> Any:
    """`value` with a few places changed, removed, doubled or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(draw.randrange(1, 4)):
        _mutate(value, draw)
    return value


def _mutate(value: Any, draw: random.Random) -> None:
    holder = value
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return
        key = draw.choice(keys)
        inner = holder[key]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.6:
            holder = inner
            continue
        kind = draw.randrange(4)
        if kind == 0 and isinstance(holder, dict):
            del holder[key]
        elif kind == 1:
            holder[key] = copy.deepcopy(holder[draw.choice(keys)])
        elif kind == 2 and isinstance(holder, dict):
            holder[draw.choice(KEYS)] = copy.deepcopy(draw.choice(VALUES))
        else:
            holder[key] = copy.deepcopy(draw.choice(VALUES))
        return


def sealed(body: Any, otherwise: str) -> str:
    """A manifest with the digest that it needs to be looked at at all: what a hostile artifact would hold."""
    if not isinstance(body, dict):
        return otherwise
    body = {key: value for key, value in body.items() if key != "sha256"}
    try:
        return render({**body, "sha256": hashlib.sha256(render(body)).hexdigest()}).decode()
    except (ValueError, LookupError, TypeError):  # no files or a list of them, NaN, half a surrogate pair
        return otherwise


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    shape: dict[str, Any] = {"hidden": 128, "intermediate": 128, "layers": "ls", "experts": 2, "vocab": 64}
    made = {"m1": make_checkpoint(root / "m1", **shape), "minimax": make_checkpoint(root / "minimax", **shape, dialect="minimax")}
    convert(made["m1"], root / "converted", tp=2)
    quantize(made["m1"], root / "quantized")
    return {**made, "converted": root / "converted", "quantized": root / "quantized"}


COMMANDS = {
    "m1": (("inspect", "{0}"), ("check", "{0}"), ("quantize", "{0}", "{1}", "--dry-run"), ("convert", "{0}", "{1}", "--dry-run")),
    "converted": (("inspect", "{0}"), ("check", "{0}"), ("convert", "{0}", "{1}", "--dry-run"), ("diff", "{0}", "{0}")),
    "quantized": (("inspect", "{0}"), ("check", "{0}"), ("convert", "{0}", "{1}", "--dry-run"), ("diff", "{0}", "{0}")),
}
COMMANDS["minimax"] = COMMANDS["m1"]


@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("file", ["config.json", INDEX, "manifest.json"])
def test_mutated_files_end_in_an_answer(count: int, file: str, folders: dict[str, Path], tmp_path: Path) -> None:
    draw = random.Random(f"{file} {count}")
    kinds = [kind for kind, root in folders.items() if (root / file).exists()]
    copies = {kind: Path(shutil.copytree(folders[kind], tmp_path / kind)) for kind in kinds}
    codes: dict[int, int] = {}
    for _ in range(count // 3):
        kind = draw.choice(kinds)
        path = copies[kind] / file
        right = path.read_bytes()
        text = json.dumps(mutated(json.loads(right), draw))
        if file == "manifest.json" and draw.random() < 0.8:
            text = sealed(json.loads(text), text)
        elif draw.random() < 0.2:  # broken as text, too
            at = draw.randrange(len(text))
            text = text[:at] + draw.choice(["", "{", '"', "]", "\\u", "1e999", "\x00", "[" * 5000]) + text[at + draw.randrange(3) :]
        path.write_text(text)
        # diff reads every weight and of a manifest only that it is there
        commands = [words for words in COMMANDS[kind] if words[0] != "diff" or file != "manifest.json"]
        command = [word.format(copies[kind], tmp_path / "out") for word in draw.choice(commands)]
        result = run(*command)
        codes[result.code] = codes.get(result.code, 0) + 1
        assert result.code in (0, 2, 3, 4, 7, 8), (command, text, result.err)
        assert "Traceback" not in result.err and "a bug in mxconv" not in result.err
        assert all(c.isprintable() or c == "\n" for c in result.out + result.err), (command, text)
        path.write_bytes(right)
    assert len(codes) > 1
    print(f"proof: {count // 3:,} mutated {file}, each an answer: {dict(sorted(codes.items()))}")


ESCAPES = (
    "../escaped.safetensors", "/tmp/escaped.safetensors", "a/../../escaped.safetensors", 7, None, "manifest.json", "config.json",
    ".mxconv.journal", "run.log", "tokenizer.json", "model.safetensors.index.json", ".hidden.safetensors",
)  # fmt: skip


@pytest.mark.parametrize("path", ESCAPES)
def test_a_sealed_manifest_cannot_make_convert_write_elsewhere(path: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(folders["converted"], tmp_path / "deep" / "artifact"))
    body = json.loads((root / "manifest.json").read_text())
    names = body["source"]["weight_map"]
    body["source"]["weight_map"] = dict.fromkeys(names, path)
    (root / "manifest.json").write_text(sealed(body, ""))
    result = run("convert", root, tmp_path / "deep" / "out")
    assert result.code == 3 and "weight_map" in result.err
    assert not list(tmp_path.rglob("*escaped*")) and not (tmp_path / "deep" / "out").exists()


@pytest.mark.parametrize("count", [1_500, pytest.param(100_000, marks=pytest.mark.thorough)])
def test_mutated_indexes_end_in_an_answer_that_the_package_shares(count: int, tmp_path: Path) -> None:
    """What is accepted names, for each tensor, a file of the folder in which the safetensors package finds it."""
    files = {"model-1.safetensors": {"a": b"12", "b": b"3"}, "model-2.safetensors": {"c": b"456"}}
    folder = write_sharded(tmp_path, files)
    right = (folder / INDEX).read_bytes()
    draw, accepted = random.Random(77), 0
    swaps = b'../ / \\u0000 \\ " { } [ null a model-2 model-1 . 0 \xff ,'.split()
    for _ in range(count):
        data = bytearray(right)
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(data))
            kind = draw.randrange(4)
            if kind == 0:
                data[at] ^= 1 << draw.randrange(8)
            elif kind == 1:
                del data[at : at + draw.randrange(1, 8)]
            elif kind == 2:
                data[at:at] = draw.choice(swaps)
            else:
                data[at:at] = data[max(0, at - draw.randrange(1, 30)) : at]
            if not data:
                data = bytearray(b"{")
        (folder / INDEX).write_bytes(data)
        shards = read_shards(folder)
        codes = {problem.exit_code for problem in shards.problems}
        assert codes <= {3, 4}
        if codes or not shards.present:
            continue
        accepted += 1
        assert json.loads(bytes(data))["weight_map"] == shards.index
        for name, file in (shards.index or {}).items():
            assert name in dict(safetensors.deserialize((folder / file).read_bytes()))
    assert 0 < accepted < count
    print(f"proof: {count:,} mutated indexes, {accepted:,} accepted, all as the safetensors package reads them")


def test_folder_names_that_are_no_utf8(folders: dict[str, Path], tmp_path: Path) -> None:
    """A name of any bytes is a name: everything works, and is printed escaped."""
    source, out = Path(f"{tmp_path}/s\udcffx"), Path(f"{tmp_path}/o\udcfey")
    shutil.copytree(folders["m1"], source)
    commands: list[tuple[object, ...]] = [
        ("inspect", source), ("convert", source, out, "--tp", "2", "--plan", tmp_path / "p\udcfd"), ("inspect", out, "--json"),
        ("check", out), ("convert", source, out, "--tp", "2", "--resume", "--json"), ("diff", source, out, "--json"),
        ("verify", out, "--source", source, "--windows", "1", "--window", "8", "--junit", tmp_path / "j\udcfc", "--json"),
        ("quantize", source, f"{out}2", "--scheme", "w4a8", "--calibration", tmp_path / "i\udcfb.npy"),
    ]  # fmt: skip
    np.save(tmp_path / "i\udcfb.npy", np.arange(16))
    for command in commands:
        result = run(*command)
        assert result.code == 0, (command, result.err)
        (result.out + result.err).encode()
    lines = [json.loads(line) for line in (out / "run.log").read_text().splitlines()]
    assert lines[0]["source"] == str(source.resolve())
    for command in (("inspect", f"{source}3"), ("convert", source, out), ("convert", source, out, "--json")):
        assert run(*command).code in (4, 5)


def test_a_header_full_of_tensors_that_are_no_models_stays_a_short_answer(folders: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(folders["m1"], tmp_path / "source"))
    for path in (*source.glob("*.safetensors"), source / INDEX):
        path.unlink(missing_ok=True)
    layers = {f"model.layers.0.self_attn.k_proj.{i}": b"x" for i in range(1500)}  # no rule, no rule, no such layer
    write_sharded(source, {f"m{j}.safetensors": {f"{j}{name}": data for name, data in layers.items()} for j in range(2)})
    for command in ("inspect", "convert", "quantize"):
        result = run(command, source, *([tmp_path / "out"] if command != "inspect" else []))
        assert result.code == 4 and "2980 more" in result.err and len(result.err) < 40_000, len(result.err)
