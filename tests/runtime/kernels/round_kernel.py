"""A kernel that does nothing but round numbers, for test_lightning_prefill."""

import triton
import triton.language as tl

from mxconv.runtime.kernels.lightning_chunks import rounded


@triton.jit
def round_numbers(x, out, like, N: tl.constexpr):
    """x float32 [N] with no more bits than the dtype of `like`."""
    i = tl.arange(0, N)
    tl.store(out + i, rounded(tl.load(x + i), like.dtype.element_ty))
