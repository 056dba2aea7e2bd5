"""Metrics against numpy on whole logits; the block by block comparison against the same."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from mxconv.runtime import Model, load, open_weights
from mxconv.verify.heads import Side, aligned, block_rows, compare
from mxconv.verify.metrics import QUANTILES, TokenScores, distribution, estimate, summarize
from tests.synthetic import make_checkpoint, random_ids


def naive(p_logits: np.ndarray, q_logits: np.ndarray, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Everything in float64 from whole logits [windows, T, V]."""
    p_logits, q_logits, targets = p_logits[:, :-1].astype(np.float64), q_logits[:, :-1].astype(np.float64), ids[:, 1:]

    def log_softmax(z: np.ndarray) -> np.ndarray:
        z = z - z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    p, q = log_softmax(p_logits), log_softmax(q_logits)
    five_p, five_q = (np.argsort(-z, axis=-1, kind="stable")[..., :5] for z in (p_logits, q_logits))
    return {
        "kl": (np.exp(p) * (p - q)).sum(-1),
        "reference_logp": np.take_along_axis(p, targets[..., None], -1)[..., 0],
        "other_logp": np.take_along_axis(q, targets[..., None], -1)[..., 0],
        "top1": (p_logits.argmax(-1) == q_logits.argmax(-1)).astype(float),
        "top5": (five_p[..., :, None] == five_q[..., None, :]).any(-1).mean(-1),
        "error_squares": ((p_logits - q_logits) ** 2).sum(-1),
        "reference_squares": (p_logits**2).sum(-1),
    }  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models that differ, with a vocabulary that neither ranks nor blocks divide."""
    root = tmp_path_factory.mktemp("heads")
    shape = {"layers": "ls", "vocab": 300, "hidden": 32}
    return make_checkpoint(root / "a", **shape), make_checkpoint(root / "b", **shape, seed=9)


@pytest.mark.parametrize("memory_bytes", [1, 1 << 30])
def test_blocks_of_the_vocabulary_give_what_whole_logits_give(checkpoints: tuple[Path, Path], memory_bytes: int) -> None:
    ids = random_ids(300, 3, 20)
    sides, logits = {}, {}
    for name, path, tp in (("p", checkpoints[0], 1), ("q", checkpoints[1], 4)):
        model = Model(open_weights(path, tp=tp), stream=True)
        batch, x = model.batch(ids), model.embed(ids)
        for index in range(2):
            with model.layer(index) as layer:
                x = layer(x, batch)
        sides[name] = Side(model=model, hidden=x)
        logits[name] = load(path, tp=tp)(ids).numpy()
    found = compare(sides, [("p", "q"), ("p", "p")], ids, memory_bytes)
    wanted = naive(logits["p"], logits["q"], ids.numpy())
    for name, values in wanted.items():
        np.testing.assert_allclose(getattr(found["p", "q"], name).numpy(), values, rtol=2e-5, atol=1e-6, err_msg=name)
    assert found["p", "p"].kl.max() < 1e-9
    assert found["p", "p"].error_squares.max() == 0
    assert bool((found["p", "p"].top5 == 1).all())


def test_memory_decides_the_size_of_blocks() -> None:
    assert block_rows(8192, 4, 1 << 30) == (1 << 30) // (4 * 8192 * 7)
    assert block_rows(8192, 4, 1) == 64
    assert block_rows(10, 1, 1 << 40) == 8192


def test_blocks_that_end_elsewhere_are_cut_to_common_ones() -> None:
    z = torch.arange(10.0)[None]
    cuts = ([0, 4, 8, 10], [0, 5, 10], [0, 10])
    streams = [iter([(a, z[:, a:b]) for a, b in pairwise(cut)]) for cut in cuts]
    found = list(aligned(streams))
    assert [start for start, _ in found] == [0, 4, 5, 8]
    for start, blocks in found:
        assert all(torch.equal(block, blocks[0]) and block[0, 0] == start for block in blocks)
    assert sum(blocks[0].shape[1] for _, blocks in found) == 10


def test_estimate_takes_windows_as_the_independent_samples() -> None:
    values = torch.tensor([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]], dtype=torch.float64)
    assert estimate(values).mean == 2.0
    assert estimate(values).error == pytest.approx(2**0.5 / 2**0.5)
    assert estimate(values[:1]).error == 0.0
    assert estimate(torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)).error == pytest.approx(1 / 3**0.5)


def test_distribution_is_numpys() -> None:
    values = np.random.default_rng(5).lognormal(size=(4, 333))
    found = distribution(torch.from_numpy(values))
    np.testing.assert_allclose([found.quantiles[share] for share in QUANTILES], np.quantile(values, QUANTILES), rtol=1e-12)
    assert (found.largest, found.smallest) == (values.max(), values.min())
    assert found.rms == pytest.approx(np.sqrt((values**2).mean()))


def test_a_value_that_is_not_a_number_is_never_hidden() -> None:
    values = torch.ones(2, 5, dtype=torch.float64)
    values[1, 3] = torch.nan
    found = distribution(values)
    assert all(np.isnan(x) for x in (found.mean.mean, found.median, found.largest, *found.quantiles.values()))


def test_summary() -> None:
    rng = np.random.default_rng(6)
    p, q = rng.normal(size=(2, 4, 50, 40)) * 2
    ids = rng.integers(0, 40, (4, 50))
    parts = naive(p, p + 0.1 * q, ids)
    found = summarize(TokenScores(**{name: torch.from_numpy(x) for name, x in parts.items()}))
    perplexities = [float(np.exp(-parts[name].mean())) for name in ("reference_logp", "other_logp")]
    assert [found.reference_perplexity, found.perplexity] == pytest.approx(perplexities)
    assert found.perplexity_change.mean == pytest.approx(perplexities[1] / perplexities[0] - 1)
    assert found.top1.mean == pytest.approx(parts["top1"].mean())
    assert found.delta_p.mean.mean == pytest.approx((np.exp(parts["other_logp"]) - np.exp(parts["reference_logp"])).mean())
    assert found.logits_l2 == pytest.approx(np.linalg.norm(0.1 * q[:, :-1]) / np.linalg.norm(p[:, :-1]))
    assert len(found.window_l2) == found.windows == 4
    assert found.tokens == 4 * 49
