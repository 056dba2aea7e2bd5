"""One rank's experts of one layer on a GPU: weights repacked once at load, and the chain of kernels that applies them.

    sort the assignments, quantize x → grouped GEMM (up_gate), SwiGLU → rotate, quantize → grouped GEMM (down) → weighted sum

Every size is known from the shapes, nothing comes back to the host: a call can be captured in a CUDA graph. Its plain twin is
`runtime.linear` and `runtime.moe` with quantized activations; here products are summed in float32 (int32 for int8) per 128 inputs
and the hidden vector between the GEMMs stays in float32. Unquantized experts go through torch's grouped_mm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
import triton
from torch import Tensor

from mxconv.errors import UsageError
from mxconv.quantize.schemes import FP8_BLOCK, INT4_MAX, ActivationRule, Scheme
from mxconv.runtime.coded import Coded
from mxconv.runtime.kernels.moe_activation import combine, hidden_kernel
from mxconv.runtime.kernels.moe_dense import DenseExperts
from mxconv.runtime.kernels.moe_front import front_kernel
from mxconv.runtime.kernels.moe_gemm import grouped_gemm_kernel
from mxconv.runtime.kernels.moe_overlap import overlap_options
from mxconv.runtime.kernels.moe_pack import (
    ROWS,
    STEP,
    Kind,
    kind_of,
    pack_codes,
    pack_scale,
    tile_bytes,
    unpack_codes,
    unpack_scale,
)  # fmt: skip
from mxconv.runtime.kernels.moe_route import route
from mxconv.runtime.kernels.moe_sort import Sorted, empty_sorted, sort_arguments
from mxconv.runtime.kernels.moe_table import LARGEST_OFFSET, Launch, block_tokens, launch_of

__all__ = ["DenseExperts", "Matrix", "MoeExperts", "route"]

FACTORS: dict[Kind, float] = {"int4_e4m3": 512.0 / INT4_MAX, "int4_int8": 1.0 / (16 * INT4_MAX), "e4m3": 1.0}
"""What a product of codes must be multiplied by, beside the scales: int4 codes are q·2⁻⁹ or 16·q, and scales are of q/7."""
FEW_ROWS = 264
"""Two for each multiprocessor of an H200: up to here a row of activations gets a program of its own."""


class Matrix:
    """One projection of all experts, [out, in] each, repacked; experts are put in one at a time."""

    def __init__(self, scheme: Scheme, experts: int, n: int, k: int, device: torch.device) -> None:
        for size, unit, name in ((n, ROWS, "outputs"), (k, STEP, "inputs")):
            if size % unit:
                raise UsageError(f"{name} of an expert do not fit the kernel", expected=f"a multiple of {unit}", got=str(size))
        self.scheme, self.kind, self.n, self.k = scheme, kind_of(scheme), n, k
        self.codes = torch.empty(experts, n // ROWS, k // STEP, ROWS, tile_bytes(self.kind), dtype=torch.int8, device=device)
        group = scheme.group_size or STEP
        shape = {
            "group": (n // ROWS, k // group, ROWS), "block": (-(-n // FP8_BLOCK), k // FP8_BLOCK), "channel": (n,), "tensor": (1,)
        }  # fmt: skip
        self.scale = torch.empty(experts, *shape[scheme.granularity], device=device)
        self.stored = torch.ones(experts, device=device)
        self.expert_scale = torch.ones(experts, device=device)

    def put(self, expert: int, coded: Coded) -> None:
        """Repack one expert's projection."""
        coded = coded.to(self.codes.device)
        self.codes[expert] = pack_codes(coded.codes, self.kind)
        self.scale[expert] = pack_scale(coded.weight_scale, self.scheme)
        if coded.activation_scale is not None:
            rule = self.scheme.activation
            self.stored[expert : expert + 1] = coded.activation_scale
            x_scale = self.stored[expert] if rule.stored_divided else self.stored[expert] / rule.divisor
            self.expert_scale[expert] = x_scale * self.scale[expert, 0] if self.scheme.granularity == "tensor" else x_scale

    def get(self, expert: int) -> Coded:
        """What was put in, bit for bit."""
        activation = self.stored[expert : expert + 1].clone() if self.scheme.static else None
        scale = unpack_scale(self.scale[expert], self.scheme)
        return Coded(codes=unpack_codes(self.codes[expert], self.kind), weight_scale=scale, activation_scale=activation)

    def multiply(
        self, x: Tensor, x_scale: Tensor, order: Tensor, per_token: int, tiles: Tensor, launch: Launch, out: Tensor
    ) -> None:
        """out [splits, A, n] (or [A, n/2] gated) = the codes x times the weights of each sorted assignment's expert.

        `per_token` 0: x has a row a sorted assignment; else a row a token, which `order` [A] names as order // per_token.
        """
        scheme, rule = self.scheme, self.scheme.activation
        scales = "flat" if scheme.granularity in ("channel", "tensor") else scheme.granularity
        rows = launch.block_n // 2 if launch.gated else launch.block_n
        grid = ((self.n // 2 if launch.gated else self.n) // rows, tiles.numel() // 3, launch.splits)
        grouped_gemm_kernel[grid](
            x, self.codes, self.scale, x_scale, self.scale, x_scale, self.expert_scale, out, order, tiles,
            self.n, self.k, len(order),
            WEIGHT=self.kind, SCALES=scales, GROUP_STEPS=(scheme.group_size or STEP) // STEP, PER_TOKEN=per_token,
            ROW_SCALE=scheme.granularity == "channel", TOKEN_SCALE=rule.scale == "token", EXPERT_SCALE=scheme.static,
            FACTOR=FACTORS[self.kind], GATED=launch.gated, BLOCK_N=launch.block_n, BLOCK_T=launch.block_t, STAGES=launch.stages,
            NATIVE=not triton.knobs.runtime.interpret, num_warps=launch.warps, **overlap_options(x.device),
        )  # fmt: skip


def _rule_constants(rule: ActivationRule, rotation: int, rint: bool) -> dict[str, object]:
    return {
        "RULE": rule.scale, "DIVISOR": float(rule.divisor), "LIMIT": float(rule.code_max), "INT8": rule.code == "int8",
        "RINT": rint, "STORED_DIVIDED": rule.stored_divided, "STAGES": max(rotation.bit_length() - 1, 0),
        "NATIVE": not triton.knobs.runtime.interpret,
    }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """How rows are cut into programs that quantize: `programs` of `rows` rows by `columns`, `pieces` of them a row."""

    rows: int
    columns: int
    pieces: int
    programs: int
    warps: int

    @property
    def constants(self) -> dict[str, int]:
        """The kernels' names of them."""
        return {"ROWS": self.rows, "COLUMNS": self.columns, "PIECES": self.pieces}


def _blocks(rule: ActivationRule, rows: int, width: int, rotation: int) -> Blocks:
    """Few rows: many threads a row, which is read once. Many: rows are taken together, in columns that waste no lane."""
    together = 1
    if rows <= FEW_ROWS:
        columns, warps = (triton.next_power_of_2(width), 16) if rule.scale == "token" else (max(1024, rotation), 4)
    else:
        columns = next(size for size in (2048, 1024, 512, 256, 128) if width % size == 0 or size == 128)
        columns = max(columns, rotation)
        together = max(1, 512 // columns)
        warps = together * columns // 512  # 16 elements a thread: most of the butterfly stays in its registers
    pieces, blocks = -(-width // columns), -(-rows // together)
    programs = blocks if rule.scale == "token" else blocks * pieces
    return Blocks(rows=together, columns=columns, pieces=pieces, programs=programs, warps=warps)


class MoeExperts:
    """The quantized experts of one layer that one rank holds; `pack` makes it of all experts, `put` of one at a time."""

    def __init__(self, scheme: Scheme, experts: int, hidden: int, intermediate: int, device: torch.device) -> None:
        self.scheme, self.experts, self.hidden, self.intermediate = scheme, experts, hidden, intermediate
        self.up_gate = Matrix(scheme, experts, 2 * intermediate, hidden, device)
        self.down = Matrix(scheme, experts, hidden, intermediate, device)

    @overload
    @classmethod
    def pack(cls, scheme: Scheme, up_gate: Sequence[Coded], down: Sequence[Coded], device: torch.device) -> MoeExperts: ...

    @overload
    @classmethod
    def pack(cls, scheme: None, up_gate: Sequence[Tensor], down: Sequence[Tensor], device: torch.device) -> DenseExperts: ...

    @classmethod
    def pack(cls, scheme: Scheme | None, up_gate: Sequence[Any], down: Sequence[Any], device: torch.device) -> Any:
        """All experts at once: up_gate [2I, H] (gate then up), down [H, I], as `Weights.coded` or `dense` gives them."""
        experts: MoeExperts | DenseExperts
        if scheme is None:
            hidden, intermediate = down[0].shape
            experts = DenseExperts(len(down), hidden, intermediate, down[0].dtype, device)
        else:
            hidden, intermediate = down[0].codes.shape
            experts = cls(scheme, len(down), hidden, intermediate, device)
        for expert, pair in enumerate(zip(up_gate, down, strict=True)):
            experts.put(expert, *pair)
        return experts

    def put(self, expert: int, up_gate: Coded, down: Coded) -> None:
        """Repack one expert."""
        self.up_gate.put(expert, up_gate)
        self.down.put(expert, down)

    def unpack(self, expert: int) -> tuple[Coded, Coded]:
        """(up_gate, down) as they were put in, bit for bit."""
        return self.up_gate.get(expert), self.down.get(expert)

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Σ_j weights[t, j] · down(silu(gate x) · (up x)) of the experts chosen[t, j]; activations quantized as the scheme says.

        x bf16, fp16 or fp32 [T, H], contiguous; chosen int32 or int64 [T, k], -1 for none; weights float32 [T, k] → [T, H] like x.
        """
        if not len(x):
            return torch.zeros_like(x)
        most = LARGEST_OFFSET // max(self.hidden, 2 * self.intermediate) // chosen.shape[1]
        if len(x) > most:
            parts = zip(x.split(most), chosen.split(most), weights.split(most), strict=True)
            return torch.cat([self(*part) for part in parts])
        chosen, weights, kind = chosen.contiguous(), weights.contiguous(), self.up_gate.kind
        assignments, per_token = chosen.numel(), chosen.shape[1]
        ordered, codes, scales = self.front(x.contiguous(), chosen, block_tokens(kind, assignments, self.experts))
        hidden = self.multiply(self.up_gate, codes, scales, 1 if self.scheme.static else per_token, ordered, x.dtype)
        codes, scales = self.quantize_hidden(hidden, chosen, ordered)
        partial = self.multiply(self.down, codes, scales, 0, ordered, x.dtype)
        return combine(partial, ordered.position, weights, x.dtype)

    def multiply(
        self, matrix: Matrix, codes: Tensor, scales: Tensor, per_token: int, ordered: Sorted, dtype: torch.dtype
    ) -> Tensor:
        """One grouped GEMM. up_gate: float32 [A, I], gated, or partial sums [splits, A, 2I] where K is split; down: partial sums
        [splits, A, H], float32 where K is split, else `dtype`."""
        assignments, up = len(ordered.order), matrix is self.up_gate
        launch = launch_of(matrix.kind, assignments, self.experts, matrix.n, matrix.k, gate=up)
        shape = (assignments, matrix.n // 2) if launch.gated else (launch.splits, assignments, matrix.n)
        out = torch.empty(shape, dtype=torch.float32 if up or launch.splits > 1 else dtype, device=codes.device)
        matrix.multiply(codes, scales, ordered.order, per_token, ordered.tiles, launch, out)
        return out

    def _outputs(self, rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        rule = self.scheme.activation
        codes = torch.empty(rows, width, dtype=torch.int8 if rule.code == "int8" else torch.float8_e4m3fn, device=device)
        shape = (rows, width // FP8_BLOCK) if rule.scale == "token_group" else (rows,)
        return codes, torch.empty(shape if not self.scheme.static else (1,), device=device)

    def front(self, x: Tensor, chosen: Tensor, block_t: int) -> tuple[Sorted, Tensor, Tensor]:
        """The sorted assignments; codes and scales of x [T, H]: a row a token, or an assignment where experts store their own."""
        rule, rotation, per_token = self.scheme.activation, self.scheme.rotation["up_gate_proj"], chosen.shape[1]
        rows = chosen.numel() if self.scheme.static else len(x)
        codes, scales = self._outputs(rows, self.hidden, x.device)
        ordered = empty_sorted(chosen.numel(), self.experts, block_t, x.device)
        arguments, constants = sort_arguments(chosen, ordered, self.experts)
        blocks = _blocks(rule, rows, self.hidden, rotation)
        front_kernel[(self.experts + 1 + blocks.programs,)](
            *arguments, x, codes, scales, self.up_gate.stored, rows, self.hidden, BLOCK_T=block_t, PER_TOKEN=per_token, **constants,
            **blocks.constants, **_rule_constants(rule, rotation, False), **overlap_options(x.device), num_warps=blocks.warps,
        )  # fmt: skip
        return ordered, codes, scales

    def quantize_hidden(self, hidden: Tensor, chosen: Tensor, ordered: Sorted) -> tuple[Tensor, Tensor]:
        """The first GEMM's output, gated [A, I] or as partial sums [splits, A, 2I], rotated: the second one's codes and scales."""
        rule, rotation = self.scheme.activation, self.scheme.rotation["down_proj"]
        splits, rows = (0, len(hidden)) if hidden.dim() == 2 else hidden.shape[:2]
        codes, scales = self._outputs(rows, self.intermediate, hidden.device)
        blocks = _blocks(rule, rows, self.intermediate, rotation)
        pieces = 1 if rule.scale == "token" else blocks.pieces
        hidden_kernel[(blocks.programs // pieces, pieces)](
            hidden, ordered.order, chosen, codes, scales, self.down.stored, self.intermediate, rows, EXPERTS=self.experts,
            SPLITS=splits, **blocks.constants, **_rule_constants(rule, rotation, rule.rint_down_input),
            **overlap_options(codes.device), num_warps=blocks.warps,
        )  # fmt: skip
        return codes, scales
