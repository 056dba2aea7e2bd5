"""SiLU of strided rows against torch's, over every number that the dtypes have."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mxconv.errors import UsageError
from mxconv.runtime import recurrence
from mxconv.runtime.kernels.silu import COLUMNS, ROWS, silu_rows
from tests.interpreted import interpreted, under_interpreter

test_in_the_interpreter = under_interpreter(__file__)

DTYPES = [torch.bfloat16, torch.float16]
OVERFLOWS = -88.72
"""Below it e^-x overflows float32, and the result is -0 instead of numbers under 3e-37."""


def every_number(dtype: torch.dtype, device: str) -> Tensor:
    """All 65,536 bit patterns: subnormals, both zeros, both infinities and every NaN among them."""
    return torch.arange(-(1 << 15), 1 << 15, device=device).to(torch.int16).view(dtype)


def ordered(x: Tensor) -> Tensor:
    """Bits as integers whose differences are units in the last place; both zeros are 0."""
    bits = x.view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def check(x: Tensor) -> None:
    """One unit at most from torch's, computed in float32 and in float64; NaN where torch has NaN, and nowhere else."""
    before = x.clone()
    got = silu_rows(x)
    assert got.shape == x.shape and got.dtype == x.dtype and got.is_contiguous() and got.data_ptr() != x.data_ptr()
    assert torch.equal(x.view(torch.int16), before.view(torch.int16))
    twin = F.silu(x.float()).to(x.dtype)
    assert torch.equal(got.isnan(), twin.isnan())
    there = ~twin.isnan()
    assert int((ordered(got)[there] - ordered(twin)[there]).abs().max()) <= 1
    exact = F.silu(x.double()).to(x.dtype)
    there &= x.float() > OVERFLOWS
    assert int((ordered(got)[there] - ordered(exact)[there]).abs().max()) <= 1
    assert bool((got[x.float() <= OVERFLOWS].nan_to_num(0.0).double().abs() < 3e-37).all())


def rows(width: int, count: int, gap: int, start: int, dtype: torch.dtype, device: str) -> Tensor:
    """[2, count, width]: a slice of rows that are `gap` longer; what lies between them is NaN, and x is random over many scales."""
    random = torch.Generator(device).manual_seed(width)
    whole = torch.full((2, count, start + width + gap), torch.nan, dtype=dtype, device=device)
    x = whole[..., start : start + width]
    x.copy_(torch.randn(x.shape, generator=random, device=device) * torch.randn(width, generator=random, device=device).exp2() * 4)
    return x


@interpreted
def test_every_number() -> None:
    check(every_number(torch.float16, "cpu").view(16, 4096)[:, :4000])
    x = every_number(torch.bfloat16, "cpu")
    check(x[~(x.float().abs() < 1e-37)])  # the interpreter rounds subnormals to bf16 wrongly


@interpreted
@pytest.mark.parametrize(("width", "count", "gap", "start"), [(1, 1, 0, 0), (5, ROWS, 3, 1), (COLUMNS + 1, ROWS + 1, 8, 0)])
def test_odd_rows(width: int, count: int, gap: int, start: int) -> None:
    check(rows(width, count, gap, start, torch.float16, "cpu"))


@interpreted
def test_other_layouts() -> None:
    x = rows(24, 6, 0, 0, torch.float16, "cpu")
    check(x[0, 0])
    check(x.transpose(0, 2))
    check(x[:, ::2])
    assert silu_rows(x[:, :0]).shape == (2, 0, 24) and silu_rows(x[..., :0]).shape == (2, 6, 0)
    with pytest.raises(UsageError):
        silu_rows(x.float())


def test_the_recurrence_takes_it_where_dispatch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 8).to(torch.bfloat16)
    assert torch.equal(recurrence.silu(x), F.silu(x))
    asked = []
    monkeypatch.setattr(recurrence, "triton_wanted", lambda *question: asked.append(question) or True)
    monkeypatch.setattr("mxconv.runtime.kernels.silu.silu_rows", lambda x: x + 7)
    assert torch.equal(recurrence.silu(x), x + 7) and asked == [("silu", x.device, x.dtype)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    check(every_number(dtype, "cuda").view(64, 1024))
    for shape in ((3072, 2051, 1024, 0), (3072, 5, 1024, 8), (3072, 5, 1025, 1), (1537, 301, 0, 3), (1, 9, 4, 0)):
        check(rows(*shape, dtype, "cuda"))


@pytest.mark.gpu
def test_rows_beyond_what_32_bits_count() -> None:
    """Rows as far apart as they are in a fused projection of 2³¹ numbers and more; only the last ones are looked at."""
    stride, count = 1 << 16, (1 << 15) + ROWS + 1
    if torch.cuda.mem_get_info()[0] < 3 * stride * count:
        pytest.skip("needs 6 GiB of GPU memory")
    x = torch.zeros(count, stride, dtype=torch.bfloat16, device="cuda")[:, :200]
    x[-ROWS - 1 :] = rows(200, ROWS + 1, 0, 0, torch.bfloat16, "cuda")[0]
    got = silu_rows(x)
    assert not got[: -ROWS - 1].any()
    assert int((ordered(got) - ordered(F.silu(x))).abs().max()) <= 1


@pytest.mark.gpu
def test_in_a_graph() -> None:
    """It waits for nothing, so that it can be captured; a replay reads what is there then."""
    x = rows(3072, 130, 1024, 0, torch.bfloat16, "cuda")
    silu_rows(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = silu_rows(x)
    x.neg_()
    graph.replay()
    assert int((ordered(out) - ordered(F.silu(x))).abs().max()) <= 1
