"""Memory: hidden states and one expert of each side, however many experts and layers there are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mxconv.execute import quantize
from mxconv.verify import Options, verify
from tests.runtime.test_stream import EXPERT_BYTES, WIDE, peak_bytes
from tests.synthetic import make_checkpoint


@pytest.mark.parametrize("section", ["numerics", "logits"])
def test_peak_is_a_few_experts_of_sixteen(section: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", **WIDE)
    quantize(source, tmp_path / "out", scheme="w4afp8", tp=2)

    def run() -> torch.Tensor:
        report = verify(tmp_path / "out", Options(source=source, sections=(section,), windows=2, window=300))
        assert report.section(section).status == "ok"
        return torch.zeros(1)

    assert peak_bytes(run) < 5 * EXPERT_BYTES
