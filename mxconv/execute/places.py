"""Where the weights of a unit are encoded: on the CPU as they are read, or on a GPU beside the reading of what follows.

A GPU is shared by all workers, a lane (lanes.py) each; while one worker hashes and writes what came back others read and encode.
On the host a lane holds no more than the plan counts for a unit; on the device what `device_bytes` says.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mxconv.dispatch import open_device, triton_wanted
from mxconv.errors import ResourceError
from mxconv.execute.lanes import Lane, aligned_bytes, short_of_memory
from mxconv.execute.rawbits import Raw
from mxconv.plan.pieces import BLOCK_BYTES
from mxconv.plan.values import Plan, Unit
from mxconv.quantize.fast import ProjectionEncoder
from mxconv.quantize.plain import PlainEncoder
from mxconv.quantize.reference import tensor_scale
from mxconv.quantize.schemes import Scheme

DEVICE_BLOCKS = 16
"""Blocks that fit a lane beside its outputs: those that travel, and what the reference makes of one where there are no kernels."""
EVEN_ROWS = 128
"""Blocks of a multiple of it keep every access of the kernels whole words, and need one compiled kernel instead of many."""
DEVICE_SHARE = 0.9
"""Of the device's free memory that lanes may take; the allocator leaves gaps."""


class Encoder(Protocol):
    """What gpu.GpuEncoder and plain.PlainEncoder have in common."""

    rows_multiple: int
    passes: int

    def observe(self, rows: Tensor) -> None: ...
    def encode_into(self, rows: Tensor, codes_out: Tensor, scale_out: Tensor) -> None: ...
    def trusted(self) -> bool: ...


class Place(Protocol):
    """One unit's encoding, wherever it happens."""

    rows_multiple: int
    passes: int
    keeps: bool
    """What `put` gave stays, so that a second pass reads nothing."""
    room: Callable[[int], Raw] | None
    """Where the next block is to be read to (uint8 of so many bytes), if not into fresh memory."""

    def put(self, rows: Tensor) -> Tensor:
        """Rows [n, in] as the next two calls take them."""

    def observe(self, rows: Tensor) -> None:
        """The first of two passes."""

    def encode_into(self, rows: Tensor, codes_out: Tensor, scale_out: Tensor) -> None:
        """Into views of what `empty` gave."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for an output."""

    def fetch(self, outputs: Sequence[Tensor]) -> list[Tensor] | None:
        """The outputs on the host, until this thread's next unit; None when the CPU must do the unit again and judge it."""


