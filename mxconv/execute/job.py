"""What every operation of a unit is given, and what it hands back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mxconv.calibrate import Statistics
from mxconv.execute.rawbits import Raw
from mxconv.execute.reading import SourceReader
from mxconv.plan.values import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run: its plan, its source, and the calibration statistics of a static scheme."""

    plan: Plan
    reader: SourceReader
    statistics: Statistics | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The stored values of each output of a unit, in their order, and facts for the journal."""

    arrays: Sequence[Raw] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
