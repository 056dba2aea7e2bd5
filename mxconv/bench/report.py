"""One `mxconv bench`: make or load the model, measure, show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from mxconv.bench import runs
from mxconv.bench.ceilings import Ceilings, measure_ceilings
from mxconv.bench.random_weights import Encode, OneRank, RandomWeights, encode_by_reference
from mxconv.bench.shapes import SHAPES, SyntheticShape, synthetic_config
from mxconv.console import Console
from mxconv.dispatch import triton_wanted
from mxconv.errors import UsageError
from mxconv.quantize.schemes import SCHEMES, Scheme, get_scheme
from mxconv.runtime.model import Model, load


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What was asked for; see `mxconv bench --help`."""

    what: str
    folder: Path | None
    shape: str
    scheme: str | None
    group_size: int | Literal["channel"] | None
    tp: int | None
    device: torch.device
    dtype: torch.dtype
    """Of a model's activations and dense weights, and of the weights that are quantized."""
    slots: int
    context: int
    steps: int
    tokens: int


def run(options: Options, console: Console) -> None:
    """Measure and print. Raises UsageError for an unknown shape or scheme, and what loading raises, before anything is measured."""
    if options.shape not in SHAPES:
        raise UsageError(f"unknown shape {options.shape!r}", expected=" or ".join(SHAPES))
    scheme = get_scheme(options.scheme, group_size=options.group_size) if options.scheme else None
    if options.what == "quantize":
        _tell(options, partial(_quantize, options, [scheme] if scheme else list(SCHEMES.values())), console)
        return
    model = open_model(options, scheme)
    try:
        _tell(options, partial(_model, options, model), console)
    finally:
        model.close()


def _tell(options: Options, measure: Callable[[Ceilings], Iterable[runs.Measured]], console: Console) -> None:
    ceilings = measure_ceilings(options.device, options.dtype, products=options.what != "quantize")
    console.note(f"{device_name(options.device)}, torch {torch.__version__}: {described(ceilings)}")
    measured = []
    for each in measure(ceilings):
        console.detail(f"{each.name}: {each.seconds * 1e3:.3f} ms")
        measured.append(each)
    console.table(None, ["", "ms", "tokens/s", "GB/s", "TFLOP/s", "of ceiling"], [_row(each) for each in measured])
    payload = {
        "device": device_name(options.device), "torch": torch.__version__, "dtype": str(options.dtype).removeprefix("torch."),
        "model": str(options.folder) if options.folder else options.shape, "scheme": options.scheme,
        "ceilings": {"copy_bytes_per_second": ceilings.copy, "operations_per_second": ceilings.matmul},
        "measured": [each.document() for each in measured],
    }  # fmt: skip
    console.document("bench", payload)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU with its threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def described(ceilings: Ceilings) -> str:
    """Ceilings in words."""
    products = [f"{name} products {rate / 1e12:.2f} TFLOP/s" for name, rate in ceilings.matmul.items()]
    return ", ".join([f"copy {ceilings.copy / 1e9:,.0f} GB/s", *products])


def _row(each: runs.Measured) -> list[str]:
    return [
        each.name, f"{each.seconds * 1e3:.3f}", f"{each.tokens_per_second:,.0f}" if each.tokens else "–",
        f"{each.moved_bytes / each.seconds / 1e9:,.0f}" if each.moved_bytes else "–",
        f"{each.operations / each.seconds / 1e12:.2f}" if each.operations else "–", f"{each.of_ceiling:.2f}",
    ]  # fmt: skip


def _quantize(options: Options, schemes: Sequence[Scheme], ceilings: Ceilings) -> Iterator[runs.Measured]:
    shape = SHAPES[options.shape]
    size = synthetic_config(shape)
    inner = size.intermediate_size // shape.tp
    for scheme in schemes:
        yield from runs.quantize(scheme, ceilings, device=options.device, out_features=inner, in_features=size.hidden_size)


def _model(options: Options, model: Model, ceilings: Ceilings) -> Iterator[runs.Measured]:
    if options.what == "decode":
        yield runs.decode(model, ceilings, slots=options.slots, context=options.context, steps=options.steps)
    elif options.what == "prefill":
        yield runs.prefill(model, ceilings, tokens=options.tokens)
    else:
        yield from runs.experts(model, ceilings)


def open_model(options: Options, scheme: Scheme | None) -> Model:
    """The model in the folder, or a synthetic one."""
    if options.folder is not None:
        return load(options.folder, tp=options.tp, device=options.device, dtype=options.dtype)
    return synthetic_model(SHAPES[options.shape], scheme, options.device, options.dtype)


def synthetic_model(shape: SyntheticShape, scheme: Scheme | None, device: torch.device, dtype: torch.dtype) -> Model:
    """A model of random weights: one layer of each kind, as the first of `shape.tp` ranks computes it."""
    weights = RandomWeights(synthetic_config(shape), tp=shape.tp, scheme=scheme, device=device, encode=fastest_encoder(device))
    return Model(weights, device=device, dtype=dtype, group=OneRank(shape.tp))


def fastest_encoder(device: torch.device) -> Encode:
    """The quantizer's kernels where there are any, asked for with the first weight; the reference gives the same bits."""

    def encode(scheme: Scheme, projection: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not triton_wanted("quantize", device, weight.dtype):
            return encode_by_reference(scheme, projection, weight)
        from mxconv.quantize.gpu import GpuEncoder

        n, k = weight.shape
        return GpuEncoder(scheme, projection, n, k, device).encode(weight)

    return encode
