"""The whole model: embedding, layers, final norm, head; kept widened in memory or streamed layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mxconv.dispatch import open_device
from mxconv.errors import UsageError
from mxconv.runtime.batch import Batch, check_ids, make_batch
from mxconv.runtime.cache import Cache, Past
from mxconv.runtime.layer import DecoderLayer
from mxconv.runtime.linear import Activations
from mxconv.runtime.loader import Weights
from mxconv.runtime.norm import rms_norm, statistics_dtype
from mxconv.runtime.opening import open_weights
from mxconv.runtime.parallel import Group, LocalRanks, ProcessRanks
from mxconv.runtime.rope import frequencies
from mxconv.runtime.vocabulary import Vocabulary

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
HEAD_BLOCK = 8192
FEW_LOGITS = 1 << 24


class Model:
    """A MiniMax model over `weights`, computed by the ranks of `group` on `device` in `dtype`.

    `stream` holds one layer's attention weights and one widened expert at a time; otherwise everything is widened once, each
    layer when it is first used.
    """

    def __init__(
        self, weights: Weights, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, stream: bool = False,
        group: Group | None = None,
    ) -> None:  # fmt: skip
        if dtype not in DTYPES:
            raise UsageError("the runtime does not compute in this dtype", expected=" or ".join(map(str, DTYPES)), got=str(dtype))
        self.weights, self.config = weights, weights.config
        self.device, self.dtype, self.stream = open_device(device), dtype, stream
        self.group = LocalRanks(weights.tp) if group is None else group
        self.inverse = frequencies(self.config.rotary_dim, self.config.rope_theta, self.device)
        self._norm = weights.dense(None, "final_norm", self.group.ranks[0], dtype).to(self.device)
        self._embed = self._vocabulary("embed")
        self._head = self._embed if self.config.tie_word_embeddings else self._vocabulary("lm_head")
        self._layers: dict[int, DecoderLayer] = {}

    def _vocabulary(self, name: str) -> Vocabulary:
        return Vocabulary(self.weights, name, self.group, self.device, self.dtype, keep=not self.stream)

    @property
    def tp(self) -> int:
        """Tensor-parallel ranks that the model is computed in."""
        return self.group.size

    def __call__(
        self, ids: Tensor, *, mask: Tensor | None = None, cache: Past | None = None, activations: Activations = "quantized",
        last: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits float32 [B, T, vocab_size] of `ids` int64 [B, T]; of the last `last` columns only when that is given.

        `mask` [B, T]: true where a token is real; logits at padded positions mean nothing. `cache` holds the past of these
        sequences and takes up the new tokens. `activations`: "quantized" as serving kernels compute, "none" with dequantized
        weights alone. Raises UsageError for ids or a mask that do not fit.
        """
        return self.forward(ids, self.batch(ids, mask=mask, cache=cache), cache=cache, activations=activations, last=last)

    def forward(
        self, ids: Tensor, batch: Batch, *, cache: Past | None = None, activations: Activations = "quantized",
        last: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits of `ids`, whose `batch` was made (and entered into `cache`) already; otherwise as a call."""
        x = self.embed(ids)
        for index in range(self.config.num_layers):
            with self.layer(index) as layer:
                x = layer(x, batch, cache=cache, activations=activations)
        if last is not None:
            x = x[:, max(0, x.shape[1] - last) :]
        x = self.final_norm(x)
        vocabulary = self.config.vocab_size
        out = torch.empty(0)
        # Few rows of logits are made in one product; streamed heads stay in blocks, whose rows are read for each.
        rows = x.numel() // x.shape[-1]
        for start, logits in self.head_blocks(x, HEAD_BLOCK if self.stream else max(HEAD_BLOCK, FEW_LOGITS // rows)):
            if logits.shape[-1] == vocabulary:
                return logits.to(torch.float32)
            if start == 0:
                out = torch.empty(*x.shape[:-1], vocabulary, dtype=torch.float32, device=x.device)
            out[..., start : start + logits.shape[-1]] = logits
        return out

    @property
    def capturable(self) -> bool:
        """Whether one token a sequence can be computed without reading anything back from the device (loads every layer)."""
        if self.device.type != "cuda" or self.stream or isinstance(self.group, ProcessRanks):
            return False
        for index in range(self.config.num_layers):
            with self.layer(index) as layer:
                if not layer.capturable:
                    return False
        return True

    def cache(self) -> Cache:
        """An empty cache for one batch of sequences."""
        return Cache()

    def batch(self, ids: Tensor, mask: Tensor | None = None, cache: Past | None = None) -> Batch:
        """What the layers need to know about `ids`; with a `cache` the new columns are entered into it here, once a call."""
        check_ids(ids, self.config.vocab_size)
        return make_batch(ids.to(self.device), mask, cache, self.inverse, self.dtype)

    def embed(self, ids: Tensor) -> Tensor:
        """Hidden states [B, T, H] of `ids`."""
        return self._embed.embed(ids.to(self.device, torch.int64))

    @contextmanager
    def layer(self, index: int) -> Iterator[DecoderLayer]:
        """Layer `index`; a streamed one lets its weights go at the end."""
        layer = self._layers.get(index)
        if layer is None:
            layer = DecoderLayer(self.weights, index, self.group, self.device, self.dtype, keep=not self.stream)
        if not self.stream:
            self._layers[index] = layer
            yield layer
            return
        try:
            yield layer
        finally:
            layer.release()

    def final_norm(self, x: Tensor) -> Tensor:
        """The norm before the head."""
        return rms_norm(x, self._norm, self.config.rms_norm_eps)

    def head_blocks(self, x: Tensor, block: int = HEAD_BLOCK) -> Iterator[tuple[int, Tensor]]:
        """(first id, logits [..., n]) for runs of up to `block` ids in order, in float32 at least; together the vocabulary."""
        for start, logits in self._head.logits(x, block):
            yield start, logits.to(statistics_dtype(self.dtype))

    def close(self) -> None:
        """Close the weights' files."""
        self.weights.close()


def load(
    path: str | Path, *, tp: int | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
    merge: bool = False, stream: bool = False, keep_decay: bool = False,
) -> Model:  # fmt: skip
    """The model of the checkpoint or artifact in folder `path`.

    `tp`: ranks, computed one after the other in this process; for a source None is 1, an artifact has its own number and
    another one is an error. `merge` computes an artifact's ranks as one. `dtype` float32, float64 or bfloat16. `stream` reads
    layers and experts when they are needed and lets them go. `keep_decay` takes stored decay rates that differ from the formula.
    Raises UsageError, MalformedInput, IncompleteInput or Problems; see `open_weights`.
    """
    return Model(open_weights(path, tp=tp, merge=merge, keep_decay=keep_decay), device=device, dtype=dtype, stream=stream)
