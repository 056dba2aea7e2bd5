"""Grouped GEMM of a layer's experts: out[s, n] = Σ_k w_e[n, k] · x[row(s), k] for the sorted assignments s of every expert e.

    tile i   (expert, first, count): `count` ≤ BLOCK_T sorted assignments of one expert, from `moe_route`; expert -1 is none
    program  (n block, tile, split): one BLOCK_N × BLOCK_T block of outᵀ over its share of K, 128 inputs a step

The operands are swapped, outᵀ = w·xᵀ, so that a handful of tokens is the *narrow* side of the tensor cores' 64×n product and
wastes nothing. The weights come as `moe_pack` lays them out: [E, N/64, K/128, 64, bytes of 128 codes], one contiguous run a step.
int4 bytes are widened in registers (the low nibbles are inputs 0-63 of the step, the high ones 64-127) and never return to shared
memory.

    int4_e4m3   nibble s·mmm → the byte s0000mmm, the e4m3 subnormal ±m·2⁻⁹: exact, and one or two instructions for four codes
    int4_int8   nibble q, two's complement → the byte q·16, int8 products summed exactly in int32
    e4m3        bytes as they are

Every 128 inputs the partial sum leaves the tensor cores for a float32 accumulator (Hopper sums fp8 products with about 14 bits),
and takes there the scale that its granularity asks for: `group` one a row of w, `block` one for all rows times one a token, `flat`
none.
At the end: · row_scale[e, n] (per channel) · token_scale[s] (per token) · expert_scale[e] (per expert) · FACTOR, whatever is there.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

from mxconv.runtime.kernels.moe_overlap import after_previous


@triton.jit
def _low(packed, INTEGER: tl.constexpr, NATIVE: tl.constexpr):
    """The codes in the low nibbles of int8 bytes: bytes of e4m3 (or 16·q as int8)."""
    if INTEGER:
        if NATIVE:
            codes = tl.inline_asm_elementwise(
                "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }", "=r,r", [packed], dtype=tl.int8,
                is_pure=True, pack=4,
            )  # fmt: skip
        else:
            codes = (packed << 4).to(tl.int8)
    elif NATIVE:
        codes = tl.inline_asm_elementwise("and.b32 $0, $1, 0x87878787;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4)
    else:
        codes = packed & -121  # 0x87
    return codes


@triton.jit
def _high(packed, INTEGER: tl.constexpr, NATIVE: tl.constexpr):
    """The codes in the high nibbles of int8 bytes: bytes of e4m3 (or 16·q as int8).

    For e4m3 the four bytes of a word are rotated as one: bits 4-6 come down to 0-2, and the sign that belongs to a byte is
    bit 3 of the *next* byte's (`moe_pack` puts it there), which the rotation brings to bit 7.
    """
    if INTEGER:
        if NATIVE:
            codes = tl.inline_asm_elementwise("and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4)
        else:
            codes = packed & -16
    elif NATIVE:
        codes = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shf.r.wrap.b32 t, $1, $1, 4; and.b32 $0, t, 0x87878787; }", "=r,r", [packed], dtype=tl.int8,
            is_pure=True, pack=4,
        )  # fmt: skip
    else:
        rows: tl.constexpr = packed.shape[0]
        words: tl.constexpr = packed.shape[1] // 4
        shift = tl.arange(0, 4)[None, None, :] * 8
        word = tl.sum((packed.to(tl.uint8).to(tl.uint32).reshape(rows, words, 4) << shift), axis=2)
        word = (word >> 4) | (word << 28)
        codes = ((word[:, :, None] >> shift) & 0x87).to(tl.uint8).to(tl.int8, bitcast=True).reshape(rows, words * 4)
    return codes


@triton.jit
def operand(packed, WEIGHT: tl.constexpr, NATIVE: tl.constexpr):
    """The codes [BLOCK_N, 128] of one step's bytes: a rearrangement of registers alone, as the tensor cores' first operand."""
    if WEIGHT == "e4m3":
        codes = packed.to(tl.float8e4nv, bitcast=True)
    else:
        INTEGER: tl.constexpr = WEIGHT == "int4_int8"
        halves = tl.join(_low(packed, INTEGER, NATIVE), _high(packed, INTEGER, NATIVE))
        codes = tl.reshape(tl.permute(halves, (0, 2, 1)), [packed.shape[0], 2 * packed.shape[1]])
        if not INTEGER:
            codes = codes.to(tl.float8e4nv, bitcast=True)
    return codes


@triton.jit
def _swiglu(y, BLOCK_T: tl.constexpr, HALF: tl.constexpr):
    """silu(gate)·up [BLOCK_T, HALF] of y [BLOCK_T, 2·HALF], gate then up."""
    gate, up = tl.split(tl.permute(tl.reshape(y, [BLOCK_T, 2, HALF]), (0, 2, 1)))
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit(do_not_specialize=["assignments"])
def grouped_gemm_kernel(
    x, w, scales, token_group_scales, row_scale, token_scale, expert_scale, out, order, tiles, N, K, assignments,
    WEIGHT: tl.constexpr, SCALES: tl.constexpr, GROUP_STEPS: tl.constexpr, PER_TOKEN: tl.constexpr, ROW_SCALE: tl.constexpr,
    TOKEN_SCALE: tl.constexpr, EXPERT_SCALE: tl.constexpr, FACTOR: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr, STAGES: tl.constexpr, NATIVE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """See the file. x [R, K] codes; w int8 [E, N/64, K/128, 64, 64 | 128]; out [splits, assignments, N] in its own dtype.

    scales float32 [E, N/64, K/(128·GROUP_STEPS), 64] for `group`, [E, ⌈N/128⌉, K/128] for `block`, which has token_group_scales
    [R, K/128]; row_scale [E, N]; token_scale [R]; expert_scale [E]. PER_TOKEN 0: row s of x is the sorted assignment s; else its
    row is order[s] // PER_TOKEN, order int32 [assignments]: a row a token, or with 1 a row an assignment. GATED: a program takes
    BLOCK_N/2 gate rows and their up rows, and out is silu(gate)·up [assignments, N/2], with K not split.
    """
    after_previous(OVERLAP)
    n_block, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    expert = tl.load(tiles + tile * 3).to(tl.int64)
    if expert < 0:
        return
    first, count = tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    t, i = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_N)
    inside = t < count
    row = tl.where(inside, first + t, first)
    if PER_TOKEN:
        row = tl.load(order + row) // PER_TOKEN
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    if GATED:
        n = n_block * WIDTH + i % WIDTH + (i // WIDTH) * (N // 2)
        second = n_block * WIDTH + N // 2
    else:
        n = n_block * BLOCK_N + i
        second = n_block * BLOCK_N + BLOCK_N // 2
    BYTES: tl.constexpr = 128 if WEIGHT == "e4m3" else 64
    b, k128 = tl.arange(0, BYTES), tl.arange(0, 128)
    steps = K // 128
    share = tl.cdiv(steps, tl.num_programs(2))
    begin = split * share
    end = tl.minimum(begin + share, steps)
    w_base = w + (expert * (N // 64) * steps + begin) * (64 * BYTES)
    w_off = (n // 64 * steps * 64 + n % 64)[:, None] * BYTES + b[None, :]
    x_base = x + begin * 128
    x_off = row[:, None] * K + k128[None, :]
    if SCALES == "group":
        groups = steps // GROUP_STEPS
        s_base = scales + (expert * (N // 64) * groups + begin // GROUP_STEPS) * 64
        s_off = n // 64 * groups * 64 + n % 64
    if SCALES == "block":
        # Each half of a program's rows lies in one block of 128: two numbers a step, where a vector would be one load a row.
        HALVES: tl.constexpr = GATED or BLOCK_N > 128
        low_at = scales + (expert * tl.cdiv(N, 128) + n_block * WIDTH // 128) * steps + begin
        high_at = scales + (expert * tl.cdiv(N, 128) + second // 128) * steps + begin
        a_at = token_group_scales + row * steps + begin
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.int32 if WEIGHT == "int4_int8" else tl.float32)
    for k in tl.range(begin, end, num_stages=STAGES):
        codes, xt = operand(tl.load(w_base + w_off), WEIGHT, NATIVE), tl.trans(tl.load(x_base + x_off))
        if WEIGHT == "int4_int8":
            acc = tl.dot(codes, xt, acc, out_dtype=tl.int32)
        else:
            partial = tl.dot(codes, xt)
            if SCALES == "group":
                acc += partial * tl.load(s_base + s_off)[:, None]
                if GROUP_STEPS == 1:
                    s_base += 64
                else:
                    s_base += tl.where((k + 1) % GROUP_STEPS == 0, 64, 0)
            elif SCALES == "block":
                if HALVES:
                    s = tl.where(i < BLOCK_N // 2, tl.load(low_at), tl.load(high_at))
                    acc += partial * (s[:, None] * tl.load(a_at)[None, :])
                else:
                    acc += partial * (tl.load(low_at) * tl.load(a_at))[None, :]
                low_at += 1
                high_at += 1
                a_at += 1
            else:
                acc += partial
        w_base += 64 * BYTES
        x_base += 128
    y = tl.trans(acc).to(tl.float32) * FACTOR
    if ROW_SCALE:
        y *= tl.load(row_scale + expert * N + n)[None, :]
    if TOKEN_SCALE:
        y *= tl.load(token_scale + row)[:, None]
    if EXPERT_SCALE:
        y *= tl.load(expert_scale + expert)
    columns = n_block * WIDTH + tl.arange(0, WIDTH)
    if GATED:
        y = _swiglu(y, BLOCK_T, WIDTH)
        width = N // 2
    else:
        width = N
    at = (split.to(tl.int64) * assignments + first + t)[:, None] * width + columns[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside[:, None])
