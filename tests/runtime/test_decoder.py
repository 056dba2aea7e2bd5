"""Decoding over slots equals decoding alone, whatever else comes, goes and stays in the other slots."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from mxconv.errors import UsageError
from mxconv.runtime import Model, load
from mxconv.runtime.decoder import Decoder
from mxconv.runtime.slots import Prompt, Slots
from tests.runtime.helpers import FLOAT32_BAR, FLOAT64_BAR, error
from tests.synthetic import make_checkpoint, random_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), layers="lsl", shared=32, postnorm=None)


def expected(model: Model, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]), last=1)[0, -1]


@pytest.mark.parametrize(("tp", "dtype", "bar"), [(1, torch.float64, FLOAT64_BAR), (2, torch.float32, FLOAT32_BAR)])
def test_sequences_come_and_go(folder: Path, tp: int, dtype: torch.dtype, bar: float) -> None:
    model = load(folder, tp=tp, dtype=dtype)
    decoder = Decoder(model, slots=4, room=8)
    held: dict[int, list[int]] = {}

    def start(slot: int, length: int) -> None:
        held[slot] = random_ids(128, 1, length, seed=length)[0].tolist()
        assert error(decoder.start(slot, held[slot]), expected(model, held[slot])) <= bar

    def step(times: int) -> None:
        for _ in range(times):
            for slot, ids in held.items():
                ids.append(int(decoder.tokens[slot]))
            logits = decoder.step()
            assert len(logits) > max(held)
            for slot, ids in held.items():
                assert error(logits[slot], expected(model, ids)) <= bar

    start(0, 3)
    step(2)
    start(2, 300)  # beyond the room, and beyond a block of lightning
    step(3)
    decoder.stop(0)
    del held[0]
    step(1)
    start(1, 1)
    start(0, 7)  # a used slot starts anew
    step(2)
    decoder.tokens[2] = 5  # another token than the likeliest
    step(1)
    assert held[2][-1] == 5


def test_a_long_prompt_goes_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder, dtype=torch.float64)
    ids = random_ids(128, 1, 30)[0].tolist()
    monkeypatch.setattr("mxconv.runtime.decoder.PROMPT_TOKENS", 11)
    decoder = Decoder(model, slots=2, room=40)
    assert error(decoder.start(1, ids), expected(model, ids)) <= FLOAT64_BAR
    token = int(decoder.tokens[1])
    assert error(decoder.step()[1], expected(model, [*ids, token])) <= FLOAT64_BAR


def test_what_stands_behind_a_sequence_does_not_matter(folder: Path) -> None:
    """Slots that are not active, and keys beyond a slot's length, may hold anything finite."""
    model = load(folder, dtype=torch.float64)
    decoder = Decoder(model, slots=3, room=16)
    ids = random_ids(128, 1, 5)[0].tolist()
    decoder.start(1, ids)
    with torch.inference_mode():
        for buffer in [buffer for pair in decoder.pool._keys.values() for buffer in pair]:
            buffer[1, 5:], buffer[[0, 2]] = 1e3, -1e3
    before = {key: states[[0, 2]].clone() for key, states in decoder.pool._states.items()}
    token = int(decoder.tokens[1])
    assert error(decoder.step()[1], expected(model, [*ids, token])) <= FLOAT64_BAR
    assert all(torch.equal(decoder.pool._states[key][[0, 2]], states) for key, states in before.items())
    assert decoder.pool.tokens.tolist() == [0, 6, 0] == decoder.pool.used


@pytest.mark.parametrize("kernels", [True, False])
def test_steps_are_captured_where_lightning_runs_as_a_kernel(
    tmp_path: Path, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its definition reads on the host which slots are active, which a capture forbids; experts are not all there is."""
    model = load(make_checkpoint(tmp_path, dense=True), dtype=torch.bfloat16)
    model(random_ids(128, 1, 2))
    model.device = torch.device("cuda")  # with every layer loaded, only asked
    asked = []

    def wanted(operation: str, device: torch.device, dtype: torch.dtype, **shape: int) -> bool:
        asked.append((operation, dtype, shape))
        return kernels

    monkeypatch.setattr("mxconv.runtime.attention.triton_wanted", wanted)
    assert model.capturable is kernels
    assert set(map(str, asked)) == {str(("lightning_decode", torch.bfloat16, {"head_dim": 16}))}


class Failed(Exception):
    """What a forward raises."""


def test_a_capture_that_fails_leaves_the_slots_active(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder, dtype=torch.float64)
    decoder = Decoder(model, slots=2, room=8)
    ids = [3, 1, 4]
    decoder.start(1, ids)
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    with monkeypatch.context() as failing, pytest.raises(Failed):
        failing.setattr(model, "forward", MagicMock(side_effect=Failed))
        decoder._capture(2, 8)
    assert decoder._active.tolist() == [False, True]
    token = int(decoder.tokens[1])
    assert error(decoder.step()[1], expected(model, [*ids, token])) <= FLOAT64_BAR


def test_refusals(folder: Path) -> None:
    model = load(folder)
    with pytest.raises(UsageError, match="captured"):
        Decoder(model, graphs=True)
    decoder = Decoder(model)
    with pytest.raises(UsageError, match="no slot is active"):
        decoder.step()
    with pytest.raises(UsageError, match="no tokens"):
        decoder.start(0, [])
    pool = Slots(2, 4, torch.device("cpu"))
    for ids, mask in ((random_ids(128, 2, 3), None), (random_ids(128, 1, 3), torch.tensor([[True, False, True]]))):
        with pytest.raises(UsageError, match="one sequence"):
            model(ids, mask=mask, cache=Prompt(pool=pool, slot=0))
    with pytest.raises(UsageError, match="no room"):
        model(random_ids(128, 1, 5), cache=Prompt(pool=pool, slot=0))
