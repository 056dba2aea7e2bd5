"""The decay of lightning layers: the formula, transformers' four buffers of it, and the comparison with stored ones.

slope_h is 2^(−8(h+1)/heads) for a power of two of heads, else slopes(m) ++ slopes(2m)[0::2][:heads−m] with m the largest
power of two below; layer i of L multiplies by 1 − i/(L−1) + 1e-5 (L = 1: by 1 + 1e-5). Source: the original modeling code.
"""

from __future__ import annotations

import numpy as np

from mxconv.errors import MalformedInput
from mxconv.mapping.minimax import DECAY_BUFFERS

# Absolute tolerance of a stored buffer: bf16 saves and transformers' own layer factor (L−1+1e-5) stay inside, wrong slopes
# are up to .9 off. slope_rate is small, so that its tolerance grows with it.
DECAY_TOLERANCE = 4e-3
SLOPE_TOLERANCE = (4e-3, 2e-5)


def head_slopes(heads: int) -> np.ndarray:
    """float64 [heads]: the slope of each head before the layer factor."""
    power = 1 << (heads.bit_length() - 1)
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    if power == heads:
        return slopes
    return np.concatenate([slopes, head_slopes(2 * power)[0::2][: heads - power]])


def layer_slopes(heads: int, layer: int, layers: int) -> np.ndarray:
    """float64 [heads]: the decay rate s of each head in `layer` (absolute index) of `layers`."""
    factor = 1.0 + 1e-5 if layers == 1 else 1.0 - layer / (layers - 1) + 1e-5
    return head_slopes(heads) * factor


def decay_shapes(heads: int, block: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the four buffers for `heads` heads and blocks of `block` tokens."""
    return {
        "slope_rate": (heads, 1, 1),
        "query_decay": (heads, block, 1),
        "key_decay": (heads, block, 1),
        "diagonal_decay": (1, heads, block, block),
    }


def decay_buffer(name: str, slopes: np.ndarray, block: int) -> np.ndarray:
    """float32: buffer `name` of a layer whose heads decay by `slopes` (float64 [heads])."""
    s = slopes[:, None, None]
    j = np.arange(1, block + 1, dtype=np.float64)
    if name == "slope_rate":
        value = s
    elif name == "query_decay":
        value = np.exp(-s * j[:, None])
    elif name == "key_decay":
        value = np.exp(-s * (block - j[:, None]))
    else:
        distance = j[:, None] - j[None, :]
        value = np.where(distance >= 0, np.exp(-s * np.maximum(distance, 0.0)), 0.0)[None]
    return value.astype(np.float32)


def compare_decay(
    name: str, stored: np.ndarray, slopes: np.ndarray, block: int, *, where: str, layer: int
) -> MalformedInput | None:
    """The problem with a stored float buffer, None when it is the formula's within the tolerance."""
    wanted = decay_buffer(name, slopes, block).astype(np.float64)
    difference = np.abs(stored.astype(np.float64).reshape(wanted.shape) - wanted)
    relative, absolute = SLOPE_TOLERANCE
    limit = relative * np.abs(wanted) + absolute if name == "slope_rate" else np.full_like(wanted, DECAY_TOLERANCE)
    if bool((difference <= limit).all()):  # a NaN is a difference too
        return None
    worst = int(np.nanargmax(np.where(np.isnan(difference), np.inf, difference - limit)))
    return MalformedInput(
        f"layer {layer}: decay buffer {name} is not the original model's",
        where=where,
        expected=f"{wanted.flat[worst]:.6g} at flat index {worst}",
        got=f"{stored.flat[worst]:.6g}",
        hint="this checkpoint computes other decays than MiniMax-M1's; --keep-decay makes mxconv's runtime use the stored ones",
    )


__all__ = ["DECAY_BUFFERS", "compare_decay", "decay_buffer", "decay_shapes", "head_slopes", "layer_slopes"]
