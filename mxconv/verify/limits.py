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


LIMITS: Mapping[str, Limit] = MappingProxyType(
    {
        limit.name: limit
        for limit in (
            Limit(
                name="rounding", value=1.0,
                reason="largest distance of a weight from its source, in units of half a step of its code: rounding to nearest never "
                "exceeds 1, whatever the weights are",
            ),
            Limit(
                name="scale", value=1e-5,
                reason="relative difference of a weight_scale from the absmax of its source: a float32 rotation and division away",
            ),
            Limit(
                name="noise", value=1.5,
                reason="rms error of a tensor in units of its rms half step, for methods that do not round to nearest: those reach .58 "
                "(int4) and .42 (e4m3), a method that moves errors between weights up to twice that; an exchanged tensor 5 and more",
            ),
            Limit(
                name="noise_local", value=3.0,
                reason="the same for every row, column and block of 128 × 128: fewer weights to average over; a doubled block reaches 5",
            ),
            Limit(
                name="activation_factor", value=1.25,
                reason="activation_scale against an absmax gathered again on the same tokens: nearly invisible in logits, so it is "
                "compared itself; another device or summation order moves an absmax by far less",
            ),
            Limit(
                name="exact_l2", value=2e-6,
                reason="relative L2 of float32 logits of unquantized weights: right forwards agree to 2–4e-7, the smallest mistakes in "
                "the model's constants give 3e-7 to 1.5e-5",
            ),
            Limit(
                name="parallel_l2", value=2e-6,
                reason="logits of TP n against TP 1 with activations unquantized: summation order alone, 2–3e-7",
            ),
            Limit(
                name="parallel_kl_share", value=0.25,
                reason="KL between TP n and TP 1 with activations quantized, as a share of the scheme's own KL: other summation orders "
                "flip roundings, and w4afp8 scales each rank's slice on its own (.11–.15 on trained models)",
            ),
            Limit(
                name="kl_mean",
                value=MappingProxyType(
                    {
                        EXACT: 1e-6, "w4afp8": 0.15, "w4afp8_static": 0.15, "w4a8": 0.15,
                        "block_wise_fp8": 0.02, "tensor_wise_fp8": 0.02,
                    }
                ),
                reason="mean KL of the source's next-token distribution against the artifact's as served",
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

    def document(self) -> dict[str, float]:
        """Name → value."""
        return {name: self[name] for name in LIMITS}
