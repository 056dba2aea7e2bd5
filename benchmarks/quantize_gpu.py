"""The quantize kernels on a GPU beside their ceiling and their peers, in one command: `python -m benchmarks.quantize_gpu`.

Kernels: ms, and the fraction of the time that a device copy takes for the same bytes (weights read once, codes and scales
written; the ceiling is measured in the same run), on random bf16 weights of 32 × 2304 × 6144 (up_gate) or 8 × 6144 × 9216 (down).
Every result is compared with the reference's, bit for bit, and its bytes are poisoned before. Peers: the reference in eager torch,
and plain torch operations for the same layout under torch.compile, which divides and fuses as it likes (its share of other bytes
is printed).

Overlap (quantize_overlap.py): the workers' code fed from memory, each part alone and all together.

End to end (--checkpoint FOLDER of benchmarks/make_layer.py): `mxconv quantize` as a user runs it, --device cpu against cuda, beside
`cp -r` and `sync` of the same folder in the same run.

    --sweep     times many launch shapes instead, compiled in parallel; the tables of mxconv/quantize/gpu.py are made from it
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mxconv
from benchmarks import quantize_overlap
from mxconv.quantize import gpu, packing, reference
from mxconv.quantize.schemes import SCHEMES, Scheme, get_scheme

SHAPES = {"up_gate_proj": (32 * 2304, 6144), "down_proj": (8 * 6144, 9216)}
CASES = {
    "int4 g128": (SCHEMES["w4afp8"], "up_gate_proj"),
    "int4 g128, H_128": (SCHEMES["w4afp8"], "down_proj"),
    "int4 g128, H_1024": (get_scheme("w4afp8", hadamard_block=1024), "down_proj"),
    "int4 channel": (SCHEMES["w4a8"], "up_gate_proj"),
    "int4 channel, H_128": (SCHEMES["w4a8"], "down_proj"),
    "fp8 128×128": (SCHEMES["block_wise_fp8"], "up_gate_proj"),
    "fp8 tensor, H_32": (SCHEMES["tensor_wise_fp8"], "up_gate_proj"),
}
GOALS = {"int4 g128": 0.75, "fp8 128×128": 0.80}
SOURCE_ROWS = 2048
DEMO = Path(mxconv.__file__).parent / "data" / "demo"


def milliseconds(work: Callable[[], object], repeat: int = 100) -> float:
    """Median by events, the cache flushed before each run."""
    from triton.testing import do_bench

    return float(do_bench(work, warmup=20, rep=repeat, return_mode="median"))


def copy_rate() -> float:
    """Bytes a second, read and written, of a device copy of 2 GiB."""
    a, b = (torch.empty(1 << 30, dtype=torch.int16, device="cuda").random_() for _ in range(2))
    return 2 * a.numel() * 2 / (milliseconds(lambda: b.copy_(a)) * 1e-3)


def weights(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Random bf16 weights."""
    make = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=make, device="cuda", dtype=torch.bfloat16) * 0.02).contiguous()


