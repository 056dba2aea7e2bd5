"""Lightning prefill on a GPU: the kernels of `lightning_chunks`, and which launch each shape gets.

Twin: `mxconv.runtime.lightning.lightning` (formulas there). Where heads × column blocks × sequences fill the GPU one pass over
q, k, v does it. Where they do not (a TP-8 rank has 8 heads) each sequence is cut into segments: a pass over k and v writes what
each segment leaves behind, and the output pass starts each segment from the decayed sum of those before it.

Accuracy, relative L2 against float64 over all heads of a layer (q, k, v behind SiLU, as in the model):

    outputs     bf16 ≤ 2e-3, of which its own rounding is 1.7e-3; fp16 ≤ 5e-4, its own rounding; float32 ≤ 2e-6
    states      float32 and fp16 ≤ 2e-6; bf16 by the Hopper kernel (head_dim 64 or 128, 64 rows or more) ≤ 1e-3, else ≤ 1.5e-3

In bf16 single heads, and TP ranks whose heads are alike, may be further off. Scores are rounded: a head that decays within a token
has outputs 2.4e-3 off, a rank of fast heads 2.3e-3. What decays by less than a bf16 step stays as it is: where a chunk, or a
segment, decays by a few thousandths in all, states may be 1.2e-3 off (by an emulation; 6.5e-4 were measured). The state, decay
factors and sums are float32. In 10⁶ tokens without any decay the matrix unit's truncating sums reach 1e-3.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mxconv.errors import UsageError
from mxconv.runtime.kernels.lightning_launches import LAUNCHES, MOST_ROWS, SCORE_REGISTERS, Launch, Launches

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD_DIM = 256
ALIGNED = (64, 96, 128, 256)
"""head_dims whose two-byte rows the kernels take as they are; others, and rows that do not lie on 16 elements, are taken as
float32: triton 3.6 multiplies a two-byte tile wrongly where it comes from registers and is transposed."""
WIDENED = (torch.float16,)
"""Dtypes that are taken as float32 always: states and scores, which are operands too, do not fit their range."""
LARGEST_COLUMN = 1 << 31
"""Columns of a tensor copy are int32."""
REACH = {torch.bfloat16: 24.0, torch.float16: 24.0, torch.float32: 40.0}
"""Tokens decayed by more than e^-reach before a segment starts are left out of its state."""
PRECISION = {torch.bfloat16: "tf32", torch.float16: "tf32", torch.float32: "tf32x3"}
"""How products of float32 operands are taken; two-byte operands do not ask."""
SHORTEST_SEGMENT = 256
"""Tokens; shorter segments would spend more on their states than on their outputs."""


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of `device`; 1 off CUDA (the interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def _copies_tiles(device: torch.device) -> bool:
    """Whether `device` is a Hopper GPU: its warpgroup products are its alone, to compile them for another ends the process."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@cache
