"""Embedding and output head, cut over ranks by rows of the vocabulary; kept widened, or read in blocks of rows when streamed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mxconv.runtime.linear import arranged
from mxconv.runtime.loader import Weights
from mxconv.runtime.parallel import Group

BLOCK_ROWS = 8192


class Vocabulary:
    """Rows of `embed` or `lm_head` of every rank in `dtype`: `keep` widens them once, otherwise blocks are read when needed."""

    def __init__(
        self, weights: Weights, name: str, group: Group, device: torch.device, dtype: torch.dtype, *, keep: bool
    ) -> None:
        self._weights, self._name, self._group, self._device, self._dtype = weights, name, group, device, dtype
        self.each = weights.rank_rows(name)
        self.size = weights.config.vocab_size
        self._kept = {rank: self._read(rank, 0, self.each) for rank in group.ranks} if keep else {}
        if name == "lm_head":
            self._kept = {rank: arranged(rows) for rank, rows in self._kept.items()}

    def _read(self, rank: int, start: int, stop: int) -> Tensor:
        return self._weights.rows(self._name, rank, start, stop).to(device=self._device, dtype=self._dtype)

    def rows(self, rank: int, start: int, stop: int) -> Tensor:
        """[stop - start, H]: rows counted within the rank."""
        kept = self._kept.get(rank)
        return self._read(rank, start, stop) if kept is None else kept[start:stop]

    def embed(self, ids: Tensor) -> Tensor:
        """[B, T] → [B, T, H]: each rank gives its own rows and zeros elsewhere, and the sum over ranks is exact."""
        if self._group.size == 1 and self._kept:
            return F.embedding(ids, self._kept[0])
        return self._group.sum(lambda rank: self._lookup(rank, ids))

    def _lookup(self, rank: int, ids: Tensor) -> Tensor:
        local = ids - rank * self.each
        kept = self._kept.get(rank)
        if kept is not None:  # without asking the device which ids are here
            here = (local >= 0) & (local < self.each)
            return torch.where(here[..., None], F.embedding(local.clamp(0, self.each - 1), kept), 0.0)
        found = torch.zeros(*ids.shape, self._weights.config.hidden_size, dtype=self._dtype, device=self._device)
        for start in range(0, self.each, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, self.each)
            here = (local >= start) & (local < stop)
            if here.any():
                found[here] = self.rows(rank, start, stop)[local[here] - start]
        return found

    def logits(self, x: Tensor, block: int) -> Iterator[tuple[int, Tensor]]:
        """(first id, x·rowsᵀ [..., n]) for runs of up to `block` ids in order, padding rows left out; the same in every process."""
        for rank in range(self._group.size):
            first = rank * self.each
            for start in range(0, self.each, block):
                stop = min(start + block, self.each, self.size - first)
                if start < stop:
                    yield first + start, self._share(x, rank, start, stop)

    def _share(self, x: Tensor, rank: int, start: int, stop: int) -> Tensor:
        shape = (*x.shape[:-1], stop - start)
        return self._group.share(rank, lambda: F.linear(x, self.rows(rank, start, stop)), shape, x)
