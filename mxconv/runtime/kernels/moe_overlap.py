"""Programmatic dependent launch: on Hopper and later a kernel may be launched while the one before it still runs.

A layer is seven short kernels; at one token the gaps between them would be most of its time. Every kernel of the chain begins with
`after_previous`: it waits until all that was launched before has finished and is visible, so that nothing else changes, then lets
the next one be launched, whose programs wait in their turn.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def after_previous(OVERLAP: tl.constexpr):
    """The first statement of a kernel, before any access to memory."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@cache
def overlap_options(device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel that begins with `after_previous`."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}
