"""The model on a GPU with kernels against the model in plain torch, whole: logits, slots, graphs, generation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mxconv.quantize.schemes import SCHEMES
from mxconv.runtime import Model, generate, load
from mxconv.runtime.batch import make_batch
from mxconv.runtime.decoder import Decoder
from mxconv.runtime.rope import frequencies
from mxconv.runtime.softmax import FULL_GPU, attend_batch, attend_slots
from tests.oracle.fastdeploy_writer import write_artifact
from tests.runtime.helpers import FLOAT32_BAR, QUANTIZABLE, error, gathered_absmax, split_call
from tests.synthetic import make_checkpoint, random_ids

pytestmark = pytest.mark.gpu

BF16_BAR = 0.03
"""Relative L2 of the logits of two right bf16 forwards of a random model, whose roundings differ."""


def both(monkeypatch: pytest.MonkeyPatch, model: Model, ids: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """Logits with kernels, and without; the model must be loaded for either."""
    with_kernels = model(ids, **options)  # type: ignore[arg-type]
    monkeypatch.setenv("MXCONV_KERNELS", "torch")
    without = model(ids, **options)  # type: ignore[arg-type]
    monkeypatch.delenv("MXCONV_KERNELS")
    return with_kernels, without


@pytest.mark.parametrize(("tp", "head_dim"), [(1, 96), (1, 128), (2, 128)])
def test_float32_kernels_judge_as_plain_torch(
    tmp_path: Path, tp: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path, **(QUANTIZABLE | {"head_dim": head_dim, "heads": 4, "rotary_dim": 16}))
    ids = random_ids(200, 2, 530)
    mask = torch.ones(2, 530, dtype=torch.bool)
    mask[0, :7], mask[1, 100:140] = False, False
    exact = load(folder, dtype=torch.float64)(ids, mask=mask)[mask]
    model = load(folder, device="cuda", tp=tp)
    for logits in both(monkeypatch, model, ids, mask=mask):
        assert error(logits.cpu()[mask], exact) <= FLOAT32_BAR
    assert error(split_call(model, ids, [255, 256, 257, 500], mask=mask).cpu()[mask], exact) <= FLOAT32_BAR


@pytest.mark.parametrize("name", ["demo", "tiny-a"])
def test_trained_models(shared: Path, name: str) -> None:
    """float32 to the bar; bf16 at the noise floor that plain torch has (model.md: KL 4.2-4.7e-4 tiny-a, 7.1e-4 demo)."""
    data = np.load(shared / "models" / f"{name}-expected.npz")
    folder = shared / "models" / name
    ids, expected = torch.from_numpy(data["long_ids"]).long(), torch.from_numpy(data["long_logits_last16"])
    assert error(load(folder, device="cuda")(ids, last=16).cpu(), expected) <= FLOAT32_BAR
    exact = torch.log_softmax(load(folder, device="cuda")(ids).double(), -1)
    rounded = torch.log_softmax(load(folder, device="cuda", dtype=torch.bfloat16)(ids).double(), -1)
    divergence = float((exact.exp() * (exact - rounded)).sum(-1).mean())
    low, high = {"tiny-a": (2e-4, 8e-4), "demo": (3.5e-4, 1.4e-3)}[name]
    assert low < divergence < high


@pytest.mark.parametrize("shape", [{}, {"shared": 128, "postnorm": None}, {"dense": True}])
def test_bf16_kernels_agree_with_plain_torch(tmp_path: Path, shape: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path, **QUANTIZABLE, **shape)
    ids = random_ids(200, 3, 140)
    mask = torch.ones(3, 140, dtype=torch.bool)
    mask[0, :60], mask[2, [3, 50, 139]] = False, False
    exact = load(folder, dtype=torch.float64)(ids, mask=mask)[mask]
    model = load(folder, device="cuda", dtype=torch.bfloat16)
    got = model(ids, mask=mask).cpu()[mask]
    monkeypatch.setenv("MXCONV_KERNELS", "torch")
    plain = load(folder, device="cuda", dtype=torch.bfloat16)(ids, mask=mask).cpu()[mask]
    assert error(got, exact) <= 1.5 * error(plain, exact) + 1e-3
    monkeypatch.delenv("MXCONV_KERNELS")
    split = split_call(model, ids, [1, 70, 71, 72], mask=mask).cpu()[mask]
    assert error(split, exact) <= 1.5 * error(plain, exact) + 1e-3


@pytest.mark.parametrize(("name", "tp"), [*((name, 1) for name in SCHEMES), ("w4afp8", 2)])
def test_artifacts_in_bf16(tmp_path: Path, name: str, tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On codes, as served, the kernels are as near to the float32 judge as plain torch in bf16 is."""
    folder = make_checkpoint(tmp_path / "source", **QUANTIZABLE)
    ids = random_ids(200, 2, 90)
    scheme = SCHEMES[name]
    absmax = gathered_absmax(load(folder), ids, dict(scheme.rotation)) if scheme.static else None
    artifact = write_artifact(folder, tmp_path / "artifact", tp=tp, scheme=name, absmax=absmax)
    judge = load(artifact)(ids)
    model = load(artifact, device="cuda", dtype=torch.bfloat16)
    got = model(ids).cpu()
    assert model.capturable
    monkeypatch.setenv("MXCONV_KERNELS", "torch")
    plain = load(artifact, device="cuda", dtype=torch.bfloat16)
    assert not plain.capturable
    assert error(got, judge) <= 1.5 * error(plain(ids).cpu(), judge) + 1e-3
    assert error(model(ids, activations="none").cpu(), load(artifact)(ids, activations="none")) < 0.1


