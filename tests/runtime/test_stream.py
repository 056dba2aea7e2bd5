"""Streaming: the same logits with one layer's attention weights and one widened expert in memory."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mxconv.errors import UsageError
from mxconv.runtime import layer as layer_module
from mxconv.runtime import load, moe
from mxconv.runtime import model as model_module
from tests.oracle.fastdeploy_writer import write_artifact
from tests.oracle.forward import Oracle
from tests.runtime.helpers import QUANTIZABLE, error
from tests.synthetic import make_checkpoint, random_ids

# One expert is 6.3 M weights: 25 MB in float32, 13 MB in the file; 16 of them are 403 MB in float32.
WIDE = {"layers": "ls", "hidden": 512, "intermediate": 4096, "heads": 4, "head_dim": 64, "experts": 8, "vocab": 256}
EXPERT_BYTES = 3 * 512 * 4096 * 4


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("wide"), **WIDE)


def peak_bytes(run: Callable[[], torch.Tensor]) -> int:
    """The most bytes of torch tensors that are alive at a time in `run()`, and the most of numpy arrays (what files gave).

    Two runs, because the profiler keeps arrays alive.
    """
    gc.collect()
    tracemalloc.start()
    run()
    arrays = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    return arrays + max(accumulate(event.nbytes() for event in results.events() if event.name() == "[memory]"))


@pytest.mark.parametrize("kind", ["source", "source tp 2", "artifact", "merged"])
def test_peak_memory(wide: Path, tmp_path: Path, kind: str) -> None:
    """Streamed: less than 2 experts (one widened, its bytes, the rest); kept: all 16 of them at least."""
    folder = wide if kind.startswith("source") else write_artifact(wide, tmp_path, tp=2, scheme="w4afp8")
    options = {"source tp 2": {"tp": 2}, "merged": {"merge": True}}.get(kind, {})
    ids = random_ids(256, 1, 48)
    assert torch.equal(load(folder, stream=True, **options)(ids), load(folder, **options)(ids))
    assert peak_bytes(lambda: load(folder, stream=True, **options)(ids)) < 2 * EXPERT_BYTES
    assert peak_bytes(lambda: load(folder, **options)(ids)) > 16 * EXPERT_BYTES


def test_one_expert_and_one_layer_at_a_time(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"expert projections": 0, "attentions": 0}
    most, made = dict(counts), dict(counts)

    def watch(thing: object, kind: str) -> None:
        made[kind] += 1
        counts[kind] += 1
        most[kind] = max(most[kind], counts[kind])
        weakref.finalize(thing, lambda: counts.__setitem__(kind, counts[kind] - 1))

    def watched(module: ModuleType, name: str, kind: str) -> None:
        original = getattr(module, name)

        def make(*args: object, **options: object) -> object:
            thing = original(*args, **options)
            watch(thing, kind)
            return thing

        monkeypatch.setattr(module, name, make)

    watched(moe, "projection", "expert projections")
    watched(layer_module, "make_attention", "attentions")
    load(wide, stream=True)(random_ids(256, 1, 64))
    assert made == {"expert projections": 2 * 8 * 2, "attentions": 2}
    assert most == {"expert projections": 2, "attentions": 1}


def test_streamed_use_layer_by_layer(tmp_path: Path) -> None:
    """The interface that calibration and verification use gives what a call gives; observers see every routed token."""
    folder = make_checkpoint(tmp_path, layers="lsl", experts=3, vocab=100)
    ids = random_ids(100, 1, 12)
    model = load(folder, dtype=torch.float64, stream=True)
    seen: dict[tuple[int, int, str], list[torch.Tensor]] = {}
    x, batch = model.embed(ids), model.batch(ids)
    for index in range(3):

        def observe(expert: int, projection: str, inputs: torch.Tensor, index: int = index) -> None:
            seen.setdefault((index, expert, projection), []).append(inputs.clone())

        with model.layer(index) as layer:
            x = layer(x, batch, observer=observe)
    blocks = list(model.head_blocks(model.final_norm(x), block=32))
    assert [start for start, _ in blocks] == [0, 32, 64, 96] and blocks[-1][1].shape == (1, 12, 4)
    assert blocks[0][1].dtype == torch.float64
    assert torch.equal(torch.cat([logits for _, logits in blocks], -1).float(), model(ids))
    oracle = Oracle(folder)
    oracle.logits(ids[0])
    assert {(layer, expert) for layer, expert, _ in seen} == set(oracle.seen)
    for (layer, expert), inputs in oracle.seen.items():
        for slot, projection in enumerate(("up_gate_proj", "down_proj")):
            got = torch.cat(seen[layer, expert, projection])
            assert error(got, torch.stack([pair[slot] for pair in inputs])) < 1e-12


def test_padding_is_not_observed(tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path, layers="l"))
    ids = random_ids(128, 2, 10)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, 4:] = False
    tokens = []
    with model.layer(0) as layer:
        layer(model.embed(ids), model.batch(ids, mask), observer=lambda e, p, x: tokens.append(len(x)))
    assert sum(tokens) == 2 * 2 * int(mask.sum())


def test_observers_need_one_rank(tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path), tp=2)
    ids = random_ids(128, 1, 3)
    with model.layer(0) as layer, pytest.raises(UsageError, match="tp 1"):
        layer(model.embed(ids), model.batch(ids), observer=lambda e, p, x: None)


def test_embedding_and_head_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mxconv.runtime import vocabulary

    folder = make_checkpoint(tmp_path / "source", **QUANTIZABLE)
    ids = random_ids(200, 2, 40)
    expected = load(folder)(ids)
    monkeypatch.setattr(vocabulary, "BLOCK_ROWS", 48)
    monkeypatch.setattr(model_module, "HEAD_BLOCK", 48)
    for path, options in (
        (folder, {}), (folder, {"tp": 8}), (write_artifact(folder, tmp_path / "4", tp=4), {}),
        (write_artifact(folder, tmp_path / "2", tp=2), {"merge": True}),
    ):  # fmt: skip
        assert error(load(path, stream=True, **options)(ids), expected) < 2e-6
