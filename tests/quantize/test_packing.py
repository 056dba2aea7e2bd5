"""Stored forms and back: against the formula of the format, element by element, and as exact inverses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxconv.errors import UsageError
from mxconv.quantize import packing
from mxconv.quantize.schemes import SCHEMES
from tests.quantize import naive

INT4, FP8 = SCHEMES["w4afp8"], SCHEMES["block_wise_fp8"]


def nibble(byte: int, high: bool) -> int:
    """Two's complement of four bits, in plain Python."""
    value = (byte >> 4 if high else byte) & 15
    return value - 16 if value > 7 else value


def test_bytes_by_hand():
    codes = torch.tensor([[1, 2, -1, -7], [7, -7, 0, 5]], dtype=torch.int8)  # [out 2, in 4]
    packed = packing.pack_int4(codes)
    assert packed.dtype == torch.int8 and packed.is_contiguous()
    assert packed.view(torch.uint8).tolist() == [[0x21, 0x97], [0x9F, 0x50]]


def test_every_byte_unpacks_to_its_nibbles():
    packed = torch.arange(256, dtype=torch.uint8).view(torch.int8).view(1, 256)
    codes = packing.unpack_int4(packed)  # [out 256, in 2]
    assert codes.tolist() == [[nibble(byte, False), nibble(byte, True)] for byte in range(256)]
    assert torch.equal(packing.pack_int4(codes), packed)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 17), st.integers(0, 2**32 - 1))
def test_packing_agrees_with_the_formula_and_is_undone(out_features, pairs, seed):
    codes = np.random.default_rng(seed).integers(-8, 8, (out_features, 2 * pairs), dtype=np.int8)
    packed = packing.store_codes(torch.from_numpy(codes), INT4)
    assert tuple(packed.shape) == packing.stored_codes_shape(INT4, *codes.shape)
    assert np.array_equal(packed.numpy(), naive.stored_codes(codes, INT4))
    assert np.array_equal(packing.load_codes(packed, INT4).numpy(), codes)


def test_e4m3_bytes_are_transposed_and_nothing_else():
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).view(8, 32)
    stored = packing.store_codes(codes, FP8)
    assert stored.is_contiguous() and tuple(stored.shape) == packing.stored_codes_shape(FP8, 8, 32) == (32, 8)
    assert stored[5].tolist() == codes[:, 5].tolist()
    assert torch.equal(packing.load_codes(stored, FP8), codes)


def test_an_odd_number_of_inputs_is_refused():
    with pytest.raises(UsageError, match="pairs"):
        packing.pack_int4(torch.zeros(4, 3, dtype=torch.int8))


@pytest.mark.parametrize(
    "name, canonical, stored",
    [
        ("w4afp8", (4, 3), (4, 3)),
        ("w4afp8_static", (4, 3), (3, 4)),
        ("w4a8", (4,), (4,)),
        ("block_wise_fp8", (4, 3), (3, 4)),
        ("tensor_wise_fp8", (1,), (1,)),
    ],
)
def test_scales_take_the_orientation_of_the_format(name, canonical, stored):
    scheme = SCHEMES[name]
    scale = torch.rand(canonical)
    result = packing.store_scale(scale, scheme)
    assert tuple(result.shape) == stored and result.is_contiguous()
    assert torch.equal(packing.load_scale(result, scheme), scale)
    if stored != canonical:
        assert result[2].tolist() == scale[:, 2].tolist()


def test_a_scale_view_writes_into_the_stored_tensor():
    stored = torch.zeros(3, 4)
    packing.scale_view(stored, SCHEMES["w4afp8_static"])[1:3].copy_(torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    assert stored.tolist() == [[0, 1, 4, 0], [0, 2, 5, 0], [0, 3, 6, 0]]
