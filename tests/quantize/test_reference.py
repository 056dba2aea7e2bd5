"""The reference against a second implementation, at the edges of its input, and its errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxconv.errors import NumericError, UsageError
from mxconv.quantize import reference
from mxconv.quantize.schemes import SCHEMES, get_scheme
from tests.quantize import naive
from tests.quantize.schemes import CASE_NAMES, CASES, VARIANTS

UP, DOWN = "up_gate_proj", "down_proj"


def assert_as_naive(w: torch.Tensor, scheme, projection) -> None:
    coded = reference.encode(w, scheme, projection)
    codes, scale = naive.encode(w.float().numpy(), scheme, projection)
    assert coded.codes.numpy().tobytes() == codes.tobytes()
    assert coded.scale.numpy().tobytes() == scale.astype(np.float32).tobytes()
    assert coded.codes.dtype == torch.int8 and coded.scale.dtype == torch.float32
    assert tuple(coded.scale.shape) == reference.scale_shape(scheme, *w.shape)


@pytest.mark.parametrize("scheme, projection", CASES, ids=CASE_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_is_what_the_page_says(scheme, projection, dtype):
    w = torch.randn(128, 512, generator=torch.Generator().manual_seed(3)).to(dtype) * 0.02
    w[5] = 0
    w[7, :128] = -0.0
    assert_as_naive(w, scheme, projection)


EXTREMES = (0.0, -0.0, 1e-45, -1e-45, 1e-41, 1.1754944e-38, 1e-38, -3e-39, 2.0**-126, 1e-20, 1.0, 3e38, -3.4028234e38)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(EXTREMES), min_size=64, max_size=64), st.sampled_from(sorted(VARIANTS)))
def test_extremes_where_no_rotation_can_overflow(values, name):
    w = torch.zeros(128, 512)
    w[1, :64] = torch.tensor(values)
    w[64, 100:164] = torch.tensor(values) * 2.0**-60
    scheme = VARIANTS[name]
    projection = UP
    if scheme.rotation[projection]:
        w = w * 2.0**-8
    assert_as_naive(w, scheme, projection)


@pytest.mark.parametrize("scheme, projection", [case for case in CASES if not case[0].rotation[case[1]]])
def test_the_largest_float_survives_decoding(scheme, projection):
    w = torch.full((128, 512), torch.finfo(torch.float32).max)
    w[:, ::2] *= -1
    decoded = reference.decode(reference.encode(w, scheme, projection), scheme, projection)
    assert torch.allclose(decoded / 2, w / 2, rtol=1e-6)


@pytest.mark.parametrize("scheme, projection", CASES, ids=CASE_NAMES)
def test_minus_eight_and_nan_codes_never_occur(scheme, projection):
    w = torch.randn(128, 512, generator=torch.Generator().manual_seed(5))
    codes = reference.encode(w, scheme, projection).codes
    if scheme.weight == "int4":
        assert codes.min() == -7 and codes.max() == 7
    else:
        assert not ((codes & 0x7F) == 0x7F).any()
        assert ((codes & 0x7F) == 0x7E).any()  # the absmax itself reaches ±448


# Relative RMS error of a Gaussian matrix: formats.md §5 (.117 at 128, .166 at 9,216), wider groups between them.
ERRORS = [
    ("w4afp8", UP, 512, 0.117), ("w4afp8", DOWN, 512, 0.117), ("w4a8", UP, 9216, 0.166), ("w4a8", DOWN, 9216, 0.166),
    ("block_wise_fp8", UP, 512, 0.0264), ("tensor_wise_fp8", DOWN, 512, 0.0264),
]  # fmt: skip


@pytest.mark.parametrize("name, projection, width, expected", ERRORS)
def test_error_of_gaussian_weights(name, projection, width, expected):
    w = torch.randn(256, width, generator=torch.Generator().manual_seed(1)) * 0.02
    scheme = SCHEMES[name]
    decoded = reference.decode(reference.encode(w, scheme, projection), scheme, projection)
    assert float((decoded - w).norm() / w.norm()) == pytest.approx(expected, rel=0.02)


def test_a_given_absmax_replaces_the_weights_own():
    scheme = SCHEMES["w4a8"]
    w = torch.randn(4, 256)
    own = reference.weight_absmax(w, scheme, DOWN)
    assert torch.equal(reference.encode(w, scheme, DOWN, own).codes, reference.encode(w, scheme, DOWN).codes)
    doubled = reference.encode(w, scheme, DOWN, 2 * own)
    assert torch.equal(doubled.scale, 2 * reference.encode(w, scheme, DOWN).scale)
    assert doubled.codes.abs().max() <= 4
    with pytest.raises(UsageError, match="absmax"):
        reference.encode(w, scheme, DOWN, torch.ones(5))


def test_a_scale_that_would_round_to_zero_is_one():
    w = torch.full((128, 128), 1e-45)
    coded = reference.encode(w, SCHEMES["block_wise_fp8"], UP)
    assert coded.scale.item() == 1.0 and not coded.codes.any()
    assert reference.tensor_scale(0.0) == 1.0
    assert reference.tensor_scale(448.0) == 1.0
    assert reference.tensor_scale(0.1) == float(np.float32(0.1) / np.float32(448))


@pytest.mark.parametrize("scheme, projection", CASES, ids=CASE_NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(scheme, projection, value):
    w = torch.ones(128, 512, dtype=torch.bfloat16)
    w[3, 7], w[100, 1] = value, value
    with pytest.raises(NumericError, match=r"2 weights .* \[3, 7\]") as caught:
        reference.encode(w, scheme, projection)
    assert caught.value.exit_code == 7


def test_a_rotation_that_overflows_is_refused():
    w = torch.full((2, 128), 3e38)
    with pytest.raises(NumericError, match="overflows"):
        reference.encode(w, SCHEMES["w4a8"], DOWN)
    reference.encode(w, SCHEMES["w4a8"], UP)  # not rotated


@pytest.mark.parametrize(
    "name, shape",
    [
        ("w4afp8", (4, 192)),
        ("block_wise_fp8", (64, 128)),
        ("block_wise_fp8", (128, 192)),
        ("tensor_wise_fp8", (4, 48)),
        ("w4a8", (4, 33)),
    ],
)
def test_a_shape_that_does_not_divide_is_refused(name, shape):
    with pytest.raises(UsageError, match="shape"):
        reference.encode(torch.zeros(shape), SCHEMES[name], UP)


def test_the_rotation_block_must_divide():
    scheme = get_scheme("w4a8", hadamard_block=512)
    reference.encode(torch.ones(2, 768), scheme, UP)
    with pytest.raises(UsageError, match="multiple of 512"):
        reference.encode(torch.ones(2, 768), scheme, DOWN)


@pytest.mark.parametrize("weight", [torch.zeros(128, dtype=torch.bfloat16), torch.zeros(2, 128, dtype=torch.float64)])
def test_other_dtypes_and_ranks_are_refused(weight):
    with pytest.raises(UsageError, match="bf16, f16 or f32"):
        reference.encode(weight, SCHEMES["w4afp8"], UP)
