"""The reference file: the same report from it, whatever scheme and TP size; refused when it does not answer the question."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mxconv.errors import IncompleteInput, IntegrityError, MalformedInput, MxconvError, OutputConflict, UsageError
from mxconv.runtime import Model
from mxconv.verify import Options, Report, verify
from mxconv.verify.reference import read_reference, write_reference
from tests.synthetic import make_checkpoint
from tests.verify.conftest import SMALL


def run(artifact: Path, source: Path, reference: Path | None, **options: Any) -> Report:
    asked = {"windows": 2, "window": 300, **options}
    return verify(artifact, Options(source=source, reference=reference, sections=("logits",), **asked))


@pytest.fixture
def reference(made: Callable[..., Path], small: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.reference"
    run(made("w4afp8", 1), small, path)
    return path


def figures(report: Report) -> dict[str, Any]:
    return {key: value for key, value in report.section("logits").figures.items() if key != "from_reference"}


def test_the_report_is_the_same(reference: Path, made: Callable[..., Path], small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For another scheme at another TP size too; and no layer of the source is run."""
    wanted = {tp: figures(run(made("block_wise_fp8", tp), small, None)) for tp in (1, 2)}
    ran: list[str] = []
    layer = Model.layer
    monkeypatch.setattr(Model, "layer", lambda self, index: ran.append(self.weights.layout) or layer(self, index))
    for tp, expected in wanted.items():
        report = run(made("block_wise_fp8", tp), small, reference)
        assert figures(report) == expected
        assert report.section("logits").figures["from_reference"] is True
        assert "reference file" in report.section("logits").lines[0]
    assert ran and set(ran) == {"fastdeploy"}


def test_the_file_opens_in_the_safetensors_package_and_nothing_is_left_beside(reference: Path) -> None:
    with safe_open(reference, framework="pt") as file:
        names = set(file.keys())
        assert names == {"hidden", "probes", "floor_hidden", "floor_probes", "facts"}
        assert file.get_tensor("hidden").shape == (2, 300, 128)
        assert file.get_tensor("probes").shape == (3, 256, 128)
    assert os.listdir(reference.parent) == [reference.name]


@pytest.mark.parametrize("options", [{"window": 299}, {"windows": 1}, {"seed": 7}, {"keep_decay": True}], ids=str)
def test_other_questions_are_refused(options: dict[str, Any], reference: Path, made: Callable[..., Path], small: Path) -> None:
    with pytest.raises(UsageError, match="reference") as caught:
        run(made("w4afp8", 1), small, reference, **options)
    assert caught.value.exit_code == 2


def test_another_source_is_refused(reference: Path, tmp_path: Path, made: Callable[..., Path]) -> None:
    """Another split into files is another set of headers, and may be another checkpoint."""
    other = make_checkpoint(tmp_path / "other", **SMALL, files=3)
    with pytest.raises(UsageError, match="another source"):
        run(made("w4afp8", 1), other, reference)


def test_another_version_of_the_metrics_is_refused(
    reference: Path, made: Callable[..., Path], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mxconv.verify.reference.METRICS_VERSION", 2)
    with pytest.raises(UsageError, match="version of the metrics"):
        run(made("w4afp8", 1), small, reference)


def test_changed_bytes_are_found(reference: Path, made: Callable[..., Path], small: Path) -> None:
    data = bytearray(reference.read_bytes())
    data[-5] ^= 1
    reference.write_bytes(data)
    with pytest.raises((IntegrityError, MalformedInput)):
        run(made("w4afp8", 1), small, reference)


def test_each_tensor_is_guarded(reference: Path, made: Callable[..., Path], small: Path) -> None:
    whole = reference.read_bytes()
    with safe_open(reference, framework="np") as file:
        start = 8 + int.from_bytes(whole[:8], "little")
        assert set(file.keys()) > {"hidden"}
    step = (len(whole) - start) // 7
    for at in range(start, len(whole), step):
        data = bytearray(whole)
        data[at] ^= 64
        reference.write_bytes(data)
        with pytest.raises(MxconvError):
            run(made("w4afp8", 1), small, reference)


@pytest.mark.parametrize("content", [b"", b"not a file of tensors", (16).to_bytes(8, "little") + b'{"a":{}}        '])
def test_other_files_are_refused(content: bytes, made: Callable[..., Path], small: Path, tmp_path: Path) -> None:
    path = tmp_path / "reference"
    path.write_bytes(content)
    with pytest.raises((MalformedInput, IncompleteInput)):
        run(made("w4afp8", 1), small, path)
    assert path.read_bytes() == content


def test_a_file_of_tensors_without_facts(made: Callable[..., Path], small: Path) -> None:
    with pytest.raises(MalformedInput, match="facts"):
        run(made("w4afp8", 1), small, next(small.glob("*.safetensors")))


def test_a_taken_name_is_never_overwritten(reference: Path, tmp_path: Path) -> None:
    before = reference.read_bytes()
    with safe_open(reference, framework="np") as file:
        facts = json.loads(bytes(file.get_tensor("facts")))
    expected = {key: value for key, value in facts.items() if key != "tensors"}
    kept = read_reference(reference, expected, torch.device("cpu"))
    with pytest.raises(OutputConflict):
        write_reference(reference, kept, expected)
    assert reference.read_bytes() == before
    write_reference(tmp_path / "again", kept, expected)
    assert (tmp_path / "again").read_bytes() == before
