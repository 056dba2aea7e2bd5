"""The GPU encoder against the reference, bit for bit: odd shapes, all kinds of numbers, strided and poisoned outputs, flags."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxconv.errors import NumericError, UsageError
from mxconv.quantize import packing, reference
from mxconv.quantize.gpu import GpuEncoder
from mxconv.quantize.kernels.gpu_fp8 import e4m3_word
from mxconv.quantize.kernels.gpu_tiles import divided, quotient
from mxconv.quantize.rotation import root
from mxconv.quantize.schemes import SCHEMES, get_scheme
from tests.interpreted import interpreted, under_interpreter
from tests.quantize.gpu_cases import (
    DOWN,
    DTYPES,
    SCHEMES_HERE,
    UP,
    bit_patterns,
    check,
    gaussian,
    hard_pairs,
    same_bits,
    vouched,
    widths,
)

test_in_the_interpreter = under_interpreter(__file__)

# Interpreter: each way through the kernels once, tiny.


@interpreted
@pytest.mark.parametrize(
    "name, projection, rows, width, dtype",
    [
        ("w4afp8", UP, 7, 256, torch.bfloat16),
        ("w4afp8", DOWN, 8, 128, torch.float32),
        ("w4afp8_g384", DOWN, 3, 384, torch.bfloat16),
        ("w4afp8_g512_b256", DOWN, 3, 512, torch.float16),
        ("w4afp8_b1024", DOWN, 3, 1024, torch.bfloat16),
        ("w4a8", UP, 6, 66, torch.bfloat16),
        ("w4a8_b1024", DOWN, 3, 1024, torch.float32),
        ("block_wise_fp8", UP, 128, 128, torch.bfloat16),
        ("block_wise_fp8", DOWN, 128, 256, torch.float16),
        ("tensor_wise_fp8", UP, 9, 96, torch.bfloat16),
        ("tensor_wise_fp8", DOWN, 4, 160, torch.float32),
    ],
)
def test_small(name: str, projection: str, rows: int, width: int, dtype: torch.dtype) -> None:
    scheme = SCHEMES_HERE[name]
    assert check(gaussian(rows, rows, width, dtype), scheme, projection, offset=rows % 4)


@interpreted
@settings(max_examples=6, deadline=None, database=None)
@given(seed=st.integers(0, 2**20), rows=st.integers(1, 9), dtype=st.sampled_from(DTYPES), name=st.sampled_from(["w4afp8", "w4a8"]))
def test_small_of_any_bits(seed: int, rows: int, dtype: torch.dtype, name: str) -> None:
    w = bit_patterns(seed, rows, 128, dtype, 0.0, min(2.0**90, torch.finfo(dtype).max / 256))
    scheme = SCHEMES[name]
    assert check(w, scheme, UP) == vouched(w, scheme, UP)


@interpreted
def test_small_of_extremes() -> None:
    for exponent in (-149, -81, 101):
        w = (torch.randn(4, 128, generator=torch.Generator().manual_seed(1), dtype=torch.float64).sign() * 2.0**exponent).float()
        for scheme in (SCHEMES["w4afp8"], SCHEMES["tensor_wise_fp8"]):
            assert check(w, scheme, UP) == vouched(w, scheme, UP)
    w = gaussian(2, 5, 128, torch.float32)
    w[3, 77] = float("nan")
    encoder = GpuEncoder(SCHEMES["w4afp8"], UP, 5, 128, torch.device("cpu"))
    with pytest.raises(NumericError, match=r"\[3, 77\]"):
        encoder.encode(w)


# On a GPU.

# Every kernel once; --thorough adds what differs in sizes alone. What takes the time is compiling.
CASES = [
    pytest.param(name, projection, marks=() if name in SCHEMES else pytest.mark.thorough, id=f"{name}-{projection}")
    for name in SCHEMES_HERE
    for projection in (UP, DOWN)
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, projection", [(name, projection) for name in SCHEMES for projection in (UP, DOWN)])
def test_numbers_of_all_sizes(name: str, projection: str, dtype: torch.dtype) -> None:
    check_sizes(name, projection, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name, projection", [(name, DOWN if "b" in name.split("_")[-1] else UP) for name in SCHEMES_HERE if name not in SCHEMES]
)
def test_numbers_of_all_sizes_in_other_groups_and_rotations(name: str, projection: str) -> None:
    check_sizes(name, projection, torch.bfloat16)


def check_sizes(name: str, projection: str, dtype: torch.dtype) -> None:
    scheme = SCHEMES_HERE[name]
    width = widths(scheme, projection) * 6
    rows = 384
    sizes = (-4, 0) if dtype == torch.float16 else (-18, 24)
    w = gaussian(3, rows, width, dtype, sizes=sizes)
    if scheme.granularity != "block" and dtype == torch.bfloat16:
        assert check(w[: rows - 1], scheme, projection, offset=3, blocks=3)
    assert check(w, scheme, projection, offset=4, blocks=3)


@pytest.mark.gpu
@pytest.mark.parametrize("name, projection", CASES)
@settings(max_examples=12, deadline=None, database=None)
@given(
    seed=st.integers(0, 2**20), dtype=st.sampled_from(DTYPES), rows=st.integers(1, 300), wider=st.integers(1, 3),
    offset=st.integers(0, 8), blocks=st.integers(1, 3),
)  # fmt: skip
def test_any_bit_pattern(
    name: str, projection: str, seed: int, dtype: torch.dtype, rows: int, wider: int, offset: int, blocks: int
) -> None:
    scheme = SCHEMES_HERE[name]
    if scheme.granularity == "block":
        rows = 128 * (1 + rows % 3)
    most = min(2.0**85, float(torch.finfo(dtype).max) / (256 if scheme.rotation[projection] else 1))
    w = bit_patterns(seed, rows, widths(scheme, projection) * wider, dtype, 2.0**-60, most)
    assert check(w, scheme, projection, offset=offset, blocks=blocks)
    # without a least size: it vouches for the scales in its range and no others
    w = bit_patterns(seed, rows, w.shape[1], dtype, 0.0, most)
    assert check(w, scheme, projection, blocks=blocks) == vouched(w, scheme, projection)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["w4afp8", "w4a8", "block_wise_fp8", "tensor_wise_fp8"])
def test_extreme_scales_are_right_or_flagged(name: str) -> None:
    scheme = SCHEMES[name]
    normal = torch.randn(256, 512, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    for exponent, projection in itertools.product((-149, -140, -126, -100, -82, -79, 80, 97, 101, 115), (UP, DOWN)):
        w = normal * 2.0**exponent
        assert check(w.float(), scheme, projection) == vouched(w.float(), scheme, projection)
        encoder = GpuEncoder(scheme, projection, *w.shape, torch.device("cuda"))
        codes, scale = encoder.encode(w.float().cuda())
        coded = reference.encode(w.float(), scheme, projection)
        assert same_bits(codes, packing.store_codes(coded.codes, scheme)) and same_bits(scale, coded.scale)


@pytest.mark.gpu
@pytest.mark.parametrize("name, projection", CASES)
def test_one_weight_that_is_not_finite_is_flagged(name: str, projection: str) -> None:
    scheme = SCHEMES_HERE[name]
    width = widths(scheme, projection) * 2
    make = torch.Generator().manual_seed(int(width))
    for dtype, value in itertools.product((torch.bfloat16, torch.float32), (float("nan"), float("inf"), -float("inf"))):
        w = (torch.randn(256, width, generator=make) * 0.02).to(dtype)
        row, column = int(torch.randint(256, (), generator=make)), int(torch.randint(width, (), generator=make))
        w[row, column] = value
        encoder = GpuEncoder(scheme, projection, *w.shape, torch.device("cuda"))
        with pytest.raises(NumericError, match=rf"1 weights .* \[{row}, {column}\]") as caught:
            encoder.encode(w.cuda())
        assert caught.value.exit_code == 7


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["w4afp8", "w4a8", "tensor_wise_fp8"])
def test_a_rotation_that_overflows_is_refused(name: str) -> None:
    encoder = GpuEncoder(SCHEMES[name], DOWN, 2, 512, torch.device("cuda"))
    with pytest.raises(NumericError, match="overflows"):
        encoder.encode(torch.full((2, 512), 3e38).bfloat16().cuda())


@pytest.mark.gpu
def test_every_pair_of_bf16_significands() -> None:
    """All pairs (weight, absmax), near and at every tie, as in the test of the CPU encoder."""
    mantissas = (128 + torch.arange(128)).float()
    shifts = 2.0 ** -torch.arange(6)
    w = (mantissas[None, :, None] * shifts[:, None, None]).expand(6, 128, 128).transpose(1, 2)
    absmax = mantissas[None, :, None].expand(6, 128, 1)
    w = torch.where(w <= absmax, w, 0.0)
    w = torch.cat((absmax, w, torch.zeros(6, 128, 127)), dim=2).reshape(-1, 256)
    w = torch.cat((w, -w))
    for exponent in (-60, 0, 80):
        scaled = (w.double() * 2.0**exponent).bfloat16()
        assert check(scaled, get_scheme("w4afp8", group_size=256), UP)


@triton.jit
def _differences(found, seed, low, high, MANTISSAS: tl.constexpr, ROUNDS: tl.constexpr, SIZE: tl.constexpr):
    """How many of random pairs (x, divisor) `quotient` rounds otherwise than the division of the hardware."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    wrong = tl.zeros([SIZE], tl.int32)
    for each in range(ROUNDS):
        a, b, c, _ = tl.randint4x(seed + each, at)
        a, b, c = a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True), c.to(tl.int32, bitcast=True)
        x = ((a & -2139095041) | ((low + (c & 0xFFFF) % (high - low + 1)) << 23)).to(tl.float32, bitcast=True)
        d = ((b & 0x007FFFFF) | ((low + ((c >> 16) & 0x7FFF) % (high - low + 1)) << 23)).to(tl.float32, bitcast=True)
        if MANTISSAS:
            x = tl.load(found + 1 + 2 * at).to(tl.float32, bitcast=True)
            d = tl.load(found + 2 + 2 * at).to(tl.float32, bitcast=True)
        inverse = tl.div_rn(tl.full([SIZE], 1.0, tl.float32), d)
        got = quotient(x, d, inverse, False).to(tl.int32, bitcast=True)
        wrong += (got != tl.div_rn(x, d).to(tl.int32, bitcast=True)).to(tl.int32)
    tl.atomic_add(found, tl.sum(wrong, 0))


