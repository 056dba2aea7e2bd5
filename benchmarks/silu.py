"""SiLU before lightning attention, on a GPU: `python -m benchmarks.silu`, a few seconds.

x is the q, k and v of a prompt of 32,768 tokens in the fused projection of a rank of MiniMax-M1 (bf16), as the layer gives it (at
TP 1 an eighth of the tokens). Beside the kernel: torch's own on the same slice and on contiguous rows, and a device copy of as many
bytes, measured in the same run. `--sweep` times other tiles as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench

from mxconv.runtime.kernels import silu

TOKENS = 32768
WIDTHS = {8: 1024, 1: 8192}
TILES = [(1, 1024, 4), (2, 1024, 4), (4, 1024, 4), (8, 1024, 8), (2, 2048, 8), (4, 512, 4), (8, 512, 4), (1, 4096, 8), (4, 1024, 8)]


def milliseconds(work: Callable[[], object]) -> float:
    """Median by events, the cache flushed before each run."""
    return float(do_bench(work, warmup=20, rep=60, return_mode="median"))


def rows(width: int, tokens: int) -> Tensor:
    """[1, tokens, 3·width], a slice of rows of 4·width."""
    return torch.randn(1, tokens, 4 * width, device="cuda", dtype=torch.bfloat16)[..., : 3 * width]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true")
    a = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; ms (of copy)")
    print("| tp | rows, columns, warps | kernel | torch, slice | torch, contiguous | copy |\n" + "|---" * 6 + "|", flush=True)
    default = (silu.ROWS, silu.COLUMNS, silu.WARPS)
    for tp, width in WIDTHS.items():
        x = rows(width, TOKENS if tp > 1 else TOKENS // 8)
        whole = x.contiguous()
        to = torch.empty_like(whole)
        floor = milliseconds(lambda whole=whole, to=to: to.copy_(whole))
        peers = [milliseconds(lambda x=x: F.silu(x)), milliseconds(lambda whole=whole: F.silu(whole))]
        for tile in [default, *(TILES if a.sweep else [])]:
            silu.ROWS, silu.COLUMNS, silu.WARPS = tile
            took = [milliseconds(lambda x=x: silu.silu_rows(x)), *peers]
            told = [f"{ms:.3f} ({floor / ms:.2f})" for ms in took]
            print(f"| {tp} | {', '.join(map(str, tile))} | " + " | ".join(told) + f" | {floor:.3f} |", flush=True)


if __name__ == "__main__":
    main()
