"""Tensor parallelism over real processes: verify, one M1-size layer cut over the GPUs, and loading. One command for any machine.

    python benchmarks/tensor_parallel.py [--model FOLDER] [--sizes 1 2 4 8] [--schemes none w4afp8 …] [--parts layer load verify]
    python benchmarks/tensor_parallel.py --device cpu --shape small --tokens 512 --slots 4 --sizes 1 2

A GPU and a process a rank, NCCL between them (gloo with `--device cpu`). A size with too few GPUs for it is named and left out.

    layer   prefill of 32k tokens and decode of 64 slots, bf16 and each scheme, random weights: ms (the slowest rank), the share
            that goes away when nothing is communicated (every rank keeps its own part of each sum), speed-up over one GPU
    load    an artifact of --model, every rank its own shard, not from the page cache: bytes, seconds, GB/s of all together
    verify  `mxconv verify` of --model's artifacts by as many processes as ranks, beside one process: seconds, exit codes, whether
            every verdict is the same, and the relative L2 between TP n and TP 1 with activations unquantized
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from mxconv.bench.ceilings import seconds_of
from mxconv.bench.random_weights import RandomWeights
from mxconv.bench.report import fastest_encoder
from mxconv.bench.shapes import SHAPES, synthetic_config
from mxconv.checkpoint import ByteReader
from mxconv.errors import MxconvError
from mxconv.execute import RunOptions, convert, quantize
from mxconv.membership import Membership
from mxconv.quantize.schemes import SCHEMES
from mxconv.runtime import Model, open_weights
from mxconv.runtime.batch import make_batch
from mxconv.runtime.parallel import Group
from mxconv.runtime.processes import Processes, joined
from mxconv.runtime.slots import Prompt, Slots, Step
from mxconv.runtime.watch import open_store

REPOSITORY = Path(__file__).resolve().parent.parent
KINDS = {0: "lightning", 1: "softmax"}
STEPS = 10


class Silent:
    """A group whose ranks keep their parts to themselves: what remains of the time is not communication."""

    def __init__(self, group: Group) -> None:
        self.size, self.ranks = group.size, group.ranks

    def sum(self, partial: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """This process's own part."""
        return partial(self.ranks[0])

    def share(self, rank: int, compute: Callable[[], torch.Tensor], shape: Any, like: torch.Tensor) -> torch.Tensor:
        """Computed here."""
        return compute()


# What a member does.


def layer(world: Processes, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds of every (scheme, kind, phase), with and without communication."""
    found: dict[str, Any] = {}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    group = world.fast_group(world.size)
    for scheme in options.schemes:
        weights = RandomWeights(
            synthetic_config(SHAPES[options.shape]), tp=world.size, scheme=SCHEMES.get(scheme), device=device,
            encode=fastest_encoder(device),
        )  # fmt: skip
        model = Model(weights, device=device, dtype=dtype, group=group)
        for how, each in (("all", group), ("silent", Silent(group))):
            for index, kind in KINDS.items():
                with model.layer(index) as one:
                    # The same weights either way: only who is asked for a sum changes.
                    one._group = one.attention.group = one.feed_forward.group = each
                    for phase, make in (("prefill", prefill), ("decode", decode)):
                        run, times = make(model, one, index, options)
                        torch.distributed.barrier()
                        found[f"{scheme} {kind} {phase} {how}"] = seconds_of(run, device, repeats=5, warmups=2) / times
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def prefill(model: Model, one: Any, index: int, options: argparse.Namespace) -> tuple[Callable[[], None], int]:
    """A prompt into an empty slot; (run, layer calls in it)."""
    x = torch.randn(1, options.tokens, model.config.hidden_size, device=model.device).to(model.dtype)
    past = Prompt(pool=Slots(1, options.tokens, model.device), slot=0)
    ids = torch.zeros(1, options.tokens, dtype=torch.int64, device=model.device)
    batch = make_batch(ids, None, past, model.inverse, model.dtype)

    @torch.inference_mode()
    def run() -> None:
        one(x, batch, cache=past)

    return run, 1


def decode(model: Model, one: Any, index: int, options: argparse.Namespace) -> tuple[Callable[[], None], int]:
    """A step of all slots, captured on a GPU where the layer can be; (run, layer calls in it)."""
    slots, device = options.slots, model.device
    x = torch.randn(slots, 1, model.config.hidden_size, device=device).to(model.dtype)
    pool = Slots(slots, options.context + 8, device)
    past = Step.of(pool, torch.ones(slots, dtype=torch.bool, device=device), options.context + 1)
    batch = make_batch(torch.zeros(slots, 1, dtype=torch.int64, device=device), None, past, model.inverse, model.dtype)

    @torch.inference_mode()
    def step() -> None:
        one(x, batch, cache=past)

    step()
    pool.pretend(options.context)
    step()
    again = step
    if device.type == "cuda" and one.capturable:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
        again = graph.replay

    def run() -> None:
        for _ in range(STEPS):
            again()

    return run, STEPS


def load(world: Processes, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds and bytes of bringing this rank's shard of `options.folder` to the device, and which folders were read."""
    folders: dict[str, int] = {}
    original = ByteReader.read

    def counted(self: ByteReader, tensor: Any, box: Any = None, **kwargs: Any) -> Any:
        found = original(self, tensor, box, **kwargs)
        name = Path(self._files[tensor.file].path).parent.name
        folders[name] = folders.get(name, 0) + found.nbytes
        return found

    ByteReader.read = counted  # type: ignore[method-assign]
    for file in Path(options.folder).rglob("*.safetensors"):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    torch.distributed.barrier()
    began = time.perf_counter()
    weights = open_weights(options.folder)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = Model(weights, device=device, dtype=dtype, group=world.fast_group(weights.tp))
    for index in range(model.config.num_layers):
        with model.layer(index) as one:
            if one.feed_forward.packed is None:  # widened when first used: ask for all
                names = {name.rsplit(".", 1)[0] for name in weights.names(index) if name.endswith("down")}
                for rank in model.group.ranks:
                    for stem in sorted(names):
                        one.feed_forward.experts.pair(stem, rank)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - began, "bytes": folders}


