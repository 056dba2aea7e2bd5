"""Do copies and kernels of `quantize --device cuda` overlap? `python -m benchmarks.quantize_overlap`, without a disk.

The work of a run's workers (execute/encoding.py, places.py, lanes.py, quantize/gpu.py), threads as there, on units of MiniMax-M1's
shapes; what a run reads is copied from memory instead, and nothing is written. Each part is also timed alone, the others left
out, through the same code:

    interpreter     nothing but the Python around the parts, which is in every other figure too; it has one lock for all workers
    memory          the source's bytes into pinned blocks, as a read from the page cache would bring them
    to the GPU, kernels, from the GPU
    SHA-256         of the source, which every run takes

All in GB/s of bf16 weights. Were everything to overlap, all of it would take as long as the slowest part does alone; without any
overlap, as all of them one after another: both are printed. The first units are compared with the CPU's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.make_layer import config
from mxconv.execute.encoding import run_quantize
from mxconv.execute.job import Job
from mxconv.execute.lanes import Lane
from mxconv.execute.places import OnDevice, Place, Places, device_encoder
from mxconv.execute.rawbits import Raw
from mxconv.execute.reading import Findings, SourceReader
from mxconv.plan import Request, build_plan
from mxconv.plan.values import Plan, Unit
from mxconv.quantize.schemes import SCHEMES, Scheme
from mxconv.source import Source, open_source
from mxconv.tensors import Box

SCHEMES_SHOWN = ["w4afp8", "block_wise_fp8"]
EXPERTS = 12
"""4.1 GB of weights, a sixth of it for one worker."""
MATRICES = 3
"""Of each shape in memory, more than the caches hold; experts take them in turn."""
REPEAT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What is really done; the rest is left out."""

    memory: bool = False
    up: bool = False
    kernels: bool = False
    down: bool = False
    sha: bool = False


ALONE = {
    "interpreter": Parts(), "memory": Parts(memory=True), "to the GPU": Parts(up=True), "kernels": Parts(kernels=True),
    "from the GPU": Parts(down=True), "SHA-256": Parts(sha=True),
}  # fmt: skip
ALL = Parts(memory=True, up=True, kernels=True, down=True, sha=True)
TOGETHER = {"all but SHA-256": Parts(memory=True, up=True, kernels=True, down=True), "all": ALL}


class NoHash:
    """Stands in for SHA-256."""

    def update(self, data: memoryview) -> None:
        """Nothing."""


class Memory(SourceReader):
    """Reads from `matrices` (shape → raw bf16 [rows, columns], several) instead of files."""

    def __init__(self, source: Source, matrices: dict[tuple[int, ...], list[Raw]], parts: Parts) -> None:
        super().__init__(source)
        self._matrices, self._parts = matrices, parts

    def raw(self, rank: int, name: str, box: Box | None = None, room: Callable[[int], Raw] | None = None) -> Raw:
        """As `SourceReader.raw`."""
        each = self._matrices[self.source.specs[rank][name].shape]
        values = each[int(name.split(".experts.")[1].split(".")[0]) % len(each)]
        values = values if box is None else values[slice(*box[0])]
        if room is None:
            return values
        out = room(values.nbytes).view(np.uint16).reshape(values.shape)
        if self._parts.memory:
            np.copyto(out, values)
        return out


class Partly(OnDevice):
    """A place on the GPU where some parts are left out: weights lie there already, outputs are those of an earlier time."""

    def __init__(self, lane: Lane, encoder: Any, places: PartPlaces) -> None:
        super().__init__(lane, encoder)
        self._places = places

    def put(self, rows: Tensor) -> Tensor:
        """Rows on the device."""
        if self._places.parts.up:
            return super().put(rows)
        return self._places.resident[: rows.numel()].view(rows.shape)

    def observe(self, rows: Tensor) -> None:
        """The first of two passes."""
        if self._places.parts.kernels:
            super().observe(rows)

    def encode_into(self, rows: Tensor, codes_out: Tensor, scale_out: Tensor) -> None:
        """The kernels."""
        if self._places.parts.kernels:
            super().encode_into(rows, codes_out, scale_out)

    def fetch(self, outputs: Sequence[Tensor]) -> list[Tensor] | None:
        """Outputs on the host; waits for the lane in any case."""
        parts, key = self._places.parts, tuple(output.shape for output in outputs)
        found = super().fetch(outputs) if parts.down else None
        if parts.down and parts.kernels:
            if found is not None and key not in self._places.outputs:
                self._places.outputs[key] = [output.clone() for output in found]
            return found
        self._lane.stream.synchronize()
        return self._places.outputs[key]


class PartPlaces(Places):
    """Gives places where `parts` are done."""

    def __init__(self, device: str, weights: Raw) -> None:
        super().__init__(device)
        self.parts = ALL
        self.resident = torch.from_numpy(weights.view(np.int16)).flatten().view(torch.bfloat16).to(self.device)
        self.outputs: dict[tuple[torch.Size, ...], list[Tensor]] = {}

    def place(self, scheme: Scheme, projection: str, shape: Sequence[int], dtype: torch.dtype) -> Place:
        """As `Places.place`."""
        lane = self._lane()
        with lane.current():
            return Partly(lane, device_encoder(scheme, projection, shape, dtype, self.device), self)


