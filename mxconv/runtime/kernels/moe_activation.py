"""What stands between the expert GEMMs: rotation and quantization of their inputs, SwiGLU, the weighted sum over a token's experts.

    quantize_one     x [T, K] → codes, scales: a row a token, or a row an assignment where each expert has a stored scale
    hidden_kernel    the first GEMM's output, gated [A, K] or as partial sums [splits, A, 2K], → silu(gate)·up, rotated: codes and
                     scales of the second one's input
    combine_kernel   partial sums of the second GEMM [splits, A, H] → y[t] = Σ_j weights[t, j] · out[position[t·k + j]], j ascending

Codes are those of `linear.quantize_activation`: the same float32 operations in the same order, with exactly rounded division.
RULE is "token" (absmax/divisor of the row), "token_group" (of runs of 128) or "static" (`stored` [experts]). The rotation is the
unnormalised Walsh-Hadamard butterfly, stages 1, 2, 4 … as in formats.md §2. NaN stays NaN in e4m3; an int8 code has no NaN.
A program takes ROWS rows: under the "token" rule all their columns, COLUMNS at a time, twice where they do not fit at once (the
second time from the cache); else one piece of COLUMNS.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxconv.runtime.kernels.moe_overlap import after_previous, overlap_options

COMBINE_COLUMNS = 1024


@triton.jit
def _rotate(v, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr):
    """H_b, block-diagonal, on the rows of v float32 [ROWS, COLUMNS]; b = 2^STAGES divides COLUMNS."""
    SIZE: tl.constexpr = ROWS * COLUMNS
    if STAGES > 0:
        v = tl.reshape(v, [SIZE])
        for stage in tl.static_range(STAGES):
            pairs = tl.permute(tl.reshape(v, [SIZE // (2 << stage), 2, 1 << stage]), (0, 2, 1))
            a, b = tl.split(pairs)
            v = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), [SIZE])
        v = tl.reshape(v, [ROWS, COLUMNS])
    return v


@triton.jit
def _divide(v, scale, NATIVE: tl.constexpr):
    """v [A, B] / scale [A], exactly rounded.

    With y the rounded 1/scale and q = v·y, q + y·(v - scale·q) is the rounded quotient (Markstein) as long as nothing underflows
    that a code could show: three instructions an element, one division a row.
    """
    wide = tl.broadcast_to(scale[:, None], v.shape)
    if NATIVE:
        if (tl.min(scale, axis=0) > 1e-20) & (tl.max(scale, axis=0) < 1e20):
            y = tl.broadcast_to(tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None], v.shape)
            q = v * y
            q = tl.where(tl.abs(q) < 1e30, tl.fma(tl.fma(-wide, q, v), y, q), q)
        else:
            q = tl.math.div_rn(v, wide)
    else:
        q = tl.math.div_rn(v, wide)
    return q


@triton.jit
def _e4m3_by_hand(v):
    """float32 in ±448 → e4m3, half to even, with integer operations: Triton's interpreter rounds subnormals wrongly."""
    bits = tl.abs(v).to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    tiny = (tl.abs(v) + 24576.0).to(tl.uint32, bitcast=True) & 15  # 1.5·2¹⁴: the sum counts in 2⁻⁹
    code = tl.where(bits < 0x3C800000, tiny, normal)
    code = tl.where(v == v, code, 0x7F) | ((v.to(tl.uint32, bitcast=True) >> 24) & 0x80)
    return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _encode(scaled, INT8: tl.constexpr, RINT: tl.constexpr, LIMIT: tl.constexpr, NATIVE: tl.constexpr):
    """Round half to even and clamp to ±LIMIT, as int8 or e4m3; RINT rounds to integers before the e4m3 cast."""
    scaled = tl.clamp(scaled, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if INT8 or RINT:
        scaled = (scaled + 12582912.0) - 12582912.0  # 1.5·2²³: the sum has no room for a fraction
    if INT8:
        codes = scaled.to(tl.int8)
    elif NATIVE:
        codes = scaled.to(tl.float8e4nv)
    else:
        codes = _e4m3_by_hand(scaled)
    return codes


@triton.jit
def _scale_of(absmax, DIVISOR: tl.constexpr):
    """absmax/divisor, exactly rounded; 1 for an absmax of 0."""
    scale = tl.math.div_rn(absmax, tl.full(absmax.shape, DIVISOR, tl.float32))
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def _store_codes(
    v, scale, codes, scales, rows, live, k, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RULE: tl.constexpr, DIVISOR: tl.constexpr,
    LIMIT: tl.constexpr, INT8: tl.constexpr, RINT: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Store the codes of v [ROWS, COLUMNS], the columns k of `rows`; `scale` [ROWS] is the divisor but for "token_group"."""
    if RULE == "token_group":
        RUNS: tl.constexpr = COLUMNS // 128
        runs = tl.reshape(v, [ROWS * RUNS, 128])
        scale = _scale_of(tl.max(tl.abs(runs), axis=1), DIVISOR)
        scaled = tl.reshape(_divide(runs, scale, NATIVE), [ROWS, COLUMNS])
        run = tl.max(tl.reshape(k, [RUNS, 128]), axis=1) // 128
        at = rows[:, None] * (K // 128) + run[None, :]
        tl.store(scales + at, tl.reshape(scale, [ROWS, RUNS]), mask=live[:, None] & (run < K // 128)[None, :])
    elif RULE == "token":
        scaled = _divide(v, scale, NATIVE)
    else:
        scaled = _divide(v * DIVISOR, scale, NATIVE)
    out = _encode(scaled, INT8, RINT, LIMIT, NATIVE)
    tl.store(codes + rows[:, None] * K + k[None, :], out, mask=live[:, None] & (k < K)[None, :])


@triton.jit
def _input(x, source, live, k, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr):
    """Rows `source` of x, rotated, in float32."""
    v = tl.load(x + source[:, None] * K + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
    return _rotate(v.to(tl.float32), ROWS, COLUMNS, STAGES)


@triton.jit
def _stored(stored, chosen, at, live, EXPERTS: tl.constexpr, DIVISOR: tl.constexpr, STORED_DIVIDED: tl.constexpr):
    """The absmax that the experts of the assignments `at` store; of expert 0 for padding, whose codes nobody reads."""
    expert = tl.load(chosen + at, mask=live, other=0).to(tl.int32)
    scale = tl.load(stored + tl.where((expert < 0) | (expert >= EXPERTS), 0, expert))
    if STORED_DIVIDED:
        scale = scale * DIVISOR
    return scale


@triton.jit
def quantize_one(
    block, piece, x, chosen, codes, scales, stored, rows_in_all, K, EXPERTS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PIECES: tl.constexpr, PER_TOKEN: tl.constexpr, RULE: tl.constexpr, DIVISOR: tl.constexpr,
    LIMIT: tl.constexpr, INT8: tl.constexpr, RINT: tl.constexpr, STORED_DIVIDED: tl.constexpr, STAGES: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Rows block·ROWS … of the codes of x; see the file."""
    rows = block * ROWS + tl.arange(0, ROWS)
    live, columns = rows < rows_in_all, tl.arange(0, COLUMNS)
    if RULE == "token":
        absmax = tl.zeros([ROWS], tl.float32)
        for p in range(PIECES):
            v = _input(x, rows, live, p * COLUMNS + columns, K, ROWS, COLUMNS, STAGES)
            absmax = tl.maximum(absmax, tl.max(tl.abs(v), axis=1))
        scale = _scale_of(absmax, DIVISOR)
        tl.store(scales + rows, scale, mask=live)
        for p in range(PIECES):
            k = p * COLUMNS + columns
            v = _input(x, rows, live, k, K, ROWS, COLUMNS, STAGES)
            _store_codes(v, scale, codes, scales, rows, live, k, K, ROWS, COLUMNS, RULE, DIVISOR, LIMIT, INT8, RINT, NATIVE)
    else:
        source, scale, k = rows, rows, piece * COLUMNS + columns
        if RULE == "static":
            source = rows // PER_TOKEN
            scale = _stored(stored, chosen, rows, live, EXPERTS, DIVISOR, STORED_DIVIDED)
        v = _input(x, source, live, k, K, ROWS, COLUMNS, STAGES)
        _store_codes(v, scale, codes, scales, rows, live, k, K, ROWS, COLUMNS, RULE, DIVISOR, LIMIT, INT8, RINT, NATIVE)


@triton.jit
def _hidden(
    partial, rows, live, k, K, assignments, SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr
):
    """silu(gate)·up of some rows and columns, rotated; SPLITS 0: gated already."""
    inside = live[:, None] & (k < K)[None, :]
    if SPLITS == 0:
        v = tl.load(partial + rows[:, None] * K + k[None, :], mask=inside, other=0.0)
    else:
        gate, up = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
        for split in tl.static_range(SPLITS):
            at = partial + (rows + assignments * split)[:, None] * (2 * K) + k[None, :]
            gate += tl.load(at, mask=inside, other=0.0)
            up += tl.load(at + K, mask=inside, other=0.0)
        v = gate / (1.0 + tl.exp(-gate)) * up
    return _rotate(v, ROWS, COLUMNS, STAGES)


@triton.jit(do_not_specialize=["assignments"])
def hidden_kernel(
    partial, order, chosen, codes, scales, stored, K, assignments, EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PIECES: tl.constexpr, SPLITS: tl.constexpr, RULE: tl.constexpr, DIVISOR: tl.constexpr, LIMIT: tl.constexpr, INT8: tl.constexpr,
    RINT: tl.constexpr, STORED_DIVIDED: tl.constexpr, STAGES: tl.constexpr, NATIVE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """partial → codes [A, K] and scales ([A], or [A, K/128]) of the sorted assignments; program (rows, piece of columns)."""
    after_previous(OVERLAP)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    assignment = tl.load(order + rows, mask=rows < assignments, other=-1)
    live, columns = assignment >= 0, tl.arange(0, COLUMNS)
    if RULE == "token":
        absmax = tl.zeros([ROWS], tl.float32)
        for p in range(PIECES):
            v = _hidden(partial, rows, live, p * COLUMNS + columns, K, assignments, SPLITS, ROWS, COLUMNS, STAGES)
            absmax = tl.maximum(absmax, tl.max(tl.abs(v), axis=1))
        scale = _scale_of(absmax, DIVISOR)
        tl.store(scales + rows, scale, mask=live)
        for p in range(PIECES):
            k = p * COLUMNS + columns
            v = _hidden(partial, rows, live, k, K, assignments, SPLITS, ROWS, COLUMNS, STAGES)
            _store_codes(v, scale, codes, scales, rows, live, k, K, ROWS, COLUMNS, RULE, DIVISOR, LIMIT, INT8, RINT, NATIVE)
    else:
        scale, k = rows, tl.program_id(1) * COLUMNS + columns
        if RULE == "static":
            scale = _stored(stored, chosen, tl.where(live, assignment, 0), live, EXPERTS, DIVISOR, STORED_DIVIDED)
        v = _hidden(partial, rows, live, k, K, assignments, SPLITS, ROWS, COLUMNS, STAGES)
        _store_codes(v, scale, codes, scales, rows, live, k, K, ROWS, COLUMNS, RULE, DIVISOR, LIMIT, INT8, RINT, NATIVE)


@triton.jit(do_not_specialize=["assignments"])
def combine_kernel(
    partial, position, weights, y, H, assignments, SIZE: tl.constexpr, PER_TOKEN: tl.constexpr, SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """y [T, H] in its own dtype, summed in float32 over splits, then over a token's experts; padding (position -1) adds nothing."""
    after_previous(OVERLAP)
    token, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    h = chunk * SIZE + tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    for j in tl.static_range(PER_TOKEN):
        row = tl.load(position + token * PER_TOKEN + j).to(tl.int64)
        if row >= 0:
            part = tl.zeros([SIZE], tl.float32)
            for split in tl.static_range(SPLITS):
                part += tl.load(partial + (row + assignments * split) * H + h, mask=h < H, other=0.0).to(tl.float32)
            total += part * tl.load(weights + token * PER_TOKEN + j)
    tl.store(y + token * H + h, total.to(y.dtype.element_ty), mask=h < H)


def combine(partial: Tensor, position: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """y [T, H] of partial outputs [splits, A, H], position int32 [A] and weights float32 [T, k]; see the file."""
    splits, rows, hidden = partial.shape
    y = torch.empty(len(weights), hidden, dtype=dtype, device=partial.device)
    combine_kernel[(len(weights), triton.cdiv(hidden, COMBINE_COLUMNS))](
        partial, position, weights, y, hidden, rows, SIZE=COMBINE_COLUMNS, PER_TOKEN=weights.shape[1], SPLITS=splits,
        **overlap_options(y.device),
    )  # fmt: skip
    return y
