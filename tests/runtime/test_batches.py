"""Padding, caches and splits: none of them may change what a sequence's real tokens give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxconv.errors import UsageError
from mxconv.runtime import Model, load
from mxconv.runtime import attention as attention_module
from tests.runtime.helpers import FLOAT64_BAR, error, split_call
from tests.synthetic import make_checkpoint, random_ids

LENGTHS = (255, 256, 257, 511, 512, 513)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(make_checkpoint(tmp_path_factory.mktemp("model"), layers="lsls"), dtype=torch.float64)


def padded(ids: Tensor, place: str, pads: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(ids, mask) with `pads` padded columns; their ids are arbitrary."""
    columns = len(ids) + pads
    random = torch.Generator().manual_seed(seed)
    where = {
        "left": torch.arange(pads), "right": torch.arange(len(ids), columns),
        "inside": torch.randperm(columns, generator=random)[:pads],
    }[place]  # fmt: skip
    mask = torch.ones(columns, dtype=torch.bool)
    mask[where] = False
    out = torch.randint(0, 128, (columns,), generator=random)
    out[mask] = ids
    return out, mask


@pytest.mark.parametrize("length", LENGTHS)
def test_split_at_block_edges(model: Model, length: int) -> None:
    ids = random_ids(128, 1, 520, seed=length)
    whole = model(ids)
    assert error(split_call(model, ids, [length]), whole) <= FLOAT64_BAR
    assert error(model(ids[:, :length]), whole[:, :length]) <= FLOAT64_BAR


@pytest.mark.parametrize("place", ["left", "right", "inside"])
def test_padding_equals_unpadded(model: Model, place: str) -> None:
    ids = random_ids(128, 3, 300)
    rows = [padded(ids[r, : 300 - 120 * r], place, 40 + 120 * r, seed=r) for r in range(3)]
    batch, mask = torch.stack([row for row, _ in rows]), torch.stack([row for _, row in rows])
    logits = model(batch, mask=mask)
    pieces = split_call(model, batch, [1, 41, 42, 256, 300], mask=mask)
    for r in range(3):
        alone = model(ids[r : r + 1, : 300 - 120 * r])[0]
        assert error(logits[r][mask[r]], alone) <= FLOAT64_BAR
        assert error(pieces[r][mask[r]], alone) <= FLOAT64_BAR
    assert logits.isfinite().all()


def test_decode_after_padded_prefill(model: Model) -> None:
    """Prompts of different lengths, padded on the right, then decoded together without a mask."""
    ids = random_ids(128, 2, 70)
    lengths = (60, 35)
    mask = torch.arange(60)[None] < torch.tensor(lengths)[:, None]
    cache = model.cache()
    model(ids[:, :60] * mask, mask=mask, cache=cache)
    steps = torch.cat([model(ids[:, t : t + 1], cache=cache) for t in range(60, 70)], dim=1)
    for r, length in enumerate(lengths):
        alone = model(torch.cat((ids[r, :length], ids[r, 60:]))[None])
        assert error(steps[r], alone[0, length:]) <= FLOAT64_BAR


def test_a_padded_step_leaves_a_sequence_where_it_was(model: Model) -> None:
    ids = random_ids(128, 2, 12)
    cache = model.cache()
    model(ids[:, :8], cache=cache)
    model(ids[:, 8:9], mask=torch.tensor([[True], [False]]), cache=cache)
    last = model(ids[:, 9:10], cache=cache)
    assert error(last[0], model(ids[:1, :10])[0, 9:]) <= FLOAT64_BAR
    assert error(last[1], model(torch.cat((ids[1:, :8], ids[1:, 9:10]), 1))[0, 8:]) <= FLOAT64_BAR


@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(1, 299), unique=True, max_size=6), seed=st.integers(0, 9))
def test_any_split(model: Model, cuts: list[int], seed: int) -> None:
    ids = random_ids(128, 2, 300, seed=seed)
    assert error(split_call(model, ids, sorted(cuts)), model(ids)) <= FLOAT64_BAR


def test_sequences_are_chunked_without_a_trace(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(128, 5, 20)
    mask = torch.rand(5, 20, generator=torch.Generator().manual_seed(0)) > 0.3
    plain, masked = model(ids), model(ids, mask=mask)
    calls = []
    original = attention_module.SoftmaxAttention.__call__

    def counted(self: object, h: Tensor, *rest: object) -> Tensor:
        calls.append(len(h))
        return original(self, h, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(attention_module.SoftmaxAttention, "__call__", counted)
    monkeypatch.setattr(attention_module, "CHUNK_TOKENS", 40)
    assert error(model(ids), plain) <= FLOAT64_BAR
    assert calls[:3] == [2, 2, 1]
    assert error(model(ids, mask=mask)[mask], masked[mask]) <= FLOAT64_BAR


def test_last(model: Model) -> None:
    ids = random_ids(128, 2, 9)
    whole = model(ids)
    assert torch.equal(model(ids, last=2), whole[:, -2:])
    assert torch.equal(model(ids, last=50), whole)


def test_int32_ids(model: Model, tmp_path: Path) -> None:
    ids = random_ids(128, 2, 9)
    assert torch.equal(model(ids.int()), model(ids))
    several = load(make_checkpoint(tmp_path), tp=2, stream=True)
    assert torch.equal(several(ids.int()), several(ids))


@pytest.mark.parametrize(
    ("ids", "kwargs"),
    [
        (torch.zeros(3, dtype=torch.int64), {}),
        (torch.zeros(1, 0, dtype=torch.int64), {}),
        (torch.zeros(1, 3), {}),
        (torch.tensor([[128]]), {}),
        (torch.tensor([[-1]]), {}),
        (torch.zeros(1, 3, dtype=torch.int64), {"mask": torch.ones(1, 2)}),
        (torch.zeros(1, 3, dtype=torch.int64), {"activations": "None"}),
    ],
)
def test_bad_calls(model: Model, ids: Tensor, kwargs: dict) -> None:
    with pytest.raises(UsageError):
        model(ids, **kwargs)


def test_cache_of_another_batch(model: Model, tmp_path: Path) -> None:
    cache = model.cache()
    model(random_ids(128, 2, 3), cache=cache)
    with pytest.raises(UsageError, match="one batch"):
        model(random_ids(128, 3, 3), cache=cache)