def planned(scheme: Scheme, experts: int) -> tuple[Source, Plan]:
    """One layer of MiniMax-M1 for 8 ranks, from its index alone: no weights are there."""
    made = config(1, experts, 2048)
    layer, attention = "model.layers.0.", ("qkv_proj", "norm", "output_gate", "out_proj")
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", f"{layer}input_layernorm.weight"]
    names += [f"{layer}post_attention_layernorm.weight", *(f"{layer}self_attn.{name}.weight" for name in attention)]
    names += [f"{layer}block_sparse_moe.gate.weight"]
    names += [f"{layer}block_sparse_moe.experts.{e}.{w}.weight" for e in range(experts) for w in ("w1", "w2", "w3")]
    with tempfile.TemporaryDirectory() as folder:
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00000.safetensors")}
        (Path(folder) / "config.json").write_text(json.dumps(made))
        (Path(folder) / "model.safetensors.index.json").write_text(json.dumps(index))
        source = open_source(folder)
        return source, build_plan(source, Request(scheme=scheme, tp=8))


def random_weights(source: Source, units: Sequence[Unit]) -> dict[tuple[int, ...], list[Raw]]:
    """Raw bf16 matrices of every shape that the units read."""
    shapes = {source.specs[rank][name].shape for unit in units for rank, name in unit.reads}
    return {shape: [random_matrix(shape, number) for number in range(MATRICES)] for shape in shapes}


@cache
def random_matrix(shape: tuple[int, ...], number: int) -> Raw:
    """Raw bf16; another one for each number."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = (torch.randn(*shape, device=device, dtype=torch.bfloat16) * 0.02).cpu()
    return made.view(torch.int16).numpy().view(np.uint16)


class Bench:
    """Units of one scheme, weights in memory, and a number of workers."""

    def __init__(self, scheme: str, workers: int, experts: int) -> None:
        self.source, self.plan = planned(SCHEMES[scheme], experts)
        units = [unit for unit in self.plan.units if unit.op == "quantize"]
        self.units = units if workers > 1 else units[: max(2, len(units) // 6)]
        self.matrices = random_weights(self.source, self.units)
        self.places = PartPlaces("cuda", next(iter(self.matrices.values()))[0])
        self.places.workers(self.plan, workers)
        self.pool = ThreadPoolExecutor(workers)

    def seconds(self, parts: Parts) -> float:
        """Of all units, by all workers."""
        self.places.parts = parts
        job = self._job(parts, self.places)

        def work(unit: Unit) -> None:
            run_quantize(unit, job, Findings() if parts.sha else Findings(sha256=NoHash()))  # type: ignore[arg-type]

        began = time.perf_counter()
        list(self.pool.map(work, self.units))
        return time.perf_counter() - began

    def identical(self) -> bool:
        """Whether the first units are the CPU's, byte for byte."""
        self.places.parts = ALL
        there, here = self._job(ALL, self.places), self._job(ALL, Places("cpu"))

        def both(unit: Unit) -> bool:
            gpu, cpu = (run_quantize(unit, job, Findings()).arrays for job in (there, here))
            return all(a.tobytes() == b.tobytes() for a, b in zip(gpu, cpu, strict=True))

        return all(self.pool.map(both, self.units[:2]))

    def rates(self) -> dict[str, float]:
        """Seconds of each part alone and of all together: the shortest of several times."""
        self.seconds(ALL)  # compiles, pins, and keeps outputs for those that make none
        return {name: min(self.seconds(parts) for _ in range(REPEAT)) for name, parts in (ALONE | TOGETHER).items()}

    def close(self) -> None:
        """Give memory and threads back."""
        self.pool.shutdown()
        self.places.__exit__()

    def _job(self, parts: Parts, places: Places) -> Job:
        return Job(plan=self.plan, reader=Memory(self.source, self.matrices, parts), statistics=None, places=places)


def measure(scheme: str, workers: int, experts: int) -> dict[str, Any]:
    """One row."""
    bench = Bench(scheme, workers, experts)
    try:
        torch.set_num_threads(1)  # as in a run
        size = sum(unit.read_bytes for unit in bench.units)
        took = bench.rates()
        row: dict[str, Any] = {"scheme": scheme, "workers": workers, "bytes": size, "identical": bench.identical()}
        row |= {name: size / seconds for name, seconds in took.items()}
        slow = [took[name] for name in ("memory", "to the GPU", "kernels", "from the GPU")]
        idle = took["interpreter"]
        for name, parts in (("all but SHA-256", slow), ("all", [*slow, took["SHA-256"]])):
            row[f"{name}, overlapped"] = size / max(parts)
            row[f"{name}, in turn"] = size / (idle + sum(max(0.0, part - idle) for part in parts))
        return row
    finally:
        bench.close()


def rows(schemes: Sequence[str], workers: Sequence[int], experts: int = EXPERTS) -> Iterator[dict[str, Any]]:
    """Measure and print, a line as soon as it is known."""
    print("GB/s of bf16 weights through the workers, from memory (if all overlapped; if nothing did)")
    print("| scheme | workers | " + " | ".join([*ALONE, *TOGETHER]) + " | artifact |\n" + "|---" * 11 + "|", flush=True)
    for scheme in schemes:
        for count in workers:
            row = measure(scheme, count, experts)
            told = [f"{row[name] / 1e9:.1f}" for name in ALONE]
            for name in TOGETHER:
                bounds = " ".join(f"{row[f'{name}, {how}'] / 1e9:.1f}" for how in ("overlapped", "in turn"))
                told.append(f"{row[name] / 1e9:.1f} ({bounds.replace(' ', '; ')})")
            told.append("identical" if row["identical"] else "DIFFERENT")
            print(f"| {scheme} | {count} | " + " | ".join(told) + " |", flush=True)
            yield row


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="*", default=SCHEMES_SHOWN, choices=SCHEMES)
    parser.add_argument("--workers", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--experts", type=int, default=EXPERTS)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    found = list(rows(a.schemes, a.workers, a.experts))
    if a.json:
        a.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
