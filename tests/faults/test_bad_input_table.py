"""Every row of the table of bad input, through the command line: exit code, message, nothing raw, nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mxconv.checkpoint import ByteReader, read_shards
from tests.checkpoint.raw import entry, file_bytes
from tests.faults.inprocess import run
from tests.synthetic import make_checkpoint

SHAPE: dict[str, Any] = {"hidden": 128, "intermediate": 256, "layers": "ls", "experts": 2, "files": 2}
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"
W2 = "model.layers.1.block_sparse_moe.experts.1.w2.weight"
CONVERT = ("convert", "{source}", "{out}")
QUANTIZE = ("quantize", "{source}", "{out}")
COMMANDS = ((*CONVERT, "--tp", "2"), (*QUANTIZE, "--tp", "2"), ("inspect", "{source}"), ("check", "{source}"))
"""What meets a broken checkpoint first, whichever it is."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Right checkpoints to be spoiled, by name."""
    root = tmp_path_factory.mktemp("made")
    make_checkpoint(root / "plain", **SHAPE)
    make_checkpoint(root / "odd", **{**SHAPE, "heads": 6, "kv_heads": 3, "intermediate": 384})
    make_checkpoint(root / "shared", **{**SHAPE, "shared": 6})
    make_checkpoint(root / "minimax", **{**SHAPE, "dialect": "minimax", "heads": 6, "kv_heads": 2, "decay": "transformers"})
    (root / "artifacts").mkdir()
    assert run("convert", root / "plain", root / "artifact", "--tp", "2").code == 0
    return root


@dataclass(frozen=True)
class Row:
    """`spoil` a copy of checkpoint `base`; each of `commands` must end with `code` and say all of `words` on stderr or stdout.

    What is written must pass `check`, and `proof`, which gets the manifest and the folder.
    """

    spoil: Callable[[Path], object]
    code: int
    words: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...] = COMMANDS
    base: str = "plain"
    proof: Callable[[dict[str, Any], Path], object] | None = None


def content(raw: bytes, name: str = SECOND) -> Callable[[Path], object]:
    return lambda root: (root / name).write_bytes(raw)


def header(text: str | dict[str, Any], size: int = 4, length: int | None = None) -> Callable[[Path], object]:
    return content(file_bytes(text, b"\0" * size, length))


def special(make: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda root: ((root / SECOND).unlink(), make(root / SECOND))


def index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], object]:
    def spoil(root: Path) -> None:
        document = json.loads((root / INDEX).read_text())
        change(document["weight_map"])
        (root / INDEX).write_text(json.dumps(document))

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], object], name: str = SECOND) -> Callable[[Path], object]:
    """Change the tensors of a shard, and the index with them."""

    def spoil(root: Path) -> None:
        held = load_file(root / name)
        change(held)
        save_file(held, root / name, metadata={"format": "pt"})
        document = json.loads((root / INDEX).read_text())
        others = {key: file for key, file in document["weight_map"].items() if file != name}
        document["weight_map"] = {**others, **dict.fromkeys(held, name)}
        (root / INDEX).write_text(json.dumps(document))

    return spoil


def config(**keys: Any) -> Callable[[Path], object]:
    return lambda root: (root / "config.json").write_text(json.dumps(json.loads((root / "config.json").read_text()) | keys))


def resized(root: Path, by: int) -> None:
    os.truncate(root / SECOND, (root / SECOND).stat().st_size + by)


def linked_out(root: Path) -> None:
    shutil.move(root / SECOND, root.parent / "outside.safetensors")
    (root / SECOND).symlink_to(root.parent / "outside.safetensors")


def make_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("device nodes cannot be made here")


def make_socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)  # a socket's path may have 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


def hub_cache(root: Path) -> None:
    """Make `root` a snapshot of the hub cache: links into blobs beside it."""
    blobs = root.parent.parent / "blobs"
    blobs.mkdir()
    for path in list(root.iterdir()):
        shutil.move(path, blobs / f"b-{path.name}")
        path.symlink_to(Path("../../blobs") / f"b-{path.name}")


def nan(value: float, name: str = W2) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(held: dict[str, torch.Tensor]) -> None:
        held[name][5, 9] = held[name][6, 1] = value

    return change


