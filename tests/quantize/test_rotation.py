"""The Walsh-Hadamard rotation: the matrix it is, the order of its float32 sums, its divisors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mxconv.errors import UsageError
from mxconv.quantize.rotation import hadamard, root, rotate_weight
from mxconv.quantize.schemes import get_scheme
from tests.quantize import naive


def sylvester(block: int) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < block:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


@pytest.mark.parametrize("block", [2, 4, 32, 128, 256, 1024])
def test_it_is_the_natural_order_sylvester_matrix(block):
    x = torch.randint(-50, 50, (3, 2 * block)).float()  # sums of integers are exact
    expected = (x.double().view(3, 2, block) @ sylvester(block)).view(3, 2 * block)
    assert torch.equal(hadamard(x, block).double(), expected)


@pytest.mark.parametrize("block", [2, 8, 128, 512])
def test_float32_sums_are_taken_in_the_order_of_the_format(block):
    x = torch.randn(5, 2 * block) * torch.logspace(-6, 6, 2 * block)
    ours, other = hadamard(x, block).numpy(), naive.hadamard(x.numpy(), block)
    assert ours.tobytes() == other.tobytes()
    # the order shows: the same sums from the largest stage down give other bits
    view, half = x.clone(), block // 2
    while half:
        pairs = view.view(-1, 2, half)
        view = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), 1)
        half //= 2
    assert block == 2 or ours.tobytes() != view.reshape(x.shape).numpy().tobytes()


def test_twice_gives_block_times_the_input():
    x = torch.randint(-9, 9, (4, 256)).float()
    assert torch.equal(hadamard(hadamard(x, 128), 128), 128 * x)


def test_block_zero_and_one_change_nothing():
    x = torch.randn(2, 6)
    assert torch.equal(hadamard(x, 0), x) and torch.equal(hadamard(x, 1), x)
    assert hadamard(x.bfloat16(), 0).dtype == torch.float32


@pytest.mark.parametrize("block, size", [(128, 192), (96, 192), (6, 12)])
def test_a_block_that_does_not_fit_is_refused(block, size):
    with pytest.raises(UsageError, match="power of two"):
        hadamard(torch.zeros(1, size), block)


@pytest.mark.parametrize("block", [128, 256, 512, 1024])
def test_root_is_the_nearest_float32(block):
    exact = math.sqrt(block)
    up, down = np.nextafter(np.float32(root(block)), np.float32(1e9)), np.nextafter(np.float32(root(block)), np.float32(0))
    assert abs(root(block) - exact) <= min(abs(float(up) - exact), abs(float(down) - exact))


def test_int4_rotates_the_down_projection_and_divides_by_the_root():
    scheme = get_scheme("w4a8", hadamard_block=256)
    w = torch.randn(3, 512).bfloat16()
    assert torch.equal(rotate_weight(w, scheme, "up_gate_proj"), w.float())
    expected = naive.hadamard(w.float().numpy(), 256) / np.float32(16)
    assert rotate_weight(w, scheme, "down_proj").numpy().tobytes() == expected.tobytes()


def test_tensor_wise_rotates_both_projections_by_32():
    w = torch.randn(3, 64)
    expected = naive.hadamard(w.numpy(), 32) / np.float32(32)
    for projection in ("up_gate_proj", "down_proj"):
        assert rotate_weight(w, get_scheme("tensor_wise_fp8"), projection).numpy().tobytes() == expected.tobytes()
