"""The feed-forward of a layer: routed experts, with a shared expert beside them where there is one, or a dense mlp.

    p = softmax(router·h) in float32, the k largest divided by their sum;  y = Σ p·down(silu(gate h)·(up h))
    with a shared expert: y·(1 - c) + shared(h)·c,  c = sigmoid(coefficient·h) in float32

Each rank computes its columns of every expert; the ranks' results are summed once. Padded tokens are not routed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mxconv.errors import UsageError
from mxconv.runtime.linear import Activations, Projection, projection
from mxconv.runtime.loader import Weights
from mxconv.runtime.norm import statistics_dtype
from mxconv.runtime.packed import pack_experts
from mxconv.runtime.parallel import Group

Observer = Callable[[int, str, Tensor], None]
"""observer(expert, "up_gate_proj" | "down_proj", x [tokens, in]): the input of an expert GEMM, before rotation and quantization."""

CHUNK_TOKENS = 4096
"""Tokens of an expert are taken this many at a time."""

Pair = tuple[Projection, Projection]

Route = tuple[int, Tensor | None, Tensor | float]
"""(expert, indices of its tokens, their weights [n, 1]); for a single token no indices and one weight."""


def gated(pair: Pair, x: Tensor, activations: Activations, observe: Callable[[str, Tensor], None] | None = None) -> Tensor:
    """down(silu(gate x) · (up x)) of x [tokens, H]: one rank's part of the sum."""
    up_gate, down = pair
    if observe:
        observe("up_gate_proj", x)
    gate, up = up_gate(x, activations).chunk(2, dim=-1)
    inner = F.silu(gate).mul_(up)
    if observe:
        observe("down_proj", inner)
    return down(inner, activations)


class Experts:
    """A layer's expert weights by (name, rank): widened and kept (`keep`, routed ones if `keep_routed`), or widened anew."""

    def __init__(
        self, weights: Weights, layer: int, device: torch.device, dtype: torch.dtype, *, keep: bool, keep_routed: bool
    ) -> None:
        self._weights, self._layer, self._device, self._dtype = weights, layer, device, dtype
        self._keep, self._keep_routed = keep, keep_routed
        self._kept: dict[tuple[str, int], Pair] = {}

    def pair(self, stem: str, rank: int) -> Pair:
        """(up_gate, down) of `stem`: `experts.3`, `shared` or `mlp`."""
        found = self._kept.get((stem, rank))
        if found is None:
            keep = self._keep and (self._keep_routed or not stem.startswith("experts."))
            up_gate, down = (
                projection(self._weights, self._layer, f"{stem}.{name}", rank, self._device, self._dtype, keep=keep)
                for name in ("up_gate", "down")
            )
            found = up_gate, down
            if keep:
                self._kept[stem, rank] = found
        return found


