"""Generation: greedy decoding equals recomputation, sampling follows its distribution, sequences end where they must."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mxconv.errors import UsageError
from mxconv.runtime import Model, generate, load
from mxconv.runtime.generate import choose
from tests.synthetic import make_checkpoint, random_ids


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(make_checkpoint(tmp_path_factory.mktemp("model"), vocab=64, config={"eos_token_id": [7, 9]}))


def test_greedy_equals_recomputation(model: Model) -> None:
    ids = random_ids(64, 1, 5)[0].tolist()
    expected = list(ids)
    for _ in range(20):
        expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    assert list(generate(model, ids, max_tokens=20, eos_ids=())) == expected[5:]


def test_ends_before_the_end_token(model: Model) -> None:
    ids = [3, 1, 4]
    free = list(generate(model, ids, max_tokens=30, eos_ids=()))
    end = free[4]
    assert list(generate(model, ids, max_tokens=30, eos_ids=[end])) == free[: free.index(end)]
    assert not set(generate(model, ids, max_tokens=200, temperature=5.0, seed=0)) & {7, 9}


def test_tokens_come_one_by_one(model: Model) -> None:
    stream = generate(model, [1], max_tokens=10**9, eos_ids=())
    first = [next(stream) for _ in range(3)]
    assert first == list(generate(model, [1], max_tokens=3, eos_ids=()))


def test_seeds(model: Model) -> None:
    runs = [list(generate(model, [1, 2], max_tokens=12, temperature=1.5, seed=seed, eos_ids=())) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    unseeded = [list(generate(model, [1, 2], max_tokens=12, temperature=1.5, eos_ids=())) for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def shares(logits: torch.Tensor, temperature: float, top_p: float, draws: int = 4000) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    drawn = [choose(logits, temperature, top_p, random) for _ in range(draws)]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / draws


def test_sampling_follows_temperature_and_top_p() -> None:
    logits = torch.tensor([0.5, 0.2, 0.2, 0.06, 0.04]).log()
    for temperature, top_p, expected in (
        (1.0, 1.0, [0.5, 0.2, 0.2, 0.06, 0.04]),
        (1.0, 0.5, [1.0, 0, 0, 0, 0]),
        (1.0, 0.51, [0.5 / 0.7, 0.2 / 0.7, 0, 0, 0]),
        (1.0, 0.95, [0.5 / 0.96, 0.2 / 0.96, 0.2 / 0.96, 0.06 / 0.96, 0]),
        (0.5, 1.0, [0.25 / 0.3352, 0.04 / 0.3352, 0.04 / 0.3352, 0.0036 / 0.3352, 0.0016 / 0.3352]),
        (0.0, 0.1, [1.0, 0, 0, 0, 0]),
    ):
        got = shares(logits, temperature, top_p)
        assert torch.allclose(got, torch.tensor(expected), atol=0.03), (temperature, top_p)
        assert not got[torch.tensor(expected) == 0].any()


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_tokens": -1}, {"ids": []}]
)
def test_parameters_out_of_range(model: Model, bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        generate(model, **({"ids": [1]} | bad))


def test_prompt_outside_the_vocabulary(model: Model) -> None:
    with pytest.raises(UsageError, match="vocabulary"):
        list(generate(model, [64]))


def test_demo_writes_python(demo: Path) -> None:
    """A trained model continues its own kind of text with a likely token most of the time."""
    model = load(demo)
    ids = random_ids(4096, 1, 4)[0].tolist()
    out = list(generate(model, ids, max_tokens=20))
    logits = model(torch.tensor([ids + out]))[0, 3:-1]
    assert logits.argmax(-1).tolist() == out
