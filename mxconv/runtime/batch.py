"""One call's tokens as every layer needs them: which are real, their positions, rotations and who attends whom."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mxconv.errors import UsageError
from mxconv.runtime.rope import Rope, rope_of

if TYPE_CHECKING:
    from mxconv.runtime.cache import Past


@dataclass(frozen=True, kw_only=True)  # no slots: `allowed` is made when a layer asks for it, and kept
class Batch:
    """B sequences of T new columns behind `past` cached ones."""

    size: int
    columns: int
    past: int
    mask: Tensor | None
    """bool [B, T]: which new columns are real; None when all are."""
    real: Tensor | None
    """bool [B, past + T]: which of all columns are real; None when all are."""
    rope: Rope

    @cached_property
    def allowed(self) -> Tensor | None:
        """bool [B or 1, 1, T, past + T]: keys that each query attends; None for plain causal attention or a single query of all."""
        if self.real is None and (self.past == 0 or self.columns == 1):
            return None
        ones = torch.ones(self.columns, self.past + self.columns, dtype=torch.bool, device=self.rope.cos.device)
        causal = ones.tril(self.past)[None, None]
        if self.real is None:
            return causal
        # Every query may see itself, so that the softmax of a padded one is finite.
        return (causal & self.real[:, None, None, :]) | ones.tril(self.past).triu(self.past)[None, None]

    def rows(self, start: int, stop: int) -> Batch:
        """The sequences [start, stop) alone."""
        def cut(x: Tensor) -> Tensor:
            return x if len(x) == 1 else x[start:stop]

        return Batch(
            size=stop - start, columns=self.columns, past=self.past,
            mask=None if self.mask is None else self.mask[start:stop],
            real=None if self.real is None else self.real[start:stop],
            rope=Rope(cos=cut(self.rope.cos), sin=cut(self.rope.sin)),
        )  # fmt: skip


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Raise UsageError unless `ids` is an integer tensor [B, T], not empty, of ids below `vocabulary`."""
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32) or not ids.numel():
        got = f"{ids.dtype} {list(ids.shape)}"
        raise UsageError("token ids must be a tensor [B, T] that is not empty", expected="int64", got=got)
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocabulary:
        raise UsageError("token id outside the vocabulary", expected=f"0 … {vocabulary - 1}", got=low if low < 0 else high)


def check_mask(mask: Tensor, ids: Tensor) -> Tensor | None:
    """`mask` as bool [B, T] on the device of `ids`, None when every token is real; UsageError for another shape."""
    if mask.shape != ids.shape:
        raise UsageError("mask and ids differ in shape", expected=list(ids.shape), got=list(mask.shape))
    real = mask.to(device=ids.device, dtype=torch.bool)
    return None if bool(real.all()) else real


def make_batch(ids: Tensor, mask: Tensor | None, cache: Past | None, inverse: Tensor, dtype: torch.dtype) -> Batch:
    """The Batch of `ids` int64 [B, T]; takes its columns from `cache`, which then must see every layer of this call.

    `inverse` are the rope frequencies, `dtype` that of cos and sin.
    """
    size, columns = ids.shape
    real = None if mask is None else check_mask(mask, ids)
    past, before, all_real = 0, None, real
    if cache is not None:
        before, past, all_real = cache.begin(size, columns, real, ids.device)
    if real is None:
        positions = torch.arange(columns, device=ids.device)[None]
    else:
        positions = (real.cumsum(1) - 1).clamp(min=0)
    if before is not None:
        positions = positions + before[:, None]
    return Batch(size=size, columns=columns, past=past, mask=real, real=all_real, rope=rope_of(positions, inverse, dtype))
