"""What every operation of a unit is given, and what it hands back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mxconv.calibrate import Statistics
from mxconv.execute.rawbits import Raw
from mxconv.execute.reading import SourceReader
from mxconv.plan.values import Plan

if TYPE_CHECKING:
    from mxconv.execute.places import Places  # torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run: its plan, its source, the calibration statistics of a static scheme, and where quantized weights are encoded."""

    plan: Plan
    reader: SourceReader
    statistics: Statistics | None
    places: Places | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The stored values of each output of a unit, in their order, and facts for the journal."""

    arrays: Sequence[Raw] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