def pickled(root: Path) -> None:
    for path in root.glob("*.safetensors"):
        path.unlink()
    (root / INDEX).unlink()
    (root / "pytorch_model.bin").write_bytes(b"PK\x03\x04cposix\nsystem\n")


def remote_code(root: Path) -> None:
    (root / "modeling_minimax_m1.py").write_text("raise SystemExit('imported')")
    (root / "extra.pt").write_bytes(b"\x80\x02.")
    config(auto_map={"AutoModelForCausalLM": "modeling_minimax_m1.MiniMaxM1ForCausalLM"})(root)


def only_weights(body: dict[str, Any], out: Path) -> None:
    assert {path.suffix for path in out.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".log"}
    assert not any("auto_map" in path.read_text() for path in out.rglob("config.json"))


def dropped_visual(body: dict[str, Any], out: Path) -> None:
    assert list(body["dropped"]) == ["model.visual"] and body["request"]["drop"] == ["model.visual"]


def kept_decay(body: dict[str, Any], out: Path) -> None:
    assert body["request"]["keep_decay"] is True and body["warnings"]["kept_decay_layers"] == [0]


def without_shards(root: Path) -> None:
    for path in root.glob("*.safetensors"):
        path.unlink()


def absent(held: dict[str, torch.Tensor]) -> None:
    for name in [name for name in held if "experts.1.w2" in name]:
        del held[name]


def in_two(root: Path) -> None:
    held, first = load_file(root / SECOND), load_file(root / FIRST)
    name = next(iter(sorted(held)))
    save_file({**first, name: held[name]}, root / FIRST, metadata={"format": "pt"})