def member(pipe: Connection, environment: Mapping[str, str], options: argparse.Namespace) -> None:
    """One process: join, do what is asked, tell."""
    os.environ.update(environment)
    place = Membership(
        rank=int(environment["RANK"]), size=int(environment["WORLD_SIZE"]), local_rank=int(environment["LOCAL_RANK"]),
        address=environment["MASTER_ADDR"], port=int(environment["MASTER_PORT"]), agent_store=True,
    )  # fmt: skip

    def speak(error: MxconvError, trace: str) -> None:
        pipe.send(f"{error}\n{trace}")

    with joined(place, options.device, speak, lambda: None) as world:
        found = {"layer": layer, "load": load}[options.part](world, options, torch.device(world.device))
    pipe.send(found)


# The parent.


def in_members(count: int, part: str, options: argparse.Namespace, **more: Any) -> list[Any]:
    """What each of `count` members found; RuntimeError with what failed."""
    _store, port = open_store()
    context, pipes = multiprocessing.get_context("spawn"), []
    asked = argparse.Namespace(**{**vars(options), "part": part, **more})
    for rank in range(count):
        place = Membership(rank=rank, size=count, local_rank=rank, address="127.0.0.1", port=port, agent_store=True)
        mine, theirs = context.Pipe()
        context.Process(target=member, args=(theirs, place.environment(), asked), daemon=True).start()
        theirs.close()
        pipes.append(mine)
    found = []
    for rank, pipe in enumerate(pipes):
        try:
            found.append(pipe.recv())
        except EOFError:
            found.append(f"rank {rank} ended without a word")
    failed = [each for each in found if isinstance(each, str)]
    if failed:
        raise RuntimeError(failed[0])
    return found


def layer_rows(size: int, options: argparse.Namespace, single: dict[str, float]) -> Iterator[dict[str, Any]]:
    """A row a (scheme, kind, phase); `single` keeps the seconds of one GPU."""
    found = in_members(size, "layer", options)
    slowest = {key: max(each[key] for each in found) for key in found[0]}
    for scheme in options.schemes:
        for kind in KINDS.values():
            for phase in ("prefill", "decode"):
                key = f"{scheme} {kind} {phase}"
                seconds, silent = slowest[f"{key} all"], slowest[f"{key} silent"]
                if size == 1:
                    single[key] = seconds
                yield {
                    "gpus": size, "experts": scheme, "layer": kind, "phase": phase, "ms": seconds * 1e3,
                    "communication": max(0.0, 1 - silent / seconds) if size > 1 else 0.0,
                    "speed_up": single[key] / seconds if key in single else None,
                }  # fmt: skip


def show_layer(row: dict[str, Any]) -> str:
    """A line."""
    speed_up = "–" if row["speed_up"] is None else f"{row['speed_up']:.2f}"
    return (
        f"| {row['gpus']} | {row['experts']:15} | {row['layer']:9} | {row['phase']:7} | {row['ms']:9.3f} "
        f"| {row['communication']:4.0%} | {speed_up} |"
    )  # fmt: skip


def artifact(model: Path, scheme: str, tp: int, folder: Path) -> Path:
    """The artifact of `model`, made once."""
    out = folder / f"{scheme}-{tp}"
    if not out.exists():
        if scheme == "none":
            convert(model, out, tp=tp, options=RunOptions())
        else:
            quantize(model, out, scheme=scheme, tp=tp, options=RunOptions())
    return out


