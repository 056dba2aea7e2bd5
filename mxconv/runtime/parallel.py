"""Tensor parallelism: which ranks this process computes, and how their partial results become one.

`LocalRanks` runs all ranks of a group one after the other in one process. `ProcessRanks` shares them out over the processes of a
`torch.distributed` group, each computing its own:

    CPU   sum     all partial results to all processes, each adds them in rank order: the bits of `LocalRanks`
                  (gloo's own all-reduce adds in another order; 36 % of the elements differ)
    CUDA  sum     one NCCL all-reduce in the dtype of the partial results; the same bits in every process
    both  share   a broadcast from the process that computes the rank

The model code knows `Group` alone, so that it is the same code either way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mxconv.errors import UsageError

CHUNK_BYTES = 16 << 20
"""A process's part of one all-gather: what all processes hold of it is this times their number."""


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
        """The sum over all ranks of `partial(rank)`, added in rank order; the same in every process.

        Partial results are the sum's own, to overwrite: nothing that a layer keeps.
        """
        ...

    def share(self, rank: int, compute: Callable[[], Tensor], shape: Sequence[int], like: Tensor) -> Tensor:
        """What `compute()` gives where `rank` is computed, in every process: [`shape`] with the dtype and device of `like`."""
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

    def share(self, rank: int, compute: Callable[[], Tensor], shape: Sequence[int], like: Tensor) -> Tensor:
        """See `Group.share`."""
        return compute()


def ranks_of(process: int, processes: int, size: int) -> range:
    """The neighbouring ranks of a group of `size` that `process` computes. Raises UsageError unless `processes` divides `size`."""
    if size % processes:
        raise UsageError(
            f"{size} tensor-parallel ranks cannot be shared out over {processes} processes",
            expected=" or ".join(str(n) for n in range(1, size + 1) if size % n == 0) + " processes", got=processes,
        )  # fmt: skip
    each = size // processes
    return range(process * each, (process + 1) * each)


def nothing_to_settle(compute: Callable[[], Tensor]) -> Tensor:
    """The plain way to compute a partial result: what fails in one process ends that process."""
    return compute()


@dataclass(slots=True, kw_only=True)
class ProcessRanks:
    """`size` ranks over the processes of `group` (None: the default group), `size` / processes neighbouring ones in each.

    `settle` runs what computes a partial result, and may raise in all processes what failed in one, so that none is left waiting.
    """

    group: dist.ProcessGroup | None
    size: int
    settle: Callable[[Callable[[], Tensor]], Tensor] = nothing_to_settle
    ranks: range = field(init=False)

    def __post_init__(self) -> None:
        self.ranks = ranks_of(dist.get_rank(self.group), dist.get_world_size(self.group), self.size)

    def sum(self, partial: Callable[[int], Tensor]) -> Tensor:
        """See `Group.sum`."""
        mine = self.settle(lambda: self._parts(partial))
        if not mine.is_cuda:
            return self._in_order(mine)
        dist.all_reduce(mine, group=self.group)
        return mine

    def _parts(self, partial: Callable[[int], Tensor]) -> Tensor:
        """Partial results of this process's ranks: on a GPU their sum, on the CPU one behind the other, [ranks, …]."""
        first = partial(self.ranks[0])
        if first.is_cuda:
            for rank in self.ranks[1:]:
                first = first + partial(rank)
            return first.contiguous()
        return torch.stack([first, *(partial(rank) for rank in self.ranks[1:])])

    def _in_order(self, mine: Tensor) -> Tensor:
        """Σ over all ranks of [ranks, …], in rank order, a chunk of elements at a time."""
        parts = mine.flatten(1)
        total = torch.empty_like(parts[0])
        step = max(1, CHUNK_BYTES // (len(parts) * mine.element_size()))
        for start in range(0, total.numel(), step):
            piece = parts[:, start : start + step].contiguous()
            gathered = [torch.empty_like(piece) for _ in range(dist.get_world_size(self.group))]
            dist.all_gather([_bytes(each) for each in gathered], _bytes(piece), group=self.group)
            into = total[start : start + step].copy_(gathered[0][0])
            for rank in range(1, self.size):
                into += gathered[rank // len(parts)][rank % len(parts)]
        return total.view(mine.shape[1:])

    def share(self, rank: int, compute: Callable[[], Tensor], shape: Sequence[int], like: Tensor) -> Tensor:
        """See `Group.share`."""
        mine = rank in self.ranks
        value = self.settle(lambda: compute().contiguous() if mine else like.new_empty(tuple(shape)))
        owner = rank // len(self.ranks)
        if math.prod(shape):
            source = owner if self.group is None else dist.get_global_rank(self.group, owner)
            dist.broadcast(value if value.is_cuda else _bytes(value), source, group=self.group)
        return value


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes: gloo moves them whatever the dtype."""
    return tensor.reshape(-1).view(torch.uint8)
