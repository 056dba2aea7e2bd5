"""Lightning attention on one GPU: ours, flash-linear-attention's and softmax attention, beside the copy speed of the same run.

    python benchmarks/lightning.py [--quick] [--json FILE]

Prefill: ms, and the fraction of the bandwidth floor (q, k, v read and out written once, the state once: 4·N·T·D·2 + 8·N·D²
bytes at copy speed). Decode: µs, and states read and written at copy speed. bf16 behind SiLU, head_dim 128, one sequence; decay
rates of a middle layer (40 of 80) of 64 heads; 8 heads stand for the fourth TP-8 rank, also with those of layer 79, which all but
do not decay (MiniMax-M1's own last lightning layer is 78, with rates 1,267 times as large).
Medians of CUDA-graph replays that rotate over more memory than the cache holds. Errors are relative L2 against float64 over all
heads, beyond 16k tokens over the first and the last.
The peer is `pip install flash-linear-attention`; without it its columns are empty.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from mxconv.runtime.kernels.lightning_decode import lightning_decode
from mxconv.runtime.kernels.lightning_prefill import lightning_prefill
from mxconv.runtime.lightning import LightningDecay, decay_rates, lightning

D = 128
CACHE_BYTES = 200e6
PREFILL = [(64, tokens, 40) for tokens in (1024, 4096, 16384, 65536, 262144)]
PREFILL += [(8, tokens, layer) for layer in (40, 79) for tokens in (4096, 16384, 65536, 262144)]
DECODE = [(1, 64), (8, 64), (64, 64), (256, 64), (64, 8), (256, 8)]


@dataclass
class Row:
    """One line of a table; times in the unit of its table."""

    what: str
    ours: float
    ours_fraction: float
    error: float
    state_error: float
    fla: float | None = None
    fla_fraction: float | None = None
    fla_error: float | None = None
    softmax: float | None = None


def milliseconds(run: Callable[[], object]) -> float:
    """Median of one `run`."""
    return triton.testing.do_bench(run, warmup=10, rep=60, return_mode="median")


def captured(runs: list[Callable[[], object]]) -> float:
    """Median ms of one of `runs`, captured one behind the other in a graph of 20 or more: its launch does not count."""
    runs = runs * -(-20 // len(runs))
    runs[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return milliseconds(graph.replay) / len(runs)


def copy_speed() -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    a, b = torch.empty(2, 1 << 30, dtype=torch.uint8, device="cuda")
    return 2 * a.numel() / milliseconds(lambda: b.copy_(a)) * 1e3


def inputs(tokens: int, heads: int) -> list[Tensor]:
    """q, k, v [T, N, D] behind SiLU."""
    return [F.silu(torch.randn(tokens, heads, D, device="cuda", dtype=torch.bfloat16)) for _ in range(3)]


def rates_of(heads: int, layer: int) -> list[float]:
    """Rates of all heads, or of the fourth TP rank of 8, in `layer` of 80."""
    every = decay_rates(64, layer, 80)
    return every if heads == 64 else every[3 * heads : 4 * heads]


def exact(q: Tensor, k: Tensor, v: Tensor, rates: list[float]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(head, outputs [T, D], state [D, D]) in float64, head by head; beyond 16k tokens of the first and the last head alone."""
    for head in range(len(rates)) if len(q) <= 16384 else (0, len(rates) - 1):
        wide = [x[:, head].double()[None, None] for x in (q, k, v)]
        out, state = lightning(*wide, LightningDecay([rates[head]], torch.device("cuda"), torch.float64))
        yield head, out[0, 0], state[0, 0]


def errors(q: Tensor, k: Tensor, v: Tensor, rates: list[float], results: list[tuple[Tensor, Tensor]]) -> list[tuple[float, float]]:
    """(relative L2 of outputs, of states) of each (out [T, N, D], state [N, D, D]) over the heads of `exact`."""
    sums = torch.zeros(len(results), 4, dtype=torch.float64, device="cuda")
    for head, out, state in exact(q, k, v, rates):
        for at, (got, got_state) in enumerate(results):
            parts = (got[:, head].double() - out, out, got_state[head].double() - state, state)
            sums[at] += torch.stack([part.square().sum() for part in parts])
    return [((a / b) ** 0.5, (c / d) ** 0.5) for a, b, c, d in sums.tolist()]


def fla_prefill() -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The peer's prefill, or None where it is not installed."""
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return None

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        out, state = chunk_simple_gla(q[None], k[None], v[None], g_gamma=gamma, scale=1.0, output_final_state=True)
        return out[0], state[0]

    return run


def fla_decode() -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The peer's step of the recurrence, or None where it is not installed."""
    try:
        from fla.ops.simple_gla import fused_recurrent_simple_gla
    except ImportError:
        return None

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        out, state = fused_recurrent_simple_gla(
            q[:, None], k[:, None], v[:, None], g_gamma=gamma, scale=1.0, initial_state=state, output_final_state=True
        )
        return out[:, 0], state

    return run


