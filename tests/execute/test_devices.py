"""quantize on a GPU: the bytes of the CPU's artifact, and the CPU's errors. Without a GPU its lanes are played by the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mxconv import dispatch
from mxconv.dispatch import triton_wanted
from mxconv.errors import MxconvError, NumericError, ResourceError, UsageError
from mxconv.execute import RunOptions, RunResult, quantize
from mxconv.execute import places as places_module
from mxconv.execute.places import OnDevice, Place, Places, device_bytes
from mxconv.plan import Request, build_plan
from mxconv.quantize.plain import PlainEncoder
from mxconv.quantize.schemes import SCHEMES
from mxconv.source import open_source
from tests.synthetic import make_checkpoint

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2.weight"


class CpuLane:
    """What a Lane does, on the CPU: blocks read into memory that is used again, work that is done late."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self._blocks = [np.full(1 << 20, 0x55, np.uint8) for _ in range(2)]
        self._turn = 0
        self.current = nullcontext
        self.rooms = 0

    def room(self, size_bytes: int) -> np.ndarray:
        self._turn, self.rooms = 1 - self._turn, self.rooms + 1
        self._blocks[self._turn][:] = 0x55
        return self._blocks[self._turn][:size_bytes]

    def put(self, rows: Tensor) -> Tensor:
        return rows.clone()

    def fetch(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        return [output.clone() for output in outputs]


@pytest.fixture
def gpu_played_by_cpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """`--device cuda` takes the same way as on a GPU, down to the encoder, which is the reference. Lists the lanes made."""
    lanes: list[Any] = []

    def place(self: Places, scheme: Any, projection: str, shape: Sequence[int], dtype: torch.dtype) -> Place:
        if not self.on_device:
            return self.host(scheme, projection, shape)
        lanes.append(CpuLane())
        out_features, in_features = shape
        return OnDevice(lanes[-1], PlainEncoder(scheme, projection, out_features, in_features, torch.device("cpu")))

    monkeypatch.setattr(places_module, "open_device", lambda name: torch.device(name))
    monkeypatch.setattr(Places, "workers", lambda self, plan, wanted: wanted)
    monkeypatch.setattr(Places, "place", place)
    return lanes


def run(source: Path, out: Path, scheme: str, device: str, **options: Any) -> RunResult:
    calibration = None
    if SCHEMES[scheme].static:
        calibration = out.parent / "ids.npy"
        np.save(calibration, np.arange(40) % 128)
    # calibration runs on the CPU for both, so that a static scale cannot differ
    statistics = options.pop("statistics", None)
    return quantize(
        source, out, scheme=scheme, device=device, calibration=None if statistics else calibration, statistics=statistics,
        options=RunOptions(workers=3), **options,
    )  # fmt: skip


def compare(tmp_path: Path, scheme: str, device: str, **shape: Any) -> None:
    """Artifacts of both devices, byte by byte."""
    tp = shape.pop("tp", 2)
    source = make_checkpoint(tmp_path / "source", **{"hidden": 256, "intermediate": 512, "layers": "ls", **shape})
    there = run(source, tmp_path / "cpu", scheme, "cpu", tp=tp)
    statistics = tmp_path / "cpu" / "statistics.json" if SCHEMES[scheme].static else None
    if statistics is not None:  # both from the same file: its digest is in the manifest
        there = run(source, tmp_path / "given", scheme, "cpu", tp=tp, statistics=statistics)
    here = run(source, tmp_path / "gpu", scheme, device, tp=tp, statistics=statistics)
    assert here.manifest.sha256 == there.manifest.sha256
    for path, fact in here.manifest.files.items():
        if fact.tensors:
            assert (tmp_path / "gpu" / path).read_bytes() == (there.root / path).read_bytes()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_lanes_give_the_same_artifact(tmp_path: Path, gpu_played_by_cpu: list[Any], scheme: str) -> None:
    compare(tmp_path, scheme, "cuda")
    assert len(gpu_played_by_cpu) == 2 * 4 * 2 and all(lane.rooms for lane in gpu_played_by_cpu)


def asked_on_device(monkeypatch: pytest.MonkeyPatch, kernels: str) -> list[bool]:
    """MXCONV_KERNELS is `kernels` where the quantizer asks about a GPU, and unset for the CPU's side. Lists the GPU's answers."""
    taken: list[bool] = []

    def wanted(operation: str, device: torch.device, dtype: torch.dtype, **shape: int) -> bool:
        if device.type == "cpu":
            return triton_wanted(operation, device, dtype, **shape)
        with monkeypatch.context() as patch:
            patch.setenv("MXCONV_KERNELS", kernels)
            taken.append(triton_wanted(operation, device, dtype, **shape))
        return taken[-1]

    monkeypatch.setattr(places_module, "triton_wanted", wanted)
    return taken


@pytest.mark.parametrize("kernels", ["", "torch", "triton"])
def test_each_side_is_asked_with_its_own_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu_played_by_cpu: list[Any], kernels: str
) -> None:
    """What the test on a GPU stands on: the CPU's side of a comparison runs whatever the GPU's is told."""
    monkeypatch.setattr(dispatch, "_importable", lambda: True)
    monkeypatch.setattr(dispatch, "_capability", lambda device: (9, 0))
    taken, place = asked_on_device(monkeypatch, kernels), Places.place

    def asking(self: Places, scheme: Any, projection: str, shape: Sequence[int], dtype: torch.dtype) -> Place:
        if self.on_device:
            places_module.triton_wanted("quantize", self.device, dtype)
        return place(self, scheme, projection, shape, dtype)

    monkeypatch.setattr(Places, "place", asking)
    compare(tmp_path, "w4afp8_static", "cuda", tp=1)
    assert len(gpu_played_by_cpu) == len(taken) and set(taken) == {kernels != "torch"}


