"""What the consumers of the `fastdeploy` layout demand of config.json (formats.md §2), stated once more as a table of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mxconv.quantize.schemes import Scheme
from mxconv.verify.findings import Finding

CHECK = "consumer config"

# Scheme → (moe_quant_type, moe_dynamic_quant, is_permuted); None: the key is absent.
QUANTIZATION: Mapping[str, tuple[str, bool | None, bool]] = {
    "w4a8": ("w4a8", False, False),
    "w4afp8": ("w4afp8", True, False),
    "w4afp8_static": ("w4afp8", False, False),
    "tensor_wise_fp8": ("tensor_wise_fp8", False, True),
    "block_wise_fp8": ("block_wise_fp8", None, True),
}
_ABSENT = object()


def fastdeploy_rules(config: Mapping[str, Any], scheme: Scheme | None) -> Iterator[Finding]:
    """Keys of config.json that this consumer would misread."""
    rules: dict[str, tuple[object, str]] = {
        "dtype": ("bfloat16", "the consumer reads the dtype under this key"),
        "torch_dtype": (_ABSENT, "the consumer must not meet the older spelling of dtype"),
        "transformers_version": (_ABSENT, "above 4.56.0 it makes the consumer expect another file format"),
        "norm_topk_prob": (True, "the consumer renormalises the router's weights only then"),
        "moe_num_experts": (config.get("num_local_experts", 1), "the consumer reads the number of experts under this key"),
        "is_quantized": (_ABSENT if scheme is None else True, "a consumer that meets it without quantization_config fails"),
    }
    for key, (wanted, reason) in rules.items():
        yield from _rule(config, key, wanted, reason)
    if scheme is None:
        yield from _rule(config, "quantization_config", _ABSENT, "the weights are not quantized")
        return
    stated = config.get("quantization_config")
    if not isinstance(stated, Mapping):
        yield Finding(check=CHECK, what="quantized experts need it", key="quantization_config", got=repr(stated))
        return
    kind, dynamic, permuted = QUANTIZATION[scheme.name]
    block = max(scheme.rotation.values())
    fields: dict[str, object] = {
        "quantization": "mix_quant", "moe_quant_type": kind, "moe_dynamic_quant": _ABSENT if dynamic is None else dynamic,
        "hadamard_block_size": block or _ABSENT, "is_permuted": permuted,
    }  # fmt: skip
    for key, wanted in fields.items():
        yield from _rule(stated, key, wanted, f"scheme {scheme.name} is loaded by it", "quantization_config.")


def consumer_warnings(block: Mapping[str, Any]) -> Iterator[str]:
    """What this consumer does otherwise than the runtime, for an artifact with this `mxconv` block."""
    if block.get("layout") != "fastdeploy":
        return
    if block.get("slopes"):
        yield "decay rates are kept in the mxconv block, which the consumer of this layout ignores: it would serve another model"
    if block.get("ignored_layers"):
        kept = block["ignored_layers"]
        yield f"layers {kept} keep their experts unquantized; the consumer of this layout does not load such a mixture"


def _rule(values: Mapping[str, Any], key: str, wanted: object, reason: str, prefix: str = "") -> Iterator[Finding]:
    found = values.get(key, _ABSENT)
    if found is wanted or (found == wanted and type(found) is type(wanted)):
        return
    words = ["absent" if value is _ABSENT else repr(value) for value in (wanted, found)]
    yield Finding(check=CHECK, what=reason, key=prefix + key, expected=words[0], got=words[1])