ONE = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 4998541\n"
A = entry()
ROWS: dict[str, Row] = {
    "git-lfs pointer": Row(content(LFS), 4, ("git-lfs pointer, 4998541 bytes missing; run git lfs pull", SECOND)),
    "HTML page": Row(content(b"<!DOCTYPE html><html>404</html>" + b" " * 99), 3, ("an HTML page", SECOND)),
    "pickle zip": Row(content(b"PK\x03\x04" + b"\0" * 99), 3, ("zip archive", "never unpickled")),
    "GGUF": Row(content(b"GGUF\x03" + b"\0" * 99), 3, ("GGUF",)),
    "truncated": Row(lambda root: resized(root, -7), 4, ("truncated", "expected", "got")),
    "trailing bytes": Row(lambda root: resized(root, 3), 4, ("bytes trail", "expected", "got")),
    "empty": Row(content(b""), 4, ("file is empty",)),
    "all zero": Row(content(b"\0" * 5000), 4, ("zeros", "5000 bytes")),
    "header length 2^63": Row(header({"a": A}, 4, 1 << 63), 3, ("header length", "9223372036854775808")),
    "header length over 100 MB": Row(header({"a": A}, 4, 100_000_001), 3, ("header length", "100000001")),
    "header length beyond the file": Row(header({"a": A}, 4, 500), 3, ("header length", "500")),
    "overlap": Row(header({"a": A, "b": entry("F32", (1,), 2, 6)}, 6), 3, ("tensor 'b'", "overlaps")),
    "hole": Row(header({"a": A, "b": entry("F32", (1,), 8, 12)}, 12), 3, ("tensor 'b'", "hole")),
    "negative offset": Row(header({"a": entry("F32", (1,), -4, 0)}), 3, ("tensor 'a'", "data_offsets")),
    "float offset": Row(header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0.0,4]}}'), 3, ("tensor 'a'", "data_offsets")),
    "shape product overflow": Row(header({"a": entry("F32", (1 << 40, 1 << 40))}), 3, ("tensor 'a'", "overflow")),
    "duplicate JSON key": Row(header(f'{{"a":{ONE},"a":{ONE}}}'), 3, ("'a'", "twice")),
    "unknown field": Row(header({"a": {**A, "z": 1}}), 3, ("tensor 'a'", "unknown field 'z'")),
    "non-UTF-8": Row(content(struct.pack("<Q", 6) + b'{"\xff":1' + b"\0" * 9), 3, ("UTF-8",)),
    "deep nesting": Row(header('{"a":{"dtype":' + "[" * 60_000), 3, ("'a'", "flat JSON object")),
    "control characters in a name": Row(header({"a\x1b[31m\n": A}), 3, ("control or escape", "\\x1b")),
    "control characters in the index": Row(index(lambda m: m.update({"a\x1b[2J": FIRST})), 3, ("control or escape", "\\x1b")),
    "unknown dtype": Row(header({"a": entry("F42")}), 3, ("tensor 'a'", "unknown dtype", "F42")),
    "FIFO": Row(special(os.mkfifo), 3, ("FIFO", SECOND)),
    "directory": Row(special(os.mkdir), 3, ("directory", SECOND)),
    "device": Row(special(make_device), 3, ("a device", SECOND)),
    "socket": Row(special(make_socket), 3, ("a socket", SECOND)),
    "link to a device": Row(special(lambda path: path.symlink_to("/dev/zero")), 3, ("out of the checkpoint folder", SECOND)),
    "FIFO that no index names": Row(
        lambda root: os.mkfifo(root / "pipe"), 0, ("pipe: ignored, it is a FIFO",),
        (("inspect", "{source}"), ("check", "{source}"), (*CONVERT, "--dry-run"), CONVERT),
    ),
    "weight_map ../": Row(index(lambda m: m.update({W2: "../x.safetensors"})), 3, (W2, "not a plain path")),
    "weight_map absolute": Row(index(lambda m: m.update({W2: "/etc/passwd"})), 3, (W2, "absolute")),
    "link out of the tree": Row(linked_out, 3, ("symbolic link leads out", SECOND)),
    "the hub cache's links": Row(hub_cache, 0, (), ((*CONVERT, "--tp", "2"), ("check", "{source}"))),
    "shard missing": Row(lambda root: (root / SECOND).unlink(), 4, ("shard is missing", SECOND, "tensors into it")),
    "key not in its shard": Row(index(lambda m: m.update({"ghost": SECOND})), 4, ("tensor ghost is not in the shard", SECOND)),
    "tensor not in the index": Row(index(lambda m: m.pop(W2)), 4, (W2, "in the shard but not in the index")),
    "same tensor in two shards": Row(in_two, 3, ("in two shards", FIRST)),
    "an index and no shard, looked at": Row(
        without_shards, 0, ("note: no shards here",), (("inspect", "{source}"), (*CONVERT, "--dry-run"), (*QUANTIZE, "--dry-run")),
    ),
    "an index and no shard, converted": Row(without_shards, 4, ("only an index",), (CONVERT, QUANTIZE)),
    "an index and no shard, verified": Row(
        without_shards, 4, ("index",), (("verify", "{made}/artifact", "--source", "{source}", "--windows", "1", "--window", "8"),)
    ),
    "model tensor missing": Row(
        tensors(absent), 4, ("layer 1", "have 1 of 2 experts"), (CONVERT, QUANTIZE, ("inspect", "{source}")),
    ),
    "unexpected tensor": Row(
        tensors(lambda t: t.update({"model.visual": torch.ones(3)})), 4, ("model.visual", "--drop"), (CONVERT, QUANTIZE),
    ),
    "unexpected tensor, dropped": Row(
        tensors(lambda t: t.update({"model.visual": torch.ones(3)})), 0, (), ((*CONVERT, "--drop", "model.visual"),),
        proof=dropped_visual,
    ),
    "layer count disagrees": Row(
        config(num_hidden_layers=3, attn_type_list=[0, 1, 0]), 4, ("layer 2", "missing"), (CONVERT, QUANTIZE),
    ),
    "expert count disagrees": Row(config(num_local_experts=3), 4, ("have 2 of 3 experts",), (CONVERT, QUANTIZE)),
    "NaN": Row(tensors(nan(float("nan"))), 7, (W2, "2 weights", "(5, 9)"), (CONVERT, QUANTIZE)),
    "infinity": Row(tensors(nan(float("inf"))), 7, (W2, "2 weights", "(5, 9)"), (CONVERT, QUANTIZE)),
    "fp16 overflow of a scale": Row(tensors(nan(1e6, W2.replace("w2", "w1"))), 7, ("float16",), (QUANTIZE,)),
    "TP that does not divide heads": Row(
        lambda root: None, 2, ("attention heads 6", "tp 1"), ((*CONVERT, "--tp", "4"), ("inspect", "{source}", "--tp", "4")), "odd"
    ),
    "TP that does not divide kv heads": Row(lambda root: None, 2, ("key/value heads 3", "tp 1"), ((*CONVERT, "--tp", "2"),), "odd"),
    "TP that does not divide the shared MLP": Row(
        lambda root: None, 2, ("shared_intermediate_size 6", "tp 1"), ((*CONVERT, "--tp", "4"),), "shared"
    ),
    "a group that does not divide I/R": Row(lambda root: None, 2, ("groups of 128", "tp 1"), ((*QUANTIZE, "--tp", "4"),)),
    "a rotation that does not divide I/R": Row(
        lambda root: None, 2, ("down_proj", "Hadamard block 512"), ((*QUANTIZE, "--hadamard-block", "512"),),
    ),
    "decay buffers that differ": Row(lambda root: None, 3, ("layer 0", "--keep-decay"), (CONVERT, QUANTIZE), "minimax"),
    "decay buffers that differ, kept": Row(
        lambda root: None, 0, ("decay slopes that are not the model's",), ((*CONVERT, "--keep-decay"),), "minimax", kept_decay
    ),
    "no tokenizer": Row(
        lambda root: None, 0, ("note: no tokenizer.json",), (("inspect", "{source}"), (*CONVERT, "--dry-run"), CONVERT, QUANTIZE),
    ),
    "no tokenizer, a static scheme": Row(
        lambda root: None, 2, ("--calibration ids.npy", "tokenizer"), ((*QUANTIZE, "--scheme", "w4a8"),)
    ),
    "an artifact at another TP": Row(
        lambda root: None, 2, ("cut into 2 ranks", "tp 4"),
        (("verify", "{made}/artifact", "--source", "{source}", "--tp", "4", "--windows", "1", "--window", "8"),),
    ),
    "pickle files only": Row(pickled, 3, ("never unpickled", "pytorch_model.bin")),
    "remote code": Row(remote_code, 0, ("never imported", "never unpickled"), (("inspect", "{source}"), ("check", "{source}"))),
    "remote code, converted": Row(remote_code, 0, (), (CONVERT, QUANTIZE), proof=only_weights),
    "index of nothing": Row(lambda root: (root / INDEX).write_text('{"weight_map":{}}'), 4, ("index names no tensor",)),
    "index that is no object": Row(lambda root: (root / INDEX).write_text("[]"), 3, ("weight_map",)),
    "config that is no JSON": Row(lambda root: (root / "config.json").write_text("{"), 3, ("not valid JSON", "config.json")),
    "config missing": Row(lambda root: (root / "config.json").unlink(), 4, ("config.json", "missing")),
    "config of another model": Row(config(model_type="llama"), 3, ("model_type", "llama")),
    "config key twice": Row(lambda root: (root / "config.json").write_text('{"a":1,"a":2}'), 3, ("'a' appears twice",)),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_row(case: str, made: Path, tmp_path: Path) -> None:
    row = ROWS[case]
    source = shutil.copytree(made / row.base, tmp_path / "models--x" / "snapshots" / "abc" / "source")
    if row.spoil is hub_cache:
        source = Path(shutil.move(source, source.parent.parent / "def"))
    row.spoil(source)
    before = {path: path.stat().st_size for path in source.rglob("*") if path.is_file()}
    for number, arguments in enumerate(row.commands):
        out = tmp_path / f"out{number}"
        names = {"{source}": str(source), "{out}": str(out), "{made}": str(made)}
        result = run(*(re.sub(r"\{\w+\}", lambda found, names=names: names[found[0]], word) for word in arguments))
        said = result.out + result.err
        assert result.code == row.code, (arguments, said)
        for word in row.words:
            assert word in said, (arguments, word, said)
        assert "Traceback" not in said and all(c.isprintable() or c == "\n" for c in said)
        assert row.code in (0, 7) or row.base == "minimax" or not out.exists(), "something was written for an impossible plan"
        assert (out / "manifest.json").exists() == (row.code == 0 and "{out}" in arguments and "--dry-run" not in arguments)
        if (out / "manifest.json").exists():
            assert run("check", out).code == 0
            if row.proof:
                row.proof(json.loads((out / "manifest.json").read_text()), out)
    assert before == {path: path.stat().st_size for path in source.rglob("*") if path.is_file()}


