"""Every limit that verify holds an artifact to: its value, and why it is that value. All can be overridden by name.

Two kinds. Bounds that follow from the format, which a right artifact never exceeds, whatever its weights (`rounding`, `scale`).
And bars between what right artifacts were measured to reach and what wrong ones do; docs/verify.md has the measurements.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mxconv.errors import UsageError, raise_all
from mxconv.quantize.schemes import SCHEMES

FLOAT32_SHARE = 2.0**-14
"""A model that amplifies rounding does so in both dtypes: float32 has 16 more bits than bfloat16; two of them are given away."""
EXACT = "none"
"""Key of an unquantized artifact (`convert`) in limits that depend on the scheme."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One row: a value, or one for each scheme."""

    name: str
    value: float | Mapping[str, float]
    reason: str

    def of(self, scheme: str | None) -> float:
        """The value for `scheme`."""
        return self.value[scheme or EXACT] if isinstance(self.value, Mapping) else self.value


def _by_scheme(*, exact: float, int4: float, fp8: float) -> Mapping[str, float]:
    codes = {"int4": int4, "e4m3": fp8}
    return MappingProxyType({EXACT: exact, **{name: codes[scheme.weight] for name, scheme in SCHEMES.items()}})


LIMITS: Mapping[str, Limit] = MappingProxyType(
    {
        limit.name: limit
        for limit in (
            Limit(
                name="rounding", value=1.0,
                reason="largest distance of a weight from its source, in units of half a step of its code: rounding to nearest "
                "never exceeds 1, whatever the weights are",
            ),
            Limit(
                name="scale", value=1e-5,
                reason="relative difference of a weight_scale from the absmax of its source: a float32 rotation and division "
                "away",
            ),
            Limit(
                name="noise", value=1.5,
                reason="rms error of a tensor in units of its rms half step, for methods that do not round to nearest: those "
                "reach .58, a method that moves errors between weights up to twice that; an exchanged "
                "tensor 5 and more",
            ),
            Limit(
                name="noise_local", value=3.0,
                reason="the same for every row, column and block of 128 × 128: fewer weights to average over; a doubled block "
                "reaches 5",
            ),
            Limit(
                name="activation_factor", value=1.25,
                reason="activation_scale against an absmax gathered again on the same tokens: nearly invisible in logits, so it "
                "is compared itself; another device or summation order moves an absmax by far less",
            ),
            Limit(
                name="exact_l2", value=2e-6,
                reason="relative L2 of float32 logits of unquantized weights: right forwards agree to 2–4e-7, the smallest "
                "mistakes in the model's constants give 3e-7 to 1.5e-5; where a model amplifies rounding more, 2^-14 of the L2 "
                "that bfloat16 makes of the source",
            ),
            Limit(
                name="parallel_l2", value=2e-6,
                reason="relative L2 of the logits of TP n against TP 1 with activations unquantized: summation order alone, "
                "2–3e-7; where a model amplifies rounding more, 2^-14 of the L2 that bfloat16 makes of the source",
            ),
            Limit(
                name="parallel_kl_share", value=0.25,
                reason="KL between TP n and TP 1 with activations quantized, as a share of the scheme's own KL: other summation "
                "orders flip roundings, and w4afp8 scales each rank's slice on its own (.07–.15)",
            ),
            Limit(
                name="kl_mean", value=_by_scheme(exact=1e-6, int4=0.1, fp8=0.01),
                reason="mean KL of the source's next-token distribution against the artifact's as served: three times what the "
                "most sensitive trained model reaches (int4 .034, fp8 .0036)",
            ),
            Limit(
                name="kl_floor_factor", value=_by_scheme(exact=0.01, int4=100.0, fp8=30.0),
                reason="or this many times the KL that bfloat16 alone makes of the source, where that is more: untrained models "
                "amplify every rounding, and their right artifacts reach 5–38 times (int4) and 2–12 times (fp8) of it",
            ),
            Limit(
                name="kl_uninformed_factor", value=_by_scheme(exact=0.01, int4=5000.0, fp8=1000.0),
                reason="the same where the source predicts nothing (perplexity above half its vocabulary: untrained, random ids): "
                "how far rounding carries there depends on the weights alone; right artifacts of one-expert models reach 670 "
                "times (int4) and 75 times (fp8)",
            ),
            Limit(
                name="layer_floor_factor", value=_by_scheme(exact=0.01, int4=30.0, fp8=10.0),
                reason="hidden-state error of a layer, in units of what bfloat16 makes of the source there: names the first bad "
                "layer of logits that fail, and gates nothing itself (right artifacts: 3e-5, 3–11, 1–4)",
            ),
            Limit(
                name="floor", value=0.01,
                reason="KL of bfloat16 against float32 of the source above which logits tell nothing about an artifact (trained "
                "models: 3–7e-4): the KL between TP sizes is then reported and not held to its limit",
            ),
        )
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of one run, for one scheme."""

    scheme: str | None
    overrides: Mapping[str, float]

    def __post_init__(self) -> None:
        problems = []
        for name in self.overrides:
            if name not in LIMITS:
                near = difflib.get_close_matches(name, LIMITS, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"limits: {', '.join(LIMITS)}"
                problems.append(UsageError(f"verify has no limit {name!r}", hint=hint))
        raise_all(problems)

    def __getitem__(self, name: str) -> float:
        return self.overrides[name] if name in self.overrides else LIMITS[name].of(self.scheme)

    def kl(self, floor: float | None, *, informed: bool = True) -> float:
        """The limit of the mean KL, given the KL of bfloat16 against float32 of the source; `informed`: the source predicts.

        Who asks for another `kl_mean` gets that, whatever the floor is, unless the factor is asked for as well.
        """
        factor = "kl_floor_factor" if informed else "kl_uninformed_factor"
        strict = "kl_mean" in self.overrides and factor not in self.overrides
        if strict or floor is None or not floor < float("inf"):
            return self["kl_mean"]
        return max(self["kl_mean"], self[factor] * floor)

    def l2(self, name: str, floor_l2: float | None) -> float:
        """The limit `name` of a relative L2 in float32, given that of bfloat16 against float32 of the source."""
        if name in self.overrides or floor_l2 is None or not floor_l2 < float("inf"):
            return self[name]
        return max(self[name], floor_l2 * FLOAT32_SHARE)

    def document(self) -> dict[str, float]:
        """Name → value."""
        return {name: self[name] for name in LIMITS}
