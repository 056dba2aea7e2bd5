"""The scheme table: what each quantization scheme stores and how its consumer computes with it.

A scheme is a value: weight code × granularity × activation rule × rotation. Everything that differs between schemes
is a field here, so that a new scheme is a new row. Facts: formats.md §2 (FastDeploy's own loading and MoE code).

Conventions. `scale` multiplies codes into weights: int4 w = q·scale/7, e4m3 w = q·scale. A rotation of b is the unnormalised
natural-order Walsh-Hadamard matrix H_b, block-diagonal along the input axis, applied to the *activation* by the consumer
(x → H_b·x); decoding a weight therefore ends with w = H_b·(decoded codes). b = 0 means no rotation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from mxconv.errors import MalformedInput, UsageError

WeightCode = Literal["int4", "e4m3"]
Granularity = Literal["group", "channel", "block", "tensor"]
ActivationCode = Literal["int8", "e4m3"]
ActivationScale = Literal["static", "token", "token_group"]

INT4_MAX = 7
E4M3_MAX = 448.0
FP8_BLOCK = 128
HADAMARD_BLOCKS = (128, 256, 512, 1024)
PROJECTIONS = ("up_gate_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationRule:
    """How the consumer quantizes the input of an expert GEMM (after the rotation, when there is one).

    `static`: one stored `activation_scale`; `token`: absmax of each token; `token_group`: of each token's runs of 128.
    x ≈ xq·a with a = absmax/`divisor`, round half to even, clamped to ±`code_max`.
    """

    code: ActivationCode
    scale: ActivationScale
    divisor: float
    code_max: float
    stored_divided: bool = False
    """The stored activation_scale is absmax/divisor itself (tensor_wise_fp8) and not absmax."""
    rint_down_input: bool = False
    """The down_proj input is rounded to an integer before the e4m3 cast (w4afp8_static)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One row of the table. `group_size` counts input elements that share a scale; None where `granularity` says it all."""

    name: str
    weight: WeightCode
    granularity: Granularity
    group_size: int | None
    activation: ActivationRule
    rotation: Mapping[str, int]
    """Projection (`up_gate_proj`, `down_proj`) → Hadamard block b, 0 for none."""
    scale_orientation: Literal["in,out", "out,in", "out", "one"]
    """Axes of the stored `weight_scale`."""
    quant_type: str
    """`moe_quant_type` of quantization_config: the consumer tells static and dynamic w4afp8 apart by another key."""
    is_permuted: bool
    dynamic_flag: bool | None
    """`moe_dynamic_quant` of quantization_config; None leaves the key out."""
    summary: str

    @property
    def static(self) -> bool:
        """The scheme stores activation scales and so needs calibration statistics."""
        return self.activation.scale == "static"

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included (channel and tensor scales rounded away)."""
        code_bits = 4.0 if self.weight == "int4" else 8.0
        scale_bits = {"group": 32 / (self.group_size or 1), "block": 32 / FP8_BLOCK**2, "channel": 0.0, "tensor": 0.0}
        return code_bits + scale_bits[self.granularity]

    def block(self) -> dict[str, Any]:
        """The fields that an artifact's `mxconv` config block records; `scheme_from_block` reads them back."""
        return {
            "scheme": self.name,
            "granularity": self.granularity,
            "group_size": self.group_size,
            "rotation": dict(self.rotation),
            "rotation_words": rotation_words(self.rotation),
            "summary": self.summary,
        }


def rotation_words(rotation: Mapping[str, int]) -> str:
    """The rotation as a sentence for people who read config.json."""
    parts = [
        f"the input of {name} is multiplied by the unnormalised natural-order Sylvester Hadamard matrix H_{b}, block-diagonal"
        for name, b in rotation.items()
        if b
    ]
    return "; ".join(parts) if parts else "none"


def _rotation(up_gate: int, down: int) -> Mapping[str, int]:
    return MappingProxyType({"up_gate_proj": up_gate, "down_proj": down})


_INT8_STATIC = ActivationRule(code="int8", scale="static", divisor=127.0, code_max=127.0)
_E4M3_STATIC = ActivationRule(code="e4m3", scale="static", divisor=E4M3_MAX, code_max=E4M3_MAX, rint_down_input=True)
_E4M3_TOKEN = ActivationRule(code="e4m3", scale="token", divisor=440.0, code_max=E4M3_MAX)
_E4M3_TENSOR = ActivationRule(code="e4m3", scale="static", divisor=E4M3_MAX, code_max=E4M3_MAX, stored_divided=True)
_E4M3_TOKEN_GROUP = ActivationRule(code="e4m3", scale="token_group", divisor=E4M3_MAX, code_max=E4M3_MAX)

SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        scheme.name: scheme
        for scheme in (
            Scheme(
                name="w4afp8", weight="int4", granularity="group", group_size=128, activation=_E4M3_TOKEN,
                rotation=_rotation(0, 128), scale_orientation="out,in", quant_type="w4afp8", is_permuted=False, dynamic_flag=True,
                summary="int4 weights in groups of 128 inputs, e4m3 activations scaled per token",
            ),
            Scheme(
                name="w4afp8_static", weight="int4", granularity="group", group_size=128, activation=_E4M3_STATIC,
                rotation=_rotation(0, 128), scale_orientation="in,out", quant_type="w4afp8", is_permuted=False, dynamic_flag=False,
                summary="int4 weights in groups of 128 inputs, e4m3 activations with one calibrated scale",
            ),
            Scheme(
                name="w4a8", weight="int4", granularity="channel", group_size=None, activation=_INT8_STATIC,
                rotation=_rotation(0, 128), scale_orientation="out", quant_type="w4a8", is_permuted=False, dynamic_flag=False,
                summary="int4 weights per output channel, int8 activations with one calibrated scale",
            ),
            Scheme(
                name="block_wise_fp8", weight="e4m3", granularity="block", group_size=None, activation=_E4M3_TOKEN_GROUP,
                rotation=_rotation(0, 0), scale_orientation="in,out", quant_type="block_wise_fp8", is_permuted=True,
                dynamic_flag=None,
                summary="e4m3 weights in blocks of 128×128, e4m3 activations scaled per token and 128 inputs",
            ),
            Scheme(
                name="tensor_wise_fp8", weight="e4m3", granularity="tensor", group_size=None, activation=_E4M3_TENSOR,
                rotation=_rotation(32, 32), scale_orientation="one", quant_type="tensor_wise_fp8", is_permuted=True,
                dynamic_flag=False,
                summary="e4m3 weights with one scale a tensor, e4m3 activations with one calibrated scale",
            ),
        )
    }
)  # fmt: skip
DEFAULT_SCHEME = "w4afp8"


def get_scheme(name: str, *, group_size: int | Literal["channel"] | None = None, hadamard_block: int | None = None) -> Scheme:
    """The scheme `name`, with another group size or Hadamard block where it has one.

    `group_size`: a multiple of 128 for the grouped int4 schemes, or "channel" for w4afp8_static.
    `hadamard_block`: 128, 256, 512 or 1024 for the int4 schemes. Raises UsageError for anything else.
    """
    scheme = SCHEMES.get(name)
    if scheme is None:
        raise UsageError(f"unknown scheme {name!r}", expected=" or ".join(SCHEMES))
    if group_size is not None and group_size != (scheme.group_size or scheme.granularity):
        if group_size == "channel" and name == "w4afp8_static":
            scheme = replace(
                scheme, granularity="channel", group_size=None, scale_orientation="out",
                summary="int4 weights per output channel, e4m3 activations with one calibrated scale",
            )  # fmt: skip
        elif scheme.granularity == "group" and isinstance(group_size, int) and group_size > 0 and group_size % 128 == 0:
            scheme = replace(
                scheme, group_size=group_size, summary=scheme.summary.replace("groups of 128", f"groups of {group_size}")
            )
        else:
            allowed = {"w4afp8": "a multiple of 128", "w4afp8_static": "a multiple of 128, or channel"}.get(
                name, "none for this scheme"
            )
            raise UsageError(f"scheme {name} has no group size {group_size}", expected=allowed)
    if hadamard_block is not None and hadamard_block != scheme.rotation["down_proj"]:
        if scheme.weight != "int4" or hadamard_block not in HADAMARD_BLOCKS:
            allowed = " or ".join(map(str, HADAMARD_BLOCKS)) if scheme.weight == "int4" else "none for this scheme"
            raise UsageError(f"scheme {name} has no Hadamard block {hadamard_block}", expected=allowed)
        scheme = replace(scheme, rotation=_rotation(0, hadamard_block))
    return scheme


def scheme_from_block(block: Mapping[str, Any], where: str) -> Scheme | None:
    """The Scheme that an artifact's `mxconv` config block names; None for an unquantized artifact.

    Raises MalformedInput when the block names no scheme of the table or contradicts it.
    """
    name = block.get("scheme")
    if name is None:
        return None
    group = block.get("group_size")
    if block.get("granularity") == "channel" and isinstance(name, str) and name in SCHEMES and SCHEMES[name].granularity == "group":
        group = "channel"
    rotation = block.get("rotation")
    try:
        if not isinstance(name, str) or not isinstance(rotation, Mapping) or set(rotation) != set(PROJECTIONS):
            raise UsageError("scheme or rotation is not as mxconv writes it")
        b = rotation["down_proj"] if SCHEMES.get(name, SCHEMES[DEFAULT_SCHEME]).weight == "int4" else None
        scheme = get_scheme(name, group_size=group, hadamard_block=b)
    except UsageError as error:
        raise MalformedInput(f"mxconv block: {error.what}", where=where, expected=error.expected, got=error.got) from None
    stated = {key: block.get(key) for key in ("granularity", "group_size", "rotation")}
    meant = {key: scheme.block()[key] for key in stated}
    if stated != meant:
        raise MalformedInput("mxconv block contradicts its scheme", where=where, expected=meant, got=stated)
    return scheme
