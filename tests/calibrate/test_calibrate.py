"""Calibration: tokens from text and ids, statistics as a file, experts without tokens, the measured maxima themselves."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mxconv.calibrate import Statistics, read_statistics
from mxconv.calibrate.observe import calibrate, rotations
from mxconv.calibrate.tokens import check_ids, load_tokens, tokens_digest
from mxconv.config import read_config
from mxconv.data import calibration_text
from mxconv.errors import IncompleteInput, MalformedInput, UsageError
from mxconv.execute import quantize
from mxconv.runtime import load
from tests.synthetic import make_checkpoint

IDS = np.random.default_rng(1).integers(0, 128, (3, 50)).astype(np.int32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("calibrate") / "model", hidden=128, intermediate=256, experts=8)


@pytest.fixture(scope="module")
def statistics(source: Path) -> Statistics:
    return calibrate(source, IDS, source_digest="0" * 64)


def sylvester(n: int) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


def test_the_maxima_are_those_of_the_inputs(source: Path, statistics: Statistics) -> None:
    """Gathered again here, with an explicit Hadamard matrix in float64."""
    seen: dict[tuple[int, int, str], torch.Tensor] = {}
    model = load(source)
    ids = torch.from_numpy(IDS.astype(np.int64))
    batch, x = model.batch(ids), model.embed(ids)
    for index in range(model.config.num_layers):
        with model.layer(index) as layer:
            x = layer(x, batch, observer=lambda e, p, v, i=index: seen.__setitem__((i, e, p), v.double()))
    assert len(seen) > 20
    for (layer, expert, projection), value in seen.items():
        for rotation in (0, 32, 128):
            rotated = value
            if rotation:
                blocks = value.reshape(-1, value.shape[-1] // rotation, rotation)
                rotated = blocks @ sylvester(rotation)
            wanted = float(rotated.abs().max()) if value.numel() else 0.0
            assert statistics.absmax(layer, expert, projection, rotation) == pytest.approx(wanted, rel=1e-5)


def test_every_token_goes_to_two_experts(statistics: Statistics) -> None:
    for layer in range(3):
        assert sum(count for (at, _), count in statistics.tokens.items() if at == layer) == 2 * IDS.size


def test_statistics_survive_their_file(tmp_path: Path, statistics: Statistics) -> None:
    path = tmp_path / "statistics.json"
    path.write_bytes(statistics.to_bytes())
    again = read_statistics(path)
    assert dict(again.values) == dict(statistics.values) and again.digest == statistics.digest
    assert "0x" in path.read_text()


@pytest.mark.parametrize(
    "change", [{"version": 99}, {"layers": {"0": {}}}, {"rotations": None}, {"layers": {"x": 1}}, {"windows": "a few"}]
)
def test_a_damaged_statistics_file_is_malformed(tmp_path: Path, statistics: Statistics, change: dict[str, Any]) -> None:
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps({**statistics.document(), **change}))
    with pytest.raises(MalformedInput):
        read_statistics(path)


@pytest.mark.parametrize("text", ["nan", "inf", "-0x1p0", "one"])
def test_an_absmax_is_a_finite_size(tmp_path: Path, statistics: Statistics, text: str) -> None:
    document = statistics.document()
    document["layers"]["0"]["up_gate_proj"]["0"][0] = text
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps(document))
    with pytest.raises(MalformedInput):
        read_statistics(path)


def test_an_expert_without_tokens_takes_its_layers_maximum_and_is_listed(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", hidden=128, intermediate=128, files=1)
    tensors = load_file(source / "model.safetensors")
    router = tensors["model.layers.1.block_sparse_moe.gate.weight"]
    router[2] = 0
    router[2, 0] = -1e6 if float(tensors["model.layers.1.post_attention_layernorm.weight"][0]) > 0 else 1e6
    tensors["model.layers.1.block_sparse_moe.gate.weight"] = router
    # the third expert is chosen only where the first hidden component is negative: make that never
    tensors["model.layers.1.block_sparse_moe.gate.weight"][2] = 0
    others = tensors["model.layers.1.block_sparse_moe.gate.weight"]
    others[[0, 1]] = 0
    others[3] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    measured = calibrate(source, IDS, source_digest="0" * 64)
    unseen = [expert for layer, expert in measured.unseen if layer == 1]
    assert unseen, "with equal router logits the same two experts are taken every time"
    for rotation in (0, 128):
        values = [measured.values[1, e, "down_proj", rotation] for e in range(4) if e not in unseen]
        assert measured.absmax(1, unseen[0], "down_proj", rotation) == max(values)
    ids = tmp_path / "ids.npy"
    np.save(ids, IDS)
    result = quantize(source, tmp_path / "out", scheme="w4a8", calibration=ids)
    assert any("saw no calibration token" in note for note in result.notes)
    assert [1, unseen[0]] in result.manifest.body["statistics"]["unseen_experts"]


def test_an_unmeasured_rotation_is_an_error(statistics: Statistics) -> None:
    with pytest.raises(IncompleteInput, match="rotation 64"):
        statistics.absmax(0, 0, "down_proj", 64)


def test_rotations_are_those_that_divide(source: Path) -> None:
    assert rotations(read_config(source)) == (0, 32, 128, 256)


@pytest.mark.parametrize(
    ("ids", "shape"), [(np.arange(100) % 7, (1, 100)), (np.arange(1500) % 7, (2, 512)), (np.zeros((2, 9), np.uint8), (2, 9))]
)
def test_ids_become_windows(ids: np.ndarray, shape: tuple[int, int]) -> None:
    checked = check_ids(ids, 128, "ids")
    assert checked.shape == shape and checked.dtype == np.int32


@pytest.mark.parametrize("ids", [np.zeros(3), np.zeros((1, 2, 3), int), np.array([], int), np.array([128]), np.array([-1])])
def test_what_is_no_ids_is_malformed(ids: np.ndarray) -> None:
    with pytest.raises(MalformedInput):
        check_ids(ids, 128, "ids")


def test_pickled_arrays_are_refused(source: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(MalformedInput, match="npy"):
        load_tokens(source, tmp_path / "ids.npy", 128)


def test_text_needs_a_tokenizer_and_ids_do_not(source: Path, demo: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ids\.npy"):
        load_tokens(source, None, 128)
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 200)
    assert load_tokens(demo, text, 4096, window=64).shape[1] == 64
    assert load_tokens(demo, None, 4096).shape[1] == 512
    text.write_bytes(b"\xff\xfe")
    with pytest.raises(MalformedInput, match="UTF-8"):
        load_tokens(demo, text, 4096)


def test_the_digest_sees_shape_and_values() -> None:
    assert len({tokens_digest(IDS), tokens_digest(IDS.reshape(1, -1)), tokens_digest(IDS + 1)}) == 3
    assert tokens_digest(IDS) == tokens_digest(IDS.astype(np.int64))


def npy(shape: str, data: bytes = b"\1\0\0\0\0\0\0\0" * 4, dtype: str = "'<i8'") -> bytes:
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


BAD_IDS = {
    "a header that claims terabytes": (npy("(10000000000000,)"), "80000000000000 bytes"),
    "an overflowing shape": (npy(f"({1 << 40}, {1 << 40})"), "does not hold"),
    "a negative axis": (npy("(-2, -2)"), "does not hold"),
    "bytes trail": (npy("(3,)"), "24 bytes"),
    "nested too deep": (npy("(" * 9000), "not a .npy file"),
    "objects": (npy("(4,)", dtype="'|O'"), "not token ids"),
    "floats": (npy("(4,)", dtype="'<f8'"), "not token ids"),
    "records": (npy("(4,)", dtype="[('a', '<i8')]"), "not token ids"),
    "a version of the future": (b"\x93NUMPY\x09\x00" + b"\0" * 64, "not a .npy file"),
    "a zip": (b"PK\x03\x04" + b"\0" * 64, "not a .npy file"),
    "nothing": (b"", "not a .npy file"),
}


@pytest.mark.parametrize("case", BAD_IDS)
def test_ids_that_are_none_are_refused_before_memory_is_taken(case: str, tmp_path: Path) -> None:
    content, words = BAD_IDS[case]
    (tmp_path / "ids.npy").write_bytes(content)
    with pytest.raises(MalformedInput, match=words.replace("(", ".")):
        load_tokens(tmp_path, tmp_path / "ids.npy", 128)


@pytest.mark.parametrize("dtype", ["<i8", ">i4", "<u2", "|i1"])
def test_ids_of_every_integer_kind_and_order(dtype: str, tmp_path: Path) -> None:
    right = np.asfortranarray(np.arange(24).reshape(4, 6)).astype(dtype, order="K")
    np.save(tmp_path / "ids.npy", right)
    found = load_tokens(tmp_path, tmp_path / "ids.npy", 128)
    assert found.dtype == np.int32 and np.array_equal(found, right)


@pytest.mark.parametrize("name", ["text.txt", "ids.npy"])
def test_calibration_from_what_is_no_file_of_a_size_is_refused_at_once(name: str, source: Path, tmp_path: Path) -> None:
    from mxconv.calibrate import tokens

    path = tmp_path / name
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": words}))
    with pytest.raises(IncompleteInput, match="no such file"):
        load_tokens(folder, path, 128)
    os.mkfifo(path)
    with pytest.raises(MalformedInput, match="not a regular file"):
        load_tokens(folder, path, 128)
    path.unlink()
    path.touch()
    os.truncate(path, 10**12)
    with pytest.raises(MalformedInput, match="too large"):
        load_tokens(folder, path, 128)
    with pytest.raises(MalformedInput, match="more token ids"):
        check_ids(np.zeros(tokens.MAX_TOKENS + 1, np.int8), 128, "x")


def test_reading_a_long_text_can_be_given_up(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer lets other threads run while it works, and only such a one waits for it."""
    from mxconv.calibrate import tokens

    text, pauses = calibration_text() * 20, []
    monkeypatch.setattr(tokens, "calibration_text", lambda: text)

    def waits(work: Callable[[Callable[[], None]], Any]) -> Any:
        ended: list[Any] = []
        thread = threading.Thread(target=lambda: ended.append(work(lambda: None)))
        began = last = time.monotonic()
        thread.start()
        while not ended:
            time.sleep(0.001)
            pauses.append(time.monotonic() - last)
            last = time.monotonic()
        pauses.append(last - began)
        return ended[0]

    monkeypatch.setattr(tokens, "run_apart", waits)
    ids = load_tokens(demo, None, 1 << 20)
    *between, whole = pauses
    assert ids.size > 100_000 and max(between) < 0.7 * whole
