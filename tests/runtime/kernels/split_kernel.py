"""A kernel that does nothing but split numbers, for test_lightning_prefill."""

import triton
import triton.language as tl

from mxconv.runtime.kernels.lightning_chunks import split


@triton.jit
def split_numbers(x, upper, rest, N: tl.constexpr):
    """x float32 [N] as two of the dtype of `upper`."""
    i = tl.arange(0, N)
    one, two = split(tl.load(x + i), upper.dtype.element_ty)
    tl.store(upper + i, one)
    tl.store(rest + i, two)
