"""Files, headers, configs; what is raised and what is reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mxconv.errors import IncompleteInput, IntegrityError, MalformedInput, UsageError
from mxconv.execute import convert, quantize
from mxconv.quantize.schemes import SCHEMES, get_scheme
from mxconv.verify import Options, Report, verify
from mxconv.verify.consumer import fastdeploy_rules
from tests.spoil import seal
from tests.synthetic import make_checkpoint
from tests.verify.conftest import SMALL

QUICK = ("structure",)


@pytest.fixture
def artifact(made: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy that may be spoiled."""
    return Path(shutil.copytree(made("w4afp8", 2), tmp_path / "artifact"))


def looked(artifact: Path, source: Path | None, **options: Any) -> Report:
    return verify(artifact, Options(source=source, sections=QUICK, **options))


def words(report: Report) -> str:
    return "\n".join(finding.render() for finding in report.findings)


class TestRaised:
    def test_no_artifact(self, small: Path, tmp_path: Path) -> None:
        with pytest.raises(IncompleteInput):
            verify(tmp_path, Options())
        with pytest.raises(IncompleteInput):
            verify(small, Options(source=small))

    def test_no_manifest(self, artifact: Path, small: Path) -> None:
        (artifact / "manifest.json").unlink()
        with pytest.raises(IncompleteInput):
            looked(artifact, small)

    def test_a_manifest_that_was_changed(self, artifact: Path, small: Path) -> None:
        path = artifact / "manifest.json"
        path.write_text(path.read_text().replace('"tp": 2', '"tp": 4'))
        with pytest.raises(IntegrityError):
            looked(artifact, small)

    def test_another_tp(self, artifact: Path, small: Path) -> None:
        with pytest.raises(UsageError, match="2 ranks"):
            looked(artifact, small, tp=4)
        assert looked(artifact, small, tp=2).ok

    def test_an_unknown_limit(self, artifact: Path, small: Path) -> None:
        with pytest.raises(UsageError, match="no limit"):
            looked(artifact, small, limits={"kl": 1.0})

    def test_a_broken_source(self, artifact: Path, tmp_path: Path) -> None:
        (tmp_path / "source").mkdir()
        with pytest.raises(IncompleteInput):
            looked(artifact, tmp_path / "source")
        (tmp_path / "source" / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(MalformedInput):
            looked(artifact, tmp_path / "source")


class TestFiles:
    def test_missing(self, artifact: Path, small: Path) -> None:
        next((artifact / "rank1").glob("*.safetensors")).unlink()
        report = looked(artifact, small)
        assert report.exit_code == 8 and "missing" in words(report)
        assert report.section("numerics").status == "skipped"

    def test_truncated_grown_and_extra(self, artifact: Path, small: Path) -> None:
        file = next((artifact / "rank1").glob("*.safetensors"))
        data = file.read_bytes()
        file.write_bytes(data[:-100])
        assert "another size" in words(looked(artifact, small))
        file.write_bytes(data + b"\0")
        assert "another size" in words(looked(artifact, small))
        file.write_bytes(data)
        (artifact / "rank0" / "notes.txt").write_text("mine")
        report = looked(artifact, small)
        assert "not in the manifest" in words(report) and "notes.txt" in words(report)

    def test_bytes_are_hashed_when_asked(self, artifact: Path, small: Path) -> None:
        path = artifact / "rank0" / "model.safetensors.index.json"
        path.write_text(path.read_text().replace(" ", "\n", 1))
        assert looked(artifact, small).ok
        assert "model.safetensors.index.json" in words(looked(artifact, small, hash_files=True))

    def test_a_rank_folder_is_gone(self, artifact: Path, small: Path) -> None:
        shutil.rmtree(artifact / "rank0")
        seal(artifact)
        report = looked(artifact, small)
        assert report.exit_code == 8 and "rank" in words(report)

    def test_headers_against_the_manifest(self, artifact: Path, small: Path, made: Callable[..., Path]) -> None:
        body = json.loads((artifact / "manifest.json").read_text())
        shutil.copy(next((artifact / "rank1").glob("*.safetensors")), tmp := artifact.parent / "kept")
        shutil.copy(next((made("w4afp8", 1)).glob("*.safetensors")), next((artifact / "rank1").glob("*.safetensors")))
        report = looked(artifact, small)
        assert "the manifest says otherwise" in words(report) and "rank 1" in words(report)
        assert tmp.exists() and body["tp"] == 2


class TestSource:
    def test_another_checkpoint(self, artifact: Path, tmp_path: Path) -> None:
        """Of the same shape: the manifest knows, and every weight says so."""
        other = make_checkpoint(tmp_path / "other", **{**SMALL, "seed": 99, "config": {"router_jitter_noise": 0.5}})
        report = verify(artifact, Options(source=other, sections=("structure", "numerics")))
        assert "source.config.router_jitter_noise" in words(report)
        assert len(report.section("numerics").findings) > 50

    def test_without_a_source(self, made: Callable[..., Path]) -> None:
        report = verify(made("w4afp8", 2), Options(windows=2, window=64))
        assert report.ok
        assert [section.status for section in report.sections] == ["ok", "skipped", "ok", "skipped"]
        assert report.section("parallel").figures["logits_l2"] < 2e-6  # type: ignore[operator]

    def test_an_artifact_is_a_source_too(self, made: Callable[..., Path], tmp_path: Path) -> None:
        fused = made(None, 2)
        quantize(fused, tmp_path / "out", scheme="w4afp8", tp=2)
        report = verify(tmp_path / "out", Options(source=fused, windows=2, window=64))
        assert report.ok, words(report)
        quantize(fused, tmp_path / "one", scheme="w4afp8", tp=1)
        with pytest.raises(UsageError, match="artifact of 2 ranks"):
            looked(tmp_path / "one", fused)


class TestConsumer:
    @pytest.mark.parametrize("scheme", [None, *SCHEMES])
    def test_the_converter_follows_its_rules(self, scheme: str | None, made: Callable[..., Path]) -> None:
        config = json.loads((made(scheme, 1) / "config.json").read_text())
        chosen = None if scheme is None else SCHEMES[scheme]
        assert not list(fastdeploy_rules(config, chosen))

    @pytest.mark.parametrize(
        ("change", "key"),
        [
            ({"dtype": "float32"}, "dtype"), ({"transformers_version": "4.57.0"}, "transformers_version"),
            ({"moe_num_experts": 5}, "moe_num_experts"), ({"is_quantized": False}, "is_quantized"),
            ({"is_quantized": 1}, "is_quantized"),
            ({"quantization_config": None}, "quantization_config"),
        ],
        ids=str,
    )  # fmt: skip
    def test_each_rule_can_fail(self, change: dict[str, Any], key: str, made: Callable[..., Path]) -> None:
        config = json.loads((made("w4afp8", 1) / "config.json").read_text()) | change
        (finding,) = fastdeploy_rules(config, SCHEMES["w4afp8"])
        assert finding.key == key

    def test_a_quantized_config_on_unquantized_weights(self, made: Callable[..., Path]) -> None:
        config = json.loads((made("w4afp8", 1) / "config.json").read_text())
        assert {finding.key for finding in fastdeploy_rules(config, None)} == {"is_quantized", "quantization_config"}

    def test_another_hadamard_block_is_told(self, made: Callable[..., Path]) -> None:
        config = json.loads((made("w4afp8", 1) / "config.json").read_text())
        (finding,) = fastdeploy_rules(config, get_scheme("w4afp8", hadamard_block=256))
        assert finding.key == "quantization_config.hadamard_block_size"


@pytest.mark.parametrize(
    "shape",
    [
        {"shared": [0, 128, 256], "layers": "lsl"}, {"dense": True, "experts": 1, "experts_per_token": 1}, {"tied": "yes"},
        {"tied": "stored"}, {"postnorm": None, "alphas": (1.0, 1.0, 1.0)}, {"router_dtype": torch.bfloat16}, {"vocab": 100},
        {"dialect": "minimax"}, {"dialect": "minimax", "permuted": True, "stacked": True},
        {"heads": 12, "kv_heads": 3, "head_dim": 16},
    ],
    ids=str,
)  # fmt: skip
def test_every_kind_of_source_converts_exactly(shape: dict[str, Any], tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", **{**SMALL, **shape})
    tp = 3 if shape.get("kv_heads") == 3 else 2
    if tp == 3:
        source = make_checkpoint(tmp_path / "three", **{**SMALL, **shape, "intermediate": 192, "vocab": 192})
    convert(source, tmp_path / "out", tp=tp)
    report = verify(tmp_path / "out", Options(source=source, windows=3, window=40))
    assert report.ok, words(report)
    lanes = report.section("logits").figures["lanes"]
    assert lanes["weights only, tp 1"]["logits_l2"] < 2e-6  # type: ignore[index]


@pytest.mark.parametrize("layout", ["minimax-m1", "minimax"])
def test_source_dialects_as_layouts(layout: str, small: Path, tmp_path: Path) -> None:
    convert(small, tmp_path / "out", layout=layout)
    report = verify(tmp_path / "out", Options(source=small, windows=2, window=40))
    assert report.ok, words(report)
    assert report.layout == layout


def test_decay_rates_that_were_kept(tmp_path: Path) -> None:
    source = make_checkpoint(
        tmp_path / "source", **{**SMALL, "heads": 12, "kv_heads": 4, "head_dim": 16, "dialect": "minimax", "decay": "transformers"}
    )
    convert(source, tmp_path / "out", tp=2, keep_decay=True)
    with pytest.raises(MalformedInput):
        looked(tmp_path / "out", source)
    report = verify(tmp_path / "out", Options(source=source, windows=2, window=40, keep_decay=True))
    assert report.ok, words(report)


def test_experts_kept_on_purpose(small: Path, tmp_path: Path) -> None:
    quantize(small, tmp_path / "out", scheme="w4afp8", tp=2, ignore=["model.layers.1.*"])
    report = verify(tmp_path / "out", Options(source=small, windows=2, window=64))
    assert report.ok, words(report)
    assert any("layers [1]" in text for text in report.section("structure").warnings)


@pytest.mark.parametrize(
    "block",
    [
        {"ignored_layers": 3}, {"scheme": 7}, {"tp": "two"}, {"layout": ["x"]}, {"rotation": None}, {"slopes": [1]},
        {"slopes": {"0": 5}},
    ],
    ids=str,
)  # fmt: skip
def test_a_block_that_makes_no_sense_is_a_finding(block: dict[str, Any], artifact: Path, small: Path) -> None:
    config = json.loads((artifact / "config.json").read_text())
    config["mxconv"] |= block
    (artifact / "config.json").write_text(json.dumps(config))
    seal(artifact)
    report = looked(artifact, small)
    assert report.exit_code == 8 and report.section("structure").status == "FAIL"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "minimax_m1"}'])
def test_a_config_that_cannot_be_read_is_a_finding(content: str, artifact: Path, small: Path) -> None:
    (artifact / "config.json").write_text(content)
    seal(artifact)
    report = looked(artifact, small)
    assert report.exit_code == 8 and "config" in {finding.check for finding in report.findings}
