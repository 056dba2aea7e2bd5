"""Softmax attention, rotary positions and norms against their formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mxconv.runtime.batch import make_batch
from mxconv.runtime.cache import Cache
from mxconv.runtime.norm import rms_norm
from mxconv.runtime.rope import frequencies, rope_of, rotate_heads
from mxconv.runtime.softmax import attend

CPU = torch.device("cpu")


def naive(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """float64, query by query; `allowed` [B, T, S]."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for n in range(q.shape[1]):
            g = n // (q.shape[1] // k.shape[1])
            for t in range(q.shape[2]):
                keys = allowed[b, t].nonzero()[:, 0]
                weight = torch.exp(k[b, g, keys] @ q[b, n, t] / math.sqrt(q.shape[3]))
                out[b, n, t] = (weight / weight.sum()) @ v[b, g, keys]
    return out


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("queries", "past"), [(9, 0), (5, 6), (1, 7), (1, 0)])
def test_grouped_causal_attention(heads: int, kv: int, queries: int, past: int) -> None:
    random = torch.Generator().manual_seed(heads + queries)
    q = torch.randn(2, heads, queries, 8, generator=random, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv, past + queries, 8, generator=random, dtype=torch.float64)
    causal = torch.ones(queries, past + queries, dtype=torch.bool).tril(past).expand(2, -1, -1)
    cache = Cache()
    ids = torch.zeros(2, past + queries, dtype=torch.int64)
    if past:
        make_batch(ids[:, :past], None, cache, frequencies(4, 1e4, CPU), torch.float64)
    batch = make_batch(ids[:, past:], None, cache, frequencies(4, 1e4, CPU), torch.float64)
    out = attend(q, k, v, batch.allowed, causal=queries > 1 and past == 0)
    assert torch.allclose(out, naive(q, k, v, causal), rtol=1e-12, atol=1e-12)


def test_padded_keys_are_not_attended() -> None:
    random = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 2, 2, 7, 4, generator=random, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 1, 0]], dtype=torch.bool)
    batch = make_batch(torch.zeros(2, 7, dtype=torch.int64), mask, None, frequencies(4, 1e4, CPU), torch.float64)
    out = attend(q, k, v, batch.allowed, causal=True)
    causal = torch.ones(7, 7, dtype=torch.bool).tril() & mask[:, None, :]
    expected = naive(q, k, v, causal | torch.eye(7, dtype=torch.bool))
    assert torch.allclose(out.transpose(1, 2)[mask], expected.transpose(1, 2)[mask], rtol=1e-12, atol=1e-12)
    assert out.isfinite().all()


def test_positions_count_real_tokens() -> None:
    inverse = torch.tensor([1.0])
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    cache = Cache()
    ids = torch.zeros(2, 5, dtype=torch.int64)
    first = make_batch(ids, mask, cache, inverse, torch.float64)
    second = make_batch(ids[:, :2], None, cache, inverse, torch.float64)
    assert torch.equal(first.rope.cos[..., 0, 0], torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]).double().cos())
    assert torch.equal(second.rope.cos[..., 0, 0], torch.tensor([[3, 4], [5, 6]]).double().cos())


def test_rope_by_hand() -> None:
    inverse = frequencies(4, 10000.0, CPU)
    assert torch.equal(inverse, torch.tensor([1.0, 0.01]))
    x = torch.arange(1.0, 7.0, dtype=torch.float64).view(1, 1, 1, 6).expand(1, 2, 1, 6)
    out = rotate_heads(x, rope_of(torch.tensor([[0, 3]]), inverse, torch.float64))
    assert torch.equal(out[0, 0], x[0, 0])
    c, s = math.cos(3), math.sin(3)
    slow = 3 * float(torch.tensor(0.01))
    expected = [c - 3 * s, 2 * math.cos(slow) - 4 * math.sin(slow), 3 * c + s, 4 * math.cos(slow) + 2 * math.sin(slow), 5, 6]
    assert torch.allclose(out[0, 1, 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 16, generator=random).to(dtype) * 1e-2, torch.randn(16, generator=random).to(dtype)
    wide = x.double()
    hat = wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)
    expected = weight.double() * hat.to(dtype).double()
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[dtype]
    assert torch.allclose(rms_norm(x, weight, 1e-5).double(), expected, rtol=tolerance, atol=0)
