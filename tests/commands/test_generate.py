"""`mxconv generate`: the text is the runtime's, in the dtype that was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(demo: Path) -> None:
    result = CliRunner().invoke(cli, ["generate", str(demo), "--prompt", "x", "--device", "cuda"])
    assert result.exit_code == 2 and "does not have the device" in result.output
