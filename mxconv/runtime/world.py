"""The processes that run one verification together, as its rooms see them: a lone process is a world of one.

Rank 0 of a world judges and speaks; the others bring what they measured. `Alone` is the plain case, `processes.Processes` the one
over `torch.distributed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from mxconv.errors import MxconvError
from mxconv.runtime.parallel import Group, LocalRanks

T = TypeVar("T")


class World(Protocol):
    """Everything below is called by all processes, in the same order."""

    @property
    def rank(self) -> int:
        """This process, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def group(self, ranks: int) -> Group:
        """A tensor-parallel group of `ranks` over all processes. Raises UsageError when they do not share it out evenly."""
        ...

    def share_out(self, steps: Sequence[Callable[[], T]]) -> list[T]:
        """Run each of `steps` once, in whichever process is free; their results in order at rank 0, an empty list elsewhere.

        `steps` are the same in every process. What one of them raises is raised in all.
        """
        ...

    def agree(self, error: MxconvError | None) -> None:
        """Raise in every process what went wrong in one (the lowest rank's), so that none is left waiting; None: nothing did."""
        ...

    def settled(self, error: MxconvError) -> bool:
        """Whether `error` was raised in every process, so that all can go on from it."""
        ...

    def tell(self, value: T) -> T:
        """What rank 0 gives, in every process."""
        ...

    def fetch(self, owner: int, tensor: Tensor | None) -> Tensor | None:
        """The `tensor` of process `owner`, at rank 0 (on the CPU, if it came from another process); None elsewhere."""
        ...


class Alone:
    """A world of this process."""

    rank = 0
    size = 1

    def group(self, ranks: int) -> Group:
        """See `World.group`."""
        return LocalRanks(ranks)

    def share_out(self, steps: Sequence[Callable[[], Any]]) -> list[Any]:
        """See `World.share_out`."""
        return [step() for step in steps]

    def agree(self, error: MxconvError | None) -> None:
        """See `World.agree`."""
        if error is not None:
            raise error

    def settled(self, error: MxconvError) -> bool:
        """See `World.settled`."""
        return True

    def tell(self, value: T) -> T:
        """See `World.tell`."""
        return value

    def fetch(self, owner: int, tensor: Tensor | None) -> Tensor | None:
        """See `World.fetch`."""
        return tensor


ALONE = Alone()


def everywhere(world: World, compute: Callable[[], T]) -> T:
    """`compute()` of each process; what fails in one is raised in all."""
    try:
        found = compute()
    except MxconvError as error:
        world.agree(error)
        raise
    world.agree(None)
    return found
