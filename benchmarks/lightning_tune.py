"""Which launches are fastest here: what the tables in `mxconv/runtime/kernels/lightning_*.py` were chosen from.

    python benchmarks/lightning_tune.py [--head-dim 128] [--dtype bfloat16] [--tokens 16384] [--heads 64]

Tries the launches below on one prefill and one decode step (a launch that does not fit the GPU is printed with
its error), and prints them from fast to slow. Tuning is never done at run time: a first call costs one compilation.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
import triton

from mxconv.runtime.kernels import lightning_decode as decode
from mxconv.runtime.kernels import lightning_prefill as prefill
from mxconv.runtime.kernels.lightning_launches import LAUNCHES, Launch, Launches

CHUNKED = list(itertools.product((32, 64), (32, 64), (4, 8), (1, 2, 3, 4)))
HOPPER_STAGES = (2, 3, 4)
STEPS = list(itertools.product((16, 32, 64, 128), (1, 2, 4, 8)))


def prefill_launches(size: int, half: bool) -> Iterator[tuple[str, Launches]]:
    """Launches of the output pass, each with the state pass of the table."""
    best = LAUNCHES[max(64, 1 << (size - 1).bit_length()), half]
    for shape in CHUNKED:
        launch = Launch(**dict(zip(("columns", "chunk", "warps", "stages"), shape, strict=True)))
        yield f"{launch}", dataclasses.replace(best, outputs=launch, hopper=None)
    if best.hopper:
        for stages in HOPPER_STAGES:
            launch = dataclasses.replace(best.hopper, stages=stages)
            yield f"hopper {launch}", dataclasses.replace(best, hopper=launch)


def ranked(runs: Iterator[tuple[str, Callable[[], object]]]) -> None:
    """Time each and print them from fast to slow."""
    times = []
    for name, run in runs:
        try:
            times.append((triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median"), name))
        except (RuntimeError, triton.runtime.errors.TritonError) as error:
            print(f"   fails  {name}: {str(error).splitlines()[0][:80]}")
    for ms, name in sorted(times):
        print(f"{ms:8.4f}  {name}", flush=True)


def main() -> None:
    """Print two rankings, in ms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--slots", type=int, default=64)
    options = parser.parse_args()
    dtype, heads, size = getattr(torch, options.dtype), options.heads, options.head_dim
    rates = torch.rand(heads, device="cuda") * 0.1
    q, k, v = (F.silu(torch.randn(options.tokens, heads, size, device="cuda")).to(dtype) for _ in range(3))
    print(f"prefill, {options.tokens} tokens")
    candidates = prefill_launches(size, dtype.itemsize == 2)
    ranked((name, lambda it=it: prefill.lightning_prefill(q, k, v, rates, launches=it)) for name, it in candidates)
    pool, slots = torch.randn(options.slots, heads, size, size, device="cuda"), torch.arange(options.slots, device="cuda")
    q, k, v = (x[: options.slots] for x in (q, k, v))
    print(f"decode, {options.slots} slots")
    steps = [decode.Launch(columns=columns, warps=warps) for columns, warps in STEPS]
    ranked((f"{it}", lambda it=it: decode.lightning_decode(q, k, v, rates, pool, slots, launch=it)) for it in steps)


if __name__ == "__main__":
    main()
