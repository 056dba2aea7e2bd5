"""The one decision between a kernel and plain torch: what each operation takes, and what overrides it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mxconv import dispatch
from mxconv.dispatch import RULES, WIDEST_NORM, open_device, triton_wanted
from mxconv.errors import UsageError
from mxconv.execute import quantize
from mxconv.runtime import load
from tests.synthetic import make_checkpoint, random_ids

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FITS = {"head_dim": 128, "hidden": 6144, "inner": 1152}


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MXCONV_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "_importable", lambda: True)
    monkeypatch.setattr(dispatch, "_capability", lambda device: (9, 0))


@pytest.mark.parametrize("operation", RULES)
def test_a_kernel_where_there_is_one(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_wanted(operation, CUDA, torch.bfloat16, **FITS)
    assert not triton_wanted(operation, CPU, torch.bfloat16, **FITS)
    assert not triton_wanted(operation, CUDA, torch.float64, **FITS)
    monkeypatch.setattr(dispatch, "_importable", lambda: False)
    assert not triton_wanted(operation, CUDA, torch.bfloat16, **FITS)


def test_shapes_that_do_not_fit() -> None:
    assert not triton_wanted("lightning_prefill", CUDA, torch.float32, head_dim=257)
    assert not triton_wanted("moe", CUDA, torch.bfloat16, hidden=6144, inner=1100)
    assert triton_wanted("moe_dense", CUDA, torch.bfloat16, hidden=64, inner=48)
    assert triton_wanted("residual_norm", CUDA, torch.bfloat16, hidden=WIDEST_NORM)
    assert not triton_wanted("residual_norm", CUDA, torch.bfloat16, hidden=WIDEST_NORM + 1)
    assert not triton_wanted("moe", CUDA, torch.float32, **FITS), "float32 is the judge's: it computes by the definition"


def test_older_gpus_have_no_e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_capability", lambda device: (8, 6))
    assert triton_wanted("lightning_prefill", CUDA, torch.bfloat16, **FITS)
    assert not triton_wanted("moe", CUDA, torch.bfloat16, **FITS)
    assert not triton_wanted("quantize", CUDA, torch.bfloat16, **FITS)


@pytest.mark.parametrize(("capability", "there"), [((8, 9), False), ((9, 0), True), ((10, 3), True), ((12, 0), False)])
def test_unquantized_experts_where_torch_does_not_ask_the_device(
    capability: tuple[int, int], there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its grouped product falls back to a loop over sizes on the host: in fp16, and on GPUs that it has no kernel for."""
    monkeypatch.setattr(dispatch, "_capability", lambda device: capability)
    assert triton_wanted("moe_dense", CUDA, torch.bfloat16, **FITS) is there
    assert not triton_wanted("moe_dense", CUDA, torch.float16, **FITS)


def test_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXCONV_KERNELS", "torch")
    assert not any(triton_wanted(operation, CUDA, torch.bfloat16, **FITS) for operation in RULES)
    monkeypatch.setenv("MXCONV_KERNELS", "triton")
    assert triton_wanted("moe", CUDA, torch.bfloat16, **FITS)
    with pytest.raises(UsageError, match="no kernel"):
        triton_wanted("moe", CPU, torch.bfloat16, **FITS)
    monkeypatch.setenv("MXCONV_KERNELS", "cuda")
    with pytest.raises(UsageError, match="unknown MXCONV_KERNELS"):
        triton_wanted("moe", CUDA, torch.bfloat16, **FITS)


def test_the_runtime_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on the CPU has no kernels to insist on, and says so."""
    model = load(make_checkpoint(tmp_path), device="cpu")
    monkeypatch.setenv("MXCONV_KERNELS", "triton")
    with pytest.raises(UsageError, match="no kernel"):
        model(random_ids(128, 1, 3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
def test_a_device_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="does not have the device"):
        load(make_checkpoint(tmp_path), device=name)
    assert open_device("cpu") == CPU


def test_the_runtime_imports_no_triton() -> None:
    code = "import sys, mxconv.runtime, mxconv.runtime.decoder; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_quantize_on_a_cpu_asks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_checkpoint(tmp_path / "source", hidden=128, intermediate=128)
    monkeypatch.setenv("MXCONV_KERNELS", "triton")
    with pytest.raises(UsageError, match="no kernel"):
        quantize(source, tmp_path / "out")
    monkeypatch.setenv("MXCONV_KERNELS", "torch")
    assert quantize(source, tmp_path / "out").root.exists()
