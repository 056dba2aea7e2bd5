"""Quantized activations and projections against an independent statement of each scheme's arithmetic, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mxconv.quantize.schemes import SCHEMES, Scheme, get_scheme
from mxconv.runtime.coded import Coded, hadamard, rotate, scale_shape
from mxconv.runtime.linear import QuantizedLinear, quantize_activation
from tests.oracle.serving import e4m3_round, e4m3_values, matrix
from tests.runtime.helpers import error

VARIANTS = (
    *SCHEMES.values(), get_scheme("w4afp8", group_size=256, hadamard_block=512), get_scheme("w4afp8_static", group_size="channel")
)  # fmt: skip


def inputs(rows: int, columns: int, seed: int = 0) -> Tensor:
    """float32 with an outlier, a zero row and rows of very different size."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x *= torch.logspace(-4, 3, rows)[:, None]
    x[0] = 0.0
    x[1, 5] *= 50
    return x


def test_e4m3_of_the_oracle_is_torchs() -> None:
    """The oracle's rounding, worked out from the format, against torch's cast: every code, every midpoint, random values."""
    values = e4m3_values()
    finite = values[values.isfinite()]
    torchs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    assert torch.equal(torchs.nan_to_num(1e9), values.nan_to_num(1e9))
    ordered = finite.unique()
    middles = (ordered[1:] + ordered[:-1]) / 2
    for x in (finite, middles, torch.randn(10000, dtype=torch.float64) * 100, torch.tensor([448.0, 1e9, -1e9, 2.0**-10, 2.0**-11])):
        x32 = x.float()
        expected = x32.clamp(-448, 448).to(torch.float8_e4m3fn).double()
        assert torch.equal(e4m3_round(x32.double()), expected)


@pytest.mark.parametrize("name", SCHEMES)
def test_activations_follow_the_scheme(name: str) -> None:
    rule, x = SCHEMES[name].activation, inputs(6, 256)
    wide = x.double()
    absmax = float(x.abs().max()) / 3  # a static scale that saturates
    stored = torch.tensor([absmax / 448 if name == "tensor_wise_fp8" else absmax])
    if name == "w4a8":
        expected = (wide * 127 / stored.double()).round().clamp(-127, 127) * stored.double() / 127
    elif name == "w4afp8_static":
        expected = e4m3_round(wide * 448 / stored.double()) * stored.double() / 448
    elif name == "tensor_wise_fp8":
        expected = e4m3_round(wide / stored.double()) * stored.double()
    else:
        runs = wide if name == "w4afp8" else wide.view(6, 2, 128)
        scale = runs.abs().amax(-1, keepdim=True) / (440 if name == "w4afp8" else 448)
        expected = (e4m3_round(runs / scale.where(scale > 0, 1.0)) * scale).view(6, 256)
    got = quantize_activation(x, rule, stored if SCHEMES[name].static else None)
    assert got.isfinite().all() and torch.equal(got[0], torch.zeros(256))
    # float32 arithmetic may flip a tie: one code's step at the most, in a few elements at the most.
    close = (got.double() - expected).abs() <= 1e-6 * expected.abs()
    assert close.float().mean() > 0.999
    assert error(got[1:], expected[1:]) < 1e-3


def test_ties_go_to_even_and_codes_are_clamped() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 200.0, -1e30]])
    got = quantize_activation(x, SCHEMES["w4a8"].activation, torch.tensor([127.0]))
    assert got.tolist() == [[0.0, 2.0, 2.0, 0.0, -2.0, 126.0, 127.0, -127.0]]
    x = torch.tensor([[17.0, 19.0, 1e9, -1e9, 2.4, 2.5]])
    plain = quantize_activation(x, SCHEMES["w4afp8_static"].activation, torch.tensor([448.0]))
    assert plain.tolist() == [[16.0, 20.0, 448.0, -448.0, 2.5, 2.5]]
    rint = quantize_activation(x, SCHEMES["w4afp8_static"].activation, torch.tensor([448.0]), rint=True)
    assert rint.tolist() == [[16.0, 20.0, 448.0, -448.0, 2.0, 2.0]]


