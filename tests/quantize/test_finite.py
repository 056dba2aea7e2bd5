"""Counting what is not finite, and scales that float16 cannot hold."""

from __future__ import annotations

import pytest
import torch

from mxconv.errors import NumericError
from mxconv.quantize.finite import FP16_SAFE_SCALE, NonFinite, find_nonfinite, fp16_subnormal_scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_count_and_first_index(dtype):
    rows = torch.zeros(5, 9, dtype=dtype)
    assert find_nonfinite(rows) is None
    rows[4, 8], rows[2, 3], rows[2, 7] = float("nan"), -float("inf"), float("inf")
    assert find_nonfinite(rows) == NonFinite(count=3, first=(2, 3))
    assert find_nonfinite(rows, base_row=100) == NonFinite(count=3, first=(102, 3))


def test_the_largest_finite_value_is_fine():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert find_nonfinite(torch.full((2, 2), torch.finfo(dtype).max, dtype=dtype)) is None


def test_blocks_merge_and_the_error_names_the_tensor():
    first = NonFinite(count=2, first=(7, 1))
    merged = first.merge(NonFinite(count=3, first=(90, 0))).merge(None)
    assert merged == NonFinite(count=5, first=(7, 1))
    error = merged.error("model.layers.3.w1\x1b[0m")
    assert isinstance(error, NumericError)
    assert "5 weights" in str(error) and "[7, 1]" in str(error) and "model.layers.3.w1\\x1b[0m" in str(error)


def test_scales_too_small_for_float16_are_counted():
    edge = torch.tensor(FP16_SAFE_SCALE)
    scale = torch.stack((edge, torch.nextafter(edge, torch.tensor(0.0)), torch.tensor(1e-9), torch.tensor(1.0)))
    assert fp16_subnormal_scales(scale) == 2
    # the edge is where the consumer's scale/7 stops being a normal float16
    assert (edge / 7).half() == torch.finfo(torch.float16).tiny
