"""Blocks of lightning attention against the recurrence, and the decay against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxconv.runtime.lightning import LightningDecay, decay_rates, head_slopes, lightning, lightning_naive

CPU = torch.device("cpu")


def draw(batch: int, heads: int, tokens: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [B, heads, T, D] and a state, float64."""
    random = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, tokens, size, generator=random, dtype=torch.float64)
    return q, k, v, torch.randn(batch, heads, size, size, generator=random, dtype=torch.float64)


def worst(a: Tensor, b: Tensor) -> float:
    """Largest difference beside the largest value."""
    return float(torch.linalg.vector_norm(a - b, torch.inf) / max(1e-300, float(torch.linalg.vector_norm(b, torch.inf))))


@pytest.mark.parametrize("tokens", [1, 2, 255, 256, 257, 511, 512, 513, 700])
@pytest.mark.parametrize("started", [False, True])
def test_blocks_equal_the_recurrence(tokens: int, started: bool) -> None:
    q, k, v, state = draw(2, 3, tokens, 8)
    rates = decay_rates(3, 1, 4)
    expected, expected_state = lightning_naive(q, k, v, rates, state if started else None)
    decay = LightningDecay(rates, CPU, torch.float64)
    out, end = lightning(q, k, v, decay, state.clone() if started else None)
    assert worst(out, expected) < 1e-12
    assert worst(end, expected_state) < 1e-12


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 530), seed=st.integers(0, 99), share=st.sampled_from([0.0, 0.1, 0.5, 0.98]), started=st.booleans()
)
def test_masked_blocks_equal_the_recurrence(tokens: int, seed: int, share: float, started: bool) -> None:
    q, k, v, state = draw(3, 2, tokens, 4, seed)
    mask = torch.rand(3, tokens, generator=torch.Generator().manual_seed(seed)) >= share
    mask[0] = False  # a sequence of padding alone
    rates = decay_rates(2, 0, 3)
    expected, expected_state = lightning_naive(q, k, v, rates, state if started else None, mask)
    decay = LightningDecay(rates, CPU, torch.float64)
    out, end = lightning(q, k, v, decay, state.clone() if started else None, mask)
    real = mask[:, None, :, None]
    assert worst(out * real, expected * real) < 1e-12
    assert worst(end, expected_state) < 1e-12
    assert out.isfinite().all()
    assert torch.equal(end[0], state[0] if started else torch.zeros(2, 4, 4, dtype=torch.float64))


def test_current_token_is_not_decayed() -> None:
    q, k, v = (torch.tensor([[[[x]]]], dtype=torch.float64) for x in (2.0, 3.0, 5.0))
    decay = LightningDecay([0.7], CPU, torch.float64)
    out, state = lightning(q, k, v, decay)
    assert (out.item(), state.item()) == (30.0, 15.0)
    out, state = lightning(q, k, v, decay, state)
    assert math.isclose(state.item(), 15 * math.exp(-0.7) + 15, rel_tol=1e-14)
    assert math.isclose(out.item(), 2 * state.item(), rel_tol=1e-14)


def test_strong_decay_and_long_sequences_stay_finite() -> None:
    q, k, v, _ = draw(1, 2, 2000, 4)
    rates = [40.0, 0.99]
    out, state = lightning(q.float(), k.float(), v.float(), LightningDecay(rates, CPU, torch.float32))
    expected, _ = lightning_naive(q, k, v, rates)
    assert out.isfinite().all() and state.isfinite().all()
    assert worst(out.double(), expected) < 1e-5


def test_slopes_by_hand() -> None:
    assert head_slopes(1) == [2.0**-8]
    assert head_slopes(4) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]
    # 12 heads: the 8 of a power of two, then every other of 16.
    assert head_slopes(12) == [2.0 ** -(h + 1) for h in range(8)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    assert head_slopes(3) == [2.0**-4, 2.0**-8, 2.0**-2]


def test_rates_by_hand() -> None:
    assert decay_rates(1, 0, 1) == [2.0**-8 * (1.0 + 1e-5)]
    assert decay_rates(1, 0, 5) == [2.0**-8 * (1.0 + 1e-5)]
    assert decay_rates(1, 1, 5) == [2.0**-8 * (0.75 + 1e-5)]
    assert decay_rates(1, 4, 5) == [2.0**-8 * 1e-5]
