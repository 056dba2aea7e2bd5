"""Random weights in memory, made on the device when they are asked for: the same ones every time."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mxconv.config import LINEAR, ModelConfig
from mxconv.errors import UsageError
from mxconv.quantize.packing import store_codes, store_scale
from mxconv.quantize.reference import encode as encode_whole
from mxconv.quantize.schemes import Scheme
from mxconv.runtime import lightning
from mxconv.runtime.coded import PROJECTION, Coded, unpack
from mxconv.runtime.expectation import Expected
from mxconv.runtime.loader import Weights, split_expert
from mxconv.runtime.sizes import vocabulary_rows

Absmax = Callable[[int, str], float]
"""(layer, logical name of an expert projection) → absmax of its rotated input, for the static schemes."""

Encode = Callable[[Scheme, str, Tensor], tuple[Tensor, Tensor]]
"""(scheme, projection, weight [out, in]) → (codes as stored, scale in canonical orientation)."""


@dataclass(frozen=True, slots=True)
class OneRank:
    """A group of `size` ranks of which the first is computed, and its partial results are the sums: for speed, not for logits."""

    size: int

    @property
    def ranks(self) -> range:
        """The first rank alone."""
        return range(1)

    def sum(self, partial: Callable[[int], Tensor]) -> Tensor:
        """The first rank's partial result."""
        return partial(0)

    def share(self, rank: int, compute: Callable[[], Tensor], shape: Sequence[int], like: Tensor) -> Tensor:
        """The first rank's share; zeros stand for what the others would send."""
        return compute() if rank in self.ranks else like.new_zeros(tuple(shape))


class RandomWeights(Weights):
    """Normal weights of variance 1/in for a rank of `config`, bf16; under a scheme experts are encoded from them."""

    def __init__(
        self, config: ModelConfig, *, tp: int, scheme: Scheme | None, device: torch.device, absmax: Absmax | None = None,
        encode: Encode | None = None,
    ) -> None:  # fmt: skip
        self.config, self.tp, self.scheme, self.layout = config, tp, scheme, "random"
        self._device, self._absmax, self._encode = device, absmax or (lambda layer, name: 6.0), encode or encode_by_reference

    def close(self) -> None:
        """Nothing is open."""

    def names(self, layer: int | None) -> tuple[str, ...]:
        """See `Weights.names`."""
        if layer is None:
            return ("embed", "final_norm", "lm_head")
        linear = self.config.layer_types[layer] == LINEAR
        own = ("q", "k", "v", "attn_out", *(("output_gate", "linear_norm") if linear else ()))
        experts = (f"experts.{e}.{name}" for e in range(self.config.num_experts) for name in PROJECTION)
        return ("attn_norm", "mlp_norm", *own, "router", *experts)

    def _shape(self, layer: int | None, name: str) -> tuple[int, ...]:
        c = self.config
        width, inner = c.num_attention_heads // self.tp * c.head_dim, c.intermediate_size // self.tp
        linear = layer is not None and c.layer_types[layer] == LINEAR
        keys = width if linear else max(1, c.num_key_value_heads // self.tp) * c.head_dim
        shapes = {
            "q": (width, c.hidden_size), "k": (keys, c.hidden_size), "v": (keys, c.hidden_size),
            "output_gate": (width, c.hidden_size), "linear_norm": (width,),
            "attn_out": (c.hidden_size, width), "router": (c.num_experts, c.hidden_size),
            "up_gate": (2 * inner, c.hidden_size), "down": (c.hidden_size, inner),
        }  # fmt: skip
        return shapes.get(split_expert(name)[0], (c.hidden_size,))

    def _normal(self, shape: Sequence[int], *key: object) -> Tensor:
        random = torch.Generator(self._device).manual_seed(zlib.crc32(repr(key).encode()))
        return torch.randn(*shape, generator=random, device=self._device)

    def _matrix(self, layer: int | None, name: str, rank: int) -> Tensor:
        shape = self._shape(layer, name)
        draw = self._normal(shape, layer, name, rank)
        if len(shape) == 1:
            return (1 + 0.1 * draw).to(torch.bfloat16)
        return draw.mul_(1 / math.sqrt(shape[1])).to(torch.float32 if name == "router" else torch.bfloat16)

    def read(self, layer: int | None, name: str, rank: int) -> tuple[Tensor, ...]:
        """See `Weights.read`."""
        return (self._matrix(layer, name, 0 if name in ("router", "attn_norm", "mlp_norm", "final_norm") else rank),)

    def coded(self, layer: int | None, name: str, rank: int) -> Coded | None:
        """See `Weights.coded`."""
        projection, expert = split_expert(name)
        if self.scheme is None or layer is None or expert is None:
            return None
        codes, scale = self._encode(self.scheme, PROJECTION[projection], self._matrix(layer, name, rank))
        activation = None
        if self.scheme.static:
            absmax = self._absmax(layer, name)
            rule = self.scheme.activation
            activation = torch.tensor([absmax / rule.divisor if rule.stored_divided else absmax], device=self._device)
        return Coded(
            codes=unpack(codes, self.scheme), weight_scale=store_scale(scale, self.scheme).contiguous(), activation_scale=activation
        )

    def rows(self, name: str, rank: int, start: int, stop: int) -> Tensor:
        """See `Weights.rows`."""
        shape = (vocabulary_rows(self.config, name, self.tp), self.config.hidden_size)
        scale = 1.0 if name == "embed" else 1 / math.sqrt(shape[1])
        return (self._normal(shape, name, rank)[start:stop] * scale).to(torch.bfloat16)

    def stored(self, layer: int | None, name: str, rank: int) -> tuple[str, ...]:
        """See `Weights.stored`; nothing is in a file."""
        return (f"random {layer} {name}",)

    def expected_tensors(self, rank: int) -> Mapping[str, Expected]:
        """There are no files. Raises UsageError."""
        raise UsageError("random weights are in no files")

    def rates(self, layer: int, rank: int) -> Sequence[float]:
        """See `Weights.rates`."""
        heads = self.config.num_attention_heads
        each = heads // self.tp
        return lightning.decay_rates(heads, layer, self.config.num_layers)[rank * each : (rank + 1) * each]


def encode_by_reference(scheme: Scheme, projection: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes as stored, scale in canonical orientation) by the quantizer's definition."""
    coded = encode_whole(weight, scheme, projection)
    return store_codes(coded.codes, scheme), coded.scale
