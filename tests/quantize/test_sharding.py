"""quantize(shard(w)) == shard(quantize(w)), bit for bit, in the stored form, for every scheme and TP 1, 2, 4, 8.

Up_gate is cut along out (gate and up each), down along in. A scale that a cut would split (channel along in, tensor) is the whole
tensor's, which the quantizer is given.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxconv.quantize import packing, reference
from mxconv.quantize.reference import Coded
from mxconv.quantize.schemes import Scheme
from tests.quantize.schemes import VARIANTS

UP, DOWN = "up_gate_proj", "down_proj"
HIDDEN, CUT = 256, 512  # CUT: weights a rank holds along the cut axis, divisible by every group, block and rotation


def stored(coded: Coded, scheme: Scheme) -> tuple[Tensor, Tensor]:
    return packing.store_codes(coded.codes, scheme), packing.store_scale(coded.scale, scheme)


def cut(tensor: Tensor, axis: int, rank: int, ranks: int) -> Tensor:
    return tensor.chunk(ranks, axis)[rank]


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    pairs = list(zip(a, b, strict=True))
    return all(x.shape == y.shape and x.contiguous().numpy().tobytes() == y.contiguous().numpy().tobytes() for x, y in pairs)


def weights(seed: int, out_features: int, in_features: int) -> Tensor:
    """Random bf16 with rows and columns of very different sizes, so that a scale of the wrong part shows."""
    make = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 1, out_features)[torch.randperm(out_features, generator=make), None]
    sizes = sizes * torch.logspace(-2, 1, in_features)[torch.randperm(in_features, generator=make)]
    return (torch.randn(out_features, in_features, generator=make) * sizes).bfloat16()


def scale_axis(scheme: Scheme, projection: str) -> int | None:
    """The axis of the stored scale that a rank's cut goes along; None where every rank holds all of it."""
    if scheme.granularity == "tensor" or (scheme.granularity == "channel" and projection == DOWN):
        return None
    if scheme.granularity == "channel":
        return 0
    along_out = projection == UP
    return int(along_out) if scheme.scale_orientation == "in,out" else int(not along_out)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@settings(max_examples=6, deadline=None)
@given(name=st.sampled_from(sorted(VARIANTS)), seed=st.integers(0, 2**20))
def test_up_and_gate(ranks, name, seed):
    scheme = VARIANTS[name]
    gate, up = weights(seed, CUT * ranks // 4, HIDDEN), weights(seed + 1, CUT * ranks // 4, HIDDEN)
    absmax = None
    if scheme.granularity == "tensor":
        absmax = max(float(reference.weight_absmax(w, scheme, UP)) for w in (gate, up))
    whole = [stored(reference.encode(w, scheme, UP, absmax), scheme) for w in (gate, up)]
    axis = scale_axis(scheme, UP)
    for rank in range(ranks):
        # the file of a rank: [gate_r | up_r] along out
        shard = torch.cat([cut(w, 0, rank, ranks) for w in (gate, up)])
        quantized = stored(reference.encode(shard, scheme, UP, absmax), scheme)
        codes = torch.cat([cut(codes, 1, rank, ranks) for codes, _ in whole], dim=1)
        scale = whole[0][1] if axis is None else torch.cat([cut(scale, axis, rank, ranks) for _, scale in whole], dim=axis)
        assert same(quantized, (codes, scale))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@settings(max_examples=6, deadline=None)
@given(name=st.sampled_from(sorted(VARIANTS)), seed=st.integers(0, 2**20))
def test_down(ranks, name, seed):
    scheme = VARIANTS[name]
    w = weights(seed, HIDDEN, CUT * ranks)
    absmax = reference.weight_absmax(w, scheme, DOWN) if scheme.granularity in ("channel", "tensor") else None
    codes, scale = stored(reference.encode(w, scheme, DOWN), scheme)
    axis = scale_axis(scheme, DOWN)
    for rank in range(ranks):
        quantized = stored(reference.encode(cut(w, 1, rank, ranks), scheme, DOWN, absmax), scheme)
        assert same(quantized, (cut(codes, 0, rank, ranks), scale if axis is None else cut(scale, axis, rank, ranks)))


def test_a_channel_scale_of_one_rank_would_not_do():
    """The property is not empty: without the whole tensor's absmax the codes of a cut differ."""
    scheme = VARIANTS["w4a8"]
    w = weights(1, HIDDEN, 1024)
    codes, scale = stored(reference.encode(w, scheme, DOWN), scheme)
    assert not same(stored(reference.encode(cut(w, 1, 0, 2), scheme, DOWN), scheme), (cut(codes, 0, 0, 2), scale))
