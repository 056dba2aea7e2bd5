"""What a sequence leaves behind for its next tokens: decayed states of lightning layers, keys and values of softmax layers.

One Cache serves one batch of sequences through any split of prefill and decode. Each call adds T columns to it; columns may
be padding, which the caches keep and mask. Rank-local, keyed by (layer, rank). For sequences that come and go see slots.py.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mxconv.errors import UsageError
from mxconv.runtime.batch import Batch
from mxconv.runtime.softmax import attend_batch


class Past(Protocol):
    """What the layers ask of whatever holds the past of a call's sequences."""

    def begin(self, batch: int, columns: int, mask: Tensor | None, device: torch.device) -> tuple[Tensor, int, Tensor | None]:
        """Take `columns` new columns; (real tokens before them [B], columns before them, mask of all columns)."""
        ...

    def recurrent(self, layer: int, rank: int, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """States [rows, heads, D, D] of a lightning layer, and each sequence's row (None: all in order); `shape` is (heads, D)."""
        ...

    def attend(self, layer: int, rank: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """Attention of new q, k, v [B, T, heads, D] over the past of a softmax layer and themselves; the past takes them up."""
        ...


class KeyValues:
    """Keys and values [B, columns, kv heads, D] of one softmax layer and rank, in buffers that grow by doubling."""

    def __init__(self) -> None:
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor, past: int) -> tuple[Tensor, Tensor]:
        """Write the new columns behind `past` earlier ones; views of all `past` + T columns."""
        columns = past + k.shape[1]
        if self._k is None or self._v is None or self._k.shape[1] < columns:
            self._k, self._v = self._grown(self._k, k, past, columns), self._grown(self._v, v, past, columns)
        self._k[:, past:columns] = k
        self._v[:, past:columns] = v
        return self._k[:, :columns], self._v[:, :columns]

    @staticmethod
    def _grown(old: Tensor | None, new: Tensor, past: int, columns: int) -> Tensor:
        room = columns if old is None else max(columns, 2 * old.shape[1])
        grown = new.new_empty(new.shape[0], room, *new.shape[2:])
        if old is not None:
            grown[:, :past] = old[:, :past]
        return grown


class Cache:
    """The past of one batch: how many real tokens and columns each sequence has, states, keys and values."""

    def __init__(self) -> None:
        self.columns = 0
        self.tokens: Tensor | None = None
        """int64 [B]: real tokens seen, which is the rope position of the next one."""
        self.mask: Tensor | None = None
        """bool [B, columns]: which columns are real; None while all are."""
        self.states: dict[tuple[int, int], Tensor] = {}
        self._keys: dict[tuple[int, int], KeyValues] = {}

    def recurrent(self, layer: int, rank: int, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """See `Past.recurrent`; zeros at the start."""
        state = self.states.get((layer, rank))
        if state is None:
            heads, size = shape
            tokens = self.tokens if self.tokens is not None else torch.zeros(0)
            state = torch.zeros(len(tokens), heads, size, size, dtype=dtype, device=tokens.device)
            self.states[layer, rank] = state
        return state, None

    def attend(self, layer: int, rank: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """See `Past.attend`."""
        k, v = self._keys.setdefault((layer, rank), KeyValues()).extend(k, v, batch.past)
        return attend_batch(q, k, v, batch)

    def begin(self, batch: int, columns: int, mask: Tensor | None, device: torch.device) -> tuple[Tensor, int, Tensor | None]:
        """Take `columns` new columns; (real tokens before them [B], columns before them, mask of all columns).

        Raises UsageError when the number of sequences is not that of the first call.
        """
        if self.tokens is None:
            self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        if len(self.tokens) != batch:
            raise UsageError("a cache serves one batch of sequences", expected=f"{len(self.tokens)} sequences", got=batch)
        before, past = self.tokens, self.columns
        if mask is not None or self.mask is not None:
            old = torch.ones(batch, past, dtype=torch.bool, device=device) if self.mask is None else self.mask
            new = torch.ones(batch, columns, dtype=torch.bool, device=device) if mask is None else mask
            self.mask = torch.cat((old, new), dim=1)
        self.tokens = before + (columns if mask is None else mask.sum(1))
        self.columns = past + columns
        return before, past, self.mask