class FeedForward:
    """The feed-forward of one layer over the ranks of `group`."""

    def __init__(
        self, weights: Weights, layer: int, group: Group, device: torch.device, dtype: torch.dtype, *, keep: bool
    ) -> None:
        names = weights.names(layer)
        self.group, self.per_token, wide = group, weights.config.experts_per_token, statistics_dtype(dtype)

        def whole(name: str) -> Tensor | None:
            return weights.dense(layer, name, group.ranks[0], wide).to(device) if name in names else None

        self.router, self.coefficient = whole("router"), whole("shared.coefficient")
        self.packed = pack_experts(weights, layer, group, device, dtype) if keep else None
        # What the kernels hold is not held twice: who asks for the definition (an observer, exact activations) widens one expert.
        self.experts = Experts(weights, layer, device, dtype, keep=keep, keep_routed=self.packed is None)
        self._rounds = weights.scheme is not None

    @property
    def capturable(self) -> bool:
        """Whether a call reads nothing back from the device: the definition asks there which experts have tokens."""
        return self.router is None or self.packed is not None

    def __call__(self, h: Tensor, mask: Tensor | None, activations: Activations, observer: Observer | None) -> Tensor:
        """[B, T, H] → [B, T, H]. Where `mask` bool [B, T] is false tokens are padding: what the result has there means nothing."""
        if self.packed is not None and observer is None and (activations == "quantized" or not self._rounds):
            return self._by_kernel(h, mask)
        tokens = h.flatten(0, 1) if mask is None else h[mask]
        routes = None if self.router is None else self._route(tokens, self.router)
        mixed = self._mixed(tokens)
        y = self.group.sum(lambda rank: self._partial(rank, tokens, routes, mixed, activations, observer)).to(h.dtype)
        if mask is None:
            return y.view(h.shape)
        out = torch.zeros_like(h)
        out[mask] = y
        return out

    def _by_kernel(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """The same through the kernels, on codes; no number comes back from the device."""
        if self.router is None or self.packed is None:
            raise UsageError("this layer has no experts for kernels")
        packed = self.packed
        from mxconv.runtime.kernels.moe import route

        tokens = h.flatten(0, 1)
        chosen, weights = route(tokens, self.router, self.per_token)
        if mask is not None:
            chosen = chosen.masked_fill(~mask.flatten()[:, None], -1)
        mixed = self._mixed(tokens)
        y = self.group.sum(lambda rank: self._beside(packed[rank](tokens, chosen, weights), rank, tokens, mixed, "quantized"))
        return y.to(h.dtype).view(h.shape)

    def _mixed(self, tokens: Tensor) -> Tensor | None:
        """The shared expert's share c [tokens, 1], None where there is none."""
        if self.coefficient is None:
            return None
        return torch.sigmoid(F.linear(tokens.to(self.coefficient.dtype), self.coefficient))

    def _beside(self, y: Tensor, rank: int, tokens: Tensor, mixed: Tensor | None, activations: Activations) -> Tensor:
        """`y` of the routed experts mixed with the shared expert's output."""
        if mixed is None:
            return y
        beside = gated(self.experts.pair("shared", rank), tokens, activations)
        return y * (1 - mixed) + beside * mixed

    def _route(self, tokens: Tensor, router: Tensor) -> list[Route]:
        """The routes of every expert that has tokens, in order."""
        shares = torch.softmax(F.linear(tokens.to(router.dtype), router), dim=-1)
        top, chosen = torch.topk(shares, self.per_token, dim=-1)
        top = top / top.sum(-1, keepdim=True)
        if len(tokens) == 1:
            return [(expert, None, weight) for expert, weight in sorted(zip(chosen[0].tolist(), top[0].tolist(), strict=True))]
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(router)).tolist()
        owners = order // self.per_token
        ordered = top.flatten()[order, None]
        parts = zip(counts, owners.split(counts), ordered.split(counts), strict=True)
        return [(expert, rows, weight) for expert, (count, rows, weight) in enumerate(parts) if count]

    def _partial(
        self, rank: int, tokens: Tensor, routes: list[Route] | None, mixed: Tensor | None, activations: Activations,
        observer: Observer | None,
    ) -> Tensor:  # fmt: skip
        """One rank's part of the output, [tokens, H] in the statistics dtype."""
        if routes is None:
            y = gated(self.experts.pair("mlp", rank), tokens, activations).to(statistics_dtype(tokens.dtype))
        else:
            y = tokens.new_zeros(tokens.shape, dtype=statistics_dtype(tokens.dtype))
            for route in routes:
                self._add_expert(y, route, rank, tokens, activations, observer)
        return self._beside(y, rank, tokens, mixed, activations)

    def _add_expert(
        self, y: Tensor, route: Route, rank: int, tokens: Tensor, activations: Activations, observer: Observer | None
    ) -> None:
        expert, rows, weight = route
        pair = self.experts.pair(f"experts.{expert}", rank)
        observe = None if observer is None else lambda name, x: observer(expert, name, x)
        if rows is None or not isinstance(weight, Tensor):
            y.add_(gated(pair, tokens, activations, observe), alpha=float(weight))
            return
        for start, part in zip(range(0, len(rows), CHUNK_TOKENS), rows.split(CHUNK_TOKENS), strict=True):
            out = gated(pair, tokens.index_select(0, part), activations, observe)
            y.index_add_(0, part, out * weight[start : start + CHUNK_TOKENS])
