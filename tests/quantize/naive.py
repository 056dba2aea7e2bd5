"""A second implementation of formats.md §2 in numpy and plain Python, written from that page and sharing nothing with mxconv.

Canonical orientation [out, in]. Only the scheme table is taken from mxconv: it says which row of the page is meant.
"""

from __future__ import annotations

import math

import numpy as np

from mxconv.quantize.schemes import Scheme

F32 = np.float32


def e4m3_value(byte: int) -> float:
    """The number an e4m3 byte (finite variant: no infinity, 0x7F and 0xFF are NaN) stands for."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return math.copysign(magnitude, sign)


E4M3_POSITIVE = np.array([e4m3_value(code) for code in range(0x7F)])  # 0 … 448, ascending
_MIDDLES = (E4M3_POSITIVE[:-1] + E4M3_POSITIVE[1:]) / 2  # exact in float64


def e4m3_bytes(x: np.ndarray) -> np.ndarray:
    """The nearest e4m3 code of each |x| ≤ 448 or so (larger saturates), ties to the even code, the sign kept: uint8."""
    magnitude = np.minimum(np.abs(x.astype(np.float64)), 448.0)
    below = np.searchsorted(_MIDDLES, magnitude, side="left")  # a tie counts as below the middle
    tie = (below < len(_MIDDLES)) & (_MIDDLES[np.minimum(below, len(_MIDDLES) - 1)] == magnitude)
    code = below + (tie & (below % 2 == 1))
    return (code | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


def hadamard(x: np.ndarray, block: int) -> np.ndarray:
    """Stages 1, 2, 4 … block/2 of (a+b, a−b), pair by pair, in float32."""
    x = x.astype(F32).copy()
    half = 1
    while half < block:
        for start in range(0, x.shape[1], 2 * half):
            for i in range(start, start + half):
                a, b = x[:, i].copy(), x[:, i + half].copy()
                x[:, i], x[:, i + half] = a + b, a - b
        half *= 2
    return x


def rotated(w: np.ndarray, scheme: Scheme, projection: str) -> np.ndarray:
    """W' of formats.md: (H_b·W)/fl(√b) for int4, H_32·W/32 for tensor_wise, W itself otherwise."""
    block = scheme.rotation[projection]
    if not block:
        return w.astype(F32)
    return hadamard(w, block) / (F32(math.sqrt(block)) if scheme.weight == "int4" else F32(block))


def absmax(w: np.ndarray, scheme: Scheme) -> np.ndarray:
    """absmax over what shares a scale, in the canonical shape of the granularity."""
    size = np.abs(w)
    n, k = size.shape
    if scheme.granularity == "group":
        return size.reshape(n, k // scheme.group_size, scheme.group_size).max(axis=2)
    if scheme.granularity == "channel":
        return size.max(axis=1)
    if scheme.granularity == "block":
        return size.reshape(n // 128, 128, k // 128, 128).max(axis=(1, 3))
    return size.max().reshape(1)


def spread(scale: np.ndarray, scheme: Scheme, shape: tuple[int, int]) -> np.ndarray:
    """The scale of each weight, [out, in]."""
    if scheme.granularity == "group":
        return np.repeat(scale, scheme.group_size, axis=1)
    if scheme.granularity == "channel":
        return np.repeat(scale[:, None], shape[1], axis=1)
    if scheme.granularity == "block":
        return np.repeat(np.repeat(scale, 128, axis=0), 128, axis=1)
    return np.broadcast_to(scale, shape)


def encode(w: np.ndarray, scheme: Scheme, projection: str, largest: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(codes uint8/int8 viewed as int8 [out, in], stored scale float32) of a float32 matrix."""
    prime = rotated(w, scheme, projection)
    largest = absmax(prime, scheme) if largest is None else largest
    if scheme.weight == "int4":
        scale = np.where(largest == 0, F32(1), largest)
        codes = np.rint((prime / spread(scale, scheme, w.shape)) * F32(7)).astype(np.int8)
        block = scheme.rotation[projection]
        return codes, scale / F32(math.sqrt(block)) if block else scale
    scale = largest / F32(448)
    scale = np.where(scale == 0, F32(1), scale)
    return e4m3_bytes(prime / spread(scale, scheme, w.shape)).view(np.int8), scale


def stored_codes(codes: np.ndarray, scheme: Scheme) -> np.ndarray:
    """The bytes as the file holds them, element by element: [in/2, out] nibbles or [in, out]."""
    if scheme.weight == "e4m3":
        return np.ascontiguousarray(codes.T)
    q = codes.T.astype(np.int32)
    k, n = q.shape
    out = np.zeros((k // 2, n), np.uint8)
    for i in range(k // 2):
        out[i] = (q[2 * i] & 15) | ((q[2 * i + 1] & 15) << 4)
    return out.view(np.int8)
