"""The fused sum and norm against its plain twin, rounding for rounding."""

from __future__ import annotations

import pytest
import torch

from mxconv.dispatch import WIDEST_NORM
from mxconv.runtime.kernels.residual_norm import residual_norm
from mxconv.runtime.norm import add_rms_norm, rms_norm
from tests.interpreted import interpreted, under_interpreter

test_in_the_interpreter = under_interpreter(__file__)


def check(rows: int, width: int, factors: tuple[float, float], dtype: torch.dtype, device: str) -> None:
    random = torch.Generator(device).manual_seed(width)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, device=device).to(dtype)

    residual, update, weight = 3 * draw(2, rows, width), draw(2, rows, width), 1 + draw(width) / 8
    update[0, 0] = 0
    exact = residual.double() * factors[0] + update.double() * factors[1]
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    x, h = residual_norm(residual, update, factors, weight, 1e-5, keep=True)
    step = torch.finfo(dtype).eps
    for got, expected in ((x, exact), (h, normed)):
        assert got.dtype == dtype and got.isfinite().all()
        assert ((got.double() - expected).abs() <= 3 * step * expected.abs() + 3 * step).all()
    alone = residual_norm(residual, None, (1.0, 1.0), weight, 1e-5, keep=False)[1]
    if device == "cuda":
        return
    # What differs are sums: nearly every element has the twin's bits.
    twin = add_rms_norm(residual, update, factors, weight, 1e-5, keep=True)
    for got, expected in zip((x, h, alone), (*twin, rms_norm(residual, weight, 1e-5)), strict=True):
        assert (got != expected).double().mean() < 0.02


@interpreted
@pytest.mark.parametrize(("rows", "width", "factors"), [(3, 128, (1.0, 1.0)), (2, 200, (3.5, 0.7)), (1, 1, (2.0, 1.0))])
def test_against_the_twin(rows: int, width: int, factors: tuple[float, float]) -> None:
    check(rows, width, factors, torch.float16, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("width", [6144, 200, WIDEST_NORM])
def test_on_a_gpu(width: int) -> None:
    for rows, factors, dtype in ((1, (3.5565588200778455, 1.0), torch.bfloat16), (2050, (0.5, 1.5), torch.bfloat16)):
        check(rows, width, factors, dtype, "cuda")
