"""Decay rates that a checkpoint or artifact stores, held against the formula (formats.md §1, "Reading minimax").

transformers saves four buffers for each lightning layer of s [heads]: `slope_rate` s, `query_decay` e^(-s·j) and `key_decay`
e^(-s(m-j)) for j = 1 … m, `diagonal_decay` e^(-s(i-j)) for i ≥ j and 0 above. Models trained with transformers' own slopes
differ from the original formula, which would change every logit silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mxconv.config import LINEAR, ModelConfig
from mxconv.errors import MalformedInput, printable

# bf16 saves and transformers' own layer factor stay inside these; wrong slopes are up to .9 off.
FACTOR_TOLERANCE = 4e-3
RATE_TOLERANCE = (4e-3, 2e-5)


def buffer_shapes(heads: int, block: int) -> dict[str, tuple[int, ...]]:
    """Shape of each buffer for blocks of `block` tokens."""
    return {
        "slope_rate": (heads, 1, 1), "query_decay": (heads, block, 1), "key_decay": (heads, block, 1),
        "diagonal_decay": (1, heads, block, block),
    }  # fmt: skip


def _expected(name: str, rates: Tensor, block: int) -> Tensor:
    s = rates[:, None, None]
    j = torch.arange(1, block + 1, dtype=torch.float64)[:, None]
    gap = j - j.T
    factor = {
        "slope_rate": lambda: s,
        "query_decay": lambda: torch.exp(-s * j),
        "key_decay": lambda: torch.exp(-s * (block - j)),
        "diagonal_decay": lambda: torch.where(gap >= 0, torch.exp(-s * gap.clamp(min=0)), 0.0)[None],
    }
    return factor[name]()


def _follows(name: str, stored: Tensor, rates: Tensor, block: int) -> bool:
    """Whether a stored buffer is the one of `rates`; NaN follows nothing."""
    expected = _expected(name, rates, block)
    relative, absolute = RATE_TOLERANCE if name == "slope_rate" else (0.0, FACTOR_TOLERANCE)
    return bool((stored.to(torch.float64) - expected).abs().le(relative * expected.abs() + absolute).all())


def check_formula(buffers: Mapping[str, Tensor], rates: Sequence[float], *, layer: int, block: int) -> None:
    """Raise MalformedInput unless the stored `buffers` of `layer` are those of `rates`."""
    formula = torch.tensor(rates, dtype=torch.float64)
    differing = [name for name, stored in buffers.items() if not _follows(name, stored, formula, block)]
    if differing:
        raise MalformedInput(
            f"layer {layer}: the stored decay buffers differ from the formula of the original model",
            where=_name(layer, differing[0]),
            expected=f"slopes of {[round(s, 6) for s in rates[:4]]} …",
            hint="a checkpoint trained with transformers' own slopes needs --keep-decay (keep_decay=True)",
        )  # fmt: skip


def own_rates(buffers: Mapping[str, Tensor], *, layer: int, block: int) -> list[float]:
    """The rates that the stored `buffers` of `layer` hold; MalformedInput when there are none or they contradict each other."""
    stored = buffers.get("slope_rate")
    if stored is None or not bool((stored >= 0).all() & stored.isfinite().all()):
        raise MalformedInput(f"layer {layer}: the stored decay buffers hold no usable slope_rate", where=_name(layer, "slope_rate"))
    own = stored.flatten().to(torch.float64)
    wrong = [name for name, values in buffers.items() if not _follows(name, values, own, block)]
    if wrong:
        raise MalformedInput(
            f"layer {layer}: the stored decay buffers contradict each other", where=_name(layer, wrong[0]),
            expected="the decay that slope_rate gives",
        )  # fmt: skip
    return own.tolist()


def _name(layer: int, buffer: str) -> str:
    return f"model.layers.{layer}.self_attn.{buffer}"


def block_rates(config: ModelConfig, where: str) -> dict[int, list[float]]:
    """Layer → rates, one a head, that an artifact's `mxconv` block keeps as hex floats under `slopes`; mostly empty.

    Raises MalformedInput when they are not written as that.
    """
    kept = (config.artifact or {}).get("slopes") or {}
    if not isinstance(kept, Mapping):
        raise MalformedInput("mxconv block: slopes is not an object", where=where)
    layers = {str(layer): layer for layer, kind in enumerate(config.layer_types) if kind == LINEAR}
    found = {}
    for key, values in kept.items():
        try:
            rates = [float.fromhex(value) for value in values]
        except (TypeError, ValueError):
            raise MalformedInput(f"mxconv block: slopes of layer {printable(key)} are not hex floats", where=where) from None
        if key not in layers or len(rates) != config.num_attention_heads or not all(0.0 <= rate < float("inf") for rate in rates):
            raise MalformedInput(
                f"mxconv block: slopes of layer {printable(key)}", where=where,
                expected=f"a lightning layer, {config.num_attention_heads} finite rates of at least 0",
            )  # fmt: skip
        found[layers[key]] = rates
    return found
