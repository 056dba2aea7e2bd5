"""`mxconv bench`: what it counts is what the model holds, its random weights are one model, and its figures come from runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from mxconv.bench.ceilings import Ceilings, seconds_of
from mxconv.bench.costs import Cut
from mxconv.bench.random_weights import OneRank, RandomWeights
from mxconv.bench.report import Options, fastest_encoder
from mxconv.bench.shapes import SHAPES, SyntheticShape, synthetic_config
from mxconv.cli import cli
from mxconv.config import LINEAR
from mxconv.errors import UsageError
from mxconv.quantize.schemes import SCHEMES
from mxconv.runtime.model import Model, load
from tests.runtime.helpers import error
from tests.synthetic import make_checkpoint, random_ids

CPU = torch.device("cpu")
TINY = SyntheticShape(
    keys={**SHAPES["small"].keys, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 256, "num_local_experts": 4},
    tp=2, summary="",
)  # fmt: skip


@pytest.mark.parametrize("tp", [1, 2])
def test_costs_are_those_of_the_weights(tp: int) -> None:
    config = synthetic_config(TINY)
    weights = RandomWeights(config, tp=tp, scheme=None, device=CPU)
    cut = Cut(config=config, tp=tp, item_bytes=2, scheme=None)
    for layer in range(2):
        names = [name for name in weights.names(layer) if "expert" not in name and "norm" not in name and name != "router"]
        assert cut.attention_weights(layer) == sum(weights.dense(layer, name, 0).numel() for name in names)
    assert cut.expert_weights == sum(weights.dense(0, f"experts.1.{name}", 0).numel() for name in ("up_gate", "down"))
    assert cut.head_weights == weights.rows("lm_head", 0, 0, weights.rank_rows("lm_head")).numel()
    # All of 4 experts for many tokens, 2 of them for one; states are read and written, keys and values read.
    assert cut.experts_bytes(10**6) == pytest.approx(4 * cut.expert_weights * 2)
    assert cut.experts_bytes(1) == pytest.approx(2 * cut.expert_weights * 2)
    linear = config.layer_types.index(LINEAR)
    assert cut.past_bytes(linear, 3, 99) == 2 * 3 * (8 // tp) * 64 * 64 * 4
    assert cut.past_bytes(1 - linear, 3, 99) == 2 * 3 * 99 * (4 // tp) * 64 * 2


@pytest.mark.parametrize("name", ["none", *SCHEMES])
def test_random_weights_are_one_model(name: str) -> None:
    """Every reading gives the same weights, and the encoded ones compute nearly what the unquantized ones do."""
    config, scheme = synthetic_config(TINY), SCHEMES.get(name)
    ids = random_ids(256, 1, 12)

    def logits(of: Any) -> torch.Tensor:
        return Model(RandomWeights(config, tp=2, scheme=of, device=CPU), stream=True, group=OneRank(2))(ids)

    once = logits(scheme)
    assert torch.equal(once, logits(scheme)) and once.isfinite().all()
    if scheme is not None:
        assert 1e-4 < error(once, logits(None)) < 0.3


def test_one_rank_reads_its_own_rows_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a step that is captured must: what it reads is there, and the other ranks' logits are not made."""
    read: list[int] = []
    rows = RandomWeights.rows

    def counted(self: RandomWeights, name: str, rank: int, start: int, stop: int) -> torch.Tensor:
        read.append(rank)
        return rows(self, name, rank, start, stop)

    monkeypatch.setattr(RandomWeights, "rows", counted)
    model = Model(RandomWeights(synthetic_config(TINY), tp=2, scheme=None, device=CPU), group=OneRank(2))
    assert read == [0, 0]
    logits = model(random_ids(256, 1, 5))
    half = logits.shape[-1] // 2
    assert read == [0, 0] and logits[..., :half].any() and not logits[..., half:].any()


def test_floor_and_seconds() -> None:
    ceilings = Ceilings(copy=100.0, matmul={"a": 10.0, "b": 20.0})
    assert ceilings.floor(1000.0, {"a": 10.0}) == 10.0
    assert ceilings.floor(100.0, {"a": 10.0, "b": 40.0}) == 3.0
    runs: list[int] = []
    assert seconds_of(lambda: runs.append(1), CPU, repeats=3, warmups=2) > 0 and len(runs) == 5


