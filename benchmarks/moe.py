"""Expert GEMMs and whole MoE layers of a TP-8 rank of MiniMax-M1, beside torch's grouped products and the ceilings of the same run.

    python benchmarks/moe.py [--tokens 1 16 128 2048] [--schemes …] [--json moe.json]

    gemm    both grouped GEMMs, on codes that are there already; the floor is, for each, the larger of its bytes at copy speed
            (weights and scales of the experts that have tokens, inputs, outputs) and its operations at a large product's speed
    layer   router, sort, quantization, both GEMMs, SwiGLU, weighted sum: what a model calls

Milliseconds are medians of CUDA graph replays; a graph goes through eight routings, and the weights are larger than the L2.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import triton
from moe_setup import EXPERTS, HIDDEN, INTERMEDIATE, PER_TOKEN, SHAPES, graph_ms, random_codes, random_routings, randomize

from mxconv.quantize.schemes import SCHEMES, Scheme
from mxconv.runtime.kernels.moe import DenseExperts, MoeExperts, route
from mxconv.runtime.kernels.moe_activation import combine
from mxconv.runtime.kernels.moe_dense import grouped_mm
from mxconv.runtime.kernels.moe_sort import sort_assignments
from mxconv.runtime.kernels.moe_table import block_tokens, launch_of

Row = dict[str, object]
MEASURES = (
    "gemm_ms", "floor_ms", "of_floor", "layer_ms", "up_ms", "down_ms", "route_ms", "front_ms", "hidden_ms", "combine_ms",
)  # fmt: skip


def ceilings() -> dict[str, float]:
    """Measured now: bytes a second of a device copy (read + written), operations a second of square products of 8192."""
    size, source = 8192, torch.randn(1 << 30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    found = {"copy": 2 * source.nbytes / triton.testing.do_bench(lambda: target.copy_(source), return_mode="median") * 1e3}
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    half = a.to(torch.float8_e4m3fn)
    whole = torch.randint(-127, 128, (size, size), device="cuda", dtype=torch.int8)
    one = torch.ones((), device="cuda")
    products: dict[str, Callable[[], object]] = {
        "bf16": lambda: a @ a.t(),
        "e4m3": lambda: torch._scaled_mm(half, half.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16),
        "int8": lambda: torch._int_mm(whole, whole.t()),
    }
    for name, product in products.items():
        found[name] = 2 * size**3 / triton.testing.do_bench(product, return_mode="median") * 1e3
    return found


def compile_one(job: tuple[str, int]) -> None:
    """Call a layer once: what the compiler leaves in Triton's cache is what matters."""
    name, tokens = job
    layer = MoeExperts(SCHEMES[name], EXPERTS, HIDDEN, INTERMEDIATE, torch.device("cuda"))
    x = torch.zeros(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    layer(x, *route(x, torch.zeros(EXPERTS, HIDDEN, device="cuda"), PER_TOKEN))
    torch.cuda.synchronize()


def warm_up(jobs: list[tuple[str, int]]) -> None:
    """Compile all kernels at once. The processes are forked before this one touches the GPU, which spares them torch's import."""
    with multiprocessing.get_context("fork").Pool(min(16, os.cpu_count() or 1, len(jobs))) as pool:
        pool.map(compile_one, jobs, chunksize=1)


def floor_ms(tokens: int, experts: float, weight_bytes: dict[str, float], in_bytes: float, operations: float, copy: float) -> float:
    """The two GEMMs' floor: `experts` of them have tokens, `weight_bytes` are those of one; two bytes an output before SwiGLU."""
    total = 0.0
    for projection, (n, k) in SHAPES.items():
        rows = tokens * PER_TOKEN
        moved = experts * weight_bytes[projection] + rows * k * in_bytes + rows * n * 2
        total += max(moved / copy, 2.0 * rows * n * k / operations) * 1e3
    return total


def quantized_rows(scheme: Scheme, tokens_list: list[int], limits: dict[str, float]) -> Iterator[Row]:
    """Our kernels for one scheme."""
    layer = MoeExperts(scheme, EXPERTS, HIDDEN, INTERMEDIATE, torch.device("cuda"))
    matrices = {"up": layer.up_gate, "down": layer.down}
    for matrix in matrices.values():
        randomize(matrix)
    bytes_of = {name: (m.codes.nbytes + m.scale.nbytes) / EXPERTS for name, m in matrices.items()}
    router = torch.randn(EXPERTS, HIDDEN, device="cuda") / HIDDEN**0.5
    for tokens in tokens_list:
        routings, assignments = random_routings(tokens), tokens * PER_TOKEN
        block = block_tokens(layer.up_gate.kind, assignments, EXPERTS)
        names = ("up", "down", "front", "hidden", "combine")
        parts: dict[str, list[Callable[[], object]]] = {name: [] for name in names}
        codes = {name: random_codes(scheme, assignments, k) for name, (_, k) in SHAPES.items()}
        inputs = [torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in routings]
        for chosen, x in zip(routings, inputs, strict=True):
            ordered = sort_assignments(chosen, EXPERTS, block)
            outs = {}
            for name, matrix in matrices.items():
                launch = launch_of(matrix.kind, assignments, EXPERTS, matrix.n, matrix.k, gate=name == "up")
                dtype = torch.float32 if name == "up" or launch.splits > 1 else torch.bfloat16
                shape = (assignments, matrix.n // 2) if launch.gated else (launch.splits, assignments, matrix.n)
                outs[name] = out = torch.empty(shape, device="cuda", dtype=dtype)
                per_token = 0 if name == "down" else 1 if scheme.static else PER_TOKEN
                parts[name].append(partial(matrix.multiply, *codes[name], ordered.order, per_token, ordered.tiles, launch, out))
            shares = torch.rand(tokens, PER_TOKEN, device="cuda")
            parts["front"].append(partial(layer.front, x, chosen, block))
            parts["hidden"].append(partial(layer.quantize_hidden, outs["up"], chosen, ordered))
            parts["combine"].append(partial(combine, outs["down"], ordered.position, shares, torch.bfloat16))
        both = [call for pair in zip(parts["up"], parts["down"], strict=True) for call in pair]
        gemms = graph_ms(both) * 2
        parts["route"] = [partial(route, x, router, PER_TOKEN) for x in inputs]
        whole = graph_ms([lambda x=x: layer(x, *route(x, router, PER_TOKEN)) for x in inputs])
        experts = statistics.mean(len(chosen.unique()) for chosen in routings)
        floor = floor_ms(tokens, experts, bytes_of, 1, limits[scheme.activation.code], limits["copy"])
        yield {
            "scheme": scheme.name, "tokens": tokens, "experts": experts, "gemm_ms": gemms, "floor_ms": floor,
            "of_floor": floor / gemms, "layer_ms": whole, **{f"{name}_ms": graph_ms(calls) for name, calls in parts.items()},
        }  # fmt: skip


def scaled_grouped_mm(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """torch's fp8 grouped product with a scale a row: x e4m3 [A, K], weight e4m3 [E, N, K]."""
    a, b = torch.ones(len(x), device="cuda"), torch.ones(weight.shape[:2], device="cuda")
    return torch._scaled_grouped_mm(x, weight.transpose(-2, -1), a, b, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True)


def peer_rows(tokens_list: list[int], limits: dict[str, float]) -> Iterator[Row]:
    """torch's grouped products in bf16 and fp8, and a whole bf16 layer with the first of them."""
    layer = DenseExperts(EXPERTS, HIDDEN, INTERMEDIATE, torch.bfloat16, torch.device("cuda"))
    for weight in (layer.up_gate, layer.down):
        weight.normal_().mul_(weight.shape[-1] ** -0.5)
    router = torch.randn(EXPERTS, HIDDEN, device="cuda") / HIDDEN**0.5
    for name, size, product in (("bf16", 2, grouped_mm), ("e4m3", 1, scaled_grouped_mm)):
        weights = {"up": layer.up_gate, "down": layer.down}
        if name == "e4m3":
            weights = {p: w.to(torch.float8_e4m3fn) for p, w in weights.items()}
        for tokens in tokens_list:
            routings = random_routings(tokens)
            calls = []
            for chosen in routings:
                ends = sort_assignments(chosen, EXPERTS, 64).ends
                for projection, weight in weights.items():
                    x = torch.randn(tokens * PER_TOKEN, SHAPES[projection][1], device="cuda").to(weight.dtype)
                    calls.append(lambda x=x, w=weight, e=ends, product=product: product(x, w, e))
            experts = statistics.mean(len(chosen.unique()) for chosen in routings)
            bytes_of = {p: w[0].numel() * size for p, w in weights.items()}
            floor = floor_ms(tokens, experts, bytes_of, size, limits[name], limits["copy"])
            row: Row = {"scheme": f"torch {name}", "tokens": tokens, "experts": experts, "floor_ms": floor}
            try:
                row["gemm_ms"] = gemms = graph_ms(calls) * 2
                row["of_floor"] = floor / gemms
                if name == "bf16":
                    inputs = [torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in routings]
                    row["layer_ms"] = graph_ms([lambda x=x: layer(x, *route(x, router, PER_TOKEN)) for x in inputs])
            except Exception as error:
                row["failed"] = f"{error!s:.160}"
            yield row


def render(row: Row) -> str:
    """A row of the table."""
    cells = [f"{row['scheme']:18}", f"{row['tokens']:6}", f"{row['experts']:6.1f}"]
    cells += [f"{row[key]:8.4f}" if key in row else " " * 8 for key in MEASURES]
    return " ".join(cells) + (f"  {row['failed']}" if "failed" in row else "")


def table(rows: list[Row]) -> str:
    """The README's table: GEMMs in milliseconds (fraction of their floor) and whole layers, a row a scheme, by tokens."""
    counts = sorted({int(str(row["tokens"])) for row in rows})
    lines = ["| | " + " | ".join(f"{count} tokens" for count in counts) + " |", "|---" * (len(counts) + 1) + "|"]
    for name in dict.fromkeys(str(row["scheme"]) for row in rows):
        cells = {row["tokens"]: row for row in rows if row["scheme"] == name and "gemm_ms" in row}
        shown = [
            f"{cells[count]['gemm_ms']:.3f} ({cells[count]['of_floor']:.2f})"
            + (f", layer {cells[count]['layer_ms']:.3f}" if "layer_ms" in cells[count] else "")
            if count in cells else "–"
            for count in counts
        ]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 2048])
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warm_up([(name, tokens) for name in arguments.schemes for tokens in arguments.tokens])
    limits = ceilings()
    header = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, "ceilings": limits,
        "shape": {"hidden": HIDDEN, "intermediate": INTERMEDIATE, "experts": EXPERTS, "per_token": PER_TOKEN},
    }  # fmt: skip
    sys.stdout.write(f"{header}\n")
    sys.stdout.write(f"{'scheme':18} tokens expert " + " ".join(f"{name.removesuffix('_ms'):>8}" for name in MEASURES) + "\n")
    rows: list[Row] = []

    def take(found: Iterator[Row]) -> None:
        for row in found:
            rows.append(row)
            sys.stdout.write(render(row) + "\n")
            sys.stdout.flush()
            if arguments.json:
                arguments.json.write_text(json.dumps({**header, "rows": rows}, indent=1))

    if not arguments.no_peers:
        take(peer_rows(arguments.tokens, limits))
    for name in arguments.schemes:
        torch.cuda.empty_cache()
        take(quantized_rows(SCHEMES[name], arguments.tokens, limits))
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
