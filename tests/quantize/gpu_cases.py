"""Weights for the GPU encoder, and what it must make of them: the reference's bits, into poisoned outputs, or a refusal."""

from __future__ import annotations

import torch
from torch import Tensor

from mxconv.errors import UsageError
from mxconv.quantize import packing, reference
from mxconv.quantize.gpu import GpuEncoder
from mxconv.quantize.schemes import Scheme, get_scheme
from tests.interpreted import INTERPRETING
from tests.quantize.schemes import VARIANTS

UP, DOWN = "up_gate_proj", "down_proj"
DEVICE = "cpu" if INTERPRETING else "cuda"
SCHEMES_HERE: dict[str, Scheme] = {
    **VARIANTS,
    "w4afp8_g384": get_scheme("w4afp8", group_size=384),
    "w4afp8_g512_b256": get_scheme("w4afp8", group_size=512, hadamard_block=256),
    "w4afp8_b1024": get_scheme("w4afp8", hadamard_block=1024),
    "w4afp8_g2048": get_scheme("w4afp8", group_size=2048),
    "w4a8_b1024": get_scheme("w4a8", hadamard_block=1024),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def same_bits(got: Tensor, wanted: Tensor) -> bool:
    return got.shape == wanted.shape and got.contiguous().cpu().numpy().tobytes() == wanted.contiguous().cpu().numpy().tobytes()


def check(w: Tensor, scheme: Scheme, projection: str, *, offset: int = 0, blocks: int = 1, device: str = DEVICE) -> bool:
    """Encode `w` in row blocks into outputs whose every byte was something else; whether the encoder vouches for its result.

    Where it does, codes and scales are the reference's, and nothing beside them was touched.
    """
    coded = reference.encode(w, scheme, projection)
    wanted = packing.store_codes(coded.codes, scheme)
    encoder = GpuEncoder(scheme, projection, *w.shape, torch.device(device))
    rows = w.to(device)
    room = torch.full((wanted.shape[0], w.shape[0] + 12), 0x55, dtype=torch.int8, device=device)
    codes = room[:, offset : offset + w.shape[0]]
    scale = torch.full(coded.scale.shape, float("nan"), device=device)
    step = -(-w.shape[0] // blocks // encoder.rows_multiple) * encoder.rows_multiple
    parts = [slice(a, min(a + step, w.shape[0])) for a in range(0, w.shape[0], step)]
    if encoder.passes == 2:
        for part in parts:
            encoder.observe(rows[part])
    for part in parts:
        lines = slice(part.start // encoder.rows_multiple, part.stop // encoder.rows_multiple)
        encoder.encode_into(rows[part], codes[:, part], scale if encoder.passes == 2 else scale[lines])
    if not encoder.trusted():
        return False
    assert same_bits(codes, wanted)
    assert same_bits(scale, coded.scale)
    assert (room[:, :offset] == 0x55).all() and (room[:, offset + w.shape[0] :] == 0x55).all()
    return True


def vouched(w: Tensor, scheme: Scheme, projection: str) -> bool:
    """Whether every scale lies where the encoder promises exact divisions."""
    scale = reference.unit_scale(reference.weight_absmax(w, scheme, projection), scheme)
    return bool(((scale >= 2.0**-80) & (scale <= 2.0**100)).all())


def gaussian(seed: int, rows: int, width: int, dtype: torch.dtype, *, sizes: tuple[int, int] = (0, 0)) -> Tensor:
    """Rows of normal numbers, of sizes from 10^a to 10^b, with a row of zeros, one of negative zeros and zeros in between."""
    make = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, width, generator=make) * 0.02
    w = w * torch.logspace(*map(float, sizes), rows)[:, None]
    limit = torch.finfo(dtype).max / 4
    w = torch.where(torch.rand(rows, width, generator=make) < 0.01, -0.0, w.clamp(-limit, limit)).to(dtype)
    w[rows // 2] = 0
    w[rows // 3] = -0.0
    w[0, : width // 2] = 0
    return w


def bit_patterns(seed: int, rows: int, width: int, dtype: torch.dtype, least: float, most: float) -> Tensor:
    """Every kind of number from `least` to `most` in magnitude, uniform over bit patterns, and zeros."""
    make = torch.Generator().manual_seed(seed)
    word, end = (torch.int32, 2**31) if dtype == torch.float32 else (torch.int16, 2**15)
    w = torch.randint(-end, end, (rows, width), generator=make).to(word).view(dtype)
    size = w.float().abs()
    return torch.where((size >= least) & (size <= most), w, torch.zeros((), dtype=dtype))


def widths(scheme: Scheme, projection: str) -> int:
    """The least number of inputs."""
    return next(n for n in range(2, 10000) if _divides(scheme, projection, n))


def _divides(scheme: Scheme, projection: str, n: int) -> bool:
    try:
        reference.check_shape(scheme, projection, 128, n)
    except UsageError:
        return False
    return True


def hard_pairs(divisors: int) -> list[tuple[int, int]]:
    """24-bit (x, divisor) whose quotient is as near to the middle of two float32 numbers as any of that divisor can be."""
    make = torch.Generator().manual_seed(8)
    pairs = []
    special = [2**23 + 1, 2**24 - 1, 2**24 - 3, 2**23 + 3]
    for d in special + (torch.randint(2**22, 2**23, (divisors,), generator=make) * 2 + 1).tolist():
        for bits in (24, 25):  # quotients from 1 on, and below 1
            inverse = pow(1 << bits, -1, d)
            for c in (1, -1, 2, -2, 3, -3):
                x = c * inverse % d
                pairs += [(x + d * k, d) for k in (0, 1) if 2**23 <= x + d * k < 2**24]
    return pairs
