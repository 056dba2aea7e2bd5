"""One MiniMax-M1-size layer of each kind on a GPU: prefill of 32k tokens and decode of 64 slots, unquantized and in each scheme.

    python benchmarks/one_layer.py [--tp 1 8] [--schemes none w4afp8 …] [--tokens 32768] [--slots 64] [--context 4096]
        [--profile] [--json FILE]

Hidden 6144, 64 heads, 32 experts, random weights made on the GPU and encoded by the quantizer; `--tp 8` computes one of 8 ranks,
without communication. Milliseconds of the layer alone (no embedding, no head), and its fraction of the ceiling: the time that the
least bytes (decode) or operations (prefill) take at the copy and matrix-product speeds measured first, over the time taken. Errors
are relative L2 of 512 tokens against the same layer in float32 with unquantized weights: of the layer's output (its residual is
3.6 × the normalised input) and of its experts' part alone. Static activation scales are calibrated on those tokens at tp 1.

`--profile` prints behind each row where the GPU's time goes, kernel by kernel.

A process for each scheme builds and compiles; they do that side by side and are timed one after the other.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxconv.bench.ceilings import Ceilings, measure_ceilings, seconds_of
from mxconv.bench.costs import Cut
from mxconv.bench.random_weights import OneRank, RandomWeights
from mxconv.bench.report import described, device_name, fastest_encoder
from mxconv.bench.runs import operations_by_dtype
from mxconv.bench.shapes import SHAPES, SyntheticShape, synthetic_config
from mxconv.quantize.schemes import SCHEMES
from mxconv.runtime.batch import make_batch
from mxconv.runtime.coded import rotate
from mxconv.runtime.model import Model
from mxconv.runtime.slots import Prompt, Slots, Step

KINDS = {0: "lightning", 1: "softmax"}
JUDGED_TOKENS = 512
STEPS = 10
SHOWN_KERNELS = 24


def hidden(config: Any, tokens: int, device: torch.device) -> Tensor:
    """float32 [1, tokens, H] of variance 1, the same for every model."""
    return torch.randn(1, tokens, config.hidden_size, generator=torch.Generator(device).manual_seed(7), device=device)


def model_of(
    shape: SyntheticShape, tp: int, scheme: str, device: torch.device, absmax: dict[tuple[int, str], float], **how: Any
) -> Model:
    """The two-layer model, as the first of `tp` ranks computes it."""
    weights = RandomWeights(
        synthetic_config(shape), tp=tp, scheme=SCHEMES.get(scheme), device=device, encode=fastest_encoder(device),
        absmax=lambda layer, name: absmax[layer, name],
    )  # fmt: skip
    return Model(weights, device=device, group=OneRank(tp), **how)


def judge(
    shape: SyntheticShape, tp: int, device: torch.device, tokens: int
) -> tuple[dict[tuple[str, int], Tensor], dict[str, Any]]:
    """float32 outputs of each layer and of its experts on the judged tokens; at tp 1 also absmax of what each scheme rotates."""
    model = model_of(shape, tp, "none", device, {}, dtype=torch.float32, stream=True)
    x = hidden(model.config, tokens, device)
    outputs, absmax = {}, {name: {} for name, scheme in SCHEMES.items() if scheme.static}
    with torch.inference_mode():
        batch = make_batch(torch.zeros(1, tokens, dtype=torch.int64, device=device), None, None, model.inverse, torch.float32)
        for index in KINDS:

            def observe(expert: int, projection: str, inputs: Tensor, index: int = index) -> None:
                for name, found in absmax.items():
                    key = index, f"experts.{expert}.{projection.removesuffix('_proj')}"
                    largest = float(rotate(inputs, SCHEMES[name].rotation[projection]).abs().max())
                    found[key] = max(found.get(key, 1.0), largest)

            with model.layer(index) as layer:
                outputs["layer", index] = layer(x, batch, observer=observe if tp == 1 else None)
                outputs["experts", index] = layer.feed_forward(x, None, "quantized", None)
    for found in absmax.values():
        for index in KINDS:
            for expert in range(model.config.num_experts):
                for name in ("up_gate", "down"):
                    found.setdefault((index, f"experts.{expert}.{name}"), 1.0)
    return outputs, absmax


def relative(got: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


class Bench:
    """One (tp, scheme): its model, and the runs that are timed."""

    def __init__(self, options: argparse.Namespace, tp: int, scheme: str, absmax: dict[tuple[int, str], float]) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        began = time.perf_counter()
        self.model = model_of(SHAPES[options.shape], tp, scheme, self.device, absmax, dtype=self.dtype)
        self.pools = {index: Slots(options.slots, options.context + 8, self.device) for index in KINDS}
        self.load = {"capturable": self.model.capturable, "seconds_to_build": time.perf_counter() - began}
        self.cut = Cut(config=self.model.config, tp=tp, item_bytes=self.dtype.itemsize, scheme=SCHEMES.get(scheme))

    @torch.inference_mode()
    def errors(self, expected: dict[tuple[str, int], Tensor]) -> dict[str, float]:
        """Relative L2 of outputs against the float32 judge."""
        tokens = expected["layer", 0].shape[1]
        x = hidden(self.model.config, tokens, self.device).to(self.dtype)
        ids = torch.zeros(1, tokens, dtype=torch.int64, device=self.device)
        batch = make_batch(ids, None, None, self.model.inverse, self.dtype)
        found = {}
        for index, kind in KINDS.items():
            with self.model.layer(index) as layer:
                found[f"{kind} layer"] = relative(layer(x, batch), expected["layer", index])
                found[f"{kind} experts"] = relative(layer.feed_forward(x, None, "quantized", None), expected["experts", index])
        return found

    def prefill(self, index: int) -> Any:
        """A call of the layer on a prompt that goes into an empty slot."""
        tokens = self.options.tokens
        x = hidden(self.model.config, tokens, self.device).to(self.dtype)
        ids = torch.zeros(1, tokens, dtype=torch.int64, device=self.device)
        past = Prompt(pool=Slots(1, tokens, self.device), slot=0)
        batch = make_batch(ids, None, past, self.model.inverse, self.dtype)

        def run() -> None:
            with torch.inference_mode(), self.model.layer(index) as layer:
                layer(x, batch, cache=past)

        return run

    def decode(self, index: int) -> Any:
        """A step of the layer for all slots, captured where that can be."""
        pool, slots = self.pools[index], self.options.slots
        x = hidden(self.model.config, slots, self.device).to(self.dtype).view(slots, 1, -1)
        ids = torch.zeros(slots, 1, dtype=torch.int64, device=self.device)
        active = torch.ones(slots, dtype=torch.bool, device=self.device)

        pool.pretend(self.options.context)
        past = Step.of(pool, active, self.options.context + 1)
        batch = make_batch(ids, None, past, self.model.inverse, self.dtype)

        def run() -> None:
            with torch.inference_mode(), self.model.layer(index) as layer:
                layer(x, batch, cache=past)

        run()
        pool.pretend(self.options.context)  # what the first run made is random from here on
        if not self.model.capturable:
            return run
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def profiles(self) -> dict[str, Any]:
        """Where the time of each kind of layer goes."""
        runs = {"prefill": self.prefill, "decode": self.decode}
        return {f"{kind} {what}": profiled(make(index)) for index, kind in KINDS.items() for what, make in runs.items()}

    def measured(self, ceilings: Ceilings) -> dict[str, Any]:
        """Milliseconds and fractions of each kind of layer."""
        found: dict[str, Any] = {}
        options, cut, config = self.options, self.cut, self.model.config
        for index, kind in KINDS.items():
            step = self.decode(index)
            seconds = seconds_of(lambda step=step: [step() for _ in range(STEPS)], self.device, repeats=5) / STEPS  # type: ignore[misc]
            moved = cut.attention_weights(index) * cut.item_bytes + 4 * config.num_experts * config.hidden_size
            moved += cut.experts_bytes(options.slots) + cut.past_bytes(index, options.slots, options.context)
            found[f"{kind} decode"] = {"ms": seconds * 1e3, "of_ceiling": ceilings.floor(moved, {}) / seconds}
            seconds = seconds_of(self.prefill(index), self.device, repeats=3, warmups=2)
            dense = 2.0 * options.tokens * cut.attention_weights(index) + cut.attention_operations(index, options.tokens)
            operations = operations_by_dtype(self.model, ceilings, dense, cut.experts_operations(options.tokens))
            found[f"{kind} prefill"] = {"ms": seconds * 1e3, "of_ceiling": ceilings.floor(0.0, operations) / seconds}
        return found


def profiled(run: Callable[[], object]) -> dict[str, Any]:
    """GPU milliseconds of one `run`: {"kernels": their sum, "by name": {name: (milliseconds, launches)}}, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    found = [(event.key, event.self_device_time_total / 1e3, event.count) for event in seen.key_averages()]
    found = sorted((each for each in found if each[1] > 0), key=lambda each: -each[1])
    return {"kernels": sum(each[1] for each in found), "by name": {name: (ms, count) for name, ms, count in found}}


