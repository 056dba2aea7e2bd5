"""How fast this device copies and multiplies, measured now: what every figure is a fraction of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

COPY_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Bytes a second read plus written by a copy; operations a second of a square matrix product by dtype name."""

    copy: float
    matmul: dict[str, float]

    def floor(self, moved_bytes: float, operations: dict[str, float]) -> float:
        """Seconds that no program takes less than: the longer of moving the bytes and of doing `operations` (dtype → number)."""
        return max(moved_bytes / self.copy, sum(number / self.matmul[dtype] for dtype, number in operations.items()))


def seconds_of(run: Callable[[], object], device: torch.device, *, repeats: int = 5, warmups: int = 1) -> float:
    """Median seconds of `run()` on `device`; on CUDA the device's own time, between events."""
    for _ in range(warmups):
        run()
    return statistics.median(_timed(run, device) for _ in range(repeats))


def _timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        begin.record()
        run()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure_ceilings(device: torch.device, dtype: torch.dtype, *, products: bool = True) -> Ceilings:
    """The ceilings for work in `dtype`, and in e4m3 where the device multiplies it; without `products` a copy's alone."""
    if not products:
        return Ceilings(copy=copy_rate(device), matmul={})
    matmul = {str(dtype).removeprefix("torch."): _matmul_rate(device, dtype)}
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        matmul["float8_e4m3fn"] = _matmul_rate(device, FP8)
    return Ceilings(copy=copy_rate(device), matmul=matmul)


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read plus written, of a copy too large for caches. Raises MemoryError where it finds no place."""
    try:
        source = torch.empty(COPY_BYTES[device.type] // 4, dtype=torch.int32, device=device).random_()
        target = torch.empty_like(source)
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error)) from None
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    one = torch.ones((), device=device)

    def multiply() -> Tensor:
        if dtype == FP8:
            return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)
        return a @ b.t()

    return 2 * size**3 / seconds_of(multiply, device)