@pytest.mark.gpu
def test_quotients_round_as_divisions_do() -> None:
    """10^11 random pairs: of equal exponents, and of exponents between which it is promised."""
    for low, high in ((127, 127), (126, 128), (80, 200)):
        found = torch.zeros(1, dtype=torch.int32, device="cuda")
        _differences[(4096,)](found, 1 + low, low, high, MANTISSAS=False, ROUNDS=8192, SIZE=1024, enable_fp_fusion=False)
        assert int(found) == 0, (low, high)


@pytest.mark.gpu
def test_quotients_next_to_a_tie_round_as_divisions_do() -> None:
    """The hardest pairs of all, on the device; 40,000 divisors."""
    pairs = hard_pairs(40000)
    size = 1024
    pairs = pairs[: len(pairs) // size * size]
    x, d = (torch.tensor(column, dtype=torch.float32).view(torch.int32) for column in zip(*pairs, strict=True))
    found = torch.cat((torch.zeros(1, dtype=torch.int32), torch.stack((x, d), dim=1).view(-1))).cuda()
    _differences[(len(pairs) // size,)](found, 0, 0, 0, MANTISSAS=True, ROUNDS=1, SIZE=size, enable_fp_fusion=False)
    assert len(pairs) > 100000 and int(found[0]) == 0


def test_the_residual_step_rounds_right_next_to_a_tie() -> None:
    """The formula of `quotient` itself, on the CPU: 64 bits decide nearly all of these pairs, exact fractions the rest."""
    x, d = (np.array(column, dtype=np.float32) for column in zip(*hard_pairs(20000), strict=True))
    inverse, right = np.float32(1) / d, x / d
    first = x * inverse
    rest = (first.astype(np.float64) * d - x).astype(np.float32)  # exact: both are multiples of the same small unit
    got = (first.astype(np.longdouble) - rest.astype(np.longdouble) * inverse).astype(np.float32)
    assert (first != right).mean() > 0.2
    for i in np.nonzero(got != right)[0]:
        exact = Fraction(float(first[i])) - Fraction(float(rest[i])) * Fraction(float(inverse[i]))
        below, above = (np.nextafter(right[i], np.float32(side)) for side in (0, 2))
        assert Fraction(float(below)) + Fraction(float(right[i])) < 2 * exact < Fraction(float(right[i])) + Fraction(float(above))


@triton.jit
def _divisions(found, divisor, inverse, remainder, exponent, POWER: tl.constexpr, SIZE: tl.constexpr):
    """How many significands `divided` divides otherwise than the hardware."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = (at | (exponent << 23)).to(tl.float32, bitcast=True)
    got = divided(x, divisor, inverse, remainder, POWER, False).to(tl.int32, bitcast=True)
    tl.atomic_add(found, tl.sum((got != tl.div_rn(x, divisor).to(tl.int32, bitcast=True)).to(tl.int32), 0))


@pytest.mark.gpu
@pytest.mark.parametrize("block", [32, 128, 256, 512, 1024])
def test_division_by_the_root_rounds_right_for_every_significand(block: int) -> None:
    divisor = 32.0 if block == 32 else root(block)
    inverse = float(torch.ones(1) / torch.tensor([divisor]))
    found = torch.zeros(1, dtype=torch.int32, device="cuda")
    power = block not in (128, 512)
    for exponent in (37, 38, 100, 126, 127, 128, 254):
        _divisions[(2**23 // 1024,)](
            found, divisor, inverse, 1 / divisor - inverse, exponent, POWER=power, SIZE=1024, enable_fp_fusion=False
        )
    assert int(found) == 0


@triton.jit
def _bytes(x, out, size, ASSEMBLY: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    a = tl.load(x + at, mask=at < size, other=0.0)
    tl.store(out + at, e4m3_word(a, a * -1.0, a, a, ASSEMBLY), mask=at < size)


def e4m3_by_kernel(x: Tensor, assembly: bool) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.int32, device=x.device)
    _bytes[(-(-x.numel() // 1024),)](x, out, x.numel(), ASSEMBLY=assembly, SIZE=1024)
    return out


def check_e4m3(x: Tensor, assembly: bool) -> None:
    word = e4m3_by_kernel(x, assembly)
    wanted = reference.e4m3_codes(x, torch.ones(1, device=x.device)).view(torch.uint8).int()
    assert torch.equal(word & 255, wanted) and torch.equal((word >> 24) & 255, wanted)
    assert torch.equal((word >> 8) & 255, reference.e4m3_codes(-x, torch.ones(1, device=x.device)).view(torch.uint8).int())


@interpreted
def test_e4m3_bytes_in_integer_arithmetic() -> None:
    every = torch.arange(2**16).to(torch.int32) << 16
    x = torch.cat([(every + low).view(torch.float32) for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    check_e4m3(x[torch.isfinite(x)][::7].contiguous(), False)


@pytest.mark.gpu
@pytest.mark.parametrize("assembly", [True, False])
def test_e4m3_bytes_of_every_float(assembly: bool) -> None:
    for high in range(256):
        x = ((torch.arange(2**24, dtype=torch.int64, device="cuda") << 8 | high) - 2**31).to(torch.int32).view(torch.float32)
        check_e4m3(x[torch.isfinite(x)], assembly)
        if not assembly and high > 15:
            break


@pytest.mark.gpu
@pytest.mark.parametrize("name, projection", [("w4afp8", UP), ("w4afp8", DOWN), ("block_wise_fp8", UP), ("tensor_wise_fp8", DOWN)])
def test_a_whole_matrix_of_minimax_m1(name: str, projection: str) -> None:
    shape = (9216, 6144) if projection == UP else (6144, 9216)
    w = (torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(4), device="cuda") * 0.02).bfloat16()
    encoder = GpuEncoder(SCHEMES[name], projection, *shape, torch.device("cuda"))
    codes, scale = encoder.encode(w)
    coded = reference.encode(w, SCHEMES[name], projection)
    assert encoder.trusted()
    assert same_bits(codes, packing.store_codes(coded.codes, SCHEMES[name])) and same_bits(scale, coded.scale)


def test_wrong_arguments_are_refused() -> None:
    block = GpuEncoder(SCHEMES["block_wise_fp8"], UP, 256, 512, torch.device("cpu"))
    w = torch.randn(128, 512).bfloat16()
    codes, scale = torch.empty(512, 128, dtype=torch.int8), torch.empty(1, 4)
    for call in (
        lambda: block.encode_into(w[:100], codes[:, :100], scale),
        lambda: block.encode_into(w, codes[:100], scale),
        lambda: block.encode_into(w.double(), codes, scale),
        lambda: block.observe(w),
    ):
        with pytest.raises(UsageError):
            call()
