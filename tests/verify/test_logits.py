"""The passes side by side: which tokens, what they say of right and wrong artifacts, which layer is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mxconv.errors import IncompleteInput, MalformedInput, UsageError
from mxconv.execute import convert, quantize
from mxconv.runtime import Model, load, open_weights
from mxconv.verify import Options, Report, verify
from mxconv.verify.limits import Limits
from mxconv.verify.logits import MERGED_SERVED, MERGED_WEIGHTS_ONLY, SERVED, SOURCE, WEIGHTS_ONLY, LogitsOutcome
from mxconv.verify.metrics import Metrics, TokenScores, summarize
from mxconv.verify.prompts import choose_prompts
from mxconv.verify.streams import Lane, probe_indices, run
from mxconv.verify.verdict import first_bad_layer, judge_parallel
from tests.spoil import Folder, configured, on, swapped
from tests.synthetic import make_checkpoint, random_ids

ONLY = ("structure", "logits")


@pytest.fixture(scope="module")
def converted(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model, fused for two ranks."""
    out = tmp_path_factory.mktemp("demo") / "converted"
    convert(demo, out, tp=2)
    return out


def spoiled(artifact: Path, source: Path, out: Path, change: Callable[[Folder], None]) -> Path:
    shutil.copytree(artifact, out)
    folder = Folder(out, source) if (source / "model.safetensors").exists() else Folder(out, artifact)
    change(folder)
    folder.save()
    return out


def logits_of(artifact: Path, source: Path, **options: Any) -> Report:
    return verify(artifact, Options(source=source, sections=ONLY, **{"windows": 2, "window": 300, **options}))


class TestTrainedModel:
    def test_right(self, converted: Path, demo: Path) -> None:
        section = logits_of(converted, demo).section("logits")
        assert section.status == "ok"
        lanes: Any = section.figures["lanes"]
        assert lanes["weights only"]["logits_l2"] < 1e-6 and lanes["weights only"]["kl"]["mean"] < 1e-7
        assert 1e-4 < lanes["bf16"]["kl"]["mean"] < 2e-3

    @pytest.mark.parametrize("scheme", ["w4afp8", "block_wise_fp8"])
    def test_quantized(self, scheme: str, demo: Path, tmp_path: Path) -> None:
        """The noise that model.md measured, on a part of the built-in text."""
        quantize(demo, tmp_path / "out", scheme=scheme, tp=2)
        report = verify(tmp_path / "out", Options(source=demo, windows=4))
        assert report.ok
        lanes: Any = report.section("logits").figures["lanes"]
        low, high = {"w4afp8": (0.01, 0.04), "block_wise_fp8": (0.001, 0.005)}[scheme]
        assert low < lanes["as served"]["kl"]["mean"] < high
        assert lanes["weights only"]["kl"]["mean"] < lanes["as served"]["kl"]["mean"]

    @pytest.mark.parametrize(
        ("change", "layer"),
        [
            (configured(layernorm_mlp_alpha=1.0), 0),
            (configured(rotary_dim=32), 1),
            (swapped("model.layers.2.input_layernorm", "model.layers.2.post_attention_layernorm"), 2),
            (on("model.layers.3.self_attn.o_proj.weight", lambda x: -x), 3),
        ],
        ids=["alpha", "rotary_dim", "norms of layer 2", "output of layer 3"],
    )
    def test_the_first_wrong_layer_is_named(
        self, change: Callable[[Folder], None], layer: int, converted: Path, demo: Path, tmp_path: Path
    ) -> None:
        report = logits_of(spoiled(converted, demo, tmp_path / "out", change), demo)
        section = report.section("logits")
        assert section.status == "FAIL" and report.exit_code == 8
        assert {finding.check for finding in section.findings} == {"kl_mean", "exact_l2", "layers"}
        assert [finding.place for finding in section.findings if finding.check == "layers"] == [f"layer {layer}"]

    def test_a_stricter_limit_fails(self, demo: Path, tmp_path: Path) -> None:
        """Two unquantized forwards may agree to the last bit, so the limit is put to a quantized one."""
        quantize(demo, tmp_path / "out", scheme="block_wise_fp8")
        section = logits_of(tmp_path / "out", demo, limits={"kl_mean": 1e-5}).section("logits")
        assert [finding.check for finding in section.findings] == ["kl_mean"]
        assert section.status == "FAIL"

    def test_logits_that_are_not_numbers_fail(self, converted: Path, demo: Path, tmp_path: Path) -> None:
        name = "model.layers.1.self_attn.o_proj.weight"
        bad = spoiled(converted, demo, tmp_path / "out", on(name, lambda x: x * float("nan")))
        section = logits_of(bad, demo).section("logits")
        assert section.status == "FAIL" and "kl_mean" in {finding.check for finding in section.findings}
        assert [finding.place for finding in section.findings if finding.check == "layers"] == ["layer 1"]