def outputs(scheme: Scheme, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Poisoned codes and scales."""
    codes = torch.full(packing.stored_codes_shape(scheme, *shape), 0x55, dtype=torch.int8, device="cuda")
    return codes, torch.full(reference.scale_shape(scheme, *shape), float("nan"), device="cuda")


def encoding(scheme: Scheme, projection: str, w: Tensor, codes: Tensor, scales: Tensor) -> Callable[[], gpu.GpuEncoder]:
    """Encode the whole matrix, every pass over it included, without waiting."""
    encoder = gpu.GpuEncoder(scheme, projection, *w.shape, torch.device("cuda"))

    def run() -> gpu.GpuEncoder:
        if encoder.passes == 2:
            encoder.observe(w)
        encoder.encode_into(w, codes, scales)
        return encoder

    return run


def identical(scheme: Scheme, projection: str, w: Tensor, codes: Tensor, scales: Tensor) -> bool:
    """Against the reference on the same device, in row blocks."""
    largest = None
    if scheme.granularity == "tensor":
        parts = [reference.weight_absmax(w[r : r + SOURCE_ROWS], scheme, projection) for r in range(0, len(w), SOURCE_ROWS)]
        largest = torch.stack(parts).max().reshape(1)
    for r in range(0, len(w), SOURCE_ROWS):
        coded = reference.encode(w[r : r + SOURCE_ROWS], scheme, projection, largest)
        lines = slice(r // 128, (r + SOURCE_ROWS) // 128) if scheme.granularity == "block" else slice(r, r + SOURCE_ROWS)
        mine = scales if largest is not None else scales[lines]
        same = torch.equal(packing.store_codes(coded.codes, scheme), codes[:, r : r + SOURCE_ROWS])
        if not same or not torch.equal(coded.scale.view(torch.int32), mine.view(torch.int32)):
            return False
    return True


def moved(scheme: Scheme, shape: tuple[int, int]) -> int:
    """Bytes that must be moved: weights read once, codes and scales written."""
    codes, scales = packing.stored_codes_shape(scheme, *shape), reference.scale_shape(scheme, *shape)
    return 2 * shape[0] * shape[1] + codes[0] * codes[1] + 4 * int(torch.tensor(scales).prod())


def plain_int4(w: Tensor) -> tuple[Tensor, Tensor]:
    """int4 in groups of 128 in plain operations, packed and transposed as stored."""
    groups = w.float().view(w.shape[0], -1, 128)
    scale = groups.abs().amax(dim=2, keepdim=True)
    scale = torch.where(scale == 0, 1.0, scale)
    codes = torch.round(groups / scale * 7).to(torch.int8).view(w.shape)
    return ((codes[:, 0::2] & 15) | (codes[:, 1::2] << 4)).t().contiguous(), scale


def plain_block(w: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 in blocks of 128 × 128 in plain operations, transposed as stored."""
    blocks = w.float().view(w.shape[0] // 128, 128, -1, 128)
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / 448
    codes = (blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.int8)
    return codes.view(w.shape).t().contiguous(), scale


PEERS = {"int4 g128": plain_int4, "fp8 128×128": plain_block}


def kernels(rate: float) -> Iterator[dict[str, Any]]:
    """One row for each case."""
    for name, (scheme, projection) in CASES.items():
        w = weights(SHAPES[projection])
        codes, scales = outputs(scheme, SHAPES[projection])
        run = encoding(scheme, projection, w, codes, scales)
        run()
        same = run().trusted() and identical(scheme, projection, w, codes, scales)
        floor = moved(scheme, SHAPES[projection]) / rate * 1e3
        row: dict[str, Any] = {"case": name, "ms": milliseconds(run), "copy_ms": floor, "identical": same}
        row["of_copy"] = floor / row["ms"]
        if name in PEERS:
            row |= peers(name, scheme, projection, w, codes, floor)
        yield row
        del w, codes, scales, run
        torch.cuda.empty_cache()


def peers(name: str, scheme: Scheme, projection: str, w: Tensor, codes: Tensor, floor: float) -> dict[str, Any]:
    """Eager and compiled torch for the same matrix (eager on an eighth of it, times eight: it makes many copies)."""
    part = w[: len(w) // 8]
    eager = 8 * milliseconds(lambda: packing.store_codes(reference.encode(part, scheme, projection).codes, scheme))
    compiled = torch.compile(PEERS[name])
    theirs, _ = compiled(w)
    other = float((theirs != codes).float().mean())
    took = milliseconds(lambda: compiled(w))
    return {"eager_ms": eager, "compiled_ms": took, "compiled_of_copy": floor / took, "compiled_other_bytes": other}


def sweep_points() -> Iterator[tuple[str, str, gpu.Shape]]:
    """(case, table, shape)."""
    for (r, lanes, steps), registers in itertools.product([(8, 4, 4), (16, 4, 4), (16, 2, 8)], (None, 80, 64)):
        yield "int4 g128", "INT4", gpu.Shape(rows=r, lanes=lanes, steps=steps, registers=registers)
    for (r, lanes, steps), registers in itertools.product([(8, 4, 4), (16, 4, 4), (16, 2, 8)], (None, 80, 128)):
        yield "int4 g128, H_128", "INT4_ROTATED", gpu.Shape(rows=r, lanes=lanes, steps=steps, registers=registers)
    for r, registers in itertools.product((8, 16), (None, 128)):
        yield "int4 g128, H_1024", "INT4_ROTATED", gpu.Shape(rows=r, lanes=16, steps=8, registers=registers)
    for (lanes, steps), registers in itertools.product([(4, 4), (8, 2)], (None, 80)):
        yield "fp8 128×128", "BLOCK", gpu.Shape(rows=32, lanes=lanes, steps=steps, registers=registers)
    for r, lanes, steps in [(8, 4, 1), (8, 4, 2), (8, 4, 4), (16, 4, 2), (32, 4, 2)]:
        yield "fp8 tensor, H_32", "TENSOR", gpu.Shape(rows=r, lanes=lanes, steps=steps)
    for case, (r, lanes, steps) in itertools.product(
        ("fp8 tensor, H_32", "int4 channel"), [(8, 4, 4), (16, 4, 4), (32, 4, 4), (64, 4, 4)]
    ):
        yield case, "ABSMAX", gpu.Shape(rows=r, lanes=lanes, steps=steps)


def set_shape(table: str, shape: gpu.Shape) -> None:
    """Have the encoder launch `shape`."""
    if isinstance(getattr(gpu, table), dict):
        getattr(gpu, table)[shape.columns] = shape
    else:
        setattr(gpu, table, shape)


def compile_point(point: tuple[str, str, gpu.Shape]) -> str:
    """Fill the kernel cache in a process of its own; what went wrong, or nothing."""
    name, table, shape = point
    scheme, projection = CASES[name]
    set_shape(table, shape)
    small = (512, SHAPES[projection][1])
    w = weights(small)
    codes, scales = outputs(scheme, small)
    try:
        encoding(scheme, projection, w, codes, scales)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:120]
    return "" if identical_small(scheme, projection, w, codes, scales) else "DIFFERENT"


def identical_small(scheme: Scheme, projection: str, w: Tensor, codes: Tensor, scales: Tensor) -> bool:
    """The whole small matrix at once."""
    coded = reference.encode(w, scheme, projection)
    return torch.equal(packing.store_codes(coded.codes, scheme), codes) and torch.equal(coded.scale, scales)


def sweep(rate: float, only: str) -> None:
    """A line for each point, as they are measured."""
    points = [point for point in sweep_points() if only in point[1]]
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        problems = pool.map(compile_point, points, chunksize=1)
    print(f"compiled {len(points)} shapes in {time.monotonic() - began:.0f} s", flush=True)
    last = None
    for (name, table, shape), problem in zip(points, problems, strict=True):
        scheme, projection = CASES[name]
        if name != last:
            w = weights(SHAPES[projection])
            codes, scales = outputs(scheme, SHAPES[projection])
            floor, last = moved(scheme, SHAPES[projection]) / rate * 1e3, name
        if not problem:
            kept = dict(getattr(gpu, table)) if isinstance(getattr(gpu, table), dict) else getattr(gpu, table)
            set_shape(table, shape)
            took = milliseconds(encoding(scheme, projection, w, codes, scales), 40)
            problem = f"{took:.3f} ms  {floor / took:.3f}"
            setattr(gpu, table, kept)
        told = f"R{shape.rows} L{shape.lanes} S{shape.steps} {shape.registers or '':>4}"
        print(f"{name:20s} {table:12s} {told}  {problem}", flush=True)


def copied(checkpoint: Path) -> float:
    """Seconds of `cp -r` and `sync` of the checkpoint, beside which a run is to be judged."""
    out = Path(tempfile.mkdtemp(prefix="mxconv-", dir=checkpoint.parent)) / "copy"
    os.sync()
    began = time.monotonic()
    subprocess.run(["cp", "-r", str(checkpoint), str(out)], check=True)
    os.sync()
    seconds = time.monotonic() - began
    shutil.rmtree(out.parent)
    return seconds


def whole_run(source: Path, folder: Path, scheme: str, device: str, *options: str) -> dict[str, Any]:
    """`mxconv quantize` as a user runs it: seconds of the process and what it says of itself; its manifest's bytes."""
    out = Path(tempfile.mkdtemp(prefix="mxconv-", dir=folder)) / "out"
    command = [sys.executable, "-m", "mxconv", "quantize", str(source), str(out), "--scheme", scheme, "--device", device]
    os.sync()
    began = time.monotonic()
    done = subprocess.run([*command, *options, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-600:]}")
    took = {"process_s": time.monotonic() - began, "manifest": (out / "manifest.json").read_bytes()}
    shutil.rmtree(out.parent)
    return took | json.loads(done.stdout.splitlines()[-1])


def end_to_end(checkpoint: Path, schemes: list[str], workers: int) -> Iterator[dict[str, Any]]:
    """Whole runs on both devices, beside a copy and beside what a run takes that has nothing to do: the bundled model's."""
    options = ("--tp", "8", "--workers", str(workers), "--memory", "8GiB")
    subprocess.run(["cat", *map(str, sorted(checkpoint.iterdir()))], stdout=subprocess.DEVNULL, check=True)  # into the page cache
    for scheme in schemes:
        row: dict[str, Any] = {"scheme": scheme, "cp_s": copied(checkpoint)}
        manifests = set()
        for device in ("cpu", "cuda"):
            start = whole_run(DEMO, checkpoint.parent, scheme, device)
            run = whole_run(checkpoint, checkpoint.parent, scheme, device, *options)
            manifests.add(run["manifest"])
            row |= {"read_bytes": run["read_bytes"], "written_bytes": run["bytes"], f"{device}_s": run["process_s"]}
            row |= {f"{device}_run_s": run["seconds"], f"{device}_start_s": start["process_s"]}
            row[f"{device}_rate"] = run["read_bytes"] / run["process_s"]
            row[f"{device}_rate_behind_start"] = run["read_bytes"] / max(1e-9, run["process_s"] - start["process_s"])
        yield row | {"identical": len(manifests) == 1}


def kernel_table(rate: float) -> list[dict[str, Any]]:
    """Measure and print, a line as soon as it is known."""
    rows = []
    print("| case | ms | of copy | goal | bits | eager ms | compiled ms (of copy; other bytes) |\n" + "|---" * 7 + "|")
    for row in kernels(rate):
        rows.append(row)
        verdict = "identical" if row["identical"] else "DIFFERENT"
        told = [row["case"], f"{row['ms']:.3f}", f"{row['of_copy']:.2f}", GOALS.get(row["case"], ""), verdict, "", ""]
        if "eager_ms" in row:
            compiled = f"{row['compiled_ms']:.3f} ({row['compiled_of_copy']:.2f}; {row['compiled_other_bytes']:.1e})"
            told[5:] = [f"{row['eager_ms']:.1f}", compiled]
        print("| " + " | ".join(map(str, told)) + " |", flush=True)
    return rows


def run_table(checkpoint: Path, schemes: list[str], workers: int) -> list[dict[str, Any]]:
    """Measure and print, a line as soon as it is known."""
    rows = []
    print(f"{workers} workers; GB/s of source bytes; start: the seconds of a run over 13 MB, most of them imports and compiling")
    print("| scheme | read, written | cp -r and sync | device | seconds | start | GB/s | GB/s behind the start | artifacts |")
    print("|---" * 9 + "|")
    for row in end_to_end(checkpoint, schemes, workers):
        rows.append(row)
        size = row["read_bytes"] / 1e9
        for device in ("cpu", "cuda"):
            told = [row["scheme"], f"{size:.2f}, {row['written_bytes'] / 1e9:.2f} GB"]
            told += [f"{row['cp_s']:.2f} s ({size / row['cp_s']:.2f})", device]
            told += [f"{row[f'{device}_s']:.2f} (run {row[f'{device}_run_s']:.2f})", f"{row[f'{device}_start_s']:.2f}"]
            told += [f"{row[f'{device}_{rate}'] / 1e9:.2f}" for rate in ("rate", "rate_behind_start")]
            print("| " + " | ".join(told) + f" | {'identical' if row['identical'] else 'DIFFERENT'} |", flush=True)
    return rows


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", nargs="?", const="", metavar="TABLE")
    parser.add_argument("--checkpoint", type=Path, help="folder of benchmarks/make_layer.py")
    parser.add_argument("--schemes", nargs="*", default=["w4afp8", "block_wise_fp8"])
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--only", choices=["kernels", "overlap", "runs"], help="one of the tables")
    parser.add_argument("--only-runs", action="store_const", const="runs", dest="only", help="--only runs")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; device copy {rate / 1e12:.2f} TB/s", flush=True)
    if a.sweep is not None:
        sweep(rate, a.sweep)
        return
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "copy_bytes_per_second": rate}
    if a.only in (None, "kernels"):
        report["kernels"] = kernel_table(rate)
    if a.only in (None, "overlap"):
        report["overlap"] = list(quantize_overlap.rows(quantize_overlap.SCHEMES_SHOWN, [1, a.workers]))
    if a.checkpoint and a.only in (None, "runs"):
        report["runs"] = run_table(a.checkpoint, a.schemes, a.workers)
    if a.json:
        a.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
