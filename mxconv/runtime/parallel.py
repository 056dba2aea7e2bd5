"""Tensor parallelism: which ranks this process computes, and how their partial results become one.

`LocalRanks` runs all ranks of a group one after the other in one process. A group over processes has the same two members:
`ranks` (its own alone) and `sum` (an all-gather, then the same sum in rank order), so that both give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Group(Protocol):
    """What the layers ask of a tensor-parallel group of `size` ranks."""

    @property
    def size(self) -> int:
        """Ranks in the group."""
        ...

    @property
    def ranks(self) -> range:
        """Ranks that this process computes."""
        ...

    def sum(self, partial: Callable[[int], Tensor]) -> Tensor:
        """The sum over all ranks of `partial(rank)`, added in rank order."""
        ...


@dataclass(frozen=True, slots=True)
class LocalRanks:
    """All `size` ranks, rank by rank in this process; one rank's partial result lives at a time."""

    size: int

    @property
    def ranks(self) -> range:
        """All ranks."""
        return range(self.size)

    def sum(self, partial: Callable[[int], Tensor]) -> Tensor:
        """See `Group.sum`."""
        total = partial(0)
        for rank in range(1, self.size):
            total = total + partial(rank)
        return total
