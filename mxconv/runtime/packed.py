"""The experts of a layer as the kernels hold them: codes repacked at load, one MoeExperts a rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from mxconv.dispatch import triton_wanted
from mxconv.runtime.loader import Weights
from mxconv.runtime.parallel import Group

if TYPE_CHECKING:
    from mxconv.runtime.kernels.moe import MoeExperts


def pack_experts(
    weights: Weights, layer: int, group: Group, device: torch.device, dtype: torch.dtype
) -> Mapping[int, MoeExperts] | None:
    """Rank → its experts of `layer` for the kernels; None where the layer has no routed experts or dispatch takes plain torch."""
    config = weights.config
    inner = config.intermediate_size // weights.tp
    if "router" not in weights.names(layer) or not triton_wanted("moe", device, dtype, hidden=config.hidden_size, inner=inner):
        return None
    from mxconv.runtime.kernels.moe import MoeExperts

    packed = {}
    for rank in group.ranks:
        halves = []
        for projection in ("up_gate", "down"):
            names = [f"experts.{expert}.{projection}" for expert in range(config.num_experts)]
            halves.append([weights.coded(layer, name, rank) or weights.dense(layer, name, rank, dtype) for name in names])
        scheme = weights.scheme if weights.coded(layer, "experts.0.down", rank) is not None else None
        packed[rank] = MoeExperts.pack(scheme, halves[0], halves[1], device)
    return packed
