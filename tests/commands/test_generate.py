"""`mxconv generate`: the text is the runtime's, in the dtype that was asked for."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

import mxconv.runtime
from mxconv.cli import cli
from mxconv.runtime import generate, load


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype(demo: Path, dtype: str) -> None:
    arguments = ["generate", str(demo), "--prompt", "def f(", "--max-tokens", "6", "--dtype", dtype, "--json"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    model = load(demo, dtype=getattr(torch, dtype))
    assert document["ids"] == list(generate(model, document["prompt_ids"], max_tokens=6))


def run(demo: Path, *more: str) -> Result:
    result = CliRunner().invoke(cli, ["generate", str(demo), "--prompt", "def f(", *more])
    assert result.exit_code == 0, result.output
    return result


def test_the_pace_is_that_of_the_steps(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the prompt nor what the first step compiles is in it."""

    def slowly(*_: object, **__: object) -> Iterator[int]:
        for token in range(20):
            time.sleep((0.5, 1.0, 0.005)[min(token, 2)])
            yield token

    monkeypatch.setattr(mxconv.runtime, "generate", slowly)
    document = json.loads(run(demo, "--json").stdout)
    assert 0.5 <= document["first_token_seconds"] < document["seconds"] - 1.0
    assert 20 < document["tokens_per_second"] <= 200  # all in all it is 12
    # Weights in float32, two of the demo's experts a layer, and a little past.
    moved = document["bytes_per_second"] / document["tokens_per_second"]
    whole = sum(tensor.numel() * 4 for file in demo.glob("*.safetensors") for tensor in load_file(file).values())
    assert 0.05 * whole < moved < whole
    assert "of_copy" not in document


def test_what_is_said_of_the_pace(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mxconv.bench.ceilings.COPY_BYTES", {"cpu": 8 << 20})
    pace = r"note: 9 tokens after \d+: the first in \d+\.\d\d s, then [\d,]+ tokens/s, [\d,]+\.\d GB/s\n"
    plain = run(demo, "--max-tokens", "9").stderr
    assert re.search(pace, plain) and "copy" not in plain
    assert re.search(pace + r"\d+\.\d\d of a copy's [\d,]+ GB/s", run(demo, "--max-tokens", "9", "-v").stderr)
    for few, words in (("0", r"note: 0 tokens after \d+\n"), ("2", r"note: 2 tokens after \d+: the first in \d+\.\d\d s\n")):
        assert re.search(words, run(demo, "--max-tokens", few).stderr)
    document = json.loads(run(demo, "--max-tokens", "9", "-v", "--json").stdout)
    assert document["of_copy"] == pytest.approx(document["bytes_per_second"] / document["copy_bytes_per_second"])
    assert json.loads(run(demo, "--max-tokens", "0", "--json").stdout)["first_token_seconds"] is None


def test_a_device_that_the_model_fills(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is there; that a copy cannot be measured beside it is no failure."""

    def full(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mxconv.bench.ceilings.torch.empty_like", full)
    said = run(demo, "--max-tokens", "9", "-v")
    assert "no memory left to measure" in said.stderr and "tokens/s" in said.stderr and said.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(demo: Path) -> None:
    result = CliRunner().invoke(cli, ["generate", str(demo), "--prompt", "x", "--device", "cuda"])
    assert result.exit_code == 2 and "does not have the device" in result.output