class Host:
    """Encoding on the CPU, row block by row block as they are read."""

    keeps = False
    room: Callable[[int], Raw] | None = None

    def __init__(self, scheme: Scheme, projection: str, shape: Sequence[int]) -> None:
        out_features, in_features = shape
        self._encoder = ProjectionEncoder(scheme, projection, out_features, in_features)
        self.rows_multiple, self.passes = self._encoder.rows_multiple, self._encoder.passes
        self._absmax = 0.0

    def put(self, rows: Tensor) -> Tensor:
        """The rows themselves."""
        return rows

    def observe(self, rows: Tensor) -> None:
        """See `ProjectionEncoder.observe`."""
        self._absmax = max(self._absmax, self._encoder.observe(rows, self._absmax))

    def encode_into(self, rows: Tensor, codes_out: Tensor, scale_out: Tensor) -> None:
        """See `ProjectionEncoder.encode_into`."""
        self._encoder.encode_into(rows, codes_out, scale_out, tensor_scale(self._absmax) if self.passes == 2 else None)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Fresh memory."""
        return torch.empty(tuple(shape), dtype=dtype)

    def fetch(self, outputs: Sequence[Tensor]) -> list[Tensor] | None:
        """The outputs themselves: what cannot be encoded has raised already."""
        return list(outputs)


class OnDevice:
    """Encoding on a GPU through this thread's lane."""

    def __init__(self, lane: Lane, encoder: Encoder) -> None:
        self._lane, self._encoder = lane, encoder
        self.rows_multiple, self.passes = math.lcm(encoder.rows_multiple, EVEN_ROWS), encoder.passes
        self.keeps = encoder.passes == 2
        self.room: Callable[[int], Raw] | None = lane.room

    def put(self, rows: Tensor) -> Tensor:
        """Rows [n, in] on the device."""
        with self._lane.current():
            return self._lane.put(rows)

    def observe(self, rows: Tensor) -> None:
        """Put the first pass over these rows on the lane."""
        with self._lane.current():
            self._encoder.observe(rows)

    def encode_into(self, rows: Tensor, codes_out: Tensor, scale_out: Tensor) -> None:
        """Put the encoding of these rows on the lane."""
        with self._lane.current():
            self._encoder.encode_into(rows, codes_out, scale_out)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory on the device."""
        with self._lane.current():
            return torch.empty(tuple(shape), dtype=dtype, device=self._lane.device)

    def fetch(self, outputs: Sequence[Tensor]) -> list[Tensor] | None:
        """The outputs in pinned memory, or None when the encoder does not vouch for them."""
        with self._lane.current():
            found = self._lane.fetch(outputs)
            return found if self._encoder.trusted() else None


class Places:
    """Gives every unit its place: `device` is cpu, cuda or cuda:N. One object a run; a context manager.

    Raises UsageError when this machine has no such device.
    """

    def __init__(self, device: str) -> None:
        self.device = open_device(device)
        if not self.on_device:
            triton_wanted("quantize", self.device, torch.bfloat16)  # refuses MXCONV_KERNELS=triton: the CPU has no kernels
        self._own = threading.local()
        self._lanes: list[Lane] = []
        self._outputs_bytes = 0

    def __enter__(self) -> Places:
        return self

    def __exit__(self, *error: object) -> None:
        for lane in self._lanes:
            lane.close()
        self._lanes = []

    @property
    def on_device(self) -> bool:
        """Units are encoded elsewhere than on the CPU."""
        return self.device.type != "cpu"

    def workers(self, plan: Plan, wanted: int) -> int:
        """So many of `wanted` workers as the device's free memory holds. Raises ResourceError (6) when not even one does."""
        scheme = plan.request.scheme
        if not self.on_device or scheme is None:
            return wanted
        units = [unit for unit in plan.units if unit.op == "quantize"]
        need = max((device_bytes(unit, scheme) for unit in units), default=1)
        self._outputs_bytes = max((aligned_bytes(output.size_bytes for output in unit.outputs) for unit in units), default=0)
        with short_of_memory(self.device):
            free = int(torch.cuda.mem_get_info(self.device)[0] * DEVICE_SHARE)
        if free < need:
            raise ResourceError(
                "the GPU has too little free memory for the largest unit", where=self.device, expected=f"{need} bytes",
                got=f"{free} bytes", hint="choose another with --device cuda:N, or --device cpu",
            )  # fmt: skip
        return min(wanted, free // need)

    def host(self, scheme: Scheme, projection: str, shape: Sequence[int]) -> Place:
        """A place on the CPU for a matrix of this shape [out, in]."""
        return Host(scheme, projection, shape)

    def place(self, scheme: Scheme, projection: str, shape: Sequence[int], dtype: torch.dtype) -> Place:
        """The place for a matrix of this shape [out, in] and dtype."""
        if not self.on_device:
            return self.host(scheme, projection, shape)
        lane = self._lane()
        with lane.current():
            return OnDevice(lane, device_encoder(scheme, projection, shape, dtype, self.device))

    def _lane(self) -> Lane:
        lane: Lane | None = getattr(self._own, "lane", None)
        if lane is None:
            with short_of_memory(self.device):
                lane = self._own.lane = Lane(self.device, self._outputs_bytes)
            self._lanes.append(lane)
        return lane


def device_encoder(scheme: Scheme, projection: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Encoder:
    """The kernels where there are any for these weights, else the reference on the device."""
    out_features, in_features = shape
    if triton_wanted("quantize", device, dtype):
        from mxconv.quantize.gpu import GpuEncoder

        return GpuEncoder(scheme, projection, out_features, in_features, device)
    return PlainEncoder(scheme, projection, out_features, in_features, device)


def device_bytes(unit: Unit, scheme: Scheme) -> int:
    """What a unit holds on the device at most: outputs, a few blocks, and where a scale takes two passes its source."""
    outputs = sum(output.size_bytes for output in unit.outputs)
    return outputs + DEVICE_BLOCKS * BLOCK_BYTES + (unit.read_bytes if scheme.granularity == "tensor" else 0)