UNTRAINED: dict[str, dict[str, Any]] = {
    "mild": {}, "loud experts": {"scale": 3.0, "alphas": (1.0, 1.0, 1.0)}, "pre-norm": {"postnorm": False, "alphas": (1.0,) * 3},
    "deep": {"layers": "lllslllslllslll", "alphas": (2.4, 2.4, 2.4)},
}  # fmt: skip


class TestUntrainedModels:
    """Right artifacts of random models pass, however sensitive they are; a warning says what their logits are worth."""

    @pytest.mark.parametrize("name", UNTRAINED)
    @pytest.mark.parametrize("scheme", ["w4a8", "tensor_wise_fp8"])
    def test_pass(self, name: str, scheme: str, tmp_path: Path) -> None:
        shape = {"hidden": 128, "intermediate": 256, "heads": 4, "kv_heads": 2, "head_dim": 32, "vocab": 256, **UNTRAINED[name]}
        source = make_checkpoint(tmp_path / "source", **shape)
        np.save(tmp_path / "ids.npy", np.random.default_rng(1).integers(0, 256, (16, 70)))
        quantize(source, tmp_path / "out", scheme=scheme, tp=2, calibration=tmp_path / "ids.npy")
        report = verify(tmp_path / "out", Options(source=source, windows=16, window=70))
        assert report.ok, [finding.render() for finding in report.findings]
        warned = any("say little" in text for text in report.section("logits").warnings)
        assert warned == (name in ("loud experts", "deep"))


