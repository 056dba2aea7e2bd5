"""Launches of the lightning prefill kernels: one table, fixed, so that a first call costs one compilation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Value columns of a program, tokens of a chunk, warps, pipeline stages."""

    columns: int
    chunk: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Launches:
    """Of the output pass, the state pass, and the output pass on Hopper (None: never)."""

    outputs: Launch
    states: Launch
    hopper: Launch | None = None


MOST_ROWS = 65_535
"""Sequences, or slots, of a call: a launch's third axis."""
SCORE_REGISTERS = 152
"""Of each thread of the Hopper kernel's warpgroup that makes scores."""


def _launch(columns: int, chunk: int, warps: int, stages: int) -> Launch:
    return Launch(columns=columns, chunk=chunk, warps=warps, stages=stages)


_HOPPER = _launch(64, 64, 4, 4)
LAUNCHES: Mapping[tuple[int, bool], Launches] = {
    (64, True): Launches(outputs=_launch(32, 64, 4, 3), states=_launch(64, 64, 4, 4), hopper=_HOPPER),
    (128, True): Launches(outputs=_launch(32, 64, 4, 3), states=_launch(128, 64, 8, 4), hopper=_HOPPER),
    (256, True): Launches(outputs=_launch(32, 64, 4, 2), states=_launch(64, 64, 8, 3)),
    (64, False): Launches(outputs=_launch(64, 64, 4, 1), states=_launch(32, 32, 4, 1)),
    (128, False): Launches(outputs=_launch(64, 64, 8, 1), states=_launch(32, 32, 4, 1)),
    (256, False): Launches(outputs=_launch(32, 32, 8, 1), states=_launch(32, 32, 8, 1)),
}
"""By head_dim padded to a power of two (64 at least), and whether operands take two bytes. Those of head_dim 128 were measured on
an H200; the others follow from them and from what registers and shared memory hold."""
