"""The bounds of weights: no right encoding of any weights exceeds them, one wrong code does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxconv.quantize import reference
from mxconv.quantize.schemes import SCHEMES, Scheme, get_scheme
from mxconv.runtime.coded import PROJECTION, Coded
from mxconv.verify import bounds
from mxconv.verify.limits import Limits
from mxconv.verify.numerics import Judge, equal_finding, row_words, tile_words

NAMES = ("w.quant_weight", "w.weight_scale", "w.activation_scale")
SCHEME_LIST = [
    *SCHEMES.values(), get_scheme("w4afp8_static", group_size="channel"), get_scheme("w4afp8", group_size=256, hadamard_block=256),
]  # fmt: skip


def stored(weight: Tensor, scheme: Scheme, name: str) -> Coded:
    """`weight` encoded by the converter's reference, as the runtime reads it."""
    coded = reference.encode(weight, scheme, PROJECTION[name])
    scale = {"in,out": coded.scale.t(), "out,in": coded.scale, "out": coded.scale, "one": coded.scale}[scheme.scale_orientation]
    return Coded(codes=coded.codes, weight_scale=scale.contiguous(), activation_scale=None)


def judge(scheme: Scheme, method: str = "rtn") -> Judge:
    return Judge(scheme=scheme, method=method, limits=Limits(scheme=scheme.name, overrides={}), device=torch.device("cpu"))


