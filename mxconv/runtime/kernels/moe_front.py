"""The first kernel of a layer: it sorts the assignments and quantizes the input, which do not need each other."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

from mxconv.runtime.kernels.moe_activation import quantize_one
from mxconv.runtime.kernels.moe_overlap import after_previous
from mxconv.runtime.kernels.moe_sort import sort_one


@triton.jit(do_not_specialize=["assignments", "max_tiles", "rows"])
def front_kernel(
    chosen, order, position, tiles, ends, assignments, max_tiles, x, codes, scales, stored, rows, K, EXPERTS: tl.constexpr,
    BINS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr,
    PER_TOKEN: tl.constexpr, RULE: tl.constexpr, DIVISOR: tl.constexpr, LIMIT: tl.constexpr, INT8: tl.constexpr,
    RINT: tl.constexpr, STORED_DIVIDED: tl.constexpr, STAGES: tl.constexpr, NATIVE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs 0..EXPERTS sort (see moe_sort), the others quantize (see moe_activation): rows by rows, or pieces of them."""
    after_previous(OVERLAP)
    program = tl.program_id(0)
    if program <= EXPERTS:
        sort_one(program, chosen, order, position, tiles, ends, assignments, max_tiles, EXPERTS, BINS, BLOCK_T, CHUNK)
    else:
        TURNS: tl.constexpr = 1 if RULE == "token" else PIECES
        at = program - EXPERTS - 1
        quantize_one(
            at // TURNS, at % TURNS, x, chosen, codes, scales, stored, rows, K, EXPERTS, ROWS, COLUMNS, PIECES, PER_TOKEN, RULE,
            DIVISOR, LIMIT, INT8, RINT, STORED_DIVIDED, STAGES, NATIVE,
        )  # fmt: skip
