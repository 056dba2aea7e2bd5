"""Placement and boxes: what goes where, to the byte, as the safetensors package would have it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save

from mxconv.placement import deal, place_file
from mxconv.tensors import DTYPE_BYTES, TORCH_NAMES, TensorSpec, box_shape, intersect, run_bytes, runs, whole

NUMPY = {"I8": np.int8, "U8": np.uint8, "F16": np.float16, "I32": np.int32, "F32": np.float32, "F64": np.float64, "BOOL": np.bool_}
specs = st.lists(
    st.tuples(st.sampled_from(sorted(NUMPY)), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=8
).map(lambda drawn: [TensorSpec(name=f"t{i}", dtype=d, shape=tuple(s)) for i, (d, s) in enumerate(drawn)])  # fmt: skip


@given(specs)
def test_header_and_offsets_are_what_safetensors_itself_writes(tensors: list[TensorSpec]) -> None:
    placed = place_file("x.safetensors", tensors)
    arrays = {t.name: np.ones(t.shape, NUMPY[t.dtype]) for t in tensors}
    theirs = save(arrays, metadata={"format": "pt"})
    assert len(placed.header).to_bytes(8, "little") + placed.header == theirs[: placed.data_start]
    assert placed.size_bytes == len(theirs)
    for tensor in tensors:
        start = placed.offsets[tensor.name]
        assert theirs[start : start + tensor.size_bytes] == arrays[tensor.name].tobytes()


def test_a_placed_file_opens_in_the_safetensors_package(tmp_path: Path) -> None:
    placed = place_file("x", [TensorSpec(name="é\u200b", dtype="BF16", shape=(3, 0)), TensorSpec(name="s", dtype="F32", shape=())])
    body = bytes(placed.size_bytes - placed.data_start)
    (tmp_path / "x").write_bytes(len(placed.header).to_bytes(8, "little") + placed.header + body)
    with safe_open(tmp_path / "x", "np") as file:
        assert set(file.keys()) == {"é\u200b", "s"} and file.metadata() == {"format": "pt"}
    assert placed.data_start % 8 == 0


@pytest.mark.parametrize(("first", "names"), [(1, "00001-of-00003"), (0, "00000-of-00003")])
def test_files_are_dealt_in_order_and_numbered(first: int, names: str) -> None:
    tensors = [TensorSpec(name=f"t{i}", dtype="U8", shape=(40,)) for i in range(5)]
    files = deal(tensors, "rank0", first, max_bytes=80)
    assert [[t.name for t in file.tensors] for file in files] == [["t0", "t1"], ["t2", "t3"], ["t4"]]
    assert files[0].path == f"rank0/model-{names}.safetensors"


def test_a_tensor_larger_than_a_file_gets_one_of_its_own() -> None:
    tensors = [TensorSpec(name=n, dtype="U8", shape=(size,)) for n, size in (("a", 10), ("b", 500), ("c", 10))]
    assert [[t.name for t in file.tensors] for file in deal(tensors, "", 1, max_bytes=80)] == [["a"], ["b"], ["c"]]


shapes = st.lists(st.integers(0, 4), max_size=4)


@given(shapes, st.data(), st.sampled_from([1, 2, 8]))
def test_runs_are_the_bytes_of_the_box(shape: list[int], data: st.DataObject, itemsize: int) -> None:
    box = tuple(tuple(sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))))) for n in shape)
    values = np.arange(int(np.prod(shape)) * itemsize, dtype=np.uint8).reshape(*shape, itemsize)
    raw = values.tobytes()
    cut = values[tuple(slice(*bounds) for bounds in box)]
    found = list(runs(shape, box, itemsize))
    assert b"".join(raw[o : o + n] for o, n in found) == cut.tobytes()
    assert {n for _, n in found} <= {run_bytes(shape, box, itemsize)}
    assert box_shape(box) == cut.shape[:-1]


@given(st.lists(st.tuples(*[st.integers(0, 6)] * 4), min_size=1, max_size=3))
def test_intersect_is_the_set_of_shared_elements(bounds: list[tuple[int, int, int, int]]) -> None:
    a = tuple((min(w, x), max(w, x)) for w, x, _, _ in bounds)
    b = tuple((min(y, z), max(y, z)) for _, _, y, z in bounds)
    ours, theirs = np.zeros([7] * len(a), bool), np.zeros([7] * len(a), bool)
    ours[tuple(slice(*p) for p in a)] = True
    theirs[tuple(slice(*p) for p in b)] = True
    both = intersect(a, b)
    expected = np.zeros_like(ours)
    if both is not None:
        expected[tuple(slice(*p) for p in both)] = True
    assert np.array_equal(ours & theirs, expected)


def test_every_dtype_has_a_torch_name_of_its_size() -> None:
    import torch

    assert set(DTYPE_BYTES) == set(TORCH_NAMES)
    for code, name in TORCH_NAMES.items():
        assert getattr(torch, name).itemsize == DTYPE_BYTES[code], code


def test_whole_is_the_tensor() -> None:
    assert whole((2, 3)) == ((0, 2), (0, 3)) and json.dumps(whole(())) == "[]"
