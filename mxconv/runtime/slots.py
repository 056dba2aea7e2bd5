"""A pool of slots for sequences that come and go: each slot holds one sequence's states, keys and values.

    states   float32 [slots, heads, D, D] of each lightning layer and rank
    keys     [slots, room, kv heads, D] of each softmax layer and rank, likewise values
    tokens   int64 [slots] on the device, and the same numbers on the host: tokens in each slot, the position of its next one

Two views of it are what the layers get as the past of a call: `Prompt` takes T tokens into one slot, `Step` one token into each
active slot of the first rows. A step reads no number back from the device and moves no buffer, so that it can be captured in a
CUDA graph: which slots are active and how long they are is data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxconv.errors import UsageError
from mxconv.runtime.batch import Batch
from mxconv.runtime.softmax import attend_batch, attend_slots

Key = tuple[int, int]


class Slots:
    """`count` slots with room for `room` tokens each; buffers are made when a layer first asks for them."""

    def __init__(self, count: int, room: int, device: torch.device) -> None:
        self.count, self.room, self.device = count, room, device
        self.tokens = torch.zeros(count, dtype=torch.int64, device=device)
        self.used = [0] * count
        """`tokens`, as the host knows it."""
        self._states: dict[Key, Tensor] = {}
        self._keys: dict[Key, tuple[Tensor, Tensor]] = {}

    def states(self, key: Key, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """States [count, heads, D, D] of a layer and rank, zero in slots that hold nothing."""
        if key not in self._states:
            heads, size = shape
            self._states[key] = torch.zeros(self.count, heads, size, size, dtype=dtype, device=self.device)
        return self._states[key]

    def keys(self, key: Key, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [count, room, kv heads, D] of a layer and rank, for new ones like `like` [B, T, kv heads, D]."""
        if key not in self._keys:
            # Zeros, because masked attention still multiplies what lies behind a sequence with weights of zero.
            shape = (self.count, self.room, *like.shape[2:])
            keys, values = (torch.zeros(shape, dtype=like.dtype, device=self.device) for _ in range(2))
            self._keys[key] = keys, values
        return self._keys[key]

    def grow(self, room: int) -> None:
        """Make room for `room` tokens a slot; the buffers of keys and values are other ones afterwards."""
        for key, pair in self._keys.items():
            wider = []
            for old in pair:
                new = torch.zeros(self.count, room, *old.shape[2:], dtype=old.dtype, device=self.device)
                new[:, : self.room] = old
                wider.append(new)
            self._keys[key] = wider[0], wider[1]
        self.room = room

    def clear(self, slot: int) -> None:
        """Forget what `slot` holds. Keys may stay: attention looks at the first `tokens` alone."""
        self.used[slot] = 0
        self.tokens[slot] = 0
        for states in self._states.values():
            states[slot].zero_()

    def took(self, slot: int, columns: int) -> None:
        """Enter `columns` tokens more into the numbers of `slot`."""
        self.used[slot] += columns
        self.tokens[slot] = self.used[slot]

    @torch.inference_mode()
    def pretend(self, tokens: int) -> None:
        """Stand every slot `tokens` tokens into a sequence of random states, keys and values: for measuring, not for text."""
        for states in self._states.values():
            states.normal_()
        for pair in self._keys.values():
            for buffer in pair:
                buffer.normal_()
        self.used = [tokens] * self.count
        self.tokens.fill_(tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The past of T tokens that go into one slot, behind those that it holds."""

    pool: Slots
    slot: int

    def begin(self, batch: int, columns: int, mask: Tensor | None, device: torch.device) -> tuple[Tensor, int, Tensor | None]:
        """See `Past.begin`; raises UsageError for several sequences, padding, or more tokens than there is room for."""
        past = self.pool.used[self.slot]
        if batch != 1 or mask is not None:
            raise UsageError("a slot takes one sequence without padding", got=f"{batch} sequences")
        if past + columns > self.pool.room:
            raise UsageError("the slot has no room for these tokens", expected=f"at most {self.pool.room}", got=past + columns)
        return self.pool.tokens[self.slot : self.slot + 1].clone(), past, None

    def recurrent(self, layer: int, rank: int, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """See `Past.recurrent`: the slot's own row, without the others."""
        return self.pool.states((layer, rank), shape, dtype)[self.slot : self.slot + 1], None

    def attend(self, layer: int, rank: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """See `Past.attend`."""
        keys, values = (buffer[self.slot : self.slot + 1] for buffer in self.pool.keys((layer, rank), k))
        stop = batch.past + batch.columns
        keys[:, batch.past : stop], values[:, batch.past : stop] = k, v
        return attend_batch(q, keys[:, :stop], values[:, :stop], batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The past of one token in each of the first slots; attention looks at `columns` keys at most."""

    pool: Slots
    rows: Tensor
    """int64 [rows]: each row's slot, -1 where it is not active."""
    used: Tensor
    """int64 [rows]: tokens of each slot, the new one among them."""
    columns: int

    @classmethod
    def of(cls, pool: Slots, active: Tensor, columns: int) -> Step:
        """The step of the slots in `active` bool [rows]; `columns` is at least the longest one's tokens and the new one."""
        rows = len(active)
        slots = torch.where(active, torch.arange(rows, device=active.device), -1)
        return cls(pool=pool, rows=slots, used=(pool.tokens[:rows] + 1).clamp(max=columns), columns=columns)

    def begin(self, batch: int, columns: int, mask: Tensor | None, device: torch.device) -> tuple[Tensor, int, Tensor | None]:
        """See `Past.begin`: positions from the slots' own numbers; how many columns lie before is no one number here."""
        return self.pool.tokens[:batch], 0, None

    def recurrent(self, layer: int, rank: int, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """See `Past.recurrent`."""
        return self.pool.states((layer, rank), shape, dtype), self.rows

    def attend(self, layer: int, rank: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """See `Past.attend`. A slot that is not active gets a key behind its last one, which nobody looks at."""
        keys, values = self.pool.keys((layer, rank), k)
        rows = torch.arange(batch.size, device=k.device)
        place = self.pool.tokens[: batch.size].clamp(max=self.pool.room - 1)
        keys[rows, place], values[rows, place] = k[:, 0], v[:, 0]
        return attend_slots(q[:, 0], keys[: batch.size], values[: batch.size], self.used, self.columns)[:, None]
