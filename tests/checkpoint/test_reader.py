"""ByteReader: any box of any tensor, from many threads, and sources that change underneath."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxconv.checkpoint import ByteReader, Shards, boxes, read_shards
from mxconv.errors import IntegrityError, MxconvError, ResourceError
from mxconv.tensors import Box
from tests.checkpoint.raw import entry, write, write_sharded


def stored(folder: Path, array: np.ndarray) -> Shards:
    write(folder / "model.safetensors", {"x": entry("BF16", array.shape, 0, array.nbytes)}, array.tobytes())
    return read_shards(folder)


@st.composite
def shapes_and_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    box = tuple(tuple(sorted((draw(st.integers(0, n)), draw(st.integers(0, n))))) for n in shape)
    return shape, box


@settings(max_examples=150, deadline=None)
@given(shapes_and_boxes(), st.sampled_from([(4 << 20, 32 << 10), (64, 8), (16, 0), (1 << 10, 2)]))
def test_a_box_is_what_slicing_gives(tmp_path_factory: pytest.TempPathFactory, case: tuple, limits: tuple[int, int]) -> None:
    shape, box = case
    array = np.arange(int(np.prod(shape)), dtype=np.uint16).reshape(shape)
    shards = stored(tmp_path_factory.getbasetemp() / "boxes", array)
    with pytest.MonkeyPatch.context() as patch, ByteReader(shards) as source:
        patch.setattr(boxes, "WINDOW_BYTES", limits[0])
        patch.setattr(boxes, "GAP_BYTES", limits[1])
        patch.setattr(boxes, "PIECE_BYTES", 7)
        got = source.read(shards.tensors["x"], box)
        assert got.dtype == np.uint8 and got.ndim == 1
        assert got.tobytes() == array[tuple(slice(a, b) for a, b in box)].tobytes()
        assert source.read(shards.tensors["x"]).tobytes() == array.tobytes()


def test_out_is_filled_and_returned(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.uint16).reshape(3, 4)
    shards = stored(tmp_path, array)
    out = np.empty(8, dtype=np.uint8)
    with ByteReader(shards) as source:
        got = source.read(shards.tensors["x"], ((1, 3), (1, 3)), out=out)
    assert np.shares_memory(got, out) and out.tobytes() == array[1:3, 1:3].tobytes()


def test_a_box_outside_the_tensor_is_refused(tmp_path: Path) -> None:
    shards = stored(tmp_path, np.zeros((3, 4), np.uint16))
    with ByteReader(shards) as source:
        for box in (((0, 4), (0, 4)), ((0, 3),), ((2, 1), (0, 4)), ((-1, 3), (0, 4))):
            with pytest.raises(MxconvError, match="box"):
                source.read(shards.tensors["x"], box)


def test_many_threads_share_few_descriptors(tmp_path: Path) -> None:
    files = {f"model-{i}.safetensors": {f"t{i}": bytes([i]) * 1000} for i in range(40)}
    shards = read_shards(write_sharded(tmp_path, files))
    before = len(os.listdir("/proc/self/fd"))
    with ByteReader(shards, max_open=4) as source:

        def work(n: int) -> bool:
            i = n * 7 % 40
            return source.read(shards.tensors[f"t{i}"]).tobytes() == bytes([i]) * 1000

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(2000)))
        assert len(os.listdir("/proc/self/fd")) <= before + 4 + 8
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("change", ["touched", "grown", "replaced", "removed", "fifo"])
def test_a_changed_source_is_noticed(change: str, tmp_path: Path) -> None:
    shards = stored(tmp_path, np.zeros((3, 4), np.uint16))
    path = shards.files[0].path
    with ByteReader(shards) as source:
        source.check_unchanged()
    if change == "touched":
        os.utime(path, ns=(0, shards.files[0].mtime_ns + 1))
    elif change == "grown":
        path.write_bytes(path.read_bytes() + b"x")
    elif change == "replaced":
        copy = tmp_path / "copy"
        copy.write_bytes(path.read_bytes())
        os.utime(copy, ns=(0, shards.files[0].mtime_ns))
        copy.rename(path)
    else:
        path.unlink()
        if change == "fifo":
            os.mkfifo(path)
    with ByteReader(shards) as source:
        with pytest.raises(IntegrityError):
            source.check_unchanged()
        with pytest.raises(IntegrityError):
            source.read(shards.tensors["x"])


def test_a_file_cut_while_open_is_an_integrity_error(tmp_path: Path) -> None:
    shards = stored(tmp_path, np.zeros((3, 4), np.uint16))
    with ByteReader(shards) as source:
        source.read(shards.tensors["x"], ((0, 1), (0, 4)))
        os.truncate(shards.files[0].path, shards.files[0].size_bytes - 2)
        with pytest.raises(IntegrityError, match="ends at byte"):
            source.read(shards.tensors["x"])


def test_a_failing_disk_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = stored(tmp_path, np.zeros((3, 4), np.uint16))

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with ByteReader(shards) as source, pytest.raises(ResourceError, match="input/output error"):
        source.read(shards.tensors["x"])


def test_the_trained_model_reads_as_the_package_reads_it(demo: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    torch = pytest.importorskip("torch")
    shards = read_shards(demo)
    shards.require()
    with ByteReader(shards) as source:
        for name, tensor in list(shards.tensors.items())[::7]:
            with safetensors.safe_open(shards.files[tensor.file].path, "pt") as file:
                expected = file.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes()
            assert source.read(tensor).tobytes() == expected