def draw(kind: str, rows: int, columns: int, seed: int) -> Tensor:
    """Weights of many distributions: what averages assume does not hold in most of them."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=g)
    kinds: dict[str, Callable[[], Tensor]] = {
        "gaussian": lambda: normal * 0.02,
        "heavy tails": lambda: normal.pow(5) * 1e-3,
        "an outlier a row": lambda: torch.where(torch.arange(columns) == 5, 30.0, normal * 0.01),
        "ternary": lambda: normal.sign() * (normal.abs() > 0.5),
        "half steps": lambda: (torch.randint(-6, 7, (rows, columns), generator=g) + 0.5) / 7,
        "zeros": lambda: torch.zeros(rows, columns),
        "zeros in groups": lambda: torch.cat((normal[:, : columns // 2], torch.zeros(rows, columns - columns // 2)), 1),
        "tiny": lambda: normal * 1e-30,
        "huge": lambda: normal * 1e30,
        "constant": lambda: torch.full((rows, columns), 0.37),
    }
    return kinds[kind]().to(torch.bfloat16)


KINDS = (
    "gaussian", "heavy tails", "an outlier a row", "ternary", "half steps", "zeros", "zeros in groups", "tiny", "huge", "constant",
)  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEME_LIST, ids=lambda s: f"{s.name}-{s.granularity}-{s.group_size}")
@pytest.mark.parametrize("name", ["up_gate", "down"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_right_encoding_is_ever_named(scheme: Scheme, name: str, kind: str) -> None:
    weight = draw(kind, 256, 512, seed=1)
    right = judge(scheme)
    deviation, findings = right.weight(stored(weight, scheme, name), weight, right.tiles(weight, name), name, NAMES, 0)
    assert not findings, [finding.render() for finding in findings]
    assert deviation.peak <= 1.001


@settings(max_examples=60, deadline=None)
@given(
    scheme=st.sampled_from(SCHEME_LIST), name=st.sampled_from(["up_gate", "down"]), seed=st.integers(0, 10**6),
    at=st.tuples(st.integers(0, 255), st.integers(0, 511)), step=st.sampled_from([-1, 1]),
)  # fmt: skip
def test_one_code_one_step_off_is_named_with_its_block(
    scheme: Scheme, name: str, seed: int, at: tuple[int, int], step: int
) -> None:
    weight = draw("gaussian", 256, 512, seed)
    coded = stored(weight, scheme, name)
    old = int(coded.codes[at])
    # e4m3 bytes count up by magnitude; a step across zero or the end of the range is another kind of mistake
    if scheme.weight == "int4":
        new = old + step if abs(old + step) <= 7 else old - step
    else:
        magnitude = old & 127
        new = old + (step if 8 < magnitude < 120 else 1 if magnitude <= 8 else -1)
    coded.codes[at] = new if new < 128 else new - 256
    wrong = judge(scheme)
    _, findings = wrong.weight(coded, weight, wrong.tiles(weight, name), name, NAMES, 3)
    # A tie may go either way: the neighbour code then is as near.
    if findings:
        (finding,) = findings
        assert finding.check == "weight rounding" and finding.rank == 3 and finding.tensor == NAMES[0]
        assert f"inputs {at[1] // 128 * 128}-" in (finding.place or "")
    else:
        assert _near_tie(weight, scheme, name, at)


def _near_tie(weight: Tensor, scheme: Scheme, name: str, at: tuple[int, int]) -> bool:
    """Whether a neighbouring code is as near as rounding may leave it.

    The element lies in the middle between two codes, or just above a power of two, below which e4m3 codes lie half as far apart,
    or all of it is below the noise of a rotation.
    """
    block = scheme.rotation[PROJECTION[name]]
    u = bounds.rotated(weight.float(), block)
    tiles = bounds.absmax(u, scheme)
    runs = bounds.runs(u, tiles)
    half = bounds.half_steps(runs, bounds.spread(tiles, scheme, len(u)), scheme).expand_as(runs).flatten(1)[at]
    decoded = reference.decode(reference.encode(weight, scheme, PROJECTION[name]), scheme, PROJECTION[name])
    error = (bounds.rotated(decoded, block) - u).abs()[at]
    x = u[at].abs() / half
    above_power = scheme.weight == "e4m3" and bool(16 <= x < 16.1)
    return bool(error > 0.95 * half) or above_power or bool(half < 4 * bounds.ROTATION_NOISE * u.abs().max())


@pytest.mark.parametrize("scheme", SCHEME_LIST, ids=lambda s: f"{s.name}-{s.granularity}-{s.group_size}")
def test_bounds_are_reached(scheme: Scheme) -> None:
    """Half a step is not only never exceeded: Gaussian weights come within one per cent of it, so that no slack hides a mistake."""
    weight = draw("gaussian", 512, 512, seed=2)
    right = judge(scheme)
    deviation, _ = right.weight(stored(weight, scheme, "up_gate"), weight, right.tiles(weight, "up_gate"), "up_gate", NAMES, 0)
    assert deviation.peak > 0.99
    expected = {"group": 0.117, "channel": 0.13, "block": 0.0265, "tensor": 0.0265}[scheme.granularity]
    assert deviation.rel_rms == pytest.approx(expected, rel=0.08)
    assert 0.4 < deviation.rel_rms / deviation.bound < 0.6


@pytest.mark.parametrize("factor", [1 + 3e-5, 0.98, 2.0, 0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", [SCHEMES["w4afp8"], SCHEMES["block_wise_fp8"], SCHEMES["tensor_wise_fp8"]], ids=lambda s: s.name)
def test_one_wrong_scale_is_named(scheme: Scheme, factor: float) -> None:
    weight = draw("gaussian", 256, 512, seed=3)
    coded = stored(weight, scheme, "down")
    coded.weight_scale.view(-1)[-1] *= factor
    wrong = judge(scheme)
    _, findings = wrong.weight(coded, weight, wrong.tiles(weight, "down"), "down", NAMES, 1)
    assert "weight scale" in {finding.check for finding in findings}


def test_chunks_of_rows_see_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = draw("heavy tails", 640, 512, seed=4)
    for scheme in SCHEME_LIST:
        coded = stored(weight, scheme, "up_gate")
        coded.codes[300, 7] = 3 if int(coded.codes[300, 7]) != 3 else 6
        whole = judge(scheme)
        one = whole.weight(coded, weight, whole.tiles(weight, "up_gate"), "up_gate", NAMES, 0)
        with monkeypatch.context() as patch:
            patch.setattr("mxconv.verify.numerics.CHUNK_ELEMENTS", 128 * 512)
            many = whole.weight(coded, weight, whole.tiles(weight, "up_gate"), "up_gate", NAMES, 0)
        assert one[0].rel_rms == pytest.approx(many[0].rel_rms, rel=1e-5)
        assert [finding.place for finding in one[1]] == [finding.place for finding in many[1]]


class TestOtherMethods:
    """Codes that were not rounded to nearest are judged by rms errors."""

    scheme = SCHEMES["w4afp8"]

    def coded(self, weight: Tensor) -> Coded:
        """Clipped scales, and a fifth of the codes moved one step in the direction of the source: more noise, no mistake."""
        coded = stored(weight, self.scheme, "up_gate")
        moved = torch.rand(coded.codes.shape, generator=torch.Generator().manual_seed(0)) < 0.2
        codes = torch.where(moved, coded.codes + weight.sign().to(torch.int8), coded.codes).clamp(-7, 7)
        return Coded(codes=codes, weight_scale=coded.weight_scale * 0.95, activation_scale=None)

    def test_more_noise_passes(self) -> None:
        weight = draw("gaussian", 256, 512, seed=5)
        coded = self.coded(weight)
        for method, passes in (("rtn", False), ("gptq", True)):
            other = judge(self.scheme, method)
            _, findings = other.weight(coded, weight, other.tiles(weight, "up_gate"), "up_gate", NAMES, 0)
            assert (not findings) == passes, method

    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            (lambda codes: codes.roll(1, 0), ""),
            (lambda codes: codes[:, :128].mul_(-1), "gate rows 0-127 × inputs 0-127"),
            (lambda codes: codes[200].neg_(), "up row 72"),
        ],
        ids=["rows moved", "block negated", "row negated"],
    )
    def test_mistakes_are_named(self, spoil: Callable[[Tensor], Tensor | None], words: str) -> None:
        weight = draw("gaussian", 256, 512, seed=5)
        coded = self.coded(weight)
        codes = coded.codes.clone()
        changed = spoil(codes[:128] if words.startswith("gate") else codes)
        coded = Coded(codes=codes if words else changed, weight_scale=coded.weight_scale, activation_scale=None)  # type: ignore[arg-type]
        other = judge(self.scheme, "gptq")
        _, (finding,) = other.weight(coded, weight, other.tiles(weight, "up_gate"), "up_gate", NAMES, 0)
        assert finding.check == "weight noise" and (finding.place or "").startswith(words)


class TestEqual:
    def test_bits_decide(self) -> None:
        a = torch.randn(6, 4).to(torch.bfloat16)
        assert equal_finding(a, a.clone(), widened=False, tensor="t", rank=0) is None
        zero = torch.zeros(3)
        assert equal_finding(zero, -zero, widened=False, tensor="t", rank=0) is not None
        nan = torch.full((3,), torch.nan)
        assert equal_finding(nan, nan.clone(), widened=False, tensor="t", rank=0) is None

    def test_a_router_may_be_wider(self) -> None:
        a = torch.randn(6, 4).to(torch.bfloat16)
        assert equal_finding(a.float(), a, widened=True, tensor="t", rank=0) is None
        narrow = equal_finding(a.float(), a, widened=False, tensor="t", rank=0)
        assert narrow is not None and "dtype" in narrow.what
        assert equal_finding(a, a.float(), widened=True, tensor="t", rank=0) is not None
        assert equal_finding(a.float() * (1 + 1e-6), a, widened=True, tensor="t", rank=0) is not None

    def test_rows_are_named(self) -> None:
        a = torch.randn(9, 4)
        b = a.clone()
        b[3, 1] += 1
        found = equal_finding(b, a, widened=False, tensor="t", rank=2, place="q")
        assert found is not None and found.place == "q: row 3" and found.rank == 2 and found.got == "differences up to 1"


def test_words() -> None:
    assert row_words(0, 128, 512, "up_gate") == "gate rows 0-127"
    assert row_words(256, 384, 512, "experts.3.up_gate") == "up rows 0-127"
    assert row_words(5, 6, 512, "down") == "row 5"
    hit = torch.zeros(4, 4, dtype=torch.bool)
    hit[1, 2] = True
    assert tile_words(hit, 512, "down") == "rows 128-255 × inputs 256-383"
    hit[:3] = True
    assert tile_words(hit, 512, "down") == "12 of 16 blocks of 128 × 128"
