"""The buffer that a lane's outputs come back in: pinned once, as large as the plan's largest unit. Played by the CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mxconv.execute import lanes, places
from mxconv.execute.lanes import ALIGNMENT, Lane
from mxconv.execute.places import Places
from mxconv.plan import Request, build_plan
from mxconv.quantize.reference import scale_shape
from mxconv.quantize.schemes import SCHEMES
from mxconv.source import open_source
from tests.synthetic import make_checkpoint


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what is pinned, in order."""
    sizes: list[int] = []

    def pin(size_bytes: int) -> Any:
        sizes.append(size_bytes)
        return SimpleNamespace(memory=torch.full((size_bytes,), 0x55, dtype=torch.uint8), close=lambda: None)

    monkeypatch.setattr(lanes, "_Pinned", pin)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    return sizes


def test_outputs_come_back_in_memory_that_is_pinned_once(pinned: list[int]) -> None:
    small = [torch.arange(7, dtype=torch.int8).view(1, 7), torch.arange(3.0)]
    large = [torch.arange(1000, dtype=torch.int16), torch.zeros(0), torch.arange(5.0)]
    lane = Lane(torch.device("cpu"), 4096)
    for outputs in (small, large, small):
        found = lane.fetch(outputs)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, outputs, strict=True))
        starts = [tensor.data_ptr() - found[0].data_ptr() for tensor in found if tensor.numel()]
        assert all(start % ALIGNMENT == 0 for start in starts)
    assert pinned == [4096]
    assert torch.equal(lane.fetch([torch.arange(5000.0)])[0], torch.arange(5000.0)) and pinned == [4096, 20224]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_plan_says_how_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pinned: list[int], scheme: str) -> None:
    """What `_encode` fetches, codes of all ranks and canonical scales, fits what `workers` reckons from the plan."""
    monkeypatch.setattr(places, "open_device", torch.device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    source = open_source(make_checkpoint(tmp_path, hidden=256, intermediate=512))
    static = "ids" if SCHEMES[scheme].static else None
    plan = build_plan(source, Request(scheme=SCHEMES[scheme], tp=2, calibration=static))
    there = Places("cuda")
    assert there.workers(plan, 3) == 3
    shapes = {param.name: param.shape for param in source.parameters}
    for unit in (unit for unit in plan.units if unit.op == "quantize"):
        codes = [coded.codes.size_bytes for coded in unit.coded]
        codes = codes if unit.projection == "up_gate_proj" else [sum(codes)]
        scales = [4 * torch.Size(scale_shape(SCHEMES[scheme], *shapes[name])).numel() for name in unit.sources]
        there._lane().fetch([torch.zeros(size, dtype=torch.uint8) for size in (*codes, *scales)])
    assert len(pinned) == 1
