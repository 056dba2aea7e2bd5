"""The whole job, one run for each scheme and TP: quantize (or convert), check, verify, generate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mxconv.artifact import check_folder
from mxconv.execute import RunOptions, convert, quantize
from mxconv.quantize.schemes import SCHEMES
from mxconv.runtime import generate, load
from mxconv.verify import Options, verify
from tests.synthetic import make_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key/value heads are copied at TP 4, cut at 2."""
    return make_checkpoint(
        tmp_path_factory.mktemp("end") / "model", layers="ls", hidden=128, intermediate=512, heads=4, kv_heads=2, head_dim=32
    )


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_from_checkpoint_to_verdict(source: Path, tmp_path: Path, scheme: str | None, tp: int) -> None:
    out = tmp_path / "out"
    if scheme is None:
        convert(source, out, tp=tp, options=RunOptions(workers=2))
    else:
        ids = tmp_path / "ids.npy"
        np.save(ids, np.random.default_rng(0).integers(0, 128, (2, 64)))
        calibration = ids if SCHEMES[scheme].static else None
        quantize(source, out, scheme=scheme, tp=tp, calibration=calibration, options=RunOptions(workers=2))
    assert not check_folder(out).problems
    report = verify(out, Options(source=source, windows=2, window=300))
    assert report.ok, [finding.render() for finding in report.findings]
    assert [section.status for section in report.sections] == ["ok", "ok", "ok" if tp > 1 else "skipped", "ok"]
    assert len(list(generate(load(out), [1, 2, 3], max_tokens=3, eos_ids=()))) == 3
