"""Weights as raw integers: moving, checking and converting them without arithmetic (numpy, no torch).

A bf16 tensor is handled as uint16, so that a copy keeps every bit, NaN payloads and negative zeros included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from mxconv.errors import IntegrityError, MxconvError
from mxconv.tensors import DTYPE_BYTES

Raw = np.ndarray

_UNSIGNED: Mapping[int, type[np.unsignedinteger]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# dtype → bits of the exponent; all set means Inf or NaN
_EXPONENT = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F80_0000, "F64": 0x7FF0_0000_0000_0000}


def raw_dtype(dtype: str) -> type[np.unsignedinteger]:
    """The unsigned integer type as wide as `dtype`."""
    return _UNSIGNED[DTYPE_BYTES[dtype]]


def nonfinite(values: Raw, dtype: str) -> np.ndarray | None:
    """bool mask of Inf and NaN in raw `values`; None when all are finite (the quick answer)."""
    exponent = _EXPONENT.get(dtype)
    if exponent is None or not values.size:
        return None
    bits = values & values.dtype.type(exponent)
    if int(bits.max()) != exponent:
        return None
    return bits == exponent


def _widen_bf16(values: Raw) -> Raw:
    return values.astype(np.uint32) << np.uint32(16)


def _narrow_to_bf16(values: Raw) -> Raw:
    if bool((values & np.uint32(0xFFFF)).any()):
        raise IntegrityError(
            "a float32 value does not fit the bf16 that the source had", hint="the artifact was changed after it was made"
        )
    return (values >> np.uint32(16)).astype(np.uint16)


def _through_float(source: type[np.floating], target: type[np.floating], raw: type[np.unsignedinteger]) -> Callable[[Raw], Raw]:
    def convert(values: Raw) -> Raw:
        before = values.view(source)
        after = before.astype(target)
        if not np.array_equal(after.astype(source), before, equal_nan=True):
            raise IntegrityError(
                "a value does not fit the dtype that the source had", hint="the artifact was changed after it was made"
            )
        return after.view(raw)

    return convert


# (from, to) → exact conversion; nothing here rounds: what does not fit is an error.
_CONVERSIONS: Mapping[tuple[str, str], Callable[[Raw], Raw]] = {
    ("BF16", "F32"): _widen_bf16,
    ("F32", "BF16"): _narrow_to_bf16,
    ("F16", "F32"): _through_float(np.float16, np.float32, np.uint32),
    ("F32", "F16"): _through_float(np.float32, np.float16, np.uint16),
    ("F64", "F32"): _through_float(np.float64, np.float32, np.uint32),
    ("F32", "F64"): _through_float(np.float32, np.float64, np.uint64),
}


def convert(values: Raw, source: str, target: str) -> Raw:
    """Raw `values` of dtype `source` as raw values of `target`, exactly. Raises IntegrityError when a value does not fit."""
    if source == target:
        return values
    exact = _CONVERSIONS.get((source, target))
    if exact is None:
        raise MxconvError(f"no exact conversion from {source} to {target}")
    return exact(np.ascontiguousarray(values))


def to_float32(values: Raw, dtype: str) -> np.ndarray:
    """Raw `values` as float32 (float64 rounds)."""
    if dtype == "BF16":
        return _widen_bf16(values).view(np.float32)
    return values.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]).astype(np.float32)
