"""CPU speed of every scheme's encoder on MiniMax-M1's expert shapes, beside the reference: `python -m benchmarks.quantize_cpu`.

GB/s of bf16 input, one torch thread, the transposed store into the whole output included. Each figure is the best of `--repeat`
runs over `--rows` rows of a matrix [out, in] of random weights; the source lies in memory, not in cache. Every timed result is
compared with the reference's. tensor_wise_fp8 reads and rotates the weights twice.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor

from mxconv.quantize import packing, reference
from mxconv.quantize.fast import ProjectionEncoder
from mxconv.quantize.schemes import SCHEMES, Scheme

SHAPES = {"up_gate_proj": (9216, 6144), "down_proj": (6144, 9216)}  # w1 or w3; w2


def best_seconds(work: Callable[[], object], repeat: int) -> float:
    """The shortest of `repeat` runs, after one that is not counted."""
    work()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def encode_whole(encoder: ProjectionEncoder, weight: Tensor, codes: Tensor, scales: Tensor, block: int) -> None:
    """What an executor does with a matrix: row blocks in, columns of the stored tensor out."""
    scale = None
    starts = range(0, weight.shape[0], block)
    if encoder.passes == 2:
        largest = 0.0
        for r in starts:
            largest = encoder.observe(weight[r : r + block], largest)
        scale = reference.tensor_scale(largest)
    lines = encoder.rows_multiple
    for r in starts:
        target = scales if encoder.passes == 2 else scales[r // lines : (r + block) // lines]
        encoder.encode_into(weight[r : r + block], codes[:, r : r + block], target, scale)


def measure(scheme: Scheme, projection: str, rows: int, repeat: int) -> str:
    """One line of the table."""
    out_features, in_features = SHAPES[projection]
    weight = (torch.randn(min(rows, out_features), in_features, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    encoder = ProjectionEncoder(scheme, projection, out_features, in_features)
    codes = torch.empty(packing.stored_codes_shape(scheme, *weight.shape), dtype=torch.int8)
    scales = torch.empty(reference.scale_shape(scheme, *weight.shape))
    size = 2 * weight.numel() / 1e9
    block = max(encoder.tile_rows, encoder.rows_multiple)
    fast = size / best_seconds(lambda: encode_whole(encoder, weight, codes, scales, block), repeat)
    coded = reference.encode(weight, scheme, projection)
    same = torch.equal(packing.store_codes(coded.codes, scheme), codes) and torch.equal(coded.scale, scales)
    plain = size / best_seconds(lambda: packing.store_codes(reference.encode(weight, scheme, projection).codes, scheme), 2)
    verdict = "identical" if same else "DIFFERENT"
    return f"{scheme.name:17s} {projection:13s} {fast:6.2f} {plain:9.2f} {fast / plain:6.1f}x   {verdict}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048, help="rows of the matrix that are encoded (2048)")
    parser.add_argument("--repeat", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, GB/s of bf16 input")
    print(f"{'scheme':17s} {'projection':13s} {'fast':>6s} {'reference':>9s}")
    for scheme in SCHEMES.values():
        for projection in SHAPES:
            print(measure(scheme, projection, arguments.rows, arguments.repeat), flush=True)


if __name__ == "__main__":
    main()