def test_scalar_and_zero_size_tensors_are_kept(made: Path, tmp_path: Path) -> None:
    """They are read as what they are and counted, are never lost in silence, and are left out only when that is asked for."""
    source = Path(shutil.copytree(made / "plain", tmp_path / "source"))
    held = {"extra.scalar": torch.tensor(7.5), "extra.empty": torch.zeros(0, 3)}
    count = len(read_shards(source).tensors)
    tensors(lambda t: t.update(held))(source)
    shards = read_shards(source)
    reader = ByteReader(shards)
    for name, tensor in held.items():
        stored = shards.tensors[name]
        assert stored.shape == tuple(tensor.shape)
        assert reader.read(stored, tuple((0, n) for n in stored.shape)).tobytes() == tensor.numpy().tobytes()
    reader.close()
    result = run("check", source)
    assert result.code == 0 and f"{count + 2} tensors" in result.out
    result = run("convert", source, tmp_path / "out")
    assert result.code == 4 and all(name in result.err for name in held)
    assert run("convert", source, tmp_path / "out", "--drop", "extra.*").code == 0
    assert set(json.loads((tmp_path / "out" / "manifest.json").read_text())["dropped"]) == set(held)


def test_problems_are_listed_together_with_json(made: Path, tmp_path: Path) -> None:
    source = shutil.copytree(made / "plain", tmp_path / "source")
    content(b"GGUF" + b"\0" * 99, FIRST)(source)
    content(b"", SECOND)(source)
    result = run("check", source, "--json")
    document = json.loads(result.out)
    assert result.code == 3 and [problem["exit_code"] for problem in document["problems"]] == [3, 4]


