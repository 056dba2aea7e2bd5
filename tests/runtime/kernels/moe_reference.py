"""Random experts, and the plain twin of the MoE kernels: runtime.linear in float32 on the same codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mxconv.quantize.schemes import SCHEMES, Scheme, get_scheme
from mxconv.runtime.coded import Coded, rotate, rotated_weight, scale_shape
from mxconv.runtime.linear import quantize_activation

VARIANTS = (
    *SCHEMES.values(), get_scheme("w4afp8", group_size=256, hadamard_block=256), get_scheme("w4afp8_static", group_size="channel")
)  # fmt: skip


def variant_name(scheme: Scheme) -> str:
    return f"{scheme.name}-{scheme.group_size or scheme.granularity}"


def random_coded(scheme: Scheme, out: int, inner: int, activation_scale: float, generator: torch.Generator) -> Coded:
    """Every code of the scheme occurs, in stored memory order [in, out]; scales differ by up to a factor of ten."""
    if scheme.weight == "int4":
        codes = torch.randint(-7, 8, (inner, out), generator=generator, dtype=torch.int8)
    else:
        codes = torch.randn(inner, out, generator=generator).mul(60).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.int8)
    scale = (torch.rand(scale_shape(scheme, out, inner), generator=generator) + 0.1) / inner**0.5
    if scheme.weight == "e4m3":
        scale = scale / 60
    activation = torch.tensor([activation_scale]) if scheme.static else None
    return Coded(codes=codes.t(), weight_scale=scale, activation_scale=activation)


def random_experts(scheme: Scheme, experts: int, hidden: int, intermediate: int, seed: int = 0) -> list[tuple[Coded, Coded]]:
    """(up_gate [2I, H], down [H, I]) of each expert, with static scales that clip a few activations."""
    generator = torch.Generator().manual_seed(seed)
    divided = 448.0 if scheme.activation.stored_divided else 1.0
    wide = 3.0 * max(1.0, scheme.rotation["up_gate_proj"] ** 0.5)
    narrow = 3.0 * max(1.0, scheme.rotation["down_proj"] ** 0.5)
    return [
        (
            random_coded(scheme, 2 * intermediate, hidden, wide * (1 + e / 8) / divided, generator),
            random_coded(scheme, hidden, intermediate, narrow * (1 + e / 8) / divided, generator),
        )
        for e in range(experts)
    ]


def random_inputs(tokens: int, hidden: int, experts: int, per_token: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """x float32 [T, H] of tokens of different size, one of many zero; chosen int64 and weights float32 [T, k], distinct experts."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator) * torch.logspace(0.5, -1, tokens)[:, None]
    if tokens > 2:
        x[tokens // 2] = 0.0
    chosen = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :per_token].contiguous()
    weights = torch.rand(tokens, per_token, generator=generator) + 0.1
    return x, chosen, weights / weights.sum(-1, keepdim=True)


def project(coded: Coded, scheme: Scheme, projection: str, x: Tensor) -> Tensor:
    """x [tokens, in] through one quantized projection as runtime.linear defines it, in the dtype of x."""
    rint = scheme.activation.rint_down_input and projection == "down_proj"
    rotated = rotate(x, scheme.rotation[projection])
    quantized = quantize_activation(rotated, scheme.activation, coded.activation_scale, rint=rint)
    return quantized @ rotated_weight(coded, scheme, x.dtype).t()


def reference(scheme: Scheme, pairs: list[tuple[Coded, Coded]], x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Σ_j weights · down(silu(gate x)·(up x)) in the dtype of x, activations quantized, expert by expert."""
    y = torch.zeros_like(x)
    for expert, (up_gate, down) in enumerate(pairs):
        tokens, j = (chosen == expert).nonzero(as_tuple=True)
        if len(tokens):
            gate, up = project(up_gate, scheme, "up_gate_proj", x[tokens]).chunk(2, -1)
            y.index_add_(0, tokens, project(down, scheme, "down_proj", F.silu(gate) * up) * weights[tokens, j, None].to(x.dtype))
    return y
