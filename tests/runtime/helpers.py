"""Measures and shapes that the runtime's tests share."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxconv.runtime import Model
from mxconv.runtime.coded import rotate

FLOAT32_BAR, FLOAT64_BAR = 2e-6, 1e-7
QUANTIZABLE: dict[str, Any] = {"hidden": 256, "intermediate": 512, "heads": 8, "kv_heads": 2, "vocab": 200, "layers": "lsl"}
"""A small shape that every scheme can hold at 1, 2 and 4 ranks; its vocabulary is no multiple of 64."""


def error(got: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    got, expected = got.to(torch.float64), expected.to(torch.float64)
    return float((got - expected).norm() / expected.norm())


def gathered_absmax(model: Model, ids: Tensor, rotation: dict[str, int] | None = None) -> dict[tuple[int, int, str], float]:
    """(layer, expert, projection) → max |x| of the projection's rotated inputs over `ids`; 1.0 for experts without tokens."""
    found = {
        (layer, expert, projection): 0.0
        for layer in range(model.config.num_layers)
        for expert in range(model.config.num_experts)
        for projection in ("up_gate_proj", "down_proj")
    }
    x, batch = model.embed(ids), model.batch(ids)
    for index in range(model.config.num_layers):

        def observe(expert: int, projection: str, inputs: Tensor, index: int = index) -> None:
            rotated = rotate(inputs, (rotation or {}).get(projection, 0))
            found[index, expert, projection] = max(found[index, expert, projection], float(rotated.abs().max()))

        with model.layer(index) as layer:
            x = layer(x, batch, observer=observe)
    return {key: value or 1.0 for key, value in found.items()}


def smallest_gap(model: Model, ids: Tensor) -> float:
    """The smallest distance of the last chosen expert's share from the next one's, over all tokens and layers.

    Below about 1e-6 two right float32 forwards may choose different experts.
    """
    gaps = []
    x, batch = model.embed(ids), model.batch(ids)
    for index in range(model.config.num_layers):
        with model.layer(index) as layer:
            feed_forward = layer.feed_forward
            route = feed_forward._route

            def watched(tokens: Tensor, router: Tensor, route: Any = route, k: int = feed_forward.per_token) -> Any:
                shares = torch.softmax(tokens.to(router.dtype) @ router.T, -1).sort(-1, descending=True).values
                if shares.shape[1] > k:
                    gaps.append(float((shares[:, k - 1] - shares[:, k]).min()))
                return route(tokens, router)

            feed_forward._route = watched  # type: ignore[method-assign]
            x = layer(x, batch)
            feed_forward._route = route  # type: ignore[method-assign]
    return min(gaps, default=1.0)


def split_call(model: Model, ids: Tensor, cuts: list[int], mask: Tensor | None = None, **kwargs: object) -> Tensor:
    """Logits of `ids` given to the model in pieces [0, cuts[0]), [cuts[0], cuts[1]) … with one cache."""
    cache, edges = model.cache(), [0, *cuts, ids.shape[1]]
    pieces = [
        model(ids[:, a:b], cache=cache, mask=None if mask is None else mask[:, a:b], **kwargs)  # type: ignore[arg-type]
        for a, b in pairwise(edges)
    ]
    return torch.cat(pieces, dim=1)


def resave(folder: Path, change: object) -> None:
    """Rewrite the single `model.safetensors` of `folder` after `change(tensors)` edited them."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)  # type: ignore[operator]
    save_file(tensors, file, metadata={"format": "pt"})