def child(pipe: Connection, options: argparse.Namespace, scheme: str) -> None:
    """For each order (tp, absmax, expected, ceilings): build and run everything once, say so, wait for the turn, measure."""
    while (order := pipe.recv()) is not None:
        tp, absmax, expected, ceilings = order
        try:
            bench = Bench(options, tp, scheme, absmax.get(scheme, {}))
            errors = bench.errors({key: value.to(bench.device) for key, value in expected.items()})
            for index in KINDS:
                bench.decode(index)()
                bench.prefill(index)()
            tidy()
            pipe.send("ready")
            pipe.recv()
            found = {**bench.load, "errors": errors, **bench.measured(ceilings)}
            pipe.send({**found, "profiles": bench.profiles() if options.profile else {}})
        except Exception as failure:  # the other processes go on; the table says what failed
            pipe.send(RuntimeError(f"{type(failure).__name__}: {failure}"))
        bench = None
        tidy()


def tidy() -> None:
    """Give the device back what nothing uses."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def show(tp: int, scheme: str, row: dict[str, Any]) -> None:
    """One line of the table."""
    keys = [f"{kind} {what}" for kind in KINDS.values() for what in ("prefill", "decode")]
    cells = [f"{row[key]['ms']:9.3f} ({row[key]['of_ceiling']:.2f})" for key in keys]
    errors = row["errors"]
    print(
        f"| {tp} | {scheme:15} | {' | '.join(cells)} | {errors['lightning layer']:.1e} / {errors['softmax layer']:.1e} "
        f"| {errors['lightning experts']:.1e} |", flush=True,
    )  # fmt: skip
    for what, found in row["profiles"].items():
        print(f"    {what}: {found['kernels']:.3f} ms in kernels")
        for name, (ms, count) in list(found["by name"].items())[:SHOWN_KERNELS]:
            print(f"        {ms:8.4f} ms  × {count:3}  {name:.110}", flush=True)


def heard(pipe: Connection) -> Any:
    """What the process at the other end says; an error when it ended without a word."""
    try:
        return pipe.recv()
    except EOFError:
        return RuntimeError("the process ended (out of memory?)")


def started(options: argparse.Namespace, schemes: list[str]) -> dict[str, Connection]:
    """A process for each scheme, waiting for orders at the other end of its pipe."""
    context, pipes = multiprocessing.get_context("spawn"), {}
    for scheme in schemes:
        pipes[scheme], other = context.Pipe()
        context.Process(target=child, args=(other, options, scheme), daemon=True).start()
        other.close()
    return pipes


def rows_of(pipes: dict[str, Connection], order: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """Each scheme's row, or what failed: all build side by side, then they are timed one after the other."""
    for pipe in pipes.values():
        pipe.send(order)
    said = {scheme: heard(pipe) for scheme, pipe in pipes.items()}
    for scheme, pipe in pipes.items():
        if said[scheme] == "ready":
            pipe.send("go")
            said[scheme] = heard(pipe)
        yield scheme, said[scheme]


