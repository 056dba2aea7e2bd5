"""Batched decoding over slots: prompts go into slots, each step gives every active slot its next token.

On a GPU whose layers run as kernels a step is one replay of a CUDA graph, captured for a number of rows and of keys that
attention looks at (both rounded up, so that a few graphs serve every length); elsewhere it is the same code, run as it stands.
Ids, lengths and which slots are active live in static buffers on the device; a step reads nothing back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mxconv.errors import UsageError
from mxconv.runtime.batch import make_batch
from mxconv.runtime.linear import Activations
from mxconv.runtime.model import Model
from mxconv.runtime.slots import Prompt, Slots, Step

PROMPT_TOKENS = 32768
"""A longer prompt goes into its slot in pieces of this many tokens."""
LEAST_COLUMNS = 256


class Decoder:
    """`slots` sequences side by side with room for `room` tokens each (more is made when one needs it).

    `graphs`: capture steps; None does so where that can be (`Model.capturable`). Raises UsageError for True where it cannot.
    """

    def __init__(
        self, model: Model, *, slots: int = 1, room: int = 4096, activations: Activations = "quantized",
        graphs: bool | None = None,
    ) -> None:  # fmt: skip
        # The kernels compute as served; exact activations take the definition, which asks the device what it chose.
        able = model.capturable and (activations == "quantized" or model.weights.scheme is None)
        if graphs and not able:
            raise UsageError("this model's steps cannot be captured in a CUDA graph", expected="cuda, bfloat16, kernels")
        self.model, self.activations = model, activations
        self.graphs = able if graphs is None else graphs
        self.pool = Slots(slots, _rounded(room, LEAST_COLUMNS), model.device)
        self.tokens = torch.zeros(slots, dtype=torch.int64, device=model.device)
        """int64 [slots]: the id that each slot takes in the next step: the likeliest after its prompt or last step, or yours."""
        self._active = torch.zeros(slots, dtype=torch.bool, device=model.device)
        self._running = [False] * slots
        self._captured: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @torch.inference_mode()
    def start(self, slot: int, ids: Sequence[int]) -> Tensor:
        """Forget `slot` and give it the prompt `ids`; logits float32 [V] behind it. Raises UsageError for ids that do not fit."""
        if not ids:
            raise UsageError("the prompt has no tokens")
        self.stop(slot)
        self.pool.clear(slot)
        self._room(len(ids) + 1)
        logits = torch.empty(0)
        for begin in range(0, len(ids), PROMPT_TOKENS):
            piece = torch.tensor([list(ids[begin : begin + PROMPT_TOKENS])], dtype=torch.int64)
            past = Prompt(pool=self.pool, slot=slot)
            logits = self.model(piece, cache=past, last=1, activations=self.activations)[0, -1]
            self.pool.took(slot, piece.shape[1])
        self.tokens[slot] = logits.argmax()
        self._running[slot] = True
        self._active[slot] = True
        return logits

    def stop(self, slot: int) -> None:
        """Leave `slot` out of the steps to come."""
        self._running[slot] = False
        self._active[slot] = False

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Every active slot takes up its id of `tokens`; logits float32 [rows, V], rows up to the last active slot at least.

        `tokens` then holds the likeliest ids. The result is overwritten by the next step.
        """
        active = [slot for slot, running in enumerate(self._running) if running]
        if not active:
            raise UsageError("no slot is active", hint="start one with a prompt")
        rows = min(_rounded(active[-1] + 1, 1), self.pool.count)
        longest = max(self.pool.used[slot] for slot in active) + 1
        self._room(longest)
        columns = min(_columns(longest), self.pool.room)
        logits = self._replayed(rows, columns) if self.graphs else self._computed(rows, columns)
        for slot in active:
            self.pool.used[slot] += 1
        return logits

    def _computed(self, rows: int, columns: int) -> Tensor:
        ids, active = self.tokens[:rows, None], self._active[:rows]
        past = Step.of(self.pool, active, columns)
        batch = make_batch(ids, None, past, self.model.inverse, self.model.dtype)
        logits = self.model.forward(ids, batch, cache=past, activations=self.activations)[:, 0]
        self.tokens[:rows] = torch.where(active, logits.argmax(-1), self.tokens[:rows])
        self.pool.tokens[:rows] += active
        return logits

    def _replayed(self, rows: int, columns: int) -> Tensor:
        if (rows, columns) not in self._captured:
            self._captured[rows, columns] = self._capture(rows, columns)
        graph, logits = self._captured[rows, columns]
        graph.replay()
        return logits

    def _capture(self, rows: int, columns: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        pool = next((graph.pool() for graph, _ in self._captured.values()), None)
        with self._none_active():
            stream = torch.cuda.Stream(self.model.device)
            stream.wait_stream(torch.cuda.current_stream(self.model.device))
            with torch.cuda.stream(stream):
                self._computed(rows, columns)
            torch.cuda.current_stream(self.model.device).wait_stream(stream)
            with torch.cuda.graph(graph, pool=pool):
                logits = self._computed(rows, columns)
        return graph, logits

    @contextmanager
    def _none_active(self) -> Iterator[None]:
        """With no slot active a run changes nothing, so that kernels can be compiled and buffers made before a capture."""
        active = self._active.clone()
        self._active.zero_()
        try:
            yield
        finally:
            self._active.copy_(active)

    def _room(self, tokens: int) -> None:
        if tokens > self.pool.room:
            self.pool.grow(_rounded(tokens, LEAST_COLUMNS))
            self._captured.clear()  # graphs hold the addresses of the old buffers


def _rounded(number: int, least: int) -> int:
    """The least power-of-two multiple of `least` that is not below `number`."""
    return least << max(0, (-(-number // least) - 1).bit_length())


def _columns(tokens: int) -> int:
    """`tokens` rounded up by an eighth at most, so that attention reads little too much and few graphs are captured."""
    step = max(LEAST_COLUMNS, _rounded(tokens, LEAST_COLUMNS) // 16)
    return -(-tokens // step) * step