def run(decoder: Decoder, prompts: dict[int, list[int]]) -> dict[int, list[int]]:
    """Greedy tokens of slots that start at different times; slot 0 ends early and starts again."""
    found: dict[int, list[int]] = {slot: [] for slot in prompts}

    def steps(count: int) -> None:
        for _ in range(count):
            for slot, running in enumerate(decoder._running):
                if running:
                    found[slot].append(int(decoder.tokens[slot]))
            decoder.step()

    for slot, ids in prompts.items():
        decoder.start(slot, ids)
        steps(5)
    decoder.stop(0)
    steps(3)
    decoder.start(0, prompts[0][:3])
    steps(20)
    return found


@pytest.mark.parametrize(("shape", "tp"), [({}, 1), ({"dense": True}, 1), ({"shared": 128, "postnorm": None}, 2)])
def test_graphs_decode_the_same_tokens(tmp_path: Path, shape: dict, tp: int) -> None:
    folder = make_checkpoint(tmp_path, **QUANTIZABLE, **shape)
    model = load(folder, device="cuda", dtype=torch.bfloat16, tp=tp)
    prompts = {slot: random_ids(200, 1, length, seed=length)[0].tolist() for slot, length in enumerate((40, 250, 3))}
    graphs, eager = (run(Decoder(model, slots=3, room=64, graphs=graphs), prompts) for graphs in (True, False))
    assert graphs == eager and len(graphs[1]) == 33