def judged(options: argparse.Namespace, device: torch.device) -> tuple[dict[int, Any], Any]:
    """Expected outputs by tp, and the absmax of the static schemes."""
    expected, absmax = {}, None
    for tp in sorted({1, *options.tp}):
        outputs, found = judge(SHAPES[options.shape], tp, device, options.judged)
        absmax = found if tp == 1 else absmax
        expected[tp] = {key: value.cpu() for key, value in outputs.items()}
    tidy()
    return expected, absmax


def main() -> None:
    """Print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, nargs="*", default=[8, 1])
    parser.add_argument("--schemes", nargs="*", default=["none", *SCHEMES])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--shape", default="m1")
    parser.add_argument("--judged", type=int, default=JUDGED_TOKENS)
    parser.add_argument("--together", type=int, help="processes at a time, each with a model (default: 6, or 2 below 120 GB)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    together = options.together or (6 if device.type == "cpu" or torch.cuda.mem_get_info(device)[1] > 120e9 else 2)
    groups = [options.schemes[first : first + together] for first in range(0, len(options.schemes), together)]
    pipes = started(options, groups[0])
    ceilings = measure_ceilings(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    print(f"{device_name(device)}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}: {described(ceilings)}", flush=True)
    print(f"one layer, {options.tokens} tokens of prefill, {options.slots} slots at {options.context}: ms (of ceiling)")
    print("| tp | experts | lightning prefill | decode | softmax prefill | decode | error of the layer (l / s) | of the experts |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    expected, absmax = judged(options, device)
    rows = []
    for number, schemes in enumerate(groups):
        pipes = pipes if number == 0 else started(options, schemes)
        for tp in options.tp:
            for scheme, row in rows_of(pipes, (tp, absmax, expected[tp], ceilings)):
                if isinstance(row, Exception):
                    print(f"| {tp} | {scheme} | {row}", flush=True)
                    continue
                rows.append({"tp": tp, "scheme": scheme, **row})
                show(tp, scheme, row)
                if options.json:  # as it grows: a run that is cut short has told something
                    document = {"copy": ceilings.copy, "matmul": ceilings.matmul, "options": {**vars(options), "json": None}}
                    options.json.write_text(json.dumps({**document, "rows": rows}, indent=1))
        for pipe in pipes.values():
            pipe.send(None)


if __name__ == "__main__":
    main()
