"""What stands between the expert GEMMs: rotation and quantization of their inputs, SwiGLU, the weighted sum over a token's experts.

    quantize_one     x [T, H] → codes, scales: a row a token, or a row an assignment where each expert has a stored scale
    hidden_kernel    partial sums of the first GEMM [splits, A, 2I] → silu(gate)·up (or [A, I], gated already), rotated: codes and
                     scales of the second's input
    combine_kernel   partial sums of the second GEMM [splits, A, H] → y[t] = Σ_j weights[t, j] · out[position[t·k + j]], j ascending

Codes are those of `linear.quantize_activation`: the same float32 operations in the same order, with exactly rounded division.
RULE is "token" (absmax/divisor of the row), "token_group" (of runs of 128) or "static" (`stored` [experts]). The rotation is the
unnormalised Walsh-Hadamard butterfly, stages 1, 2, 4 … as in formats.md §2. NaN stays NaN in e4m3; an int8 code has no NaN.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxconv.runtime.kernels.moe_overlap import after_previous, overlap_options

COMBINE_COLUMNS = 1024


@triton.jit
def rotate(v, SIZE: tl.constexpr, STAGES: tl.constexpr):
    """H_b, block-diagonal, on a float32 vector [SIZE]; b = 2^STAGES."""
    for stage in tl.static_range(STAGES):
        pairs = tl.permute(tl.reshape(v, [SIZE // (2 << stage), 2, 1 << stage]), (0, 2, 1))
        a, b = tl.split(pairs)
        v = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), [SIZE])
    return v


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
def _store_codes(
    v, codes, scales, stored, row, chunk, K, expert, SIZE: tl.constexpr, RULE: tl.constexpr, DIVISOR: tl.constexpr,
    LIMIT: tl.constexpr, INT8: tl.constexpr, RINT: tl.constexpr, STORED_DIVIDED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Quantize v [SIZE], columns chunk·SIZE … of `row`, and store codes [R, K] and scales ([R], or [R, K/128])."""
    k = chunk * SIZE + tl.arange(0, SIZE)
    if RULE == "token_group":
        runs = tl.reshape(v, [SIZE // 128, 128])
        scale = tl.math.div_rn(tl.max(tl.abs(runs), axis=1), DIVISOR)
        scale = tl.where(scale == 0.0, 1.0, scale)
        scaled = tl.reshape(tl.math.div_rn(runs, tl.broadcast_to(scale[:, None], [SIZE // 128, 128])), [SIZE])
        run = chunk * (SIZE // 128) + tl.arange(0, SIZE // 128)
        tl.store(scales + row * (K // 128) + run, scale, mask=run < K // 128)
    elif RULE == "token":
        scale = tl.math.div_rn(tl.max(tl.abs(v), axis=0), DIVISOR)
        scale = tl.where(scale == 0.0, 1.0, scale)
        scaled = tl.math.div_rn(v, tl.full([SIZE], 1.0, tl.float32) * scale)
        tl.store(scales + row, scale)
    else:
        absmax = tl.load(stored + expert)
        if STORED_DIVIDED:
            absmax = absmax * DIVISOR
        scaled = tl.math.div_rn(v * DIVISOR, tl.full([SIZE], 1.0, tl.float32) * absmax)
    tl.store(codes + row * K + k, _encode(scaled, INT8, RINT, LIMIT, NATIVE), mask=k < K)


@triton.jit
def quantize_one(
    row, chunk, x, chosen, codes, scales, stored, K, EXPERTS: tl.constexpr, SIZE: tl.constexpr, PER_TOKEN: tl.constexpr,
    RULE: tl.constexpr, DIVISOR: tl.constexpr, LIMIT: tl.constexpr, INT8: tl.constexpr, RINT: tl.constexpr,
    STORED_DIVIDED: tl.constexpr, STAGES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """SIZE columns of a row of codes: of a token, or for a static rule of an assignment, with the scale of its expert."""
    source, expert = row, 0
    if RULE == "static":
        source = row // PER_TOKEN
        expert = tl.load(chosen + row).to(tl.int32)
        expert = tl.where((expert < 0) | (expert >= EXPERTS), 0, expert)  # padding: codes that nobody reads
    k = chunk * SIZE + tl.arange(0, SIZE)
    v = tl.load(x + source * K + k, mask=k < K, other=0.0).to(tl.float32)
    v = rotate(v, SIZE, STAGES)
    _store_codes(v, codes, scales, stored, row, chunk, K, expert, SIZE, RULE, DIVISOR, LIMIT, INT8, RINT, STORED_DIVIDED, NATIVE)


@triton.jit(do_not_specialize=["assignments"])
def hidden_kernel(
    partial, order, chosen, codes, scales, stored, K, assignments, SIZE: tl.constexpr, SPLITS: tl.constexpr, RULE: tl.constexpr,
    DIVISOR: tl.constexpr, LIMIT: tl.constexpr, INT8: tl.constexpr, RINT: tl.constexpr, STORED_DIVIDED: tl.constexpr,
    STAGES: tl.constexpr, NATIVE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """partial [SPLITS, A, 2K] (gate then up), or [A, K] where SPLITS is 0, → codes [A, K] and scales ([A], or [A, K/128]);
    program (sorted row, SIZE columns)."""
    after_previous(OVERLAP)
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    assignment = tl.load(order + row)
    if assignment < 0:
        return
    expert = 0
    if RULE == "static":
        expert = tl.load(chosen + assignment).to(tl.int32)
    k = chunk * SIZE + tl.arange(0, SIZE)
    if SPLITS == 0:
        v = tl.load(partial + row * K + k, mask=k < K, other=0.0)
    else:
        gate, up = tl.zeros([SIZE], tl.float32), tl.zeros([SIZE], tl.float32)
        for split in tl.static_range(SPLITS):
            at = partial + (row + assignments * split) * (2 * K) + k
            gate += tl.load(at, mask=k < K, other=0.0)
            up += tl.load(at + K, mask=k < K, other=0.0)
        v = gate / (1.0 + tl.exp(-gate)) * up
    v = rotate(v, SIZE, STAGES)
    _store_codes(v, codes, scales, stored, row, chunk, K, expert, SIZE, RULE, DIVISOR, LIMIT, INT8, RINT, STORED_DIVIDED, NATIVE)


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
