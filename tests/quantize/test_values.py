"""Value tables: small matrices with the bytes and scales that formats.md gives them, worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mxconv.quantize import packing, reference
from mxconv.quantize.schemes import SCHEMES
from tests.quantize import naive

UP, DOWN = "up_gate_proj", "down_proj"


def row(width: int, **values: float) -> torch.Tensor:
    """A row of zeros with value vI at index I: row(128, v0=3.0)."""
    x = torch.zeros(1, width)
    for name, value in values.items():
        x[0, int(name[1:])] = value
    return x


def stored(weight: torch.Tensor, name: str, projection: str) -> tuple[list[int], torch.Tensor]:
    """(the column of stored bytes of output 0, the stored scale) of a scheme."""
    scheme = SCHEMES[name]
    coded = reference.encode(weight, scheme, projection)
    return packing.store_codes(coded.codes, scheme).view(torch.uint8)[:, 0].tolist(), packing.store_scale(coded.scale, scheme)


@pytest.mark.parametrize("name", ["w4afp8", "w4afp8_static", "w4a8"])
def test_int4_bytes(name):
    w = row(128, v0=7.0, v1=-7.0, v2=1.0, v3=-1.0, v4=3.4, v5=-3.6, v127=2.0)
    column, scale = stored(w, name, UP)
    assert column[:3] == [0x97, 0xF1, 0xC3]  # (7, -7) (1, -1) (3, -4): low nibble first
    assert column[3:63] == [0] * 60 and column[63] == 0x20
    assert scale.flatten().tolist() == [7.0]


def test_int4_ties_go_to_the_even_code():
    halves = [1.0, 3, 5, 7, 9, 11, 13, 14]  # w/14·7 = .5, 1.5, 2.5 …
    w = torch.zeros(1, 128)
    w[0, :8] = torch.tensor(halves)
    w[0, 8:16] = -torch.tensor(halves)
    codes = reference.encode(w, SCHEMES["w4afp8"], UP).codes[0]
    assert codes[:8].tolist() == [0, 2, 2, 4, 4, 6, 6, 7]
    assert codes[8:16].tolist() == [0, -2, -2, -4, -4, -6, -6, -7]


def test_int4_groups_and_channels_take_their_own_scales():
    w = torch.cat((row(128, v0=2.0, v1=1.0), row(128, v0=-8.0, v1=1.0)), dim=1)
    grouped = reference.encode(w, SCHEMES["w4afp8"], UP)
    assert grouped.scale.tolist() == [[2.0, 8.0]]
    assert grouped.codes[0, [0, 1, 128, 129]].tolist() == [7, 4, -7, 1]  # 3.5 → 4, .875 → 1
    channel = reference.encode(w, SCHEMES["w4a8"], UP)
    assert channel.scale.tolist() == [8.0]
    assert channel.codes[0, [0, 1, 128, 129]].tolist() == [2, 1, -7, 1]


@pytest.mark.parametrize("name", ["w4afp8", "w4afp8_static", "w4a8"])
@pytest.mark.parametrize("index, byte", [(0, 0x77), (1, 0x97)])
def test_int4_down_projection_is_rotated(name, index, byte):
    # column `index` of H_128 times 2: ±2 everywhere, so every code is ±7 and the scale is 2/√128, divided by √128 once more
    column, scale = stored(row(128, **{f"v{index}": 2.0}), name, DOWN)
    assert column == [byte] * 64
    root = np.float32(math.sqrt(128))
    assert scale.flatten().tolist() == [float(np.float32(2) / root / root)]
    decoded = reference.decode(reference.encode(row(128, v0=2.0), SCHEMES[name], DOWN), SCHEMES[name], DOWN)
    assert torch.allclose(decoded, row(128, v0=2.0), atol=1e-6)


@pytest.mark.parametrize(
    "name, projection, scale",
    [("w4afp8", UP, 1.0), ("w4a8", DOWN, 1 / math.sqrt(128)), ("block_wise_fp8", UP, 1.0)],
)
def test_all_zero_sets_get_scale_one(name, projection, scale):
    coded = reference.encode(torch.zeros(128, 128), SCHEMES[name], projection)
    assert not coded.codes.any()
    assert torch.allclose(coded.scale, torch.tensor(scale)) and coded.scale.unique().numel() == 1


E4M3_TABLE = (
    (448.0, 0x7E), (-448.0, 0xFE), (1.0, 0x38), (-1.0, 0xB8), (0.0, 0x00), (-0.0, 0x80),
    (16.0, 0x58), (17.0, 0x58), (18.0, 0x59), (19.0, 0x5A), (19.001, 0x5A), (16.999, 0x58), (17.001, 0x59),
    (2.0**-6, 0x08), (2.0**-9, 0x01), (2.0**-10, 0x00), (3 * 2.0**-10, 0x02), (1.01 * 2.0**-10, 0x01), (-(2.0**-10), 0x80),
    (240.0, 0x77), (248.0, 0x78), (440.0, 0x7E), (432.0, 0x7E), (431.9, 0x7D), (1e-30, 0x00), (3.0, 0x44), (-0.4, 0xAD),
)  # fmt: skip


def test_block_fp8_bytes():
    w = torch.zeros(128, 128)
    w[0, : len(E4M3_TABLE)] = torch.tensor([value for value, _ in E4M3_TABLE])
    column, scale = stored(w, "block_wise_fp8", UP)
    assert scale.tolist() == [[1.0]]  # absmax 448
    assert column[: len(E4M3_TABLE)] == [byte for _, byte in E4M3_TABLE]


def test_block_fp8_blocks_take_their_own_scales():
    w = torch.zeros(256, 256)
    w[0, 0], w[0, 128], w[128, 0], w[255, 255] = 448, 896, -224, 1.0
    coded = reference.encode(w, SCHEMES["block_wise_fp8"], UP)
    assert coded.scale.tolist() == [[1.0, 2.0], [0.5, float(np.float32(1) / np.float32(448))]]
    assert packing.store_scale(coded.scale, SCHEMES["block_wise_fp8"])[0].tolist() == [1.0, 0.5]  # [in/128, out/128]
    assert [coded.codes.view(torch.uint8)[i, j].item() for i, j in ((0, 0), (0, 128), (128, 0), (255, 255))] == [
        0x7E,
        0x7E,
        0xFE,
        0x7E,
    ]


def test_tensor_fp8_bytes():
    # H_32 of an impulse of 32·448 at 1, divided by 32: alternating ±448
    column, scale = stored(row(64, v1=32.0 * 448), "tensor_wise_fp8", UP)
    assert scale.tolist() == [1.0]
    assert column == [0x7E, 0xFE] * 16 + [0x00] * 32


def test_tensor_scale_is_shared_by_gate_and_up():
    gate, up = row(32, v0=32.0), row(32, v0=-64.0)
    scheme = SCHEMES["tensor_wise_fp8"]
    largest = max(float(reference.weight_absmax(x, scheme, UP)) for x in (gate, up))
    assert largest == 2.0
    coded = [reference.encode(x, scheme, UP, largest) for x in (gate, up)]
    assert [x.scale.tolist() for x in coded] == [[reference.tensor_scale(2.0)]] * 2
    assert coded[0].codes.view(torch.uint8).unique().tolist() == [0x76]  # 1 / (2/448) = 224
    assert coded[1].codes.view(torch.uint8).unique().tolist() == [0xFE]


def test_all_256_e4m3_codes_decode_as_the_format_says():
    values = reference.e4m3_values(torch.arange(256, dtype=torch.uint8).view(torch.int8)).tolist()
    for byte, value in enumerate(values):
        expected = naive.e4m3_value(byte)
        if math.isnan(expected):
            assert math.isnan(value)
        else:
            assert value == expected and math.copysign(1, value) == math.copysign(1, expected)


def test_every_boundary_between_e4m3_codes_rounds_half_to_even():
    middles = torch.from_numpy((naive.E4M3_POSITIVE[:-1] + naive.E4M3_POSITIVE[1:]) / 2).float()
    up, down = torch.nextafter(middles, torch.tensor(1e9)), torch.nextafter(middles, torch.tensor(-1e9))
    codes = torch.arange(126)
    even = codes + codes % 2
    for sign in (1, -1):
        flip = 0 if sign > 0 else 0x80
        for x, expected in ((middles, even), (up, codes + 1), (down, codes)):
            got = reference.e4m3_codes(sign * x, torch.ones(1)).view(torch.uint8).long()
            assert torch.equal(got, expected | flip)


def test_e4m3_saturates_and_keeps_the_sign_of_zero():
    x = torch.tensor([1e30, -1e30, 449.0, -0.0, 0.0])
    assert reference.e4m3_codes(x, torch.ones(1)).view(torch.uint8).tolist() == [0x7E, 0xFE, 0x7E, 0x80, 0x00]


def test_int4_values_are_sevenths():
    values = reference.int4_values(torch.arange(-7, 8, dtype=torch.int8))
    assert values.tolist() == [float(np.float32(q) / np.float32(7)) for q in range(-7, 8)]
