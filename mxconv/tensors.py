"""Names of dtypes, sizes of tensors and boxes inside them: the ground that files, plans and kernels share (no torch).

A *box* is one (start, stop) pair per axis. Its bytes inside a C-contiguous tensor are a list of equally long *runs*;
trailing axes that the box covers whole are merged into the run, so that a block of rows is a single one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Box = tuple[tuple[int, int], ...]

# safetensors dtype code → bytes an element, in the order of the package's own enumeration, by which its writer sorts. Sub-byte
# codes are not in it: no checkpoint of this family has them.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "C64": 8, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
DTYPE_ORDER = {code: number for number, code in enumerate(DTYPE_BYTES)}

# safetensors dtype code → name of the torch dtype (an attribute of `torch`).
TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "I16": "int16", "U16": "uint16", "F16": "float16",
    "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32", "I64": "int64", "U64": "uint64", "F64": "float64",
    "C64": "complex64",
}  # fmt: skip

FLOAT_DTYPES = frozenset(("BF16", "F16", "F32", "F64"))


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor before its bytes: name, safetensors dtype code, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def whole(shape: Sequence[int]) -> Box:
    """The box that covers a tensor of `shape`."""
    return tuple((0, n) for n in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    """The shape of what a box cuts out."""
    return tuple(stop - start for start, stop in box)


def intersect(a: Box, b: Box) -> Box | None:
    """The box in both, None when they share no element."""
    both = tuple((max(a0, b0), min(a1, b1)) for (a0, a1), (b0, b1) in zip(a, b, strict=True))
    return both if all(start < stop for start, stop in both) else None


def run_bytes(shape: Sequence[int], box: Box, itemsize: int) -> int:
    """Bytes of each contiguous run of `box` in a C-contiguous tensor of `shape` (0 for an empty box)."""
    length = itemsize
    for n, (start, stop) in zip(reversed(shape), reversed(box), strict=True):
        length *= stop - start
        if stop - start != n:
            break
    return length


def runs(shape: Sequence[int], box: Box, itemsize: int) -> Iterator[tuple[int, int]]:
    """(offset, length) in bytes of each contiguous run of `box`, in the order of the box's own C-contiguous bytes."""
    if math.prod(stop - start for start, stop in box) == 0:
        return
    strides = [itemsize] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    split = len(shape)  # axes from `split` on lie inside a run
    while split > 0:
        split -= 1
        if box[split] != (0, shape[split]):
            break
    length = itemsize * math.prod(stop - start for start, stop in box[split:])
    base = sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
    counts = [stop - start for start, stop in box[:split]]
    index = [0] * split
    while True:
        yield base + sum(i * s for i, s in zip(index, strides, strict=False)), length
        axis = split - 1
        while axis >= 0 and index[axis] + 1 == counts[axis]:
            index[axis] = 0
            axis -= 1
        if axis < 0:
            return
        index[axis] += 1
