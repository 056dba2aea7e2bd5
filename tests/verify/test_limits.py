"""Limits: by name, by scheme, overridden; what follows the source's own noise."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mxconv.errors import UsageError
from mxconv.quantize.schemes import SCHEMES
from mxconv.verify import LIMITS, Options
from mxconv.verify.limits import Limits

DOCS = Path(__file__).resolve().parents[2] / "docs" / "verify.md"


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_every_limit_has_a_value_and_a_reason_for_every_scheme(scheme: str | None) -> None:
    limits = Limits(scheme=scheme, overrides={})
    assert limits.document().keys() == LIMITS.keys()
    assert all(math.isfinite(value) and value >= 0 for value in limits.document().values())
    assert all(len(limit.reason) > 40 for limit in LIMITS.values())


def test_an_override_wins_and_an_unknown_name_is_refused() -> None:
    assert Limits(scheme="w4a8", overrides={"scale": 0.5})["scale"] == 0.5
    with pytest.raises(UsageError, match="kl_men") as caught:
        Limits(scheme="w4a8", overrides={"kl_men": 0.5})
    assert caught.value.exit_code == 2 and "kl_mean" in str(caught.value)


def test_kl_follows_the_floor_unless_one_is_asked_for() -> None:
    plain = Limits(scheme="w4afp8", overrides={})
    assert plain.kl(None) == plain.kl(1e-5) == plain["kl_mean"]
    assert plain.kl(0.02) == pytest.approx(2.0)
    assert plain.kl(float("nan")) == plain.kl(float("inf")) == plain["kl_mean"]
    assert Limits(scheme="w4afp8", overrides={"kl_mean": 0.03}).kl(0.02) == 0.03
    assert Limits(scheme="w4afp8", overrides={"kl_mean": 0.03, "kl_floor_factor": 10}).kl(0.02) == pytest.approx(0.2)
    assert Limits(scheme=None, overrides={}).kl(5e-5) == 1e-6


def test_summation_order_follows_the_floor() -> None:
    plain = Limits(scheme=None, overrides={})
    for name in ("parallel_l2", "exact_l2"):
        assert plain.l2(name, None) == plain.l2(name, 0.01) == plain.l2(name, float("nan")) == 2e-6
        assert plain.l2(name, 0.3) == pytest.approx(0.3 / 16384)
        assert Limits(scheme=None, overrides={name: 1e-7}).l2(name, 0.3) == 1e-7


@pytest.mark.parametrize(
    "wrong",
    [
        {"windows": 0}, {"window": 1}, {"text": "a", "tokens": "b", "source": "s"}, {"reference": "r"}, {"sections": ("logit",)},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(wrong: dict) -> None:
    with pytest.raises(UsageError):
        Options(**wrong)


def test_paths_may_be_texts() -> None:
    assert Options(source="a", tokens="b").source == Path("a")  # type: ignore[arg-type]


def test_the_documentation_has_every_limit() -> None:
    text = DOCS.read_text(encoding="utf-8")
    missing = [name for name in LIMITS if f"`{name}`" not in text]
    assert not missing