def load_row(size: int, scheme: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Loading one artifact by all its ranks at once."""
    out = artifact(options.model, scheme, size, folder)
    found = in_members(size, "load", options, folder=str(out))
    own = all(set(each["bytes"]) == {f"rank{rank}"} for rank, each in enumerate(found)) or size == 1
    moved, seconds = sum(sum(each["bytes"].values()) for each in found), max(each["seconds"] for each in found)
    return {"gpus": size, "experts": scheme, "bytes": moved, "seconds": seconds, "own_shard_only": own}


def verify(out: Path, size: int, options: argparse.Namespace) -> tuple[int, float, dict[str, Any]]:
    """(exit code, seconds, document) of the command."""
    command = [sys.executable, "-m", "mxconv", "verify", str(out), "--source", str(options.model), "--json", "--device",
               options.device, "--windows", str(options.windows)]  # fmt: skip
    command += ["--processes", str(size)] if size > 1 else []
    began = time.perf_counter()
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return run.returncode, time.perf_counter() - began, json.loads(run.stdout) if run.stdout else {"error": run.stderr}


def verify_row(size: int, scheme: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The command by one process and by `size`."""
    out = artifact(options.model, scheme, size, folder)
    alone_code, alone_seconds, alone = verify(out, 1, options)
    code, seconds, found = verify(out, size, options)
    verdicts = [{name: part["status"] for name, part in each.get("sections", {}).items()} for each in (alone, found)]
    figures = found.get("sections", {}).get("parallel", {}).get("figures", {})
    return {
        "gpus": size, "experts": scheme, "codes": [alone_code, code], "seconds": [alone_seconds, seconds],
        "same_verdicts": verdicts[0] == verdicts[1] != {}, "logits_l2": figures.get("logits_l2"),
    }  # fmt: skip


def attempted(what: str, make: Callable[[], Any]) -> Any:
    """`make()`, or None with the reason printed: one size that fails ends nothing else."""
    try:
        return make()
    except (RuntimeError, MxconvError) as failure:
        print(f"| {what}: not run: {str(failure).splitlines()[0]}", flush=True)
        return None


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=["layer", "load", "verify"])
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--schemes", nargs="*", default=["none", *SCHEMES])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shape", default="m1")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--model", type=Path, default=REPOSITORY / "mxconv" / "data" / "demo", help="for load and verify")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def run_layer(sizes: list[int], options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of `layer`."""
    print("| ranks | experts | layer | phase | ms | communication | speed-up over one |", flush=True)
    single: dict[str, float] = {}
    for size in sizes:
        for row in attempted(f"{size} ranks", lambda size=size: list(layer_rows(size, options, single))) or ():
            print(show_layer(row), flush=True)
            yield row


def run_load(sizes: list[int], options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of `load`."""
    print("| ranks | experts | loaded MB | seconds | GB/s | own shards alone |", flush=True)
    for size, scheme in ((size, scheme) for size in sizes for scheme in options.schemes):
        row = attempted(f"{size} ranks, {scheme}", lambda a=size, b=scheme: load_row(a, b, options, folder))
        if row:
            rate, own = row["bytes"] / row["seconds"] / 1e9, "yes" if row["own_shard_only"] else "NO"
            print(f"| {size} | {scheme} | {row['bytes'] / 1e6:.1f} | {row['seconds']:.2f} | {rate:.3f} | {own} |", flush=True)
            yield row


def run_verify(sizes: list[int], options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of `verify`."""
    print("| ranks | experts | exit codes (1 process, n) | seconds (1, n) | same verdicts | L2 of TP n to 1 |", flush=True)
    for size, scheme in ((size, scheme) for size in sizes if size > 1 for scheme in options.schemes):
        row = attempted(f"{size} ranks, {scheme}", lambda a=size, b=scheme: verify_row(a, b, options, folder))
        if row:
            (one, many), (code, codes), same = row["seconds"], row["codes"], "yes" if row["same_verdicts"] else "NO"
            print(f"| {size} | {scheme} | {code}, {codes} | {one:.1f}, {many:.1f} | {same} | {row['logits_l2']} |", flush=True)
            yield row


PARTS = {"layer": run_layer, "load": run_load, "verify": run_verify}


def main() -> None:
    """Print every row as it is known."""
    options = parse()
    gpus = torch.cuda.device_count() if options.device == "cuda" else None
    name = f"{gpus} × {torch.cuda.get_device_name()}" if gpus else f"{len(os.sched_getaffinity(0))} CPU cores"
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {name}", flush=True)
    sizes = [size for size in options.sizes if gpus is None or size <= gpus]
    for size in sorted(set(options.sizes) - set(sizes)):
        print(f"{size} GPUs: not run, this machine has {gpus}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        rows = {part: list(PARTS[part](sizes, options, Path(scratch))) for part in options.parts}
    if options.json:
        asked = {key: str(value) for key, value in vars(options).items()}
        options.json.write_text(json.dumps({"options": asked, "machine": name, **rows}, indent=1))


if __name__ == "__main__":
    main()
