"""Softmax attention through torch's own kernels: plain, grouped, and packed for sequences of different lengths.

Letters: B sequences, T queries, S keys, N query heads, K KV heads (query head n uses KV head n // (N/K)), D head_dim.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxconv.runtime.batch import Batch

FULL_GPU = 256
"""Slots × KV heads from which masked attention keeps an H200 busy (measured: 64 × 8 heads .70 of copy speed, 64 × 1 .32)."""


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, *, causal: bool) -> Tensor:
    """softmax(q·kᵀ/√D)·v: q [B, N, T, D], k and v [B, K, S, D]; [B, N, T, D].

    `allowed` bool [B or 1, 1, T, S] says who attends whom; without it `causal` does (S = T), or every query attends all.
    """
    shared = q.shape[1] // k.shape[1]
    if q.shape[2] == 1 and shared > 1:
        # One query a head: the heads of a KV head stand in a row, and no key is copied.
        rows = attend(q.view(q.shape[0], k.shape[1], shared, -1), k, v, allowed, causal=False)
        return rows.reshape(q.shape)
    if shared > 1 and q.is_cuda and allowed is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    if shared > 1:
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal and allowed is None)


def attend_batch(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """Causal attention of the new columns of `batch`: q [B, T, N, D], k and v [B, past + T, K, D]; [B, T, N, D].

    Outputs at padded positions are finite and mean nothing.
    """
    if batch.columns > 1 and (batch.past or batch.real is not None) and _packs(q):
        return _attend_packed(q, k, v, batch)
    causal = batch.columns > 1 and batch.past == 0
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), batch.allowed, causal=causal).transpose(1, 2)


def _packs(q: Tensor) -> bool:
    """Whether torch's variable-length kernel takes these values."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """`attend_batch` over real tokens alone, which needs no mask of T × S; a padded query gets zero."""
    queries, keys = batch.mask, batch.real
    if keys is None:
        keys = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
    if queries is None:
        queries = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    from torch.nn.attention.varlen import varlen_attn

    lengths = _starts(queries), _starts(keys), q.shape[1], k.shape[1]
    packed = varlen_attn(q[queries], k[keys], v[keys], *lengths, window_size=(-1, 0), **_grouped())
    return torch.zeros_like(q).masked_scatter_(queries[..., None, None], packed)  # type: ignore[arg-type]


def attend_slots(q: Tensor, k: Tensor, v: Tensor, used: Tensor, columns: int) -> Tensor:
    """One query a slot, q [S, N, D], over the first `used` int64 [S] (≤ `columns`) of k and v [S, room, K, D]; [S, N, D].

    Few heads in all leave a GPU's kernel for masked attention idle; there the one that splits keys is 2-4 times as fast.
    """
    slots, room, kv, size = k.shape
    if _packs(q) and slots * kv < FULL_GPU and slots * room < 1 << 31:
        queries = torch.arange(slots + 1, dtype=torch.int32, device=q.device)
        flat = q, k.view(-1, kv, size), v.view(-1, kv, size), queries, queries * room, 1, columns
        # The public form of this, varlen_attn, takes lengths from torch 2.12 on only.
        return torch.ops.aten._flash_attention_forward(
            *flat, 0.0, False, return_debug_mask=False, seqused_k=used.to(torch.int32)
        )[0]  # fmt: skip
    allowed = (torch.arange(columns, device=q.device) < used[:, None])[:, None, None]
    keys, values = k[:, :columns].transpose(1, 2), v[:, :columns].transpose(1, 2)
    return attend(q[:, :, None], keys, values, allowed, causal=False)[:, :, 0]


def _starts(real: Tensor) -> Tensor:
    """int32 [B + 1]: where each sequence's real tokens begin among all of them."""
    return F.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)


@cache
def _grouped() -> dict[str, Any]:
    """torch 2.11 shares KV heads without being told, later ones ask for it."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
