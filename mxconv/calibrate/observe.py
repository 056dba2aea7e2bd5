"""The calibration pass: the source runs through the runtime, TP 1 and float32, and each expert's inputs are measured.

Layers stream, experts stream inside them: at any moment one layer's attention weights, one widened expert and the hidden
states of all windows are in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from mxconv.apart import run_apart
from mxconv.calibrate.statistics import Key, Statistics
from mxconv.calibrate.tokens import tokens_digest
from mxconv.config import ModelConfig
from mxconv.errors import NumericError
from mxconv.progress import SILENT, Progress
from mxconv.quantize.rotation import hadamard
from mxconv.quantize.schemes import HADAMARD_BLOCKS
from mxconv.runtime import load

TENSOR_WISE_BLOCK = 32


def rotations(config: ModelConfig) -> tuple[int, ...]:
    """Rotations that some scheme applies to an expert input of this model: none, 32, and the Hadamard blocks that divide."""
    sizes = (config.hidden_size, config.intermediate_size)
    blocks = (TENSOR_WISE_BLOCK, *HADAMARD_BLOCKS)
    return (0, *(b for b in blocks if any(size % b == 0 for size in sizes)))


def calibrate(
    path: Path, ids: np.ndarray, *, source_digest: str, device: str = "cpu", keep_decay: bool = False, progress: Progress = SILENT,
    check: Callable[[], None] = lambda: None,
) -> Statistics:  # fmt: skip
    """Statistics of the checkpoint at `path` on windows `ids` (int32 [N, T]).

    `check` is called every moment, however long a layer takes, and may raise to end the pass; so does a KeyboardInterrupt.
    Raises NumericError when an activation is not finite, and what `runtime.load` raises.
    """

    def work(wanted: Callable[[], None]) -> Statistics:
        return _measure(path, ids, source_digest, device, keep_decay, progress, wanted)

    return run_apart(work, check)


def _measure(
    path: Path, ids: np.ndarray, source_digest: str, device: str, keep_decay: bool, progress: Progress, wanted: Callable[[], None]
) -> Statistics:
    """The pass itself; it asks `wanted` before each expert, which raises once nobody waits for the result."""
    model = load(path, tp=1, device=device, dtype=torch.float32, stream=True, keep_decay=keep_decay)
    config = model.config
    measured = rotations(config)
    values: dict[Key, float] = {}
    tokens = {(layer, expert): 0 for layer in range(config.num_layers) for expert in range(config.num_experts)}
    progress.start(f"calibrate on {ids.shape[0]} windows of {ids.shape[1]} tokens", 0)
    with torch.inference_mode():
        windows_NT = torch.from_numpy(ids.astype(np.int64))
        batch = model.batch(windows_NT)
        x = model.embed(windows_NT)
        for index in range(config.num_layers):

            def observe(expert: int, projection: str, inputs: Tensor, at: int = index) -> None:
                wanted()
                if projection == "up_gate_proj":
                    tokens[at, expert] += inputs.shape[0]
                for rotation in measured:
                    if rotation == 0 or inputs.shape[-1] % rotation == 0:
                        key = (at, expert, projection, rotation)
                        values[key] = max(values.get(key, 0.0), _absmax(inputs, rotation, key))

            with model.layer(index) as layer:
                x = layer(x, batch, observer=observe)
            wanted()
            progress.advance(0, f"layer {index + 1} of {config.num_layers}")
    progress.finish()
    return Statistics(
        source_digest=source_digest, tokens_digest=tokens_digest(ids), windows=ids.shape[0], window=ids.shape[1],
        rotations=measured, tokens=MappingProxyType(tokens), values=MappingProxyType(values),
    )  # fmt: skip


def _absmax(inputs: Tensor, rotation: int, key: Key) -> float:
    if not inputs.numel():
        return 0.0
    rotated = hadamard(inputs, rotation) if rotation else inputs
    value = float(rotated.abs().max())
    if not np.isfinite(value):
        raise NumericError(f"an activation is not finite in layer {key[0]}, expert {key[1]}, input of {key[2]}")
    return value
