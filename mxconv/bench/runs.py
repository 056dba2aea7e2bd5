"""What is measured: a decoding step, a prompt, the experts of a layer, the quantizer; each beside its floor on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mxconv.bench.ceilings import Ceilings, seconds_of
from mxconv.bench.costs import Cut
from mxconv.dispatch import triton_wanted
from mxconv.quantize.fast import ProjectionEncoder
from mxconv.quantize.schemes import PROJECTIONS, Scheme
from mxconv.runtime.decoder import Decoder
from mxconv.runtime.model import Model

EXPERT_TOKENS = (1, 16, 128, 2048)
PROMPT_BEFORE_STEPS = 8
ENCODINGS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One line: what ran, its seconds, what it moved and computed at least, and the fraction of the floor's speed that this is."""

    name: str
    seconds: float
    tokens: int
    moved_bytes: float
    operations: float
    of_ceiling: float
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second, 0 where no tokens are counted."""
        return self.tokens / self.seconds

    def document(self) -> dict[str, Any]:
        """For JSON."""
        rates = {"tokens_per_second": self.tokens_per_second, "bytes_per_second": self.moved_bytes / self.seconds}
        return {**asdict(self), **rates}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def operations_by_dtype(model: Model, ceilings: Ceilings, dense: float, experts: float) -> dict[str, float]:
    """Operations by the dtype that multiplies: experts with 8-bit activations count at the e4m3 rate where it was measured."""
    eight = model.weights.scheme is not None and "float8_e4m3fn" in ceilings.matmul
    if not eight:
        return {_name(model.dtype): dense + experts}
    return {_name(model.dtype): dense, "float8_e4m3fn": experts}


def filled(model: Model, slots: int, context: int, steps: int) -> Decoder:
    """A decoder whose slots all stand `context` tokens into a sequence; states, keys and values are random."""
    decoder = Decoder(model, slots=slots, room=context + steps)
    prompt = [(7 * i) % model.config.vocab_size for i in range(min(PROMPT_BEFORE_STEPS, context))]
    for slot in range(slots):
        decoder.start(slot, prompt)
        decoder.tokens[slot] = (slot * 31 + 5) % model.config.vocab_size
    decoder.pool.pretend(context)
    return decoder


def decode(model: Model, ceilings: Ceilings, *, slots: int, context: int, steps: int) -> Measured:
    """One step of `slots` sequences, `context` tokens in: the mean of `steps`, the median of five such runs."""
    repeats = 5
    decoder = filled(model, slots, context, (repeats + 2) * steps)
    with torch.inference_mode():
        for _ in range(2):
            decoder.step()

        def run() -> None:
            for _ in range(steps):
                decoder.step()

        seconds = seconds_of(run, model.device, repeats=repeats) / steps
    moved = len(model.group.ranks) * Cut.of(model).step_bytes(slots, context)
    return Measured(
        name=f"decode, {slots} slots at {context}", seconds=seconds, tokens=slots, moved_bytes=moved, operations=0.0,
        of_ceiling=ceilings.floor(moved, {}) / seconds, detail={"slots": slots, "context": context, "graphs": decoder.graphs},
    )  # fmt: skip


def prefill(model: Model, ceilings: Ceilings, *, tokens: int, repeats: int = 3) -> Measured:
    """A prompt of `tokens` into an empty slot, logits of its last token."""
    decoder = Decoder(model, slots=1, room=tokens + 1)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (tokens,), generator=random).tolist()
    seconds = seconds_of(lambda: decoder.start(0, ids), model.device, repeats=repeats)
    cut, ranks = Cut.of(model), len(model.group.ranks)
    dense, experts = (ranks * number for number in cut.prompt_operations(tokens))
    moved = ranks * cut.weights_bytes(tokens)
    by_dtype = operations_by_dtype(model, ceilings, dense, experts)
    return Measured(
        name=f"prefill, {tokens} tokens", seconds=seconds, tokens=tokens, moved_bytes=moved, operations=dense + experts,
        of_ceiling=ceilings.floor(moved, by_dtype) / seconds,
    )  # fmt: skip


def experts(model: Model, ceilings: Ceilings, *, layer: int = 0) -> Iterator[Measured]:
    """The experts of one layer, router, sum and a shared one included, for several numbers of tokens."""
    cut, ranks = Cut.of(model), len(model.group.ranks)
    random = torch.Generator(model.device).manual_seed(0)
    with model.layer(layer) as decoder_layer, torch.inference_mode():
        for tokens in EXPERT_TOKENS:
            h = torch.randn(1, tokens, model.config.hidden_size, generator=random, device=model.device).to(model.dtype)
            run = captured(partial(decoder_layer.feed_forward, h, None, "quantized", None), model)
            seconds = seconds_of(run, model.device, repeats=9, warmups=3)
            shared = cut.shared_weights(layer)
            moved = ranks * (cut.experts_bytes(tokens) + shared * cut.item_bytes)
            routed, beside = ranks * cut.experts_operations(tokens), ranks * 2.0 * tokens * shared
            operations = routed + beside
            floor = ceilings.floor(moved, operations_by_dtype(model, ceilings, beside, routed))
            yield Measured(
                name=f"experts, {tokens} tokens", seconds=seconds, tokens=tokens, moved_bytes=moved, operations=operations,
                of_ceiling=floor / seconds,
            )  # fmt: skip


def captured(run: Any, model: Model) -> Any:
    """`run` as the replay of a CUDA graph where the model can be captured, so that launches do not count."""
    if not model.capturable:
        return run
    run()
    torch.cuda.synchronize(model.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def quantize(
    scheme: Scheme, ceilings: Ceilings, *, device: torch.device, out_features: int, in_features: int
) -> Iterator[Measured]:
    """Encoding each projection of one expert; bytes are the bf16 weights read and the codes written."""
    random = torch.Generator(device).manual_seed(0)
    shapes = {"up_gate_proj": (2 * out_features, in_features), "down_proj": (in_features, out_features)}
    for projection in PROJECTIONS:
        n, k = shapes[projection]
        weight = torch.randn(n, k, generator=random, device=device).to(torch.bfloat16)
        if triton_wanted("quantize", device, weight.dtype):
            seconds = seconds_of(_on_gpu(scheme, projection, weight), device) / ENCODINGS
        else:
            encoder = ProjectionEncoder(scheme, projection, n, k)
            seconds = seconds_of(partial(_encode, encoder, weight.cpu()), torch.device("cpu"))
        moved = n * k * (2 + scheme.bits_per_weight / 8)
        yield Measured(
            name=f"{scheme.name} {projection} {n} × {k}", seconds=seconds, tokens=0, moved_bytes=moved, operations=0.0,
            of_ceiling=ceilings.floor(moved, {}) / seconds,
        )  # fmt: skip


def _on_gpu(scheme: Scheme, projection: str, weight: Tensor) -> Callable[[], None]:
    """`ENCODINGS` of them one after the other, so that the device and not the launching is timed."""
    from mxconv.quantize.gpu import GpuEncoder

    n, k = weight.shape
    encoder = GpuEncoder(scheme, projection, n, k, weight.device)
    codes, scale = encoder.encode(weight)

    def run() -> None:
        for _ in range(ENCODINGS):
            if encoder.passes == 2:
                encoder.observe(weight)
            encoder.encode_into(weight, codes, scale)

    return run


def _encode(encoder: ProjectionEncoder, weight: Tensor) -> None:
    if encoder.passes == 2:
        from mxconv.quantize.reference import tensor_scale

        encoder.encode(weight, tensor_scale(encoder.observe(weight)))
    else:
        encoder.encode(weight)
