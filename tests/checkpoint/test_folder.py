"""Checkpoint folders: indexes, links, special files, and every row of bad input that concerns them."""

from __future__ import annotations

import json
import os
import socket
import struct
from pathlib import Path

import pytest

from mxconv.checkpoint import Shards, rank_folders, read_shards
from mxconv.errors import IncompleteInput, MalformedInput, MxconvError
from tests.checkpoint.raw import entry, file_bytes, write, write_sharded

TWO = {"model-1.safetensors": {"a": b"1234", "b": b"56"}, "model-2.safetensors": {"c": b"789"}}


def only(shards: Shards) -> MxconvError:
    """The single problem of a folder."""
    assert len(shards.problems) == 1, [problem.render() for problem in shards.problems]
    return shards.problems[0]


def single(folder: Path, raw: bytes) -> Shards:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(raw)
    return read_shards(folder)


def test_a_sharded_folder(tmp_path: Path) -> None:
    shards = read_shards(write_sharded(tmp_path, TWO))
    assert not shards.problems and not shards.notes and shards.present
    assert [file.relative for file in shards.files] == ["model-1.safetensors", "model-2.safetensors"]
    assert shards.index == {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    for name, content in (("a", b"1234"), ("b", b"56"), ("c", b"789")):
        tensor = shards.tensors[name]
        raw = (tmp_path / shards.files[tensor.file].relative).read_bytes()
        assert raw[tensor.offset : tensor.offset + tensor.size_bytes] == content
    shards.require()


def test_a_single_file(tmp_path: Path) -> None:
    shards = single(tmp_path, file_bytes({"__metadata__": {"format": "pt"}, "a": entry()}, b"abcd"))
    assert shards.index is None and shards.present and not shards.problems
    assert shards.files[0].metadata == {"format": "pt"} and shards.tensors["a"].size_bytes == 4


BAD_FILES: dict[str, tuple[bytes, int, str]] = {
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 4998541\n",
        4,
        "git-lfs pointer, 4998541 bytes missing; run git lfs pull",
    ),
    "HTML page": (b"<!DOCTYPE html>\n<html><body>404</body></html>" + b" " * 100, 3, "an HTML page"),
    "HTML after blanks": (b"\n\n  <html>" + b" " * 100, 3, "an HTML page"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", 3, "XML or HTML"),
    "JSON": (b'{"error": "not found"}', 3, "JSON text"),
    "pickle in a zip": (b"PK\x03\x04\x14\x00\x00\x00" + b"\0" * 100, 3, "never unpickled"),
    "bare pickle": (b"\x80\x02}q\x00(X\x01\x00" + b"\0" * 100, 3, "never unpickled"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + b"\0" * 100, 3, "GGUF"),
    "gzip": (b"\x1f\x8b\x08\x00" + b"\0" * 100, 3, "gzip"),
    "empty": (b"", 4, "empty"),
    "three bytes": (b"abc", 4, "truncated"),
    "all zero": (b"\0" * 4096, 4, "zeros"),
    "zero length, then text": (b"\0" * 8 + b"{}", 3, "length is zero"),
    "length 2^63": (file_bytes({"a": entry()}, b"\0" * 4, 1 << 63), 3, "header length"),
    "length over 100 MB": (file_bytes({"a": entry()}, b"\0" * 4, 100_000_001), 3, "header length"),
    "length beyond the file": (file_bytes({"a": entry()}, b"\0" * 4, 200), 3, "header length"),
    "truncated": (file_bytes({"a": entry()}, b"\0" * 3), 4, "truncated (expected 73 bytes, got 72 bytes)"),
    "trailing": (file_bytes({"a": entry()}, b"\0" * 9), 4, "bytes trail"),
    "binary rubbish": (bytes(range(200, 256)) * 10, 3, "header length"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(case: str, tmp_path: Path) -> None:
    raw, code, words = BAD_FILES[case]
    problem = only(single(tmp_path, raw))
    assert problem.exit_code == code and words in problem.render() and "model.safetensors" in problem.render()


def test_lengths_are_checked_before_anything_is_allocated(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 90_000_000) + b"{")
    os.truncate(path, 1 << 40)  # sparse: the length is plausible, the header is 90 MB of zeros
    assert only(read_shards(tmp_path)).exit_code == 3
    path.write_bytes(file_bytes({"a": entry("F64", (1 << 50,), 0, 8 << 50)}))
    assert "truncated" in only(read_shards(tmp_path)).render()


@pytest.mark.parametrize("kind", ["fifo", "directory", "socket", "device"])
def test_special_file_as_shard(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # a socket's path may have 108 bytes at most
        socket.socket(socket.AF_UNIX).bind("model.safetensors")
    else:
        path.symlink_to("/dev/zero")
    problem = only(read_shards(tmp_path))
    assert problem.exit_code == 3
    assert {"fifo": "FIFO", "directory": "directory", "socket": "a socket", "device": "out of"}[kind] in problem.render()


BAD_PATHS = [
    "../x.safetensors", "a/../../x.safetensors", "/etc/passwd", "//x", "", ".", "..", "./x.safetensors", "a//b", "a/",
    "~/x", "~root/x",
    "C:\\x", "C:/x", "..\\x", "a\\..\\x", "\\\\host\\share", "x\0y", "x\ny", "x\x1b[31m", "x\u202ey", "a" * 2000, "%2e%2e/../x",
    "a/./b", "a/..", "../../../../../../etc/shadow", "/",
]  # fmt: skip


@pytest.mark.parametrize("value", [*BAD_PATHS, None, 7, [], {}, True], ids=lambda value: ascii(value)[:30])
def test_bad_path_in_weight_map(value: object, tmp_path: Path) -> None:
    write_sharded(tmp_path, TWO)
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": value}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    codes = {problem.exit_code for problem in read_shards(tmp_path).problems}
    text = "\n".join(problem.render() for problem in read_shards(tmp_path).problems)
    assert 3 in codes and "tensor 'c'" in text and text.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", 3), ("[]", 3), ("{}", 3), ('{"weight_map":[]}', 3), ('{"weight_map":{}}', 4), ('{"weight_map":{"a":"b","a":"c"}}', 3),
        ("[" * 200_000, 3), ('{"metadata":3,"weight_map":{"a":"x"}}', 3), ('{"weight_map":{"a\\u001b":"x"}}', 3), ("{\xff", 3),
        ('{"weight_map":{"a":"\\ud800"}}', 3),
        ('{"weight_map":{"\\udfff":"a"}}', 3),
        ('{"metadata":{"x":"\\uD812"},"weight_map":{"a":"b"}}', 3),
    ],
)  # fmt: skip
def test_bad_index(text: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    assert code in {problem.exit_code for problem in read_shards(tmp_path).problems}


def test_index_that_is_a_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    assert only(read_shards(tmp_path)).exit_code == 3


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, TWO)
    (tmp_path / "model-1.safetensors").unlink()
    problem = only(read_shards(tmp_path))
    assert isinstance(problem, IncompleteInput) and "model-1.safetensors" in problem.render() and "2 tensors" in problem.render()


def test_an_index_without_any_shard_is_no_problem_until_weights_are_needed(tmp_path: Path) -> None:
    write_sharded(tmp_path, TWO)
    for name in TWO:
        (tmp_path / name).unlink()
    shards = read_shards(tmp_path)
    assert not shards.problems and not shards.present and set(shards.index or ()) == {"a", "b", "c"}
    with pytest.raises(IncompleteInput):
        shards.require()


def test_key_not_in_its_shard_and_tensor_not_in_the_index(tmp_path: Path) -> None:
    index = {"a": "model-1.safetensors", "z": "model-1.safetensors", "c": "model-2.safetensors"}
    shards = read_shards(write_sharded(tmp_path, TWO, index))
    lines = sorted(problem.render() for problem in shards.problems)
    assert len(lines) == 2 and {problem.exit_code for problem in shards.problems} == {4}
    assert any("tensor z is not in the shard" in line for line in lines)
    assert any("tensor b is in the shard but not in the index" in line for line in lines)


def test_key_in_another_shard_than_the_index_says(tmp_path: Path) -> None:
    index = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    problem = only(read_shards(write_sharded(tmp_path, TWO, index)))
    assert problem.exit_code == 4 and "tensor b" in problem.render() and "model-2.safetensors" in problem.render()


def test_the_same_tensor_in_two_shards(tmp_path: Path) -> None:
    files = {"model-1.safetensors": {"a": b"1"}, "model-2.safetensors": {"a": b"2", "c": b"3"}}
    problem = only(read_shards(write_sharded(tmp_path, files, {"a": "model-1.safetensors", "c": "model-2.safetensors"})))
    assert problem.exit_code == 3 and "'a'" in problem.render() and "two shards" in problem.render()


def test_all_problems_are_listed_together(tmp_path: Path) -> None:
    files = {f"model-{i}.safetensors": {f"t{i}": b"x"} for i in range(5)}
    write_sharded(tmp_path, files)
    (tmp_path / "model-0.safetensors").write_bytes(b"GGUF" + b"\0" * 50)
    (tmp_path / "model-1.safetensors").unlink()
    os.truncate(tmp_path / "model-2.safetensors", (tmp_path / "model-2.safetensors").stat().st_size - 1)
    shards = read_shards(tmp_path)
    assert sorted(problem.exit_code for problem in shards.problems) == [3, 4, 4]
    with pytest.raises(MxconvError) as raised:
        shards.require()
    assert raised.value.exit_code == 3 and all(f"model-{i}" in str(raised.value) for i in range(3))


def test_long_lists_are_cut(tmp_path: Path) -> None:
    index = {f"t{i}": "model-1.safetensors" for i in range(100)}
    shards = read_shards(write_sharded(tmp_path, {"model-1.safetensors": {"t0": b"x"}}, index))
    assert len(shards.problems) == 21 and "79 more" in shards.problems[-1].render()


def test_lists_stay_short_whatever_a_folder_holds(tmp_path: Path) -> None:
    """One header of 3,000 tensors under 40 names, an index of as many wrong and missing files, a crowd of files beside them."""
    many = write_sharded(tmp_path, {"m0.safetensors": {f"t{i}": b"x" for i in range(3000)}})
    for i in range(1, 40):
        (many / f"m{i}.safetensors").symlink_to("m0.safetensors")
        (many / f"pipe{i}").touch() if i < 5 else os.mkfifo(many / f"pipe{i}")
        (many / f"code{i}.py").touch()
        (many / f"b{i}.safetensors").write_bytes(file_bytes({f"b{j}": {**entry(), "z": 1} for j in range(50)}, b"1234"))
    index = {f"x{i}": f"m{i % 40}.safetensors" for i in range(2000)} | {f"y{i}": f"gone{i}.safetensors" for i in range(500)}
    index |= {f"z{i}": "../m" for i in range(500)} | {f"b{i}": f"b{i}.safetensors" for i in range(1, 40)}
    (many / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    shards = read_shards(many)
    told = [problem.render() for problem in shards.problems]
    assert len(told) < 1200 and len("\n".join(told)) < 300_000 and len(shards.notes) < 50
    for words in ("116980 more is in two", "480 more is not a plain path", "shard is missing", "more tensors of this header"):
        assert any(words in line for line in told), words
    assert any("15 more" in note and "FIFO" in note for note in shards.notes)


def test_headers_that_are_too_much_together_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = write_sharded(tmp_path, {f"m{i}.safetensors": {f"t{i}": b"x"} for i in range(20)})
    size = sum(int.from_bytes(path.read_bytes()[:8], "little") for path in right.glob("*.safetensors"))
    monkeypatch.setattr("mxconv.checkpoint.folder.MAX_HEADERS_BYTES", size)
    assert not read_shards(right).problems
    monkeypatch.setattr("mxconv.checkpoint.folder.MAX_HEADERS_BYTES", size - 1)
    problem = only(read_shards(right))
    assert problem.exit_code == 3 and f"at most {size - 1} bytes together" in problem.render()


def test_what_is_no_file_is_noted(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path, TWO)
    os.mkfifo(folder / "a-pipe")
    os.mkfifo(folder / "b.safetensors")
    (folder / "c-device").symlink_to("/dev/null")
    (folder / "d-folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "e-socket"))
    shards = read_shards(folder)
    assert not shards.problems
    assert shards.notes == (
        "a-pipe: ignored, it is a FIFO", "b.safetensors: ignored, it is a FIFO", "c-device: ignored, it is a device",
        "e-socket: ignored, it is a socket",
    )  # fmt: skip


def test_links_inside_the_folder_and_into_the_hub_cache_are_fine(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    write_sharded(blobs, TWO)
    for name in (*TWO, "model.safetensors.index.json"):
        (blobs / name).rename(blobs / f"hash-{name}")
        (snapshot / name).symlink_to(f"../../blobs/hash-{name}")
    shards = read_shards(snapshot)
    assert not shards.problems and len(shards.tensors) == 3
    plain = write_sharded(tmp_path / "plain", TWO)
    (plain / "model-1.safetensors").rename(plain / "real.safetensors")
    (plain / "model-1.safetensors").symlink_to("real.safetensors")
    assert not read_shards(plain).problems


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("inside_snapshot", [False, True])
def test_other_links_out_of_the_folder_are_refused(dangling: bool, inside_snapshot: bool, tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / "abc" if inside_snapshot else tmp_path / "model"
    folder.mkdir(parents=True)
    write_sharded(folder, TWO)
    outside = tmp_path / "secret.safetensors"
    (folder / "model-1.safetensors").rename(outside)
    if dangling:
        outside.unlink()
    (folder / "model-1.safetensors").symlink_to(outside)
    problem = only(read_shards(folder))
    assert isinstance(problem, MalformedInput) and "out of the checkpoint folder" in problem.render()


def test_a_folder_link_out_of_the_tree_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path / "elsewhere", TWO)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    index = {"weight_map": {"a": "sub/model-1.safetensors", "b": "sub/model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "out of the checkpoint folder" in only(read_shards(folder)).render()


def test_a_link_to_the_folder_itself_is_fine(tmp_path: Path) -> None:
    write_sharded(tmp_path / "real", TWO)
    (tmp_path / "link").symlink_to("real")
    assert not read_shards(tmp_path / "link").problems


@pytest.mark.parametrize(
    ("names", "code", "words"),
    [
        ((), 4, "neither"),
        (("pytorch_model.bin", "x.pt"), 3, "never unpickled"),
        (("model-00001-of-00002.safetensors",), 4, "no model.safetensors.index.json"),
    ],
)
def test_nothing_to_read(names: tuple[str, ...], code: int, words: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    problem = only(read_shards(tmp_path))
    assert problem.exit_code == code and words in problem.render()


def test_missing_folder_and_file_instead_of_folder(tmp_path: Path) -> None:
    assert only(read_shards(tmp_path / "nowhere")).exit_code == 4
    write(tmp_path / "x.safetensors", {"a": entry()}, b"\0" * 4)
    assert only(read_shards(tmp_path / "x.safetensors")).exit_code == 3


def test_pickles_code_and_strays_beside_safetensors_are_noted(tmp_path: Path) -> None:
    write_sharded(tmp_path, TWO)
    for name in ("pytorch_model.bin", "modeling_minimax_m1.py", "consolidated.safetensors"):
        (tmp_path / name).write_bytes(b"import os")
    shards = read_shards(tmp_path)
    assert not shards.problems and len(shards.notes) == 3
    assert all(any(word in note for note in shards.notes) for word in ("never unpickled", "never imported", "no index names it"))


def test_a_wrong_total_size_is_noted(tmp_path: Path) -> None:
    write_sharded(tmp_path, TWO)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] = 10
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "total_size 10" in read_shards(tmp_path).notes[0]


def test_rank_folders_in_numeric_order(tmp_path: Path) -> None:
    assert rank_folders(tmp_path) == () == rank_folders(tmp_path / "nowhere")
    for i in range(12):
        (tmp_path / f"rank{i}").mkdir()
    assert [path.name for path in rank_folders(tmp_path)] == [f"rank{i}" for i in range(12)]
    (tmp_path / "rank3").rmdir()
    with pytest.raises(IncompleteInput, match="rank3"):
        rank_folders(tmp_path)


@pytest.mark.parametrize("name", ["rank00", "rankx", "rank-1", "rank"])
def test_strange_rank_folders_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "rank0").mkdir()
    (tmp_path / name).mkdir()
    with pytest.raises(MalformedInput, match=name):
        rank_folders(tmp_path)


def test_the_real_index_without_a_shard(shared: Path) -> None:
    shards = read_shards(shared / "reference" / "minimax-m1")
    assert not shards.problems and not shards.present and shards.index is not None
    assert len(shards.index) == 8243 and len(set(shards.index.values())) == 413
    assert shards.index_metadata["total_size"] == 912_210_767_872