def test_a_source_that_changes_during_the_run_is_noticed(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mxconv.execute.run as execute

    source, ran = shutil.copytree(made / "plain", tmp_path / "source"), 0
    copy = execute.OPERATIONS["copy"]

    def touch(*given: Any) -> Any:
        nonlocal ran
        ran += 1
        if ran == 5:
            tensors(nan(0.5))(source)
        return copy(*given)

    monkeypatch.setitem(execute.OPERATIONS, "copy", touch)  # type: ignore[arg-type]
    result = run("convert", source, tmp_path / "out", "--workers", "1")
    assert result.code == 8 and "source changed" in result.err and "--resume" in result.err


def test_another_plan_and_another_writer_in_the_output_folder(made: Path, tmp_path: Path) -> None:
    from mxconv.artifact import open_output

    assert run("convert", made / "plain", tmp_path / "out").code == 0
    result = run("quantize", made / "plain", tmp_path / "out", "--resume")
    assert result.code == 5 and "plan" in result.err
    with open_output(tmp_path / "busy", plan_digest="0" * 64, resume=False, overwrite=False):
        result = run("convert", made / "plain", tmp_path / "busy", "--resume")
    assert result.code == 5


@pytest.mark.parametrize("error", [28, 122, 5], ids=["disk full", "quota", "input/output error"])
def test_a_disk_that_gives_out_is_6_and_resumable(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    real, calls = os.pwrite, 0

    def fail(*given: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise OSError(error, os.strerror(error))
        return real(*given)

    monkeypatch.setattr(os, "pwrite", fail)
    result = run("convert", made / "plain", tmp_path / "out", "--workers", "1")
    assert result.code == 6 and "--resume" in result.err
    monkeypatch.undo()
    assert run("convert", made / "plain", tmp_path / "out", "--resume").code == 0
    assert run("check", tmp_path / "out").code == 0


@pytest.mark.parametrize("name", ["fifo.npy", "fifo.txt"])
def test_calibration_from_a_fifo_does_not_hang(name: str, made: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    source = Path(shutil.copytree(made / "plain", tmp_path / "source"))
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    (source / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": words}))
    result = run("quantize", source, tmp_path / "out", "--scheme", "w4a8", "--calibration", tmp_path / name)
    assert result.code == 3 and "not a regular file" in result.err and not (tmp_path / "out").exists()


def test_ids_outside_the_vocabulary(made: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([[1, 2, 99999]]))
    result = run("quantize", made / "plain", tmp_path / "out", "--scheme", "w4a8", "--calibration", tmp_path / "ids.npy")
    assert result.code in (2, 3) and "99999" in result.err and "Traceback" not in result.err
