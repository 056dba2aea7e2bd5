"""The one place that decides whether an operation runs as a Triton kernel or in plain torch.

`MXCONV_KERNELS=torch` never takes a kernel, `MXCONV_KERNELS=triton` refuses to run what has none; unset, a kernel is taken
where the table below has one for the device, dtype and shape. Results agree within the tolerance that each kernel states.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from mxconv.errors import UsageError

if TYPE_CHECKING:
    import torch

VARIABLE = "MXCONV_KERNELS"
CHOICES = ("torch", "triton")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Where an operation has a kernel: dtypes by torch's name, what its shape must fulfil, compute capabilities from, and below."""

    dtypes: frozenset[str]
    fits: Callable[[Mapping[str, int]], bool] = lambda shape: True
    capability: tuple[int, int] = (8, 0)
    below: tuple[int, int] = (1000, 0)


_E4M3 = (8, 9)
"""The first GPUs that convert to e4m3."""
_HALF = frozenset({"bfloat16", "float16"})
WIDEST_NORM = 16384
"""A row of this many values fits the registers of a program of `residual_norm`."""
RULES: Mapping[str, Rule] = {
    # The head_dims whose kernels have been run on a GPU.
    "lightning_prefill": Rule(dtypes=_HALF | {"float32"}, fits=lambda shape: shape["head_dim"] in (16, 32, 64, 96, 128, 256)),
    "lightning_decode": Rule(dtypes=_HALF | {"float32"}, fits=lambda shape: shape["head_dim"] <= 256),
    "silu": Rule(dtypes=_HALF),
    "lightning_norm": Rule(dtypes=_HALF),
    "residual_norm": Rule(dtypes=_HALF, fits=lambda shape: shape["hidden"] <= WIDEST_NORM),
    "moe": Rule(dtypes=_HALF, fits=lambda shape: shape["hidden"] % 128 == 0 and shape["inner"] % 128 == 0, capability=_E4M3),
    # torch's grouped_mm has a kernel for bf16 on these alone; elsewhere it asks the device for the sizes of the groups.
    "moe_dense": Rule(
        dtypes=frozenset({"bfloat16"}), fits=lambda shape: shape["hidden"] % 16 == 0 and shape["inner"] % 16 == 0,
        capability=(9, 0), below=(11, 0),
    ),
    "quantize": Rule(dtypes=_HALF | {"float32"}, capability=_E4M3),
}


def open_device(name: str | torch.device) -> torch.device:
    """The device `name` (cpu, cuda or cuda:N). Raises UsageError when this machine does not have it."""
    import torch

    device = torch.device(name)
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= there:
        expected = f"cpu, or one of {there} CUDA devices" if there else "cpu"
        raise UsageError("this machine does not have the device", expected=expected, got=device, hint="see --device")
    return device


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    import torch

    return torch.cuda.get_device_capability(device)


@cache
def _importable() -> bool:
    return find_spec("triton") is not None


def chosen(environ: Mapping[str, str]) -> str | None:
    """What `MXCONV_KERNELS` says, None where it is unset. Raises UsageError for what it cannot be."""
    choice = environ.get(VARIABLE) or None
    if choice is not None and choice not in CHOICES:
        raise UsageError(f"unknown {VARIABLE}", expected=" or ".join(CHOICES), got=choice)
    return choice


def triton_wanted(operation: str, device: torch.device, dtype: torch.dtype, **shape: int) -> bool:
    """Whether `operation` runs as a kernel for values of `dtype` on `device`; `shape` is what its rule asks about.

    Raises UsageError for an unknown `MXCONV_KERNELS`, and under `triton` where the operation has no kernel.
    """
    choice = chosen(os.environ)
    if choice == "torch" or (choice is None and device.type != "cuda"):
        return False
    rule, name = RULES[operation], str(dtype).removeprefix("torch.")
    able = device.type == "cuda" and _importable() and name in rule.dtypes and rule.fits(shape)
    able = able and rule.capability <= _capability(device) < rule.below
    if choice == "triton" and not able:
        raise UsageError(
            f"{VARIABLE}=triton, and {operation} has no kernel for this", expected=f"cuda, {' or '.join(sorted(rule.dtypes))}",
            got=f"{device}, {name}, {dict(shape)}", hint=f"unset {VARIABLE} to let plain torch take what has no kernel",
        )  # fmt: skip
    return able