def test_lanes_take_stacked_and_wide_sources(tmp_path: Path, gpu_played_by_cpu: list[Any]) -> None:
    compare(tmp_path / "stacked", "w4afp8", "cuda", dialect="minimax", stacked=True, router_dtype=torch.bfloat16)
    compare(tmp_path / "double", "tensor_wise_fp8", "cuda", dtype=torch.float64)
    assert gpu_played_by_cpu


@pytest.mark.parametrize("scheme", SCHEMES)
def test_lanes_fail_as_the_cpu_does(tmp_path: Path, gpu_played_by_cpu: list[Any], scheme: str) -> None:
    fails_alike(tmp_path, scheme, "cuda")


def fails_alike(tmp_path: Path, scheme: str, device: str) -> None:
    """NaN and, where the scheme rotates, a sum that overflows: the same error from both devices."""
    from safetensors.torch import load_file, save_file

    source = make_checkpoint(tmp_path / "source", hidden=256, intermediate=512, files=1, layers="ls", dtype=torch.float32)
    whole = load_file(source / "model.safetensors")
    statistics = None
    if SCHEMES[scheme].static:
        run(source, tmp_path / "for statistics", scheme, "cpu")
        statistics = tmp_path / "for statistics" / "statistics.json"
    spoiled: list[Callable[[Tensor], None]] = [lambda w: w[77].index_fill_(0, torch.tensor([3, 9]), float("nan"))]
    if SCHEMES[scheme].rotation["down_proj"]:
        spoiled.append(lambda w: w[5].fill_(3e38))
    for number, spoil in enumerate(spoiled):
        tensors = {name: w.clone() for name, w in whole.items()}
        spoil(tensors[EXPERT])
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        messages = []
        for where in ("cpu", device):
            with pytest.raises(NumericError) as caught:
                run(source, tmp_path / f"{where}{number}", scheme, where, statistics=statistics)
            messages.append(str(caught.value))
        assert messages[0] == messages[1] and ("2 weights" in messages[0] or "overflows" in messages[0])


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", hidden=256, intermediate=256)
    name = "cuda:99" if torch.cuda.is_available() else "cuda"
    with pytest.raises(UsageError) as caught:
        quantize(source, tmp_path / "out", device=name)
    assert caught.value.exit_code == 2 and not (tmp_path / "out").exists()
    with pytest.raises(UsageError):
        quantize(source, tmp_path / "out", options=RunOptions(device=name))


def test_what_a_lane_holds_is_known_from_the_plan(tmp_path: Path) -> None:
    source = open_source(make_checkpoint(tmp_path / "source", hidden=256, intermediate=512))
    for scheme in SCHEMES.values():
        plan = build_plan(source, Request(scheme=scheme, calibration="x" if scheme.static else None))
        units = [unit for unit in plan.units if unit.op == "quantize"]
        need = max(device_bytes(unit, scheme) for unit in units)
        assert need > max(sum(output.size_bytes for output in unit.outputs) for unit in units)
        assert scheme.granularity != "tensor" or need > max(unit.read_bytes for unit in units)
        assert plan.largest_unit_bytes >= max(sum(o.size_bytes for o in u.outputs) for u in units) + (16 << 20)


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kernels", ["", "torch", "triton"])
def test_a_gpu_gives_the_same_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, kernels: str) -> None:
    taken = asked_on_device(monkeypatch, kernels)
    compare(tmp_path, scheme, "cuda", tp=4 if scheme == "w4afp8" else 1)
    assert set(taken) == {kernels != "torch"}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_gpu_takes_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    compare(tmp_path, "w4afp8", "cuda:0", dtype=dtype)


@pytest.mark.gpu
def test_a_gpu_takes_stacked_sources_and_extreme_weights(tmp_path: Path) -> None:
    compare(tmp_path / "stacked", "w4afp8", "cuda", dialect="minimax", stacked=True, router_dtype=torch.bfloat16)
    compare(tmp_path / "tiny", "block_wise_fp8", "cuda", scale=1e-27, dtype=torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gpu_fails_as_the_cpu_does(tmp_path: Path, scheme: str) -> None:
    fails_alike(tmp_path, scheme, "cuda")


@pytest.mark.gpu
def test_a_full_gpu_is_exit_code_6(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_checkpoint(tmp_path / "source", hidden=256, intermediate=512)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    hog = torch.empty(free - (96 << 20), dtype=torch.uint8, device="cuda")
    with pytest.raises(ResourceError, match="too little free memory"):
        quantize(source, tmp_path / "before", device="cuda")
    monkeypatch.setattr(Places, "workers", lambda self, plan, wanted: wanted)
    monkeypatch.setattr(places_module.Lane, "put", lambda self, rows: torch.empty(total, dtype=torch.uint8, device="cuda"))
    with pytest.raises(MxconvError, match="out of memory") as caught:
        quantize(source, tmp_path / "during", device="cuda")
    assert caught.value.exit_code == 6
    del hog
    torch.cuda.empty_cache()
