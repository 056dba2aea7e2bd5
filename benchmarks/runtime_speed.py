"""Speed of the runtime: prefill and decode of one sequence, tokens a second, best and median of several runs.

    python benchmarks/runtime_speed.py [MODEL …] [--device cpu] [--threads N] [--tokens 1024] [--steps 128] [--dtype float32]

MODEL is a checkpoint or artifact folder; the bundled demo model by default. Prefill gives the logits of all positions.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mxconv.data import demo_model
from mxconv.runtime import load
from mxconv.runtime.model import Model


def seconds(run: Callable[[], object], repeats: int, device: str) -> list[float]:
    """Seconds of each of `repeats` runs, after one that warms up."""
    taken = []
    for repeat in range(repeats + 1):
        if device != "cpu":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        if repeat:
            taken.append(time.perf_counter() - began)
    return taken


def decode(model: Model, prompt: torch.Tensor, steps: int) -> Callable[[], None]:
    """Decodes `steps` tokens behind `prompt`, which is prefilled once."""
    cache = model.cache()
    model(prompt, cache=cache, last=1)
    token = prompt[:, -1:]

    def run() -> None:
        with torch.inference_mode():
            for _ in range(steps):
                model(token, cache=cache, last=1)

    return run


def main() -> None:
    """Print one line a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads, {options.dtype}; tokens/s: best (median)")
    for folder in options.models or [demo_model()]:
        model = load(folder, device=options.device, dtype=getattr(torch, options.dtype))
        ids = torch.randint(0, model.config.vocab_size, (1, options.tokens), generator=torch.Generator().manual_seed(0))
        prefill = [options.tokens / s for s in seconds(lambda: model(ids), options.repeats, options.device)]  # noqa: B023
        steps = [options.steps / s for s in seconds(decode(model, ids[:, :64], options.steps), options.repeats, options.device)]
        print(
            f"{folder.name}: prefill {max(prefill):,.0f} ({statistics.median(prefill):,.0f}), "
            f"decode {max(steps):,.0f} ({statistics.median(steps):,.0f})"
        )


if __name__ == "__main__":
    main()
