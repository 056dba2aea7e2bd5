"""The same verdicts and figures on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mxconv.quantize.schemes import SCHEMES
from mxconv.verify import Options, Report, verify
from tests.mutants import MUTANTS, make_base, make_source
from tests.spoil import Folder

pytestmark = pytest.mark.gpu


def judged(artifact: Path, source: Path, device: str) -> Report:
    return verify(artifact, Options(source=source, device=device, windows=2, window=300))


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_a_right_artifact(scheme: str | None, made: Callable[..., Path], small: Path) -> None:
    gpu, cpu = (judged(made(scheme, 2), small, device) for device in ("cuda", "cpu"))
    assert gpu.ok, [finding.render() for finding in gpu.findings]
    lanes: Any = gpu.section("logits").figures["lanes"]
    wanted: Any = cpu.section("logits").figures["lanes"]
    for lane, metrics in wanted.items():
        if scheme is not None and lane != "bf16":
            assert lanes[lane]["kl"]["mean"] == pytest.approx(metrics["kl"]["mean"], rel=0.1)
    if scheme is not None:
        worst: list[Any] = [report.section("numerics").figures["worst"] for report in (gpu, cpu)]
        assert worst[0]["rel_rms"] == pytest.approx(worst[1]["rel_rms"], rel=0.02)


CAUGHT = ("experts exchanged", "a group of codes off by one", "activation scale doubled", "rotation missing")


@pytest.mark.parametrize("name", CAUGHT)
def test_a_mutant(name: str, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    source = make_source(tmp_path / "source")
    folder = Folder(make_base(mutant.base, source, tmp_path / "out"), source)
    mutant.spoil(folder)
    folder.save()
    section = judged(tmp_path / "out", source, "cuda").section(mutant.section)
    lines = [finding.render() for finding in section.findings]
    assert any(all(word in line for word in mutant.names) for line in lines), lines[:5]
