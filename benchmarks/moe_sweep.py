"""Finds the grouped GEMM's block sizes: candidates are compiled, timed in CUDA graphs on a TP-8 rank of MiniMax-M1, and ranked.

    python benchmarks/moe_sweep.py [--tokens 1 16 128 2048] [--schemes w4afp8 …] [--top 4]

What it finds is written by hand into mxconv/runtime/kernels/moe_table.py: nothing is tuned while a model runs.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from moe_setup import EXPERTS, PER_TOKEN, SHAPES, graph_ms, random_codes, random_matrix, random_routings

from mxconv.quantize.schemes import SCHEMES, Scheme
from mxconv.runtime.kernels.moe import Matrix
from mxconv.runtime.kernels.moe_pack import Kind, kind_of
from mxconv.runtime.kernels.moe_sort import Sorted, sort_assignments
from mxconv.runtime.kernels.moe_table import Launch


def candidates(kind: Kind, tokens: int, projection: str) -> Iterator[Launch]:
    """The launches worth trying at `tokens` tokens."""
    splits = [1]
    if tokens <= 128:
        shapes, stages = [(64, 16, 4), (128, 16, 4)], [3, 4, 5]
        if tokens <= 2:
            splits = [4, 6, 8, 12] if projection == "up" else [1, 2, 3, 4]
    elif tokens <= 512:
        shapes, stages = [(128, 16, 4), (64, 32, 4), (128, 32, 4), (128, 64, 4)], [3, 4]
    else:
        shapes, stages = [(128, 64, 4), (256, 64, 8), (128, 128, 8), *([(256, 128, 8)] if kind == "int4_int8" else [])], [3, 4]
    for (block_n, block_t, warps), stage, split in itertools.product(shapes, stages, splits):
        for gated in {False, projection == "up" and split == 1}:
            yield Launch(block_n=block_n, block_t=block_t, warps=warps, stages=stage, splits=split, gated=gated)


def call_of(
    matrix: Matrix, projection: str, ordered: Sorted, codes: torch.Tensor, scales: torch.Tensor, launch: Launch
) -> Callable[[], None]:
    """One GEMM as a layer runs it, with its output allocated."""
    per_token = 0 if projection == "down" else 1 if matrix.scheme.static else PER_TOKEN
    dtype = torch.float32 if projection == "up" or launch.splits > 1 else torch.bfloat16
    rows = len(ordered.order)
    out = torch.empty(rows * matrix.n * launch.splits, device="cuda", dtype=dtype).view(launch.splits, rows, matrix.n)
    return lambda: matrix.multiply(codes, scales, ordered.order, per_token, ordered.tiles, launch, out)


def compile_one(job: tuple[str, str, Launch]) -> None:
    """Compile a candidate in a process of its own: what it leaves in Triton's cache is what matters."""
    name, projection, launch = job
    try:
        matrix = Matrix(SCHEMES[name], 1, *SHAPES[projection], torch.device("cuda"))
        nobody = torch.full((16, PER_TOKEN), -1, device="cuda", dtype=torch.int32)
        codes, scales = random_codes(SCHEMES[name], 32, matrix.k)
        call_of(matrix, projection, sort_assignments(nobody, 1, launch.block_t), codes, scales, launch)()
        torch.cuda.synchronize()
    except Exception as error:  # a candidate that does not compile is not a candidate
        sys.stderr.write(f"{job}: {error!s:.200}\n")


def timings(scheme: Scheme, projection: str, tokens: int) -> Iterator[tuple[float, Launch]]:
    """(milliseconds, launch) of every candidate that runs."""
    rows = tokens if projection == "up" and not scheme.static else tokens * PER_TOKEN
    matrix, (codes, scales) = random_matrix(scheme, projection), random_codes(scheme, rows, SHAPES[projection][1])
    routings, repeats = (random_routings(tokens), 15) if tokens < 16384 else (random_routings(tokens)[:2], 5)
    for launch in candidates(matrix.kind, tokens, projection):
        sets = [sort_assignments(chosen, EXPERTS, launch.block_t) for chosen in routings]
        try:
            yield graph_ms([call_of(matrix, projection, ordered, codes, scales, launch) for ordered in sets], repeats), launch
        except Exception as error:
            sys.stdout.write(f"{launch}: {error!s:.120}\n")


def report(name: str, tokens: int, top: int) -> None:
    """Print the best candidates of one scheme and token count, and the worst."""
    for projection in SHAPES:
        timed = sorted(timings(SCHEMES[name], projection, tokens), key=lambda pair: pair[0])
        for ms, launch in timed[:top] + timed[-1:]:
            sys.stdout.write(
                f"{name:16} {projection:4} {tokens:5} tokens  {ms * 1000:8.1f} us  n{launch.block_n} t{launch.block_t} "
                f"w{launch.warps} s{launch.stages} k{launch.splits}{' gated' if launch.gated else ''}\n"
            )
        sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 2048])
    parser.add_argument("--schemes", nargs="+", default=["w4afp8", "w4a8", "block_wise_fp8", "tensor_wise_fp8"])
    parser.add_argument("--top", type=int, default=4)
    arguments = parser.parse_args()
    jobs = [
        (name, projection, launch)
        for tokens in arguments.tokens for name in arguments.schemes for projection in SHAPES
        for launch in candidates(kind_of(SCHEMES[name]), tokens, projection)
    ]  # fmt: skip
    unique = {(*job[:2], replace(job[2], splits=min(job[2].splits, 2))): job for job in jobs}
    began = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(min(16, os.cpu_count() or 1)) as pool:
        pool.map(compile_one, unique.values(), chunksize=4)
    sys.stdout.write(f"{len(unique)} kernels compiled in {time.perf_counter() - began:.0f} s\n")
    for tokens in arguments.tokens:
        for name in arguments.schemes:
            report(name, tokens, arguments.top)


if __name__ == "__main__":
    main()