def bench(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["bench", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["schema"] == "mxconv.bench" and document["ceilings"]["copy_bytes_per_second"] > 0
    for row in document["measured"]:
        assert row["seconds"] > 0 and 0 < row["of_ceiling"] < 100
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
    return document


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mxconv.bench.ceilings.COPY_BYTES", {"cpu": 8 << 20})
    monkeypatch.setattr("mxconv.bench.ceilings.MATMUL_SIZE", {"cpu": 256})
    monkeypatch.setattr("mxconv.bench.runs.EXPERT_TOKENS", (1, 16))


def test_a_folder(tmp_path: Path) -> None:
    folder = str(make_checkpoint(tmp_path, shared=32))
    (row,) = bench("decode", folder, "--slots", "3", "--context", "10", "--steps", "2")["measured"]
    assert row["tokens"] == 3 and row["detail"]["context"] == 10
    (row,) = bench("prefill", folder, "--tokens", "33")["measured"]
    assert row["tokens"] == 33 and row["operations"] > 0
    # Each weight once: those of attention, routers, the experts that 33 tokens touch, and the head.
    model = load(folder)
    names = [(layer, name) for layer in range(3) for name in model.weights.names(layer) if "norm" not in name]
    whole = 4 * sum(model.weights.dense(layer, name, 0).numel() for layer, name in names) + 4 * 128 * 64
    assert 0.98 * whole < row["moved_bytes"] <= whole
    assert row["bytes_per_second"] == pytest.approx(row["moved_bytes"] / row["seconds"])
    first, second = bench("moe", folder)["measured"]
    assert [first["tokens"], second["tokens"]] == [1, 16]
    shared, expert = 3 * 64 * 32, 3 * 64 * 64
    assert first["moved_bytes"] == pytest.approx(4 * (shared + 2 * expert))
    assert first["operations"] == 2 * (shared + 2 * expert)


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are captured, ceilings of both kinds are there, and every subject runs as a kernel."""
    monkeypatch.setattr("mxconv.bench.ceilings.COPY_BYTES", {"cuda": 64 << 20})
    monkeypatch.setattr("mxconv.bench.ceilings.MATMUL_SIZE", {"cuda": 1024})
    small = ("--shape", "small", "--device", "cuda")
    for scheme in ((), ("--scheme", "w4afp8"), ("--scheme", "block_wise_fp8")):
        document = bench("decode", *small, *scheme, "--slots", "5", "--context", "300", "--steps", "4")
        assert document["measured"][0]["detail"]["graphs"] and document["dtype"] == "bfloat16"
        assert set(document["ceilings"]["operations_per_second"]) == {"bfloat16", "float8_e4m3fn"}
    bench("prefill", *small, "--scheme", "w4a8", "--tokens", "500")
    assert len(bench("moe", *small, "--scheme", "tensor_wise_fp8")["measured"]) == 2
    assert len(bench("quantize", *small)["measured"]) == 10


def test_the_quantizer() -> None:
    document = bench("quantize", "--scheme", "w4afp8", "--group-size", "256")
    assert [row["name"].split()[1] for row in document["measured"]] == ["up_gate_proj", "down_proj"]
    n, k = 2 * 1024, 512
    assert document["measured"][0]["moved_bytes"] == n * k * (2 + 0.5 + 4 / 256) and document["dtype"] == "bfloat16"
    assert document["ceilings"]["operations_per_second"] == {}, "nothing is multiplied"


def test_one_of_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mxconv.bench.report.SHAPES", {"tiny": TINY})
    for scheme in ((), ("--scheme", "w4afp8")):
        (row,) = bench("decode", "--shape", "tiny", *scheme, "--slots", "2", "--context", "10", "--steps", "2")["measured"]
        assert row["tokens"] == 2


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", [(), ("--scheme", "w4a8")])
def test_one_of_two_ranks_on_a_gpu(scheme: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step is captured, which forbids to ask for the other ranks' part of anything; a prompt and experts alone run too."""
    monkeypatch.setattr("mxconv.bench.report.SHAPES", {"tiny": TINY})
    monkeypatch.setattr("mxconv.bench.ceilings.COPY_BYTES", {"cuda": 64 << 20})
    monkeypatch.setattr("mxconv.bench.ceilings.MATMUL_SIZE", {"cuda": 1024})
    tiny = ("--shape", "tiny", "--device", "cuda", *scheme)
    (row,) = bench("decode", *tiny, "--slots", "3", "--context", "300", "--steps", "4")["measured"]
    assert row["detail"]["graphs"] and row["tokens"] == 3
    bench("prefill", *tiny, "--tokens", "70")
    assert len(bench("moe", *tiny)["measured"]) == 2


def test_nothing_is_quantized_without_a_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the quantizer's kernels are not insisted on either."""
    monkeypatch.setenv("MXCONV_KERNELS", "triton")
    config = synthetic_config(TINY)
    plain = RandomWeights(config, tp=2, scheme=None, device=CPU, encode=fastest_encoder(CPU))
    assert plain.coded(0, "experts.1.down", 0) is None and plain.dense(0, "experts.1.down", 0).any()
    scheme = SCHEMES["w4a8"]
    coded = RandomWeights(config, tp=2, scheme=scheme, device=CPU, encode=fastest_encoder(CPU))
    with pytest.raises(UsageError, match="quantize has no kernel"):
        coded.coded(0, "experts.1.down", 0)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["decode", "--device", "cuda"], 2), (["decode", "--shape", "huge"], 2), (["decode", "--scheme", "w1"], 2),
        (["decode", "{folder}", "--shape", "small"], 2), (["decode", "{folder}", "--scheme", "w4a8"], 2), (["dance"], 2),
        (["prefill", "{folder}/nothing"], 4), (["decode", "--scheme", "w4a8", "--group-size", "256"], 2),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, arguments: list[str], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is measured."""
    monkeypatch.setattr("mxconv.bench.report.measure_ceilings", lambda *_, **__: pytest.fail("measured"))
    if torch.cuda.is_available() and "cuda" in arguments:
        pytest.skip("there is a CUDA device")
    folder = make_checkpoint(tmp_path)
    result = CliRunner().invoke(cli, ["bench", *(word.format(folder=folder) for word in arguments)])
    assert result.exit_code == code, result.output


SAYS_SOMETHING = {
    "--tp 2": "decode prefill moe of a folder", "--dtype bfloat16": "decode prefill moe", "--slots 2": "decode",
    "--context 8": "decode", "--steps 2": "decode", "--tokens 9": "prefill", "--shape small": "decode prefill moe quantize of none",
    "--scheme w4afp8": "decode prefill moe quantize of none",
    "--scheme w4afp8 --group-size 256": "decode prefill moe quantize of none",
    "--group-size 256": "", "": "decode prefill moe quantize",
}  # fmt: skip
"""What each option is for: of a folder's model, of none, or of both."""


@pytest.mark.parametrize("of", ["a folder", "none"])
@pytest.mark.parametrize("what", ["decode", "prefill", "moe", "quantize"])
def test_what_is_given_is_honoured_or_refused(
    tmp_path: Path, what: str, of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Options] = []
    monkeypatch.setattr("mxconv.bench.report.run", lambda asked, console: seen.append(asked))
    folder = [str(make_checkpoint(tmp_path))] if of == "a folder" else []
    for option, subjects in SAYS_SOMETHING.items():
        seen.clear()
        result = CliRunner().invoke(cli, ["bench", what, *folder, *option.split()])
        named = subjects.partition(" of ")
        fits = what in named[0].split() and named[2] in ("", of) and not (folder and what == "quantize")
        assert result.exit_code == (0 if fits else 2), (option, result.output)
        if fits:
            for word, value in zip(option.split()[::2], option.split()[1::2], strict=True):
                got = getattr(seen[0], word.removeprefix("--").replace("-", "_"))
                assert str(got).removeprefix("torch.") == value
        else:
            assert "FOLDER" in result.output or option.split()[-2] in result.output, result.output
            assert "expected" in result.output or "hint" in result.output


def test_settings_from_elsewhere_are_no_conflict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are for what has a use for them: a scheme and its groups for synthetic weights, ranks for a folder."""
    seen: list[Options] = []
    monkeypatch.setattr("mxconv.bench.report.run", lambda asked, console: seen.append(asked))
    monkeypatch.setenv("MXCONV_SCHEME", "w4afp8")
    monkeypatch.setenv("MXCONV_TP", "2")
    folder = str(make_checkpoint(tmp_path))
    settings = tmp_path / "mxconv.toml"
    settings.write_text("group_size = 256\n")
    for arguments in (["decode", folder], ["decode"], ["quantize", "--group-size", "512"]):
        result = CliRunner().invoke(cli, ["bench", *arguments, "--config", str(settings)])
        assert result.exit_code == 0, result.output
    of_folder, synthetic, quantizer = seen
    assert of_folder.scheme is None and of_folder.tp == 2
    assert (synthetic.scheme, synthetic.group_size) == ("w4afp8", 256) and quantizer.group_size == 512
