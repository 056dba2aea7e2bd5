"""The Walsh-Hadamard rotation of weights and activations, by the one butterfly that every twin repeats to the bit.

H_b is the unnormalised natural-order Sylvester matrix, H_1 = [1], H_2n = [[H_n, H_n], [H_n, -H_n]]; it is symmetric and
H_b·H_b = b·I. It is applied block-diagonally along the last axis. The sums are float32 and their order is part of the
format (formats.md §2): stages 1, 2, 4 … b/2, each pair (a, b) of a stage becoming (a+b, a−b).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mxconv.errors import UsageError
from mxconv.quantize.schemes import Scheme


def hadamard(x: Tensor, block: int) -> Tensor:
    """H_block·x along the last axis, block by block, unnormalised.

    x: [..., n] of any float dtype, n a multiple of `block`; the result is float32 of the same shape. `block` is a power of
    two; 0 and 1 leave x as it is. Raises UsageError when the block is no power of two or does not divide n.
    """
    size = x.shape[-1]
    if block <= 1:
        return x.to(torch.float32)
    if block & (block - 1) or size % block:
        raise UsageError("a Hadamard block is a power of two that divides the axis", expected=f"a divisor of {size}", got=block)
    values = x.to(torch.float32)
    half = 1
    while half < block:
        pairs = values.reshape(-1, 2, half)
        a, b = pairs[:, 0], pairs[:, 1]
        values = torch.stack((a + b, a - b), dim=1)
        half *= 2
    return values.reshape(x.shape)


def rotation_divisor(scheme: Scheme, projection: str) -> float:
    """What the rotated weight is divided by: fl32(√b) for int4, b for e4m3 (exact), 1 without a rotation."""
    block = scheme.rotation[projection]
    if not block:
        return 1.0
    return root(block) if scheme.weight == "int4" else float(block)


def scale_divisor(scheme: Scheme, projection: str) -> float:
    """What a rotated int4 scale is divided by before it is stored, fl32(√b), so that decoding needs H_b alone; else 1."""
    block = scheme.rotation[projection]
    return root(block) if block and scheme.weight == "int4" else 1.0


def root(block: int) -> float:
    """√block rounded to float32."""
    return float(torch.tensor(math.sqrt(block), dtype=torch.float32))


def divide(x: Tensor, divisor: float) -> Tensor:
    """x / divisor in float32, correctly rounded on every device.

    The divisor travels as a tensor on the device of x: CUDA divides by a Python number through its reciprocal, which
    rounds differently (2.5 % of int4 words change).
    """
    return x / torch.tensor([divisor], dtype=torch.float32, device=x.device)


def rotate_weight(weight: Tensor, scheme: Scheme, projection: str) -> Tensor:
    """The weight that is quantized: (H_b·w)/divisor along `in`, or w itself where the scheme does not rotate `projection`.

    weight: [out, in] of any float dtype; the result is float32 [out, in]. Sums that leave float32 become infinite; the
    caller checks. Raises UsageError when the block does not divide `in`.
    """
    block = scheme.rotation[projection]
    if not block:
        return weight.to(torch.float32)
    return divide(hadamard(weight, block), rotation_divisor(scheme, projection))
