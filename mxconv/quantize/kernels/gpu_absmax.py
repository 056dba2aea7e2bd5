"""absmax of rotated weights on the GPU, for scales that no single program sees whole: channels, tensors, odd groups.

Bits of numbers that are not negative order like the numbers, infinity and then NaN largest: an atomic integer maximum finds the
same absmax in any order.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
from __future__ import annotations

import triton
import triton.language as tl

from mxconv.quantize.kernels.gpu_tiles import absmax_of, hadamard, largest_along, load_run, widened


@triton.jit
def absmax_kernel(
    weights, absmax, rows, width, group, groups,
    LOG2: tl.constexpr, CHUNK: tl.constexpr, R: tl.constexpr, L: tl.constexpr, STEPS: tl.constexpr,
    MASKED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Raise absmax to that of R rows × 8·L·STEPS columns a program, rotated by blocks of 2^LOG2 but not divided.

    weights: as of `load_run`. absmax: int32, the bits of float32 [rows, groups], zeros at first; with WHOLE, [1]. CHUNK columns lie
    in one group.
    """
    COUNT: tl.constexpr = 8 * STEPS
    EACH: tl.constexpr = CHUNK // L
    across = tl.cdiv(width, 8 * L * STEPS)
    n = tl.program_id(0) // across * R + tl.arange(0, R)
    column = tl.program_id(0) % across * (8 * L * STEPS)
    values = ()
    for t in tl.static_range(STEPS):
        values = values + widened(load_run(weights, n, rows, column + t * 8 * L, width, L, MASKED), L)
    values = hadamard(values, LOG2, L, COUNT)
    if WHOLE:
        found = largest_along(absmax_of(values, 0, COUNT), 0).to(tl.int32, bitcast=True)
        if found > tl.load(absmax):  # what is read may be old, then the maximum says it again; mostly nothing need be said
            tl.atomic_max(absmax, found, sem="relaxed")
    else:
        for g in tl.static_range(COUNT // EACH):
            found = absmax_of(values, g * EACH, (g + 1) * EACH)
            k = column + g * CHUNK
            at = n * groups + k // group
            tl.atomic_max(absmax + at, found.to(tl.int32, bitcast=True), mask=n < tl.where(k < width, rows, 0), sem="relaxed")
