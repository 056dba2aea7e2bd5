"""Strided assignment: numpy's own is the definition, for any order of the axes on both sides."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from mxconv.execute import transposing
from mxconv.execute.transposing import SMALLEST, assign

SHAPES = [(), (0, 7), (5,), (70, 300), (1, 130, 513), (5, 128, 64), (3, 1, 67, 129), (65, 2, 2, 65), (200, 3, 1100)]


def window(shape: tuple[int, ...], order: tuple[int, ...], dtype: type, gap: int) -> np.ndarray:
    """Zeros whose axes lie in memory in this order, `gap` elements apart on each."""
    whole = np.zeros([shape[axis] + gap for axis in order], dtype)
    inner = whole[(..., *(slice(0, shape[axis]) for axis in order))]
    return inner.transpose(np.argsort(order)) if shape else inner


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint64])
def test_every_order_of_axes(shape: tuple[int, ...], dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transposing, "SMALLEST", 1)
    random = np.random.default_rng(len(shape))
    for number, order in enumerate(permutations(range(len(shape)))):
        source = window(shape, order[::-1], dtype, number % 2)
        source[...] = random.integers(0, 256, shape)
        target = window(shape, order, dtype, (number + 1) % 2)
        outside = target.base
        assign(target, source)
        assert np.array_equal(target, source)
        assert outside is None or int(outside.sum()) == int(source.sum()), "nothing beside the window was written"


def test_long_rows_and_few_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows too long for a strip of 64, alone and behind another axis; source rows 4 KiB apart."""
    monkeypatch.setattr(transposing, "STRIP_BYTES", 1 << 14)
    for shape in ((150, 2048), (3, 77, 2048), (77, 3, 2048), (2, 77, 3, 512)):
        source = np.random.default_rng(1).integers(0, 1 << 16, shape).astype(np.uint16)
        assert source.size >= SMALLEST
        axes = tuple(range(len(shape)))
        for order in (axes[::-1], (axes[-1], *axes[:-1])):
            target = window(shape, order, np.uint16, 1)
            assign(target, source)
            assert np.array_equal(target, source)
