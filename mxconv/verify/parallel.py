"""The ranks of one artifact against each other: what must be the same in several of them is, and padding is zero.

Codes and scales are cut out of one quantization, so that the ranks reassemble to one tensor bit for bit: a scale that covers
weights of several ranks (a channel of `down_proj`, a whole tensor) stands in all of them, as do replicated tensors, replicas of
KV heads and activation scales. No source is needed to see that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mxconv.config import FULL
from mxconv.quantize.schemes import Scheme
from mxconv.runtime.coded import Coded
from mxconv.runtime.loader import VOCABULARY_WEIGHTS, Weights
from mxconv.verify.findings import Finding
from mxconv.verify.numerics import same_bits

# Weights that every rank holds whole; all others are cut.
REPLICATED = frozenset(("attn_norm", "mlp_norm", "router", "shared.coefficient", "final_norm"))
CHECKS = ("replicated tensors", "KV replicas", "shared scales", "padding")


def copies(weights: Weights, layer: int | None, name: str) -> int:
    """How many neighbouring ranks must hold the same copy of an unquantized weight: 1 for what is cut."""
    if name in REPLICATED:
        return weights.tp
    grouped = layer is not None and weights.config.layer_types[layer] == FULL and name in ("k", "v")
    return max(1, weights.tp // weights.config.num_key_value_heads) if grouped else 1


def differing_copies(weights: Weights, layer: int | None, name: str, parts: Sequence[Tensor]) -> Iterator[Finding]:
    """Ranks whose copy is not that of the first rank that must hold the same; `parts` is one tensor a rank."""
    each = copies(weights, layer, name)
    check = "KV replicas" if name in ("k", "v") else "replicated tensors"
    for rank, part in enumerate(parts):
        first = rank - rank % each
        if not _same(part, parts[first]):
            yield Finding(
                check=check, what=f"differs from the copy of rank {first}", rank=rank,
                tensor=" ".join(weights.stored(layer, name, rank)), place=name if name in ("k", "v") else None,
            )  # fmt: skip


def differing_scales(weights: Weights, layer: int, name: str, coded: Sequence[Coded | None]) -> Iterator[Finding]:
    """Scales that cover several ranks and are not the same in all, and ranks that hold an expert in another form."""
    first = coded[0]
    for rank, mine in enumerate(coded):
        tensor = weights.stored(layer, name, rank)
        if (mine is None) != (first is None):
            yield Finding(check="shared scales", what="quantized in some ranks and not in others", tensor=tensor[0], rank=rank)
        if mine is None or first is None or weights.scheme is None:
            continue
        if _covers_ranks(weights.scheme, name) and not _same(mine.weight_scale, first.weight_scale):
            yield Finding(
                check="shared scales", what="weight_scale covers all ranks and differs from that of rank 0", tensor=tensor[1],
                rank=rank,
            )  # fmt: skip
        if mine.activation_scale is not None and first.activation_scale is not None:
            ours, theirs = float(mine.activation_scale), float(first.activation_scale)
            if ours != theirs:
                yield Finding(
                    check="shared scales", what="activation_scale differs from that of rank 0", tensor=tensor[2], rank=rank,
                    expected=f"{theirs:.8g}", got=f"{ours:.8g}",
                )  # fmt: skip


def padding(weights: Weights, name: str, rank: int) -> Iterator[Finding]:
    """Rows of `embed` or `lm_head` behind the vocabulary that are not zero."""
    each = weights.rank_rows(name)
    start = min(max(weights.config.vocab_size - rank * each, 0), each)
    if name in VOCABULARY_WEIGHTS and start < each and bool(weights.rows(name, rank, start, each).any()):
        yield Finding(
            check="padding", what="rows behind the vocabulary are not zero", tensor=weights.stored(None, name, rank)[0], rank=rank,
            place=f"rows {start}-{each - 1}",
        )  # fmt: skip


def _covers_ranks(scheme: Scheme, name: str) -> bool:
    return scheme.granularity == "tensor" or (scheme.granularity == "channel" and name.endswith("down"))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*same_bits(a, b))
