"""Sizes of a rank: how many heads, columns and vocabulary rows each of R tensor-parallel ranks holds."""

from __future__ import annotations

import math

from mxconv.config import ModelConfig
from mxconv.errors import UsageError

VOCABULARY_MULTIPLE = 64


def padded_vocabulary(config: ModelConfig) -> int:
    """Vocabulary size rounded up to a multiple of 64, as serving engines pad the embedding."""
    return -(-config.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def vocabulary_rows(config: ModelConfig, name: str, tp: int) -> int:
    """Rows of `embed` or `lm_head` that each of `tp` ranks holds.

    The embedding is always padded to a multiple of 64; the head only when `tp` does not divide the vocabulary.
    """
    if name == "lm_head" and config.vocab_size % tp == 0:
        return config.vocab_size // tp
    return padded_vocabulary(config) // tp


def divides(config: ModelConfig, tp: int) -> bool:
    """Whether the model cuts into `tp` ranks: heads, KV heads (or replicas of them), columns and padded vocabulary."""
    kv = config.num_key_value_heads
    whole = (config.num_attention_heads, config.intermediate_size, padded_vocabulary(config), *config.shared_intermediate_sizes)
    return all(size % tp == 0 for size in whole) and (kv % tp == 0 or tp % kv == 0)


def check_tp(config: ModelConfig, tp: int) -> None:
    """Raise UsageError, naming the sizes that work, when the model does not cut into `tp` ranks."""
    if tp < 1 or not divides(config, tp):
        valid = [size for size in range(1, config.num_attention_heads + 1) if divides(config, size)]
        raise UsageError(
            f"the model does not cut into {tp} tensor-parallel ranks",
            expected=f"tp {' or '.join(map(str, valid))}", got=tp,
            hint="heads, KV heads (or their replicas), intermediate sizes and the padded vocabulary must divide by it",
        )  # fmt: skip


def kv_heads(config: ModelConfig, tp: int, rank: int) -> tuple[int, int]:
    """First and one past the last KV head of `rank`; above one rank a KV head, replicas share it in order."""
    kv = config.num_key_value_heads
    if kv % tp == 0:
        return rank * kv // tp, (rank + 1) * kv // tp
    head = rank * kv // tp
    return head, head + 1


def axis_sizes(config: ModelConfig, layer: int | None, ranks: int) -> dict[str, int]:
    """Axis letter (see layouts.py) → size in files that hold one of `ranks` ranks; V is set by `vocabulary_rows`."""
    heads = config.num_attention_heads // ranks
    # Lightning layers have as many keys and values as queries; the letter K is only used in softmax layers, F in both.
    kv = max(1, config.num_key_value_heads // ranks)
    grouped = layer is not None and config.layer_types[layer] == "full_attention"
    return {
        "N": heads, "K": kv, "D": config.head_dim, "H": config.hidden_size, "I": config.intermediate_size // ranks,
        "S": 0 if layer is None else config.shared_intermediate_sizes[layer] // ranks,
        "E": config.num_experts, "F": heads + 2 * (kv if grouped else heads), "3": 3, "2": 2, "1": 1, "V": config.vocab_size,
    }  # fmt: skip


def product(sizes: dict[str, int], axes: str) -> int:
    """The size of fused `axes`."""
    return math.prod(sizes[axis] for axis in axes)
