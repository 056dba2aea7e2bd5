"""The experts of a layer as the kernels hold them: codes repacked at load one expert at a time, unquantized ones side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from mxconv.dispatch import triton_wanted
from mxconv.errors import UsageError
from mxconv.runtime.loader import Weights
from mxconv.runtime.parallel import Group

if TYPE_CHECKING:
    from mxconv.runtime.kernels.moe import MoeExperts
    from mxconv.runtime.kernels.moe_dense import DenseExperts


def pack_experts(
    weights: Weights, layer: int, group: Group, device: torch.device, dtype: torch.dtype
) -> Mapping[int, MoeExperts | DenseExperts] | None:
    """Rank → its experts of `layer` for the kernels; None where the layer has no routed experts or dispatch takes plain torch."""
    config = weights.config
    if "router" not in weights.names(layer):
        return None
    stored = weights.coded(layer, "experts.0.down", group.ranks[0]) is not None
    sizes = {"hidden": config.hidden_size, "inner": config.intermediate_size // weights.tp}
    if not triton_wanted("moe" if stored else "moe_dense", device, dtype, **sizes):
        return None
    pack = _pack_coded if stored else _pack_dense
    return {rank: pack(weights, layer, rank, device, dtype) for rank in group.ranks}


def _pack_coded(weights: Weights, layer: int, rank: int, device: torch.device, dtype: torch.dtype) -> MoeExperts:
    from mxconv.runtime.kernels.moe import MoeExperts

    config = weights.config
    if weights.scheme is None:
        raise UsageError("codes without a scheme")
    experts = MoeExperts(weights.scheme, config.num_experts, config.hidden_size, config.intermediate_size // weights.tp, device)
    for expert in range(config.num_experts):
        up_gate, down = (weights.coded(layer, f"experts.{expert}.{name}", rank) for name in ("up_gate", "down"))
        if up_gate is None or down is None:
            raise UsageError(f"layer {layer} holds some experts quantized and some not", got=f"expert {expert}")
        experts.put(expert, up_gate, down)
    return experts


def _pack_dense(weights: Weights, layer: int, rank: int, device: torch.device, dtype: torch.dtype) -> DenseExperts:
    from mxconv.runtime.kernels.moe_dense import DenseExperts

    config = weights.config
    experts = DenseExperts(config.num_experts, config.hidden_size, config.intermediate_size // weights.tp, dtype, device)
    for expert in range(config.num_experts):
        up_gate, down = (weights.dense(layer, f"experts.{expert}.{name}", rank, dtype) for name in ("up_gate", "down"))
        experts.put(expert, up_gate.to(device), down.to(device))
    return experts