def prefill_row(heads: int, tokens: int, layer: int, copy: float, peer: Callable[..., tuple[Tensor, Tensor]] | None) -> Row:
    """Times and errors of one prefill."""
    chosen = rates_of(heads, layer)
    rates = torch.tensor(chosen, device="cuda")
    one = 4 * heads * tokens * D * 2
    sets = [inputs(tokens, heads) for _ in range(max(1, round(CACHE_BYTES / one)))]
    floor = (one + 8 * heads * D * D) / copy * 1e3
    results = [lightning_prefill(*sets[0], rates)]
    if peer:
        results.append(peer(*sets[0], -rates))
    wrong = errors(*sets[0], chosen, [(out, state.reshape(heads, D, D)) for out, state in results])
    del results
    ours = captured([lambda x=x: lightning_prefill(*x, rates) for x in sets])
    row = Row(f"{heads} heads, {tokens // 1024}k, layer {layer}", ours, floor / ours, *wrong[0])
    if peer:
        row.fla = captured([lambda x=x: peer(*x, -rates) for x in sets])
        row.fla_fraction, row.fla_error = floor / row.fla, wrong[1][0]
    if tokens <= 65536 and layer == 40:
        q, k, v = (x.transpose(0, 1)[None] for x in sets[0])
        row.softmax = milliseconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    return row


def decode_row(slots: int, heads: int, copy: float, peer: Callable[..., tuple[Tensor, Tensor]] | None) -> Row:
    """Times and errors of one step of `slots` sequences, their states cold."""
    chosen = rates_of(heads, 40)
    rates = torch.tensor(chosen, device="cuda")
    states = heads * slots * D * D * 4
    copies = max(1, round(CACHE_BYTES / states))
    pool = torch.randn(copies * slots, heads, D, D, device="cuda")
    sets = [torch.arange(at * slots, (at + 1) * slots, device="cuda") for at in range(copies)]
    q, k, v = inputs(slots, heads)
    before = pool[:slots].double()
    step = torch.exp(-torch.tensor(chosen, dtype=torch.float64, device="cuda"))[:, None, None]
    after = before * step + k.double()[..., None] * v.double()[..., None, :]
    want = (q.double()[..., None, :] @ after)[..., 0, :]
    out = lightning_decode(q, k, v, rates, pool, sets[0])
    wrong = [float((got.double() - right).norm() / right.norm()) for got, right in ((out, want), (pool[:slots], after))]
    ours = captured([lambda s=s: lightning_decode(q, k, v, rates, pool, s, out=out) for s in sets]) * 1e3
    floor = 2 * states / copy * 1e6
    row = Row(f"{slots} slots × {heads} heads", ours, floor / ours, *wrong)
    if peer:
        views = pool.split(slots)
        row.fla = captured([lambda s=s: peer(q, k, v, -rates, s) for s in views]) * 1e3
        row.fla_fraction = floor / row.fla
    return row


def show(title: str, rows: list[Row]) -> None:
    """A Markdown table."""

    def cell(value: float | None, fraction: float | None = None) -> str:
        return "–" if value is None else f"{value:.4g}" + (f" ({fraction:.2f})" if fraction is not None else "")

    print(f"\n{title}\n\n| | ours | error, state's | fla | its error | softmax |\n|---|---|---|---|---|---|")
    for row in rows:
        errors_of = f"{row.error:.1e}, {row.state_error:.1e}"
        peer_error = "–" if row.fla_error is None else f"{row.fla_error:.1e}"
        print(
            f"| {row.what} | {cell(row.ours, row.ours_fraction)} | {errors_of} | {cell(row.fla, row.fla_fraction)} "
            f"| {peer_error} | {cell(row.softmax)} |", flush=True,
        )  # fmt: skip


def main() -> None:
    """Print both tables; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="no row beyond 16k tokens or 64 slots")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    options = parser.parse_args()
    torch.manual_seed(0)
    copy = copy_speed()
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    peers = fla_prefill(), fla_decode()
    print(f"{machine}; copy {copy / 1e12:.2f} TB/s" + ("" if peers[0] else "; flash-linear-attention is not installed: no column"))
    prefill = [prefill_row(*shape, copy, peers[0]) for shape in PREFILL if not options.quick or shape[1] <= 16384]
    show("Prefill, ms (fraction of the floor)", prefill)
    decode = [decode_row(*shape, copy, peers[1]) for shape in DECODE if not options.quick or shape[0] <= 64]
    show("Decode, µs (fraction of the floor)", decode)
    if options.json:
        rows = {"prefill": [asdict(row) for row in prefill], "decode": [asdict(row) for row in decode]}
        figures = {"machine": machine, "copy_bytes_per_second": copy, **rows}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
