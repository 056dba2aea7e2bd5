"""The encoder for weights on a GPU: the twin of fast.ProjectionEncoder, its kernels held to reference.py bit for bit.

Nothing here waits for the device but `trusted` and `encode`: calls put work on the current stream. What a kernel cannot vouch for
(NaN, infinity, a rotation that overflows, scales so extreme that its division is not exact) it flags on the device; the caller
asks at the end and lets another path decide.
"""

from __future__ import annotations

import os
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxconv.errors import UsageError
from mxconv.quantize import reference
from mxconv.quantize.kernels.gpu_absmax import absmax_kernel
from mxconv.quantize.kernels.gpu_fp8 import fp8_block_kernel, fp8_tensor_kernel
from mxconv.quantize.kernels.gpu_int4 import int4_kernel
from mxconv.quantize.packing import store_codes, stored_codes_shape
from mxconv.quantize.rotation import divide, rotation_divisor
from mxconv.quantize.schemes import FP8_BLOCK, Scheme

# A kernel is compiled at its first launch: by one thread, while others that want it wait.
_LAUNCHING = threading.Lock()
# Columns that any granularity but a smaller group shares a scale within, and that a rotation of 32 divides.
CHUNK = 128
LARGEST_SPAN = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Constants of a kernel (gpu_tiles.py): `rows` fours of rows, `lanes` threads a row, `steps` runs of 8·lanes columns."""

    rows: int
    lanes: int
    steps: int
    registers: int | None = None
    """At most so many a thread, so that more programs fit a multiprocessor."""

    @property
    def columns(self) -> int:
        """Columns of a program."""
        return 8 * self.lanes * self.steps

    @property
    def launch(self) -> dict[str, Any]:
        """Warps and registers."""
        return {"num_warps": max(1, self.rows * self.lanes // 32), "maxnreg": self.registers}


# By columns of a program. 128, rotated 1024, BLOCK, TENSOR and ABSMAX of 128 are the fastest of a sweep on an H200
# (benchmarks/quantize_gpu.py --sweep, 2026-11-24); the others follow them and were not compared.
INT4 = {
    128: Shape(rows=8, lanes=4, steps=4),
    256: Shape(rows=8, lanes=8, steps=4),
    512: Shape(rows=8, lanes=16, steps=4),
    1024: Shape(rows=8, lanes=16, steps=8),
}
INT4_ROTATED = {**INT4, 1024: Shape(rows=8, lanes=16, steps=8, registers=128)}
BLOCK = Shape(rows=FP8_BLOCK // 4, lanes=4, steps=4)
TENSOR = Shape(rows=16, lanes=4, steps=2)
# Here `rows` are single rows, not fours.
ABSMAX = {
    128: Shape(rows=64, lanes=4, steps=4),
    256: Shape(rows=32, lanes=8, steps=4),
    512: Shape(rows=16, lanes=16, steps=4),
    1024: Shape(rows=8, lanes=16, steps=8),
}


def interpreted() -> bool:
    """Kernels run in Triton's interpreter, on the CPU, where no fused multiply-add and no assembly exists."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class GpuEncoder:
    """Encodes one projection of one expert from row blocks on `device`.

    rows_multiple, passes: as of `ProjectionEncoder`. With passes = 2 `observe` every block before the first `encode_into`.
    """

    def __init__(self, scheme: Scheme, projection: str, out_features: int, in_features: int, device: torch.device) -> None:
        """Raises UsageError when the matrix [out_features, in_features] does not divide into groups, blocks or rotations."""
        reference.check_shape(scheme, projection, out_features, in_features)
        self.scheme, self.projection, self.device = scheme, projection, device
        self.in_features = in_features
        self.rows_multiple = FP8_BLOCK if scheme.granularity == "block" else 1
        self.passes = 2 if scheme.granularity == "tensor" else 1
        self._divisor = rotation_divisor(scheme, projection)
        self._inverse = float(divide(torch.ones(1), self._divisor))
        self._remainder = 1 / self._divisor - self._inverse
        self._log2 = max(scheme.rotation[projection], 1).bit_length() - 1
        self._flags = torch.zeros(2, dtype=torch.int32, device=device)
        self._absmax = torch.zeros(1, dtype=torch.int32, device=device)
        self._group = reference.tile_shape(scheme, out_features, in_features)[1]

    def observe(self, rows: Tensor) -> None:
        """Take rows [n, in] into the absmax that the scale of the whole tensor is made of."""
        if self.passes != 2:
            raise UsageError(f"{self.scheme.name} needs no pass over the weights before encoding")
        self._check_rows(rows)
        self._find_absmax(rows.contiguous(), self._absmax, whole=True)

    def encode_into(self, rows: Tensor, codes_out: Tensor, scale_out: Tensor) -> None:
        """Codes and scales of rows [n, in], on the device, into views of the whole outputs there.

        rows: bf16, f16 or f32, n a multiple of `rows_multiple`. codes_out: int8 [in/2, n] (int4) or [in, n] (e4m3), columns of the
        stored tensor; scale_out: float32 in canonical orientation (`reference.scale_shape`). Raises UsageError for other shapes.
        """
        self._check_rows(rows)
        if tuple(codes_out.shape) != stored_codes_shape(self.scheme, *rows.shape) or codes_out.stride(1) != 1:
            raise UsageError("the output does not fit the rows", got=list(codes_out.shape))
        rows = rows.contiguous()
        scale = scale_out if scale_out.is_contiguous() else torch.empty_like(scale_out, memory_format=torch.contiguous_format)
        {"int4": self._int4, "e4m3": self._block if self.passes == 1 else self._tensor}[self.scheme.weight](rows, codes_out, scale)
        if scale is not scale_out:
            scale_out.copy_(scale)

    def trusted(self) -> bool:
        """Wait for the device: whether everything that was encoded so far has the reference's bits."""
        return not bool(self._flags.any())

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes in stored orientation and canonical scales of a whole matrix on the device.

        Raises NumericError for NaN, infinity, or a rotation that overflows; extreme scales are left to the reference.
        """
        n = rows.shape[0]
        codes = torch.empty(stored_codes_shape(self.scheme, n, self.in_features), dtype=torch.int8, device=rows.device)
        scale = torch.empty(reference.scale_shape(self.scheme, n, self.in_features), device=rows.device)
        if self.passes == 2:
            self._absmax.zero_()
            self.observe(rows)
        self._flags.zero_()
        self.encode_into(rows, codes, scale)
        if self.trusted():
            return codes, scale
        coded = reference.encode(rows, self.scheme, self.projection)
        return store_codes(coded.codes, self.scheme), coded.scale

    def _int4(self, rows: Tensor, codes: Tensor, scale: Tensor) -> None:
        n, width = rows.shape
        span = max(self._group, 1 << self._log2)
        given = bool(span & (span - 1)) or span > LARGEST_SPAN or self._group < CHUNK or width % span != 0
        if given:
            span = max(CHUNK, 1 << self._log2)
        shape = (INT4_ROTATED if self._log2 else INT4)[span]
        groups = width // self._group
        absmax = torch.zeros((n, groups), dtype=torch.int32, device=rows.device) if given else self._absmax
        if given:
            self._find_absmax(rows, absmax, whole=False)
        self._launch(
            int4_kernel, -(-n // (4 * shape.rows)) * -(-width // span), shape,
            _readable(rows), _words(codes, n), scale, absmax.view(torch.float32), self._flags, n, width, self._group, groups,
            codes.stride(0), self._divisor, self._inverse, self._remainder,
            LOG2=self._log2, CHUNK=CHUNK if given else self._group, R=shape.rows, L=shape.lanes, STEPS=shape.steps,
            WORDS=_fits_words(codes, n), GIVEN=given, MASKED=width % span != 0, EXACT=interpreted(),
        )  # fmt: skip

    def _block(self, rows: Tensor, codes: Tensor, scale: Tensor) -> None:
        n, width = rows.shape
        self._launch(
            fp8_block_kernel, n // FP8_BLOCK * (width // FP8_BLOCK), BLOCK,
            _readable(rows), _words(codes, n), scale, self._flags, n, width, codes.stride(0),
            BLOCK=FP8_BLOCK, L=BLOCK.lanes, WORDS=_fits_words(codes, n),
            EXACT=interpreted(), ASSEMBLY=not interpreted(),
        )  # fmt: skip

    def _tensor(self, rows: Tensor, codes: Tensor, scale: Tensor) -> None:
        n, width = rows.shape
        absmax = self._absmax.view(torch.float32)
        self._launch(
            fp8_tensor_kernel, -(-n // (4 * TENSOR.rows)) * -(-width // TENSOR.columns), TENSOR,
            _readable(rows), _words(codes, n), absmax, self._flags, n, width, codes.stride(0),
            self._divisor, self._inverse,
            LOG2=self._log2, R=TENSOR.rows, L=TENSOR.lanes, STEPS=TENSOR.steps, WORDS=_fits_words(codes, n),
            MASKED=width % TENSOR.columns != 0, EXACT=interpreted(), ASSEMBLY=not interpreted(),
        )  # fmt: skip
        scale.copy_(reference.unit_scale(divide(absmax, self._divisor), self.scheme))

    def _find_absmax(self, rows: Tensor, absmax: Tensor, whole: bool) -> None:
        n, width = rows.shape
        shape = ABSMAX[max(CHUNK, 1 << self._log2)]
        self._launch(
            absmax_kernel, -(-n // shape.rows) * -(-width // shape.columns), shape,
            _readable(rows), absmax, n, width, self._group, width // self._group,
            LOG2=self._log2, CHUNK=CHUNK, R=shape.rows, L=shape.lanes, STEPS=shape.steps,
            MASKED=width % shape.columns != 0, WHOLE=whole,
        )  # fmt: skip

    def _launch(self, kernel: Any, programs: int, shape: Shape, *arguments: Any, **constants: Any) -> None:
        """Products and sums must round apart: no fused multiply-add but those that a kernel asks for."""
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with _LAUNCHING, on_device:
            kernel[(programs,)](*arguments, **constants, **shape.launch, enable_fp_fusion=False)

    def _check_rows(self, rows: Tensor) -> None:
        if rows.dim() != 2 or rows.shape[1] != self.in_features or rows.shape[0] % self.rows_multiple or not rows.shape[0]:
            expected = f"[multiple of {self.rows_multiple}, {self.in_features}]"
            raise UsageError("rows do not fit this encoder", expected=expected, got=list(rows.shape))
        if rows.dtype not in reference.SOURCE_DTYPES:
            raise UsageError("weights to quantize are bf16, f16 or f32", got=rows.dtype)


def _readable(rows: Tensor) -> Tensor:
    """rows as `gpu_tiles.load_run` takes them."""
    if rows.dtype != torch.bfloat16:
        return rows
    return (rows if rows.data_ptr() % 4 == 0 else rows.clone()).view(torch.int32)


def _fits_words(codes: Tensor, n: int) -> bool:
    return n % 4 == 0 and codes.stride(0) % 4 == 0 and codes.data_ptr() % 4 == 0


def _words(codes: Tensor, n: int) -> Tensor:
    """The output as the kernels take it: only its address and element type matter."""
    return codes.view(torch.int32) if _fits_words(codes, n) else codes
