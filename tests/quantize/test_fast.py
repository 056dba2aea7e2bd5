"""The CPU encoders against the reference, bit for bit: odd shapes, all kinds of numbers, strided and poisoned outputs, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxconv.errors import NumericError, UsageError
from mxconv.quantize import fast, packing, reference
from mxconv.quantize.fast import ProjectionEncoder
from mxconv.quantize.schemes import SCHEMES, Scheme, get_scheme
from tests.quantize.schemes import CASE_NAMES, CASES, VARIANTS

UP, DOWN = "up_gate_proj", "down_proj"
WIDTHS = (512, 1536)  # divisible by every group, block and rotation of the variants


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 32 to 96 rows at these widths, so that every test crosses tile edges."""
    monkeypatch.setattr(fast, "ROW_TILE", 96 * 512)
    monkeypatch.setattr(fast, "COLUMN_TILE", 64 * 512)


def expected(w: Tensor, scheme: Scheme, projection: str) -> tuple[Tensor, Tensor]:
    coded = reference.encode(w, scheme, projection)
    return packing.store_codes(coded.codes, scheme), coded.scale


def encoded(w: Tensor, scheme: Scheme, projection: str, block: int | None = None) -> tuple[Tensor, Tensor]:
    """The whole matrix through an encoder in row blocks, into outputs whose every byte was something else."""
    encoder = ProjectionEncoder(scheme, projection, *w.shape)
    block = block or w.shape[0]
    starts = range(0, w.shape[0], block)
    rows, columns = packing.stored_codes_shape(scheme, *w.shape)
    codes = torch.full((rows, columns + 3), 0x55, dtype=torch.int8)[:, 1:-2]
    scale = torch.full(reference.scale_shape(scheme, *w.shape), float("nan"))
    tensor_scale = None
    if encoder.passes == 2:
        largest = 0.0
        for r in starts:
            largest = encoder.observe(w[r : r + block], largest)
        tensor_scale = reference.tensor_scale(largest)
    for r in starts:
        lines = slice(r // encoder.rows_multiple, (r + block) // encoder.rows_multiple)
        target = scale if encoder.passes == 2 else scale[lines]
        encoder.encode_into(w[r : r + block], codes[:, r : r + block], target, tensor_scale)
    return codes, scale


def assert_same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()


def bit_patterns(seed: int, shape: tuple[int, int], dtype: torch.dtype, largest: float) -> Tensor:
    """Every kind of finite number up to `largest`: uniform over bit patterns, with runs of zeros."""
    make = torch.Generator().manual_seed(seed)
    word = torch.int32 if dtype == torch.float32 else torch.int16
    bits = torch.randint(
        -(2**31) if word == torch.int32 else -(2**15), 2**31 if word == torch.int32 else 2**15, shape, generator=make
    )
    w = bits.to(word).view(dtype)
    w = torch.where(torch.isfinite(w) & (w.abs() <= largest), w, torch.zeros((), dtype=dtype))
    w[torch.rand(shape[0], generator=make) < 0.1] = 0
    w[:, :128] *= (torch.rand(shape[0], 1, generator=make) < 0.9).to(dtype)
    return w


@pytest.mark.parametrize("scheme, projection", CASES, ids=CASE_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gaussian_weights(scheme, projection, dtype):
    w = (torch.randn(384, 1536, generator=torch.Generator().manual_seed(2)) * 0.02).to(dtype)
    w[128:256, :128] = 0
    w[300] = -0.0
    assert_same(encoded(w, scheme, projection), expected(w, scheme, projection))


@pytest.mark.parametrize("scheme, projection", CASES, ids=CASE_NAMES)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    rows=st.integers(1, 150),
    width=st.sampled_from(WIDTHS),
    block=st.integers(1, 200),
)
def test_any_bit_pattern_any_rows_any_blocks(scheme, projection, seed, dtype, rows, width, block):
    if scheme.granularity == "block":
        rows, block = 128 * (1 + rows % 3), 128 * (1 + block % 3)
    largest = 2.0**110 if scheme.rotation[projection] else torch.finfo(dtype).max
    w = bit_patterns(seed, (rows, width), dtype, largest)
    assert_same(encoded(w, scheme, projection, block), expected(w, scheme, projection))


def test_every_pair_of_bf16_significands_rounds_as_the_reference():
    """int4 in one pass rests on a proof for pairs (weight, absmax); here are all of them, near and at every tie."""
    mantissas = (128 + torch.arange(128)).float()
    shifts = 2.0 ** -torch.arange(6)
    w = (mantissas[None, :, None] * shifts[:, None, None]).expand(6, 128, 128).transpose(1, 2)  # [shift, absmax, weight]
    absmax = mantissas[None, :, None].expand(6, 128, 1)
    w = torch.where(w <= absmax, w, 0.0)
    w = torch.cat((absmax, w, torch.zeros(6, 128, 127)), dim=2).reshape(-1, 256)
    w = torch.cat((w, -w))
    scheme = get_scheme("w4afp8", group_size=256)
    ties = ((14 * w.abs() / w.abs().amax(1, keepdim=True)) % 2 == 1).sum()
    assert ties > 400
    for exponent in (0, -130, -138, 119):  # also where weights are subnormal, and where 7·w overflows
        scaled = (w.double() * 2.0**exponent).bfloat16()
        assert_same(encoded(scaled, scheme, UP), expected(scaled, scheme, UP))


@pytest.mark.parametrize("largest", [2.0**123, 2.0**125, 2.0**126, 3.38e38])
def test_scales_where_seven_times_a_weight_overflows(largest):
    w = (torch.rand(64, 512, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 2 - 1) * largest
    w = w.bfloat16()
    assert_same(encoded(w, SCHEMES["w4afp8"], UP), expected(w, SCHEMES["w4afp8"], UP))


@pytest.mark.parametrize("exponent", [-149, -146, -145, -144, -140, -133, -126, -110, -100])
@pytest.mark.parametrize("name", ["block_wise_fp8", "tensor_wise_fp8", "w4afp8"])
def test_subnormal_weights_and_scales(name, exponent):
    w = torch.randn(128, 512, generator=torch.Generator().manual_seed(6), dtype=torch.float64) * 8 * 2.0**exponent
    for projection in (UP, DOWN):
        assert_same(encoded(w.float(), SCHEMES[name], projection), expected(w.float(), SCHEMES[name], projection))


def test_float32_weights_beside_every_tie():
    """Where w/s·7 is within a few roundings of k+½, one formula's last bit decides; the reference's must."""
    make = torch.Generator().manual_seed(12)
    absmax = torch.rand(96, 4, 1, generator=make) + 0.5
    w = absmax * (2 * torch.randint(0, 7, (96, 4, 127), generator=make) + 1) / 14
    w = (w.view(torch.int32) + torch.randint(-2, 3, w.shape, generator=make, dtype=torch.int32)).view(torch.float32)
    w = torch.cat((absmax, w), dim=2).view(96, 512)
    for projection in (UP, DOWN):
        assert_same(encoded(w, SCHEMES["w4afp8"], projection), expected(w, SCHEMES["w4afp8"], projection))
    one_pass = (7 * w.view(96, 4, 128) / absmax).round().view(96, 512)
    assert not torch.equal(one_pass.to(torch.int8), reference.encode(w, SCHEMES["w4afp8"], UP).codes)


def test_a_tensor_scale_that_is_too_small_saturates():
    w, scheme = torch.randn(64, 512).bfloat16(), SCHEMES["tensor_wise_fp8"]
    scale = reference.tensor_scale(float(reference.weight_absmax(w, scheme, UP))) / 16
    codes, _ = ProjectionEncoder(scheme, UP, 64, 512).encode(w, scale)
    rotated = reference.rotate_weight(w, scheme, UP)
    assert torch.equal(codes, reference.e4m3_codes(rotated, torch.tensor([scale])).t())
    assert (codes == 0x7E).any() and not ((codes & 0x7F) == 0x7F).any()


def test_encode_allocates_what_encode_into_fills():
    w = torch.randn(200, 512).bfloat16()
    for name, projection in (("w4afp8", UP), ("w4a8", DOWN)):
        scheme = SCHEMES[name]
        assert_same(ProjectionEncoder(scheme, projection, 200, 512).encode(w), expected(w, scheme, projection))
    scheme = SCHEMES["tensor_wise_fp8"]
    encoder = ProjectionEncoder(scheme, UP, 200, 512)
    assert_same(encoder.encode(w, reference.tensor_scale(encoder.observe(w))), expected(w, scheme, UP))


def test_an_encoder_remembers_nothing_of_earlier_rows():
    scheme = SCHEMES["w4afp8"]
    for projection in (UP, DOWN):
        encoder = ProjectionEncoder(scheme, projection, 300, 512)
        for rows in (96, 7, 64, 7, 1, 300):
            w = torch.randn(rows, 512).bfloat16()
            assert_same(encoder.encode(w), expected(w, scheme, projection))


def test_rows_that_are_not_contiguous():
    w = torch.randn(64, 1024).bfloat16()[:, 512:]
    assert_same(encoded(w, SCHEMES["w4afp8"], UP), expected(w, SCHEMES["w4afp8"], UP))
    assert_same(encoded(w, SCHEMES["w4afp8"], DOWN), expected(w, SCHEMES["w4afp8"], DOWN))


def test_scale_views_of_stored_tensors():
    scheme, w = SCHEMES["w4afp8_static"], torch.randn(64, 512).bfloat16()
    stored = torch.full((4, 64), float("nan"))
    encoder = ProjectionEncoder(scheme, UP, 64, 512)
    encoder.encode_into(w, torch.empty(256, 64, dtype=torch.int8), packing.scale_view(stored, scheme))
    assert torch.equal(stored, packing.store_scale(reference.encode(w, scheme, UP).scale, scheme))


@pytest.mark.parametrize("shape", ["gaussian", "heavy", "one block", "zero", "equal"])
def test_observe_finds_the_absmax_whatever_it_skips(shape):
    make = torch.Generator().manual_seed(8)
    w = torch.randn(300, 512, generator=make)
    w = {
        "gaussian": w,
        "heavy": w / torch.rand(300, 512, generator=make),
        "one block": torch.where(torch.arange(512)[None] < 32, w, w * 1e-3),
        "zero": w * 0,
        "equal": w.sign(),
    }[shape].bfloat16()
    scheme = SCHEMES["tensor_wise_fp8"]
    for weight in (w, w.flip(0), w.float()):
        encoder = ProjectionEncoder(scheme, DOWN, 300, 512)
        wanted = float(reference.weight_absmax(weight, scheme, DOWN))
        assert encoder.observe(weight) == wanted
        assert encoder.observe(weight, wanted / 2) == wanted
        assert encoder.observe(weight, 2 * wanted) == 2 * wanted
        running = 0.0
        for r in range(0, 300, 41):
            running = encoder.observe(weight[r : r + 41], running)
        assert running == wanted


@pytest.mark.parametrize("scheme, projection", CASES, ids=CASE_NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_that_are_not_finite_are_named(scheme, projection, value, dtype):
    w = torch.randn(256, 512, generator=torch.Generator().manual_seed(9)).to(dtype)
    w[201, 9], w[201, 500], w[255, 0] = value, value, value
    with pytest.raises(NumericError, match=r"3 weights .* \[201, 9\]") as caught:
        encoded(w, scheme, projection)
    assert caught.value.exit_code == 7


@pytest.mark.parametrize("name", ["w4afp8", "w4a8", "tensor_wise_fp8"])
def test_a_rotation_that_overflows_is_refused(name):
    w = torch.full((2, 512), 3e38).bfloat16()
    with pytest.raises(NumericError, match="overflows"):
        encoded(w, SCHEMES[name], DOWN)


@pytest.mark.parametrize("scheme, projection", CASES[::3], ids=CASE_NAMES[::3])
def test_one_encoder_a_thread(scheme, projection):
    weights = [torch.randn(256, 512, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda w: encoded(w, scheme, projection), weights))
    for w, got in zip(weights, results, strict=True):
        assert_same(got, expected(w, scheme, projection))


@pytest.mark.parametrize(
    "name, shape", [("w4afp8", (4, 192)), ("block_wise_fp8", (64, 128)), ("tensor_wise_fp8", (4, 48)), ("w4a8", (4, 64))]
)
def test_a_matrix_that_does_not_divide_is_refused(name, shape):
    with pytest.raises(UsageError, match="shape"):
        ProjectionEncoder(SCHEMES[name], DOWN, *shape)


def test_wrong_arguments_are_refused():
    block = ProjectionEncoder(SCHEMES["block_wise_fp8"], UP, 256, 512)
    tensor = ProjectionEncoder(SCHEMES["tensor_wise_fp8"], UP, 256, 512)
    w = torch.randn(128, 512).bfloat16()
    for call in (
        lambda: block.encode(w[:100]),
        lambda: block.encode(w[:, :256]),
        lambda: block.encode(w.double()),
        lambda: block.encode(w, 1.0),
        lambda: block.observe(w),
        lambda: tensor.encode(w),
    ):
        with pytest.raises(UsageError):
            call()


def test_tiles_and_passes_are_told():
    assert {name: ProjectionEncoder(s, UP, 256, 512).rows_multiple for name, s in VARIANTS.items() if s.granularity == "block"} == {
        "block_wise_fp8": 128
    }
    assert [name for name, s in SCHEMES.items() if ProjectionEncoder(s, UP, 256, 512).passes == 2] == ["tensor_wise_fp8"]
    assert ProjectionEncoder(SCHEMES["block_wise_fp8"], UP, 256, 512).tile_rows % 128 == 0
