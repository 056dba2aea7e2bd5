"""One worker's part of a GPU: a stream, pinned blocks that the source is read into in turn, a pinned buffer for outputs.

While a block travels and is encoded the next one is read and hashed; outputs travel back once a unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mxconv.errors import ResourceError
from mxconv.execute.rawbits import Raw
from mxconv.plan.pieces import BLOCK_BYTES

BLOCKS = 2
"""Pinned blocks of a lane: one is read into while the other travels."""
ALIGNMENT = 256
_PORTABLE = 1


class _Pinned:
    """Host memory that the device reads and writes by itself, of exactly the size that was asked for (torch's own rounds up)."""

    def __init__(self, size_bytes: int) -> None:
        self.memory = torch.empty(size_bytes, dtype=torch.uint8)
        self._pinned = _succeeds(torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), size_bytes, _PORTABLE))
        self.free = torch.cuda.Event()
        """Reached when nothing travels from or to it any more."""
        if not self._pinned:
            raise ResourceError(
                "the host memory for copies to the GPU cannot be pinned", got=f"{size_bytes} bytes", hint="lower --workers"
            )

    def close(self) -> None:
        """Let go of the memory."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())
            self._pinned = False


def _succeeds(status: Any) -> bool:
    return int(status) == 0


@contextmanager
def short_of_memory(device: torch.device) -> Iterator[None]:
    """A device that runs out of memory inside, the allocator's or the driver's own, is ResourceError (6)."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if "out of memory" not in str(error):
            raise
        raise ResourceError(
            "the GPU is out of memory", where=device, hint="lower --workers, or leave more of the GPU free"
        ) from None


def aligned_bytes(sizes: Iterable[int]) -> int:
    """Bytes of a buffer that holds outputs of these sizes one behind the other, each where `ALIGNMENT` allows."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


class Lane:
    """One worker's part of a GPU."""

    def __init__(self, device: torch.device, outputs_bytes: int = 0) -> None:
        """`outputs_bytes`: of the largest unit, so that memory is pinned once; what exceeds it is pinned when it comes."""
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._blocks: list[_Pinned] = []
        self._turn = 0
        self._outputs_bytes = outputs_bytes
        self._outputs: _Pinned | None = None

    @contextmanager
    def current(self) -> Iterator[None]:
        """Work inside goes to this lane's stream; a device out of memory is ResourceError."""
        with short_of_memory(self.device), torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield

    def room(self, size_bytes: int) -> Raw:
        """The next pinned block, as soon as what it held before has travelled."""
        self._turn = (self._turn + 1) % BLOCKS
        with torch.cuda.device(self.device):
            while len(self._blocks) < BLOCKS:
                self._blocks.append(_Pinned(BLOCK_BYTES))
            block = self._blocks[self._turn]
            block.free.synchronize()
            if block.memory.numel() < size_bytes:
                block.close()
                block = self._blocks[self._turn] = _Pinned(size_bytes)
        return block.memory[:size_bytes].numpy()

    def put(self, rows: Tensor) -> Tensor:
        """Rows [n, in] of the host on the device; without waiting where they lie in the block that `room` gave last."""
        if not self._lies_in_block(rows):
            staged = self.room(rows.numel() * rows.element_size())
            rows = torch.from_numpy(staged).view(rows.dtype).view(rows.shape).copy_(rows)
        there = torch.empty(rows.shape, dtype=rows.dtype, device=self.device)
        there.copy_(rows, non_blocking=True)
        self._blocks[self._turn].free.record(self.stream)
        return there

    def _lies_in_block(self, rows: Tensor) -> bool:
        if not self._blocks or not rows.is_contiguous():
            return False
        memory = self._blocks[self._turn].memory
        return memory.data_ptr() <= rows.data_ptr() < memory.data_ptr() + memory.numel()

    def fetch(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Copies on the host, in pinned memory that the next call writes again; waits for everything that was put on the lane."""
        sizes = [output.numel() * output.element_size() for output in outputs]
        starts = [aligned_bytes(sizes[:number]) for number in range(len(sizes))]
        total = aligned_bytes(sizes)
        if self._outputs is None or self._outputs.memory.numel() < total:
            if self._outputs is not None:
                self._outputs.close()
            self._outputs = _Pinned(max(total, self._outputs_bytes))
        found = []
        for output, start, size in zip(outputs, starts, sizes, strict=True):
            place = self._outputs.memory[start : start + size]
            found.append(place.view(output.dtype).view(output.shape))
            found[-1].copy_(output, non_blocking=True)
        self.stream.synchronize()
        return found

    def close(self) -> None:
        """Wait for the device and let go of the memory."""
        self.stream.synchronize()
        for block in (*self._blocks, *([self._outputs] if self._outputs else [])):
            block.close()
        self._blocks, self._outputs = [], None
