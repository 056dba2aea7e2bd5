"""Rotation in place gives the bits of its plain twin."""

from __future__ import annotations

import pytest
import torch

from mxconv.runtime.kernels.rotate import rotate_in_place
from mxconv.runtime.rope import frequencies, rope_of, rotate_heads
from tests.interpreted import interpreted, under_interpreter

test_in_the_interpreter = under_interpreter(__file__)


def check(batch: int, tokens: int, heads: int, size: int, rotary: int, each: bool, dtype: torch.dtype, device: str) -> None:
    random = torch.Generator(device).manual_seed(tokens)
    # The heads stand in the rows of a wider tensor, as q and k do before v.
    fused = torch.randn(batch, tokens, heads + 3, size, generator=random, device=device).to(dtype)
    before = fused.clone()
    positions = torch.randint(0, 10**6, (batch if each else 1, tokens), generator=random, device=device)
    rope = rope_of(positions, frequencies(rotary, 1e4, torch.device(device)), dtype)
    rotate_in_place(fused[:, :, :heads], rope.cos, rope.sin)
    assert torch.equal(fused[:, :, :heads], rotate_heads(before[:, :, :heads], rope))
    assert torch.equal(fused[:, :, heads:], before[:, :, heads:])


@interpreted
@pytest.mark.parametrize(("batch", "tokens", "heads", "each"), [(1, 3, 5, False), (2, 2, 9, False), (2, 2, 3, True)])
def test_against_the_twin(batch: int, tokens: int, heads: int, each: bool) -> None:
    check(batch, tokens, heads, 32, 12, each, torch.float16, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "rotary"), [(128, 64), (96, 96), (64, 20)])
def test_on_a_gpu(size: int, rotary: int) -> None:
    for batch, tokens, heads, each in ((1, 1000, 72, False), (3, 65, 9, False), (64, 1, 9, True)):
        check(batch, tokens, heads, size, rotary, each, torch.bfloat16, "cuda")