def _shared_layout(rows: int, width: int, dtype: torch.dtype) -> Any:
    """How a tile [rows, width] lies in shared memory."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for([rows, width], getattr(gl, str(dtype).removeprefix("torch.")))


@dataclass(frozen=True, slots=True)
class Packed:
    """q, k, v and out as rows of tokens: sequences, tokens of each (without cu_seqlens), heads, head_dim."""

    sequences: int
    tokens: int
    rows: int
    heads: int
    size: int


def _row_strides(x: Tensor, name: str) -> tuple[int, int]:
    """(token stride, head stride) in elements of x [T, N, D] or [B, T, N, D]."""
    if x.stride(-1) != 1:
        raise UsageError(f"{name} must be contiguous along head_dim", expected="stride 1", got=x.stride(-1))
    if x.dim() == 4 and x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1):
        raise UsageError(f"sequences of {name} must follow one another", expected=x.shape[1] * x.stride(1), got=x.stride(0))
    return x.stride(-3), x.stride(-2)


def _packed(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> Packed:
    """Sizes of a call; UsageError where its parts do not fit together."""
    if q.dim() not in (3, 4) or k.shape != q.shape or v.shape != q.shape or not q.dtype == k.dtype == v.dtype:
        raise UsageError("q, k and v must have one shape [T, N, D] or [B, T, N, D] and one dtype", got=(q.shape, k.shape, v.shape))
    heads, size = q.shape[-2:]
    batch, tokens = (1, q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[1])
    if q.dtype not in DTYPES:
        raise UsageError("lightning kernels take", expected=" or ".join(map(str, DTYPES)), got=q.dtype)
    if size > LARGEST_HEAD_DIM:
        raise UsageError("head_dim is too large for the lightning kernels", expected=f"at most {LARGEST_HEAD_DIM}", got=size)
    if rates.shape != (heads,):
        raise UsageError("one rate for each head", expected=(heads,), got=tuple(rates.shape))
    if cu_seqlens is not None and (batch > 1 or mask is not None):
        raise UsageError("packed sequences are one row of tokens without a mask", got=f"{batch} rows, mask {mask is not None}")
    if mask is not None and (mask.dtype != torch.bool or mask.numel() != batch * tokens):
        raise UsageError("mask must be bool", expected=(batch, tokens), got=(tuple(mask.shape), mask.dtype))
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.device != q.device):
        raise UsageError("cu_seqlens must be int32 [S + 1] beside q", got=(cu_seqlens.shape, cu_seqlens.dtype, cu_seqlens.device))
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    if sequences > MOST_ROWS:
        raise UsageError("too many sequences for one call", expected=f"at most {MOST_ROWS}", got=sequences)
    return Packed(sequences, tokens, batch * tokens, heads, size)


def _checked_states(state: Tensor | None, slots: Tensor | None, packed: Packed) -> None:
    """UsageError unless `state` is float32, contiguous, and of one row for each sequence (or a pool of any, with slots)."""
    if state is None:
        if slots is not None:
            raise UsageError("slots need a pool of states")
        return
    want = (state.shape[0] if slots is not None else packed.sequences, packed.heads, packed.size, packed.size)
    if state.dtype != torch.float32 or tuple(state.shape) != want or not state.is_contiguous():
        raise UsageError("states must be contiguous float32", expected=want, got=(tuple(state.shape), state.dtype))
    if slots is not None and slots.shape != (packed.sequences,):
        raise UsageError("one slot for each sequence", expected=(packed.sequences,), got=tuple(slots.shape))


@dataclass(frozen=True, slots=True)
class Cut:
    """How each sequence is cut: programs of the output pass, and the segments, each with a state of its own, that one takes."""

    programs: int
    parts: int = 1

    @property
    def segments(self) -> int:
        """Segments of a sequence."""
        return self.programs * self.parts


def cut_of(packed: Packed, launches: Launches, device: torch.device) -> Cut:
    """As many programs of the output pass as fill the GPU once, and as many of the state pass where segments stay long enough."""

    def fitting(columns: int) -> int:
        alone = packed.sequences * packed.heads * -(-packed.size // columns)
        typical = packed.rows // max(1, packed.sequences)
        return max(1, min(_processors(device) // max(1, alone), typical // SHORTEST_SEGMENT))

    programs = fitting((launches.hopper or launches.outputs).columns)
    return Cut(programs, max(1, fitting(launches.states.columns) // programs) if programs > 1 else 1)


def _taken_as_they_are(*rows: Tensor) -> bool:
    """Whether the kernels take q, k and v in their dtype: two-byte tiles must reach shared memory by copies of 16 bytes."""
    if rows[0].element_size() != 2:
        return True
    strides = (stride for x in rows for stride in _row_strides(x, "q, k and v"))
    fits = rows[0].dtype not in WIDENED and rows[0].shape[-1] in ALIGNED
    return fits and not any(x.data_ptr() % 16 for x in rows) and not any(stride % 16 for stride in strides)


class _Call:
    """One call: what its two kernels share."""

    def __init__(
        self, packed: Packed, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rates: Tensor, cu_seqlens: Tensor | None,
        mask: Tensor | None, cut: Cut,
    ) -> None:  # fmt: skip
        self.packed, self.q, self.k, self.v, self.out, self.rates, self.cut = packed, q, k, v, out, rates, cut
        self.strides = _row_strides(q, "q"), _row_strides(k, "k"), _row_strides(v, "v"), _row_strides(out, "out")
        self.lengths = rates if cu_seqlens is None else cu_seqlens
        self.counts = rates if mask is None else mask.reshape(packed.sequences, packed.tokens).cumsum(1, dtype=torch.int32)
        self.padded = max(16, 1 << (packed.size - 1).bit_length())
        self.flags = {
            "VARLEN": cu_seqlens is not None, "MASKED": mask is not None, "PRECISION": PRECISION[q.dtype],
            "D": packed.size, "DP": self.padded,
        }  # fmt: skip

    def _grid(self, launch: Launch, segments: int) -> tuple[int, int, int]:
        columns = -(-self.packed.size // min(launch.columns, self.padded))
        return columns * segments, self.packed.heads, self.packed.sequences

    def _launch(self, kernel: Any, launch: Launch, programs: int, *arguments: object, **flags: object) -> None:
        kernel[self._grid(launch, programs)](
            *arguments, self.packed.tokens, self.packed.heads, self.cut.segments, **self.flags, **flags,
            BV=min(launch.columns, self.padded), C=launch.chunk, STAGES=launch.stages,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip

    def run_states(self, launch: Launch) -> Tensor:
        """What each segment leaves behind, where a program reads it: float32 [S, N, segments, D, D]."""
        from mxconv.runtime.kernels.lightning_chunks import lightning_states

        packed = self.packed
        shape = (packed.sequences, packed.heads, self.cut.segments, packed.size, packed.size)
        local_states = torch.empty(shape, dtype=torch.float32, device=self.q.device)
        inputs = self.k, self.v, self.rates, self.lengths, self.counts, local_states
        before_last = self.cut.segments - self.cut.parts
        behind = REACH[self.q.dtype], *self.strides[1], *self.strides[2]
        self._launch(lightning_states, launch, before_last, *inputs, *behind, PARTS=self.cut.parts)
        return local_states

    def run_outputs(
        self, launches: Launches, local_states: Tensor | None, state: Tensor | None, final: Tensor, slots: Tensor | None
    ) -> None:
        """Write `out` and `final`, by the Hopper kernel where its conditions are met."""
        tensors, nothing = (self.q, self.k, self.v, self.out), self.rates  # `nothing` is never read: its flag is off
        rows = self._hopper_rows(launches.hopper)
        flags = {"STARTED": state is not None, "POOLED": slots is not None, "SEGMENTED": self.cut.programs > 1}
        parts = self.cut.parts
        behind = (
            nothing if state is None else state, final, nothing if slots is None else slots,
            nothing if local_states is None else local_states, REACH[self.q.dtype], *(n for pair in self.strides for n in pair),
        )  # fmt: skip
        if rows is not None and launches.hopper is not None:
            from mxconv.runtime.kernels.lightning_hopper import hopper_outputs

            hopper_outputs[self._grid(launches.hopper, self.cut.programs)](
                *tensors, *rows, self.rates, self.lengths, self.counts, *behind,
                self.packed.tokens, self.packed.heads, self.cut.segments,
                D=self.packed.size, BV=launches.hopper.columns, C=launches.hopper.chunk, STAGES=launches.hopper.stages, PARTS=parts,
                **{name: self.flags[name] for name in ("VARLEN", "MASKED")}, **flags,
                SCORE_REGISTERS=SCORE_REGISTERS, num_warps=launches.hopper.warps,
            )  # fmt: skip
            return
        from mxconv.runtime.kernels.lightning_chunks import lightning_outputs

        inputs = *tensors, self.rates, self.lengths, self.counts
        self._launch(lightning_outputs, launches.outputs, self.cut.programs, *inputs, *behind, PARTS=parts, **flags)

    def _hopper_rows(self, launch: Launch | None) -> tuple[Any, ...] | None:
        """Tensor descriptors of q, k, v and out as [rows, width], or None where the Hopper kernel cannot take this call."""
        packed, tensors = self.packed, (self.q, self.k, self.v, self.out)
        if launch is None or not _copies_tiles(self.q.device) or self.q.dtype != torch.bfloat16 or launch.stages < 2:
            return None
        if packed.size not in (64, 128) or packed.rows < launch.chunk:
            return None
        if any(x.data_ptr() % 16 or pair[0] % 8 or pair[1] % 8 for x, pair in zip(tensors, self.strides, strict=True)):
            return None
        if any(packed.heads * pair[1] + packed.size >= LARGEST_COLUMN for pair in self.strides):
            return None
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        widths = (packed.size, packed.size, launch.columns, launch.columns)
        return tuple(
            TensorDescriptor(
                x, [packed.rows, (packed.heads - 1) * pair[1] + packed.size], [pair[0], 1], [launch.chunk, width],
                _shared_layout(launch.chunk, width, x.dtype),
            )
            for x, pair, width in zip(tensors, self.strides, widths, strict=True)
        )  # fmt: skip


def lightning_prefill(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None, *,
    slots: Tensor | None = None, mask: Tensor | None = None, out: Tensor | None = None,
    launches: Launches | None = None, cut: Cut | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, states behind the last tokens) of whole sequences; out has the shape and dtype of q.

    q, k, v: [T, N, D] (one sequence, or several packed one behind the other with `cu_seqlens` int32 [S + 1]) or [B, T, N, D];
    bfloat16, float16 or float32; any token and head strides, D contiguous and at most 256, so that they may be views of a fused
    projection. rates: s ≥ 0 of each head, float32 or float64 [N]. state: float32 [S, N, D, D] (k axis, v axis) before the first
    tokens, not changed; None means zeros. With `slots` int [S], `state` is instead a pool [slots, N, D, D] whose rows are read,
    updated in place, and returned as the pool; slot -1 is a padding sequence: outputs 0, no state touched. Two sequences with
    one slot are the caller's error. mask: bool [B, T], False where a token is padding: output 0, nothing added or decayed.
    `launches` and `cut` override the measured ones. fp16, and bf16 rows that `ALIGNED` or 16 elements rule out, are copied to
    float32. Rows of `out` that cu_seqlens does not cover are not written.

    Nothing here waits for the GPU: how a batch is cut into segments is decided by the mean length of its sequences. Raises
    UsageError for shapes and dtypes that do not fit.
    """
    packed = _packed(q, k, v, rates, cu_seqlens, mask)
    _checked_states(state, slots, packed)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if out.shape != q.shape or out.dtype != q.dtype:
        raise UsageError("out must be like q", expected=(tuple(q.shape), q.dtype), got=(tuple(out.shape), out.dtype))
    if slots is None or state is None:
        final = q.new_empty((packed.sequences, packed.heads, packed.size, packed.size), dtype=torch.float32)
    else:
        final = state
    if packed.sequences == 0 or packed.heads == 0:
        return out, final
    if not _taken_as_they_are(q, k, v):
        wide = q.float(), k.float(), v.float()
        result, final = lightning_prefill(*wide, rates, state, cu_seqlens, slots=slots, mask=mask, cut=cut)
        return out.copy_(result), final
    launches = launches or LAUNCHES[max(64, 1 << (packed.size - 1).bit_length()), q.element_size() == 2]
    cut = cut or cut_of(packed, launches, q.device)
    call = _Call(packed, q, k, v, out, rates, cu_seqlens, mask, cut)
    if state is not None and slots is not None and cut.programs > 1:
        return out, _beside_the_pool(call, launches, state, slots)
    local_states = call.run_states(launches.states) if cut.programs > 1 else None
    call.run_outputs(launches, local_states, state, final, slots)
    return out, final


def _beside_the_pool(call: _Call, launches: Launches, pool: Tensor, slots: Tensor) -> Tensor:
    """The pool behind a call in segments, whose programs all read a sequence's state while one writes it: out of place.

    Without waiting for the GPU to say which slots are -1: those write what another sequence writes.
    """
    there = slots >= 0
    rows = slots.clamp(min=0).long()
    before = pool.index_select(0, rows)
    after = torch.empty_like(before)
    own = torch.where(there, torch.arange(len(slots), device=slots.device), -1)
    call.run_outputs(launches, call.run_states(launches.states), before, after, own)
    some = there.int().argmax(0, keepdim=True)
    repeated = torch.where(there[some, None, None, None], after[some], before[some])
    pool.index_copy_(0, torch.where(there, rows, rows[some]), torch.where(there[:, None, None, None], after, repeated))
    return pool