@pytest.mark.parametrize("size", [32, 128, 256, 512, 1024])
def test_hadamard_is_natural_order_and_its_own_inverse(size: int) -> None:
    h = hadamard(size, torch.float64, torch.device("cpu"))
    assert torch.equal(h, matrix(size))
    assert torch.equal(h @ h, size * torch.eye(size, dtype=torch.float64))
    x = torch.randn(3, 2 * size, dtype=torch.float64)
    assert torch.allclose(rotate(x, size), torch.cat([x[:, :size] @ h, x[:, size:] @ h], 1))


def random_coded(scheme: Scheme, out: int, inner: int) -> Coded:
    """Codes in stored memory order ([in, out]) with scales of the scheme's shape."""
    random = torch.Generator().manual_seed(out + inner)
    if scheme.weight == "int4":
        codes = torch.randint(-7, 8, (inner, out), generator=random, dtype=torch.int8)
    else:
        codes = torch.randn(inner, out, generator=random).mul(60).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.int8)
    scale = torch.rand(scale_shape(scheme, out, inner), generator=random) + 0.1
    return Coded(codes=codes.t(), weight_scale=scale, activation_scale=torch.tensor([9.0]) if scheme.static else None)


@pytest.mark.parametrize("projection", ["up_gate", "down"])
@pytest.mark.parametrize("scheme", VARIANTS, ids=lambda s: f"{s.name}-{s.group_size}")
def test_projection_without_activation_quantization(scheme: Scheme, projection: str) -> None:
    """Element by element: which scale belongs to which code, and where the rotation goes."""
    out, inner = 256, 512
    coded = random_coded(scheme, out, inner)
    values = coded.codes.double() / 7 if scheme.weight == "int4" else e4m3_values()[coded.codes.to(torch.int64) & 255]
    w = torch.empty(out, inner, dtype=torch.float64)
    group = scheme.group_size or 128
    for n in range(out):
        for k in range(0, inner, 128):
            scale = {
                "group": lambda n=n, k=k: coded.weight_scale[(n, k // group) if scheme.name == "w4afp8" else (k // group, n)],
                "channel": lambda n=n: coded.weight_scale[n],
                "block": lambda n=n, k=k: coded.weight_scale[k // 128, n // 128],
                "tensor": lambda: coded.weight_scale[0],
            }[scheme.granularity]()
            w[n, k : k + 128] = values[n, k : k + 128] * float(scale)
    block = scheme.rotation["up_gate_proj" if projection == "up_gate" else "down_proj"]
    if block:
        w = (w.view(out, -1, block) @ matrix(block)).view(out, inner)
    x = inputs(4, inner).double()
    for dtype, bar in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        got = QuantizedLinear(coded, scheme, projection, dtype)(x.to(dtype), "none")
        assert error(got, x @ w.T) < bar


def test_int8_products_are_exact_in_float32() -> None:
    """int8 x int4 sums of M1's longest input stay below 2^24: the kernels' int32 sums have the same value."""
    scheme = SCHEMES["w4a8"]
    codes = torch.full((9216, 1), 7, dtype=torch.int8)
    coded = Coded(codes=codes.t(), weight_scale=torch.tensor([7.0]), activation_scale=torch.tensor([127.0]))
    linear = QuantizedLinear(coded, scheme, "up_gate", torch.float32)
    assert linear(torch.full((1, 9216), 127.0), "quantized").item() == 7 * 127 * 9216
    assert 7 * 127 * 9216 < 2**24


def test_each_rank_scales_its_own_slice() -> None:
    """w4afp8: two halves of an input with different absmax are scaled differently when they lie in different ranks."""
    rule = SCHEMES["w4afp8"].activation
    x = torch.cat([torch.linspace(0.0, 1.0, 128), torch.linspace(0.0, 37.0, 128)])[None]
    whole, halves = quantize_activation(x, rule), torch.cat([quantize_activation(half, rule) for half in x.chunk(2, 1)], 1)
    assert not torch.equal(whole, halves)
    assert math.isclose(halves[0, 127].item(), 1.0, rel_tol=0.04)
