"""The schemes that the tests run over: every row of the table and its variants."""

from __future__ import annotations

from mxconv.quantize.schemes import PROJECTIONS, SCHEMES, Scheme, get_scheme

VARIANTS: dict[str, Scheme] = {
    **SCHEMES,
    "w4afp8_g256": get_scheme("w4afp8", group_size=256),
    "w4afp8_b256": get_scheme("w4afp8", hadamard_block=256),
    "w4afp8_static_channel": get_scheme("w4afp8_static", group_size="channel"),
    "w4a8_b512": get_scheme("w4a8", hadamard_block=512),
}
CASES = [(scheme, projection) for scheme in VARIANTS.values() for projection in PROJECTIONS]
CASE_NAMES = [f"{name}-{projection}" for name in VARIANTS for projection in PROJECTIONS]
