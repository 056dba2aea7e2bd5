"""Logits of several models side by side, a block of the vocabulary at a time: full logits are never held.

Each model's final hidden states [tokens, H] meet its head block by block; running sums give what a softmax over the whole
vocabulary would. With m a running maximum of the reference's logits z, and w those of another model,

    S = Σ e^(z−m)      A = Σ e^(z−m)·(z − w)      KL = A/S − (lse(z) − lse(w))

where A and S are rescaled whenever m grows. Exponentials are float32; sums over blocks are float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mxconv.runtime import Model
from mxconv.verify.metrics import TokenScores

TOP = 5
MIN_BLOCK, MAX_BLOCK = 64, 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One model and its final hidden states [windows, tokens, H] before the final norm."""

    model: Model
    hidden: Tensor


class Softmax:
    """Running log-sum-exp, sum of squares, top 5 and true token's logit of [tokens] positions."""

    def __init__(self, targets: Tensor) -> None:
        tokens, device = len(targets), targets.device
        self.targets = targets
        self.largest = torch.full((tokens,), -torch.inf, device=device)
        self.sum = torch.zeros(tokens, dtype=torch.float64, device=device)
        self.true = torch.full((tokens,), torch.nan, dtype=torch.float64, device=device)
        self.squares = torch.zeros(tokens, dtype=torch.float64, device=device)
        self.top = torch.full((tokens, TOP), -torch.inf, device=device)
        self.top_ids = torch.full((tokens, TOP), -1, dtype=torch.int64, device=device)

    def add(self, start: int, z: Tensor) -> tuple[Tensor, Tensor]:
        """Take logits [tokens, n] of ids from `start`; (e^(z − m), factor by which earlier sums shrink)."""
        largest = torch.maximum(self.largest, z.amax(1))
        shrink = torch.exp(self.largest - largest).to(torch.float64)
        weights = torch.exp(z - largest[:, None])
        self.sum = self.sum * shrink + weights.sum(1, dtype=torch.float64)
        self.largest = largest
        self.squares += z.square().sum(1)
        here = (self.targets >= start) & (self.targets < start + z.shape[1])
        self.true[here] = z[here].gather(1, (self.targets[here] - start)[:, None])[:, 0].to(torch.float64)
        values, ids = z.topk(min(TOP, z.shape[1]), dim=1)
        values, ids = torch.cat((self.top, values), 1), torch.cat((self.top_ids, ids + start), 1)
        self.top, chosen = values.topk(TOP, dim=1)
        self.top_ids = ids.gather(1, chosen)
        return weights, shrink

    @property
    def lse(self) -> Tensor:
        """log Σ e^z, float64 [tokens]."""
        return self.largest.to(torch.float64) + self.sum.log()


class Pair:
    """Running sums of a reference against another model."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.cross, self.error = (torch.zeros(tokens, dtype=torch.float64, device=device) for _ in range(2))

    def add(self, weights: Tensor, shrink: Tensor, z: Tensor, w: Tensor) -> None:
        """Take logits of both; `weights` and `shrink` are the reference's."""
        gap = z - w
        # KL is a small difference of large sums: the products are added in float64, the squares need not be.
        self.cross = self.cross * shrink + (weights * gap).sum(1, dtype=torch.float64)
        self.error += gap.square_().sum(1)

    def scores(self, p: Softmax, q: Softmax, windows: int) -> TokenScores:
        """Everything as [windows, tokens] on the CPU."""
        kl = (self.cross / p.sum - (p.lse - q.lse)).clamp(min=0)
        shared = (p.top_ids[:, :, None] == q.top_ids[:, None, :]).any(2)
        columns = (
            kl, p.true - p.lse, q.true - q.lse, (p.top_ids[:, 0] == q.top_ids[:, 0]).double(), shared.double().mean(1),
            self.error, p.squares,
        )  # fmt: skip
        names = ("kl", "reference_logp", "other_logp", "top1", "top5", "error_squares", "reference_squares")
        return TokenScores(**{name: x.view(windows, -1).cpu() for name, x in zip(names, columns, strict=True)})


def block_rows(tokens: int, sides: int, memory_bytes: int) -> int:
    """Vocabulary rows of a block, so that float32 logits of all sides and three more arrays as large fit into `memory_bytes`."""
    return max(MIN_BLOCK, min(MAX_BLOCK, memory_bytes // (4 * tokens * (sides + 3))))


def aligned(streams: Sequence[Iterator[tuple[int, Tensor]]]) -> Iterator[tuple[int, list[Tensor]]]:
    """Blocks of several models cut to common runs of ids: ranks end their blocks at other places than a single one does."""
    held: list[tuple[int, Tensor]] = [next(stream) for stream in streams]
    while True:
        start = held[0][0]
        stop = min(first + block.shape[-1] for first, block in held)
        yield start, [block[..., : stop - start] for _, block in held]
        for index, (first, block) in enumerate(held):
            rest = block[..., stop - first :]
            if rest.shape[-1]:
                held[index] = stop, rest
            else:
                following = next(streams[index], None)
                if following is None:
                    return
                held[index] = following


def block_of(pairs: Sequence[tuple[str, str]], ids: Tensor, memory_bytes: int) -> int:
    """Vocabulary rows of a block when `pairs` are compared on `ids` [windows, T]."""
    return block_rows(ids[:, 1:].numel(), len({name for pair in pairs for name in pair}), memory_bytes)


def accompany(sides: Sequence[Side], block: int) -> None:
    """The part in `compare` of the processes that do not score: to compute their ranks' logits of `sides`, and hand them on.

    `sides` are those that all processes run, in the order of their names. They end their blocks at the same ids, so that they
    are asked for in the same order whatever else stands beside them in `compare`.
    """
    with torch.inference_mode():
        for _ in aligned([_blocks(side, block) for side in sides]):
            pass


def compare(
    sides: Mapping[str, Side], pairs: Sequence[tuple[str, str]], ids: Tensor, memory_bytes: int
) -> dict[tuple[str, str], TokenScores]:
    """Scores of each (reference, other) of `pairs` on `ids` int64 [windows, T]: of all tokens but the last of each window."""
    names = sorted({name for pair in pairs for name in pair})
    device = sides[names[0]].hidden.device
    targets = ids[:, 1:].flatten().to(device)
    block = block_of(pairs, ids, memory_bytes)
    softmax = {name: Softmax(targets) for name in names}
    sums = {pair: Pair(len(targets), device) for pair in pairs}
    with torch.inference_mode():
        streams = [_blocks(sides[name], block) for name in names]
        for start, blocks in aligned(streams):
            logits = dict(zip(names, blocks, strict=True))
            for name in names:
                weights, shrink = softmax[name].add(start, logits[name])
                for (p, q), pair in sums.items():
                    if p == name:
                        pair.add(weights, shrink, logits[p], logits[q])
    return {(p, q): pair.scores(softmax[p], softmax[q], len(ids)) for (p, q), pair in sums.items()}


def _blocks(side: Side, block: int) -> Iterator[tuple[int, Tensor]]:
    scored = side.model.final_norm(side.hidden[:, :-1].flatten(0, 1))
    return side.model.head_blocks(scored, block)
