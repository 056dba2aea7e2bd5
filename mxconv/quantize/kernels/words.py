"""Weights seen as machine words: how the CPU kernels widen and split a matrix without touching single elements.

A row of `in` weights is a row of in/2 *words*, each an (even, odd) pair of neighbouring inputs: int32 for bf16, int64 for
float32 (little-endian: the even input is the low half). Shifts and masks turn words into two float32 *planes*, the even and the
odd inputs, contiguous each: the halves that int4 packing and the first stage of a rotation need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _split_bf16(words: Tensor, even: Tensor, odd: Tensor) -> None:
    torch.bitwise_left_shift(words, 16, out=even)
    torch.bitwise_and(words, -1 << 16, out=odd)


def _split_f32(words: Tensor, even: Tensor, odd: Tensor) -> None:
    even.copy_(words)  # a narrowing copy keeps the low half
    odd.copy_(words >> 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class WordFormat:
    """How the pairs of one source dtype are read."""

    element: torch.dtype
    """The integer dtype of one weight's bits."""
    word: torch.dtype
    """The integer dtype of a pair."""
    magnitude: int
    """The mask that clears both signs of a word; what is left orders like the numbers, infinity and NaN largest."""
    split: Callable[[Tensor, Tensor, Tensor], None]
    """words, even, odd: writes the float32 bits of both planes into int32 tensors of the words' shape."""
    short: bool
    """Significands are short enough for 7·w to be exact in float32 (see rows.py)."""


WORD_FORMATS = {
    torch.bfloat16: WordFormat(element=torch.int16, word=torch.int32, magnitude=0x7FFF_7FFF, split=_split_bf16, short=True),
    torch.float32: WordFormat(
        element=torch.int32, word=torch.int64, magnitude=0x7FFF_FFFF_7FFF_FFFF, split=_split_f32, short=False
    ),
}


def readable(rows: Tensor) -> Tensor:
    """rows [n, in] contiguous and in a dtype of `WORD_FORMATS` (float16 is widened)."""
    return (rows if rows.dtype in WORD_FORMATS else rows.to(torch.float32)).contiguous()


def magnitudes(rows: Tensor, scratch: Tensor) -> Tensor:
    """|rows| as integers of the element's width that order like the numbers, infinity and NaN largest: [n, in].

    scratch: a flat int32 tensor of at least rows.numel() elements; the result lies in it.
    """
    form = WORD_FORMATS[rows.dtype]
    result = scratch.view(form.element)[: rows.numel()]
    torch.bitwise_and(rows.view(form.word).view(-1), form.magnitude, out=result.view(form.word))
    return result.view(rows.shape)


def as_int32(value: int) -> int:
    """value mod 2^32 as the signed number that an int32 tensor takes."""
    return (value & 0xFFFF_FFFF) - ((value & 0x8000_0000) << 1)