@pytest.mark.parametrize(("dtype", "kernels"), [(torch.float64, ""), (torch.float32, "torch"), (torch.bfloat16, "torch")])
def test_lightning_by_its_definition_is_not_captured(
    tmp_path: Path, dtype: torch.dtype, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even with a dense mlp, which could be: the definition asks the device which slots are active."""
    monkeypatch.setenv("MXCONV_KERNELS", kernels)
    model = load(make_checkpoint(tmp_path, **QUANTIZABLE, dense=True), device="cuda", dtype=dtype)
    decoder = Decoder(model, slots=3, room=64)
    assert not model.capturable and not decoder.graphs
    decoder.start(1, ids := random_ids(200, 1, 9)[0].tolist())
    for _ in range(3):
        ids.append(int(decoder.tokens[1]))
        assert error(decoder.step()[1], model(torch.tensor([ids]), last=1)[0, -1]) <= BF16_BAR


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_capture_that_fails_is_tried_again(tmp_path: Path, fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the run before it, or in itself: the slots stay active, and the next step is right."""
    model = load(make_checkpoint(tmp_path, **QUANTIZABLE), device="cuda", dtype=torch.bfloat16)
    decoder = Decoder(model, slots=2, room=64)
    decoder.start(1, ids := random_ids(200, 1, 9)[0].tolist())
    calls = []

    def forward(*arguments: object, **options: object) -> Tensor:
        calls.append(arguments)
        if len(calls) == fails_at:
            raise ArithmeticError
        return Model.forward(model, *arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as failing, pytest.raises(ArithmeticError):
        failing.setattr(model, "forward", forward)
        decoder.step()
    ids.append(int(decoder.tokens[1]))
    assert decoder.graphs and error(decoder.step()[1], model(torch.tensor([ids]), last=1)[0, -1]) <= BF16_BAR


def test_slots_equal_sequences_alone(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, **QUANTIZABLE)
    model = load(folder, device="cuda", dtype=torch.bfloat16)
    decoder = Decoder(model, slots=5, room=400)
    sequences = {slot: random_ids(200, 1, length, seed=length)[0].tolist() for slot, length in ((0, 300), (2, 1), (4, 64))}
    for slot, ids in sequences.items():
        decoder.start(slot, ids)
    for _ in range(8):
        for slot, ids in sequences.items():
            ids.append(int(decoder.tokens[slot]))
        logits = decoder.step()
        for slot, ids in sequences.items():
            assert error(logits[slot], model(torch.tensor([ids]), last=1)[0, -1]) <= BF16_BAR


def test_generation_by_slots_and_by_cache(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(demo, device="cuda", dtype=torch.bfloat16)
    ids = random_ids(4096, 1, 30)[0].tolist()
    assert model.capturable
    graphs = list(generate(model, ids, max_tokens=40, eos_ids=()))
    monkeypatch.setattr(Model, "capturable", property(lambda self: False))
    assert graphs == list(generate(model, ids, max_tokens=40, eos_ids=()))


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize(("past", "columns"), [(0, 130), (77, 130)])
def test_packed_attention(heads: int, kv: int, past: int, columns: int) -> None:
    """Sequences of different lengths through the variable-length kernel against masked attention in float64."""
    random = torch.Generator("cuda").manual_seed(heads + past)
    q = torch.randn(3, columns, heads, 64, generator=random, device="cuda")
    k, v = torch.randn(2, 3, past + columns, kv, 64, generator=random, device="cuda")
    real = torch.rand(3, past + columns, generator=random, device="cuda") > 0.3
    real[1] = True

    def run(dtype: torch.dtype) -> Tensor:
        ids = torch.zeros(3, columns, dtype=torch.int64, device="cuda")
        batch = make_batch(ids, None, None, frequencies(16, 1e4, ids.device), dtype)
        batch = type(batch)(size=3, columns=columns, past=past, mask=real[:, past:], real=real, rope=batch.rope)
        return attend_batch(q.to(dtype), k.to(dtype), v.to(dtype), batch)[real[:, past:]]

    packed = run(torch.bfloat16)
    assert packed.isfinite().all() and error(packed, run(torch.float64)) < 1e-2


@pytest.mark.parametrize(("slots", "heads", "kv"), [(5, 8, 2), (3, 4, 4), (FULL_GPU // 2, 8, 4)])
def test_attention_over_slots(slots: int, heads: int, kv: int) -> None:
    """Both of torch's kernels that take lengths, against float64; what lies behind a slot's length is huge and not seen."""
    random = torch.Generator("cuda").manual_seed(slots)
    room, columns = 700, 512
    q = torch.randn(slots, heads, 128, generator=random, device="cuda")
    k, v = torch.randn(2, slots, room, kv, 128, generator=random, device="cuda")
    used = torch.randint(1, columns + 1, (slots,), generator=random, device="cuda")
    beyond = torch.arange(room, device="cuda") >= used[:, None]
    k[beyond], v[beyond] = 1e4, -1e4
    exact = attend_slots(q.double(), k.double(), v.double(), used, columns)
    got = attend_slots(q.bfloat16(), k.bfloat16(), v.bfloat16(), used, columns)
    assert got.isfinite().all() and error(got, exact) < 1e-2


def test_draws_over_slots_and_over_a_cache(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed draws nearly the same tokens either way: until a rounding moves a share over the drawn number."""
    model = load(demo, device="cuda", dtype=torch.bfloat16)
    ids = random_ids(4096, 1, 30)[0].tolist()
    options = {"max_tokens": 12, "temperature": 0.7, "top_p": 0.9, "seed": 3, "eos_ids": ()}
    over_slots = list(generate(model, ids, **options))  # type: ignore[arg-type]
    assert over_slots == list(generate(model, ids, **options))  # type: ignore[arg-type]
    monkeypatch.setattr(Model, "capturable", property(lambda self: False))
    assert over_slots[:3] == list(generate(model, ids, **options))[:3]  # type: ignore[arg-type]


def test_exact_activations_decode_without_graphs(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source", **QUANTIZABLE)
    model = load(write_artifact(folder, tmp_path / "out", scheme="w4afp8"), device="cuda", dtype=torch.bfloat16)
    tokens = list(generate(model, [1, 2, 3], max_tokens=6, eos_ids=(), activations="none"))
    logits = model(torch.tensor([[1, 2, 3, *tokens]]), activations="none")[0, 2:-1]
    chosen = logits.gather(1, torch.tensor(tokens, device="cuda")[:, None])[:, 0]
    assert (logits.amax(-1) - chosen <= 0.1 * logits.std()).all()  # likeliest, but for roundings
    assert Decoder(model).graphs and not Decoder(model, activations="none").graphs