class TestPrompts:
    def test_order_of_choice(self, converted: Path, demo: Path, made: Callable[..., Path], small: Path, tmp_path: Path) -> None:
        def words(artifact: Path, vocabulary: int, **options: Any) -> str:
            return choose_prompts(artifact, vocabulary, Options(**options)).words

        np.save(tmp_path / "ids.npy", np.arange(100))
        (tmp_path / "a.txt").write_text("def f(x):\n    return x\n" * 200)
        assert words(converted, 4096) == "the built-in text"
        assert words(converted, 4096, text=tmp_path / "a.txt") == "a.txt"
        assert words(converted, 4096, tokens=tmp_path / "ids.npy", window=50) == "ids of ids.npy"
        assert words(made("w4a8", 1), 128, window=64) == "the recorded calibration ids"
        assert words(made("w4afp8", 1), 128) == "random ids of seed 0"
        assert words(made("w4afp8", 1), 4096, source=demo) == "the built-in text"
        with pytest.raises(UsageError, match="tokenizer"):
            words(made("w4afp8", 1), 128, text=tmp_path / "a.txt", source=small)

    def test_windows(self, converted: Path, tmp_path: Path) -> None:
        np.save(tmp_path / "ids.npy", np.arange(100))
        prompts = choose_prompts(converted, 4096, Options(tokens=tmp_path / "ids.npy", window=30, windows=2))
        assert prompts.ids.tolist() == [list(range(30)), list(range(30, 60))]
        assert prompts.digest != choose_prompts(converted, 4096, Options(tokens=tmp_path / "ids.npy", window=25)).digest

    def test_a_seed_is_repeatable(self, made: Callable[..., Path]) -> None:
        a, b, c = (choose_prompts(made("w4afp8", 1), 128, Options(seed=seed)) for seed in (4, 4, 5))
        assert a.digest == b.digest != c.digest and not a.natural

    def test_bad_ids(self, converted: Path, tmp_path: Path) -> None:
        for name, values in {"big": np.array([[5000, 1]]), "float": np.ones((2, 4)), "one": np.array([[1], [2]])}.items():
            np.save(tmp_path / f"{name}.npy", values)
            with pytest.raises((MalformedInput, UsageError)):
                choose_prompts(converted, 4096, Options(tokens=tmp_path / f"{name}.npy"))
        (tmp_path / "text.npy").write_text("no array")
        with pytest.raises(MalformedInput):
            choose_prompts(converted, 4096, Options(tokens=tmp_path / "text.npy"))
        with pytest.raises(IncompleteInput):
            choose_prompts(converted, 4096, Options(tokens=tmp_path / "absent.npy"))

    def test_a_short_text(self, converted: Path, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("too short")
        with pytest.raises(UsageError, match="too few"):
            choose_prompts(converted, 4096, Options(text=tmp_path / "a.txt"))

    def test_short_windows_are_warned_about(self, made: Callable[..., Path], small: Path) -> None:
        warnings = verify(made("w4afp8", 1), Options(source=small, windows=2, window=256)).section("logits").warnings
        assert any("first block of 256" in text for text in warnings)
        warnings = verify(made("w4afp8", 1), Options(source=small, windows=2, window=257)).section("logits").warnings
        assert not any("first block" in text for text in warnings)


def test_lanes_repeat_the_models_own_forward(made: Callable[..., Path], small: Path) -> None:
    """What runs side by side is what each model computes alone, to the bit."""
    ids = random_ids(128, 2, 270)
    artifact = Model(open_weights(made("w4afp8", 2)), stream=True)
    source = Model(open_weights(small), stream=True)
    traces = run(
        [Lane(name="s", model=source), Lane(name="q", model=artifact), Lane(name="n", model=artifact, activations="none")], ids
    )
    for name, model, activations in (("s", source, "none"), ("q", artifact, "quantized"), ("n", artifact, "none")):
        hidden = model.final_norm(traces[name].hidden)
        logits = torch.cat([block for _, block in model.head_blocks(hidden)], -1)
        alone = load(small if name == "s" else made("w4afp8", 2))(ids, activations=activations)
        assert torch.equal(logits, alone)
        assert torch.equal(traces[name].probes[-1], traces[name].hidden.flatten(0, 1)[probe_indices(2, 270)])


def test_probes_are_spread_over_all_windows() -> None:
    index = probe_indices(16, 512)
    assert len(index) == 256 and len(index.unique()) == 256
    assert set((index // 512).tolist()) == set(range(16)) and int(index.max()) < 16 * 512
    assert probe_indices(2, 5).tolist() == list(range(10))


@pytest.mark.parametrize(
    ("errors", "layer"),
    [
        ([0.01, 0.0141, 0.0173, 0.02], None), ([0.01, 0.011, 0.2, 0.21], 2), ([0.01, float("nan"), 1.0], 1),
        ([0.5, 0.6, 0.7, 0.8], 0), ([0.01, 0.01, 0.35, 0.36], 2), ([0.1, 0.1001, 0.1002, 0.1003], 0), ([], None),
        ([0.0, 0.0, 0.0], None),
    ],
)  # fmt: skip
def test_first_bad_layer(errors: list[float], layer: int | None) -> None:
    assert first_bad_layer(errors, [0.01] * len(errors), 30.0) == layer


class TestParallel:
    """Limits between TP sizes, on made-up scores."""

    def metrics(self, kl: float = 0.0, l2: float = 0.0, windows: int = 16, bad: int = 0) -> Metrics:
        shape = (windows, 10)
        squares = torch.full(shape, l2**2, dtype=torch.float64)
        squares[:bad] = 1e-4
        ones = torch.ones(shape, dtype=torch.float64)
        return summarize(
            TokenScores(
                kl=kl * ones, reference_logp=-ones, other_logp=-ones, top1=ones, top5=ones, error_squares=squares,
                reference_squares=ones,
            )
        )  # fmt: skip

    def outcome(
        self, *, between: float, own: float, floor: float = 4e-4, windows: int = 16, l2: float = 3e-7, bad: int = 0
    ) -> LogitsOutcome:
        return LogitsOutcome(
            metrics={
                (MERGED_SERVED, SERVED): self.metrics(between, windows=windows), (SOURCE, SERVED): self.metrics(own),
                (MERGED_WEIGHTS_ONLY, WEIGHTS_ONLY): self.metrics(l2=l2, windows=windows, bad=bad),
                (SOURCE, "bf16"): self.metrics(floor, 0.008),
            },
            layers={}, from_reference=False,
        )  # fmt: skip

    def judged(self, **figures: Any) -> list[str]:
        section = judge_parallel(self.outcome(**figures), [], 2, Limits(scheme="w4afp8", overrides={}))
        assert (section.status == "FAIL") == bool(section.findings)
        return [finding.check for finding in section.findings]

    def test_share(self) -> None:
        assert self.judged(between=0.24e-2, own=1e-2) == []
        assert self.judged(between=0.26e-2, own=1e-2) == ["parallel_kl_share"]
        assert self.judged(between=0.26e-2, own=1e-2, windows=15) == []
        assert self.judged(between=0.5, own=1.0, floor=0.2) == []
        assert self.judged(between=1e-8, own=1e-9) == []
        assert self.judged(between=float("nan"), own=1e-2) == ["parallel_kl_share"]

    def test_summation(self) -> None:
        assert self.judged(between=0, own=1, l2=1.9e-6) == []
        assert self.judged(between=0, own=1, l2=2.1e-6) == ["parallel_l2"]
        assert self.judged(between=0, own=1, bad=2) == []
        assert self.judged(between=0, own=1, bad=3) == ["parallel_l2"]
        assert self.judged(between=0, own=1, bad=1, windows=1) == ["parallel_l2"]
        assert self.judged(between=0, own=1, l2=float("nan")) == ["parallel_l2"]

    def test_a_near_tie_is_told(self) -> None:
        section = judge_parallel(self.outcome(between=0, own=1, bad=1), [], 2, Limits(scheme="w4afp8", overrides={}))
        assert any("near-tie" in line for line in section.lines)

    def test_without_quantized_activations(self) -> None:
        outcome = self.outcome(between=0, own=1)
        outcome = replace(outcome, metrics={k: v for k, v in outcome.metrics.items() if k[0] == MERGED_WEIGHTS_ONLY})
        section = judge_parallel(outcome, [], 2, Limits(scheme=None, overrides={}))
        assert section.status == "ok" and "parallel_kl_share" not in section.checks


class TestUninformedModel:
    @pytest.mark.parametrize(("scheme", "tp", "seed", "scale"), [("w4afp8", 1, 2, 1.0), ("block_wise_fp8", 1, 3, 2.0)])
    def test_a_right_artifact_of_an_untrained_one_expert_model_passes(
        self, scheme: str, tp: int, seed: int, scale: float, tmp_path: Path
    ) -> None:
        """Its whole mlp is quantized and its predictions are noise: KL far beyond what a trained model shows."""
        source = make_checkpoint(
            tmp_path / "source", experts=1, experts_per_token=1, seed=seed, scale=scale, layers="lsll", hidden=128,
            intermediate=256, heads=4, kv_heads=2, head_dim=32, rotary_dim=16, vocab=1000,
        )  # fmt: skip
        quantize(source, tmp_path / "out", scheme=scheme, tp=tp)
        report = verify(tmp_path / "out", Options(source=source, windows=4, window=300))
        assert report.ok, [finding.render() for finding in report.findings]
        assert any("predicts nothing" in warning for warning in report.section("logits").warnings)
