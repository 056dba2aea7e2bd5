"""What the MoE benchmarks share: the shapes of a TP-8 rank of MiniMax-M1, random weights and routings, timing in CUDA graphs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from mxconv.quantize.schemes import Scheme
from mxconv.runtime.kernels.moe import Matrix

HIDDEN, INTERMEDIATE, EXPERTS, PER_TOKEN = 6144, 1152, 32, 2
SHAPES = {"up": (2 * INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE)}
SETS = 8
"""Routings that a timed graph goes through, so that one token's experts come from memory and not from the L2."""


def randomize(matrix: Matrix) -> None:
    """Random codes and scales in the packed form: any byte is two int4 codes, and any but two an e4m3 code."""
    shape = matrix.codes.shape
    if matrix.kind == "e4m3":
        for expert in matrix.codes:
            expert.copy_(torch.randn(shape[1:], device="cuda").mul_(60).clamp_(-448, 448).to(torch.float8_e4m3fn).view(torch.int8))
    else:
        matrix.codes.copy_(torch.randint(-128, 128, shape, device="cuda", dtype=torch.int8))
    matrix.scale.uniform_(0.5, 1.5).mul_(0.1 / matrix.k**0.5)
    matrix.stored.fill_(1.0 if matrix.scheme.activation.stored_divided else 100.0)


def random_matrix(scheme: Scheme, projection: str) -> Matrix:
    """A projection of all experts with random codes."""
    matrix = Matrix(scheme, EXPERTS, *SHAPES[projection], torch.device("cuda"))
    randomize(matrix)
    return matrix


def random_routings(tokens: int) -> list[torch.Tensor]:
    """SETS random choices int32 [tokens, 2] of distinct experts."""
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.rand(tokens, EXPERTS, generator=generator).argsort(-1)[:, :PER_TOKEN].to(torch.int32).contiguous().cuda()
        for _ in range(SETS)
    ]


def random_codes(scheme: Scheme, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [rows, width] and scales of a GEMM's input."""
    if scheme.activation.code == "int8":
        codes = torch.randint(-127, 128, (rows, width), device="cuda", dtype=torch.int8)
    else:
        codes = torch.randn(rows, width, device="cuda").mul_(60).clamp_(-448, 448).to(torch.float8_e4m3fn)
    return codes, torch.rand((rows, width // 128) if scheme.activation.scale == "token_group" else (rows,), device="cuda") + 0.5


def graph_ms(calls: Sequence[Callable[[], object]], repeats: int = 15) -> float:
    """Median milliseconds of one of `calls`, which are captured together in one CUDA graph and replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    taken = []
    for repeat in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if repeat >= 2:
            taken.append(start.elapsed_time(end) / len(calls))
    return statistics.median(taken)
